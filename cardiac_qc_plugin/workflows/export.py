"""A bundle as a zip that needs no plugin: what its configs use of this package becomes its own ``scripts`` package.

Only modules that the configs reach are taken along. A package's ``__init__.py`` keeps those of its imports whose
module is taken; so it must hold nothing but imports, ``__all__`` and constants, as those of this package do.
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from cardiac_qc_plugin.bundle import find_bundle
from cardiac_qc_plugin.checkpoints import files_beside, load_weights, read_threshold, sees_segmentation

from .files import file_sha256, read_json, write_file

__all__ = ["export"]

PACKAGE = __name__.partition(".")[0]
ROOT = Path(__file__).parents[1]
VENDORED = "scripts"
LARGE = 25_000_000  # bytes; the zoo takes no larger file
WEIGHTS = {".pt", ".ts", ".onnx"}
YAML = {".yaml", ".yml"}
OWN_ENTRIES = {"monai", "torch", "numpy"}  # metadata has an entry of its own for the version of each


def source_file(module: str) -> Path | None:
    """File of a module or package of the plugin by its dotted name, None where there is none."""
    path = ROOT.joinpath(*module.split(".")[1:])
    candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in candidates if file.is_file()), None)


def is_package(module: str) -> bool:
    """Whether a module of the plugin is a package."""
    return source_file(module).name == "__init__.py"


@cache
def read_source(module: str) -> tuple[str, ast.Module]:
    """Text and syntax tree of a module of the plugin."""
    text = source_file(module).read_text(encoding="utf-8")
    return text, ast.parse(text)


def imported_names(module: str, node: ast.stmt) -> dict[str, str]:
    """Full dotted names that a statement imports, by the names it gives them; none for other statements."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name: alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return {}
    package = module if is_package(module) else module.rpartition(".")[0]
    source = resolve_name("." * node.level + (node.module or ""), package)
    return {a.asname or a.name: source if a.name == "*" else f"{source}.{a.name}" for a in node.names}


@cache
def modules_of(name: str) -> set[str]:
    """Modules that hold what a dotted name stands for, through the imports of ``__init__.py``.

    A package as a whole stands for all that it imports.

    Raises:
        ValueError: if the plugin has nothing of that name.
    """
    parts = name.split(".")
    size = next(n for n in range(len(parts), 0, -1) if source_file(".".join(parts[:n])))
    module, rest = ".".join(parts[:size]), parts[size:]
    tree = read_source(module)[1]
    imports = {alias: full for node in tree.body for alias, full in imported_names(module, node).items()}
    nodes = list(ast.walk(tree))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if rest and rest[0] not in defined | set(imports):
        raise ValueError(f"{module} has no '{rest[0]}'.")
    if not is_package(module):
        return {module}
    followed = [full for alias, full in imports.items() if not rest or alias == rest[0]]
    return {module}.union(*(modules_of(full) for full in followed if full.split(".")[0] == PACKAGE))


def reachable(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Modules of the plugin that are needed for dotted names, and the top-level names of all others they import."""
    todo = set().union(*(modules_of(name) for name in names))
    done: set[str] = set()
    others: set[str] = set()
    while todo - done:
        module = (todo - done).pop()
        done.add(module)
        todo |= {module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)}  # the packages it lies in
        if is_package(module):
            continue  # of its imports only those are kept that are needed anyhow
        imports = {full for node in ast.walk(read_source(module)[1]) for full in imported_names(module, node).values()}
        own = {full for full in imports if full.split(".")[0] == PACKAGE}
        others |= {full.split(".")[0] for full in imports - own}
        todo |= set().union(*(modules_of(full) for full in own))
    return done, others - set(sys.stdlib_module_names)


def renamed(text: str) -> str:
    """Python source or config in which the plugin's modules are the vendored package's, in docstrings as well.

    The bare name in quotes stays: it is what files record as the origin of a result.
    """
    return re.sub(rf"\b{PACKAGE}(?=\.\w| import\b)|(?<=import ){PACKAGE}\b", VENDORED, text)


def trimmed(package: str, modules: set[str]) -> str:
    """Source of a package's ``__init__.py`` without the imports from modules that are not among ``modules``."""
    text, tree = read_source(package)
    lines = text.splitlines(keepends=True)
    dropped: set[str] = set()
    for node in reversed(tree.body):
        names = imported_names(package, node)
        own = [full for full in names.values() if full.startswith(f"{PACKAGE}.")]
        if not all(modules_of(full) <= modules for full in own):
            dropped |= set(names)
            lines[node.lineno - 1 : node.end_lineno] = []
    start = next((n for n, line in enumerate(lines) if line.startswith("__all__")), None)
    if not dropped or start is None:
        return "".join(lines)
    listed = ast.parse("".join(lines[start:])).body[0]
    kept = [name for name in ast.literal_eval(listed.value) if name not in dropped]
    lines[start : start + listed.end_lineno] = ["__all__ = [\n", *(f'    "{name}",\n' for name in kept), "]\n"]
    return "".join(lines)


def used_names(configs: dict[str, str]) -> set[str]:
    """Dotted names of the plugin in the texts of configs, JSON or YAML: targets, imports, expressions.

    Raises:
        ValueError: if the plugin does not have one of them; the message names the config.
    """
    dotted = rf"{PACKAGE}(?:\.\w+)*"
    names: set[str] = set()
    for file, text in configs.items():
        for source, imported, name in re.findall(rf"\bfrom ({dotted}) import ([\w ,]+)|\b({dotted})\b", text):
            found = {f"{source}.{item.split()[0]}" for item in imported.split(",")} if source else {name}
            try:
                reachable(found)
            except ValueError as error:
                raise ValueError(f"{file} names {', '.join(found)}, but {error}") from error
            names |= found
    return names


def vendor(configs: dict[str, str], siblings: dict[str, str]) -> tuple[dict[str, str], set[str]]:
    """The ``scripts`` package of a bundle.

    Args:
        configs: texts of its configs, by file.
        siblings: texts of the configs that another bundle may run. That happens in its own process, where only one
            package can be called ``scripts``: so if the bundle loads others, its package serves these as well.

    Returns:
        Sources by path below ``scripts``, and top-level names of the other packages that they import.
    """
    modules, others = reachable(used_names(configs))
    if f"{PACKAGE}.bundle" in modules:
        modules, others = reachable(used_names(configs | siblings))
    sources = {}
    for module in modules:
        text = trimmed(module, modules) if is_package(module) else read_source(module)[0]
        sources[source_file(module).relative_to(ROOT).as_posix()] = renamed(text)
    return sources, others


def standalone_metadata(metadata: dict[str, Any], imports: set[str]) -> dict[str, Any]:
    """Metadata that require, instead of the plugin, the packages that the vendored modules import."""
    required = dict(metadata["required_packages_version"])
    required = {name: pin for name, pin in required.items() if name.replace("-", "_") != PACKAGE}
    distributions = packages_distributions()
    for name in sorted(imports - OWN_ENTRIES):
        package = distributions[name][0]
        required.setdefault(package, version(package).partition("+")[0])
    return {**metadata, "required_packages_version": required}


def read_metadata(folder: Path) -> dict[str, Any]:
    """A bundle's metadata, whose version has to be in its changelog."""
    path = folder / "configs" / "metadata.json"
    metadata = read_json(path)
    if metadata["version"] not in metadata["changelog"]:
        raise ValueError(f"{path}: version {metadata['version']} is not in the changelog. Add what changed.")
    return metadata


def weight_files(folder: Path, weights: str | Path | None) -> dict[str, Path]:
    """What goes into ``models``, by path in the bundle; ``model.pt`` has to be there and fit the network."""
    found = [path for path in (folder / "models").glob("*") if path.suffix in WEIGHTS | {".json"}]
    files = {f"models/{path.name}": path for path in found}
    if weights is not None:
        files["models/model.pt"] = Path(weights)
        for own, given in zip(files_beside("models/model.pt"), files_beside(weights), strict=True):
            files.pop(own.as_posix(), None)
            files |= {own.as_posix(): given} if given.is_file() else {}
    elif "models/model.pt" not in files:
        raise ValueError(f"{folder}/models/model.pt: no such file. Train the bundle, or give weights with --weights.")
    config = ConfigParser()
    config.read_config(str(folder / "configs" / "inference.json"))
    config["ckpt_path"] = str(files["models/model.pt"])  # which tells a detector's number of channels
    load_weights(config.get_parsed_content("network_def"), files["models/model.pt"])
    if "read_threshold" in str(config.get("threshold")):
        read_threshold(files["models/model.pt"])  # it has to be there, too
    return files


def with_channels(text: str, weights: Path) -> str:
    """``train.json`` of a detector with the channels of the weights: ``monai.bundle.load`` makes the network of it."""
    return re.sub(r'(?<="see_segmentation": )(?:true|false)', json.dumps(sees_segmentation(weights)), text)


def write_zip(path: Path, files: dict[str, bytes | Path]) -> None:
    """Write a zip that depends on nothing but the files: in order of name, without dates and owners."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name in sorted(files):
                entry = zipfile.ZipInfo(name)  # 1980-01-01
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                stored = Path(name).suffix in WEIGHTS  # they hardly shrink
                entry.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
                content = files[name]
                archive.writestr(entry, content.read_bytes() if isinstance(content, Path) else content)

    write_file(path, write)


def write_assets(output: Path, stem: str, files: dict[str, Path], url: str) -> str:
    """Copy weights beside the zip as ``<stem>_<file>``; returns the ``large_files.yml`` that fetches them."""
    text = "large_files:\n"
    for name, path in sorted(files.items()):
        asset = f"{stem}_{Path(name).name}"
        write_file(output / asset, lambda temporary, path=path: temporary.write_bytes(path.read_bytes()))
        entry = {"url": f"{url.rstrip('/')}/{asset}", "hash_val": file_sha256(path), "hash_type": "sha256"}
        text += f'  - path: "{name}"\n' + "".join(f'    {key}: "{value}"\n' for key, value in entry.items())
    return text


def export(
    bundle: str,
    output: str | Path,
    bundle_dir: str | Path | None = None,
    weights: str | Path | None = None,
    weights_url: str | None = None,
) -> Path:
    """Write a bundle as ``<name>_v<version>.zip``, which runs without the plugin, as in MONAI's model zoo.

    Args:
        bundle: name of the bundle.
        output: folder for the zip.
        bundle_dir: folder of the bundles, instead of the repository's.
        weights: weights to ship as ``models/model.pt``, instead of the bundle's.
        weights_url: where weights above 25 MB will be published. They are written beside the zip, to be uploaded
            there, and ``large_files.yml`` says so; without it they are in the zip.

    Returns:
        The zip.

    Raises:
        ValueError: for a bundle that is not there, has no weights or others than its network's, whose version is not
            in its changelog, or whose configs name what the plugin does not have.
    """
    folder, output = find_bundle(bundle, bundle_dir), Path(output)
    metadata = read_metadata(folder)
    models = weight_files(folder, weights)
    paths = {name: folder / name for name in ("LICENSE", "docs/README.md", "docs/data_license.txt")}
    paths |= {f"configs/{path.name}": path for path in (folder / "configs").iterdir() if path.is_file()}
    missing = next((path for path in paths.values() if not path.is_file()), None)
    if missing:
        raise ValueError(f"{missing}: no such file. The zoo takes no bundle without it.")
    files: dict[str, bytes | Path] = {name: path.read_bytes().replace(b"\r\n", b"\n") for name, path in paths.items()}

    configs = {name: files[name].decode() for name in files if Path(name).suffix in {".json", *YAML}}
    del configs["configs/metadata.json"]
    configs["configs/train.json"] = with_channels(configs["configs/train.json"], models["models/model.pt"])
    siblings = {str(path): path.read_text() for path in sorted(folder.parent.glob("*/configs/inference.json"))}
    sources, imports = vendor({str(folder / name): text for name, text in configs.items()}, siblings)
    files |= {f"{VENDORED}/{name}": text.encode() for name, text in sources.items()}
    files |= {name: renamed(text).encode() for name, text in configs.items()}
    imports |= {"fire"} | {"yaml" for name in configs if Path(name).suffix in YAML}  # MONAI's command line needs them
    text = json.dumps(standalone_metadata(metadata, imports), indent=4, ensure_ascii=False)
    files["configs/metadata.json"] = (text + "\n").encode()

    stem = f"{folder.name}_v{metadata['version']}"
    large = {name: path for name, path in models.items() if weights_url and path.stat().st_size > LARGE}
    if large:
        files["large_files.yml"] = write_assets(output, stem, large, weights_url).encode()
    files |= {name: path for name, path in models.items() if name not in large}
    write_zip(output / f"{stem}.zip", {f"{folder.name}/{name}": content for name, content in files.items()})
    return output / f"{stem}.zip"
