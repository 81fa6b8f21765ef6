"""A trained fold, or any checkpoint of a bundle's training, as a MONAI bundle with these weights."""

import contextlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from cardiac_qc_plugin.auto3dseg.algo import TEMPLATES, template_parameters
from cardiac_qc_plugin.auto3dseg.fold import DATALIST, NOT_COPIED, Fold, split_settings, validation_metrics
from cardiac_qc_plugin.bundle import find_bundle, root_cause
from cardiac_qc_plugin.checkpoints import load_weights, save_weights

from .files import read_json, write_text

__all__ = ["fold_to_bundle"]

SEGMENTATION = sorted(template_parameters(path.name)["bundle"] for path in TEMPLATES.iterdir())


@dataclass(frozen=True)
class Trained:
    """What a training left behind.

    Attributes:
        bundle: folder of the bundle that was trained.
        weights: the file of weights.
        overrides: entries of the bundle's configs that were replaced, by config.
        metrics: by name, over the scans that were left out; none where they are not known.
        what: which weights these are, in words.
    """

    bundle: Path
    weights: Path
    overrides: dict[str, dict[str, Any]]
    metrics: dict[str, float]
    what: str


def of_fold(folder: Path) -> Trained:
    """A fold that Auto3DSeg trained."""
    fold = Fold(folder)
    score = fold.score()
    overrides = {name: fold.overrides(name) for name in ("train", "inference")}
    for place in ("dataset_dir", "pretrained"):  # on this machine
        overrides["train"].pop(place, None)
    what = f"weights of {folder.resolve().name}, trained by Auto3DSeg, fold {score['fold']} left out"
    return Trained(fold.bundle, fold.bundle / "models" / "model.pt", overrides, score["metrics"], what)


def of_weights(weights: Path, bundle: Path, settings: dict[str, Any]) -> Trained:
    """A file that a bundle's training wrote."""
    what = f"weights of {weights.name}"
    if "fold" in settings:
        what += f", fold {settings['fold']} left out"
    settings = {name: value for name, value in settings.items() if name != "pretrained"}  # a place on this machine
    return Trained(bundle, weights, split_settings(bundle, settings), {}, what)


def write_config(file: Path, config: dict[str, Any]) -> None:
    """Write a config as the bundles have them."""
    write_text(file, json.dumps(config, indent=4, ensure_ascii=False) + "\n")


def copy_bundle(source: Path, folder: Path, overrides: dict[str, dict[str, Any]], datalist: str | Path | None) -> None:
    """Copy a bundle without its weights, with entries of its configs replaced and a datalist of its own."""
    shutil.copytree(source, folder, ignore=NOT_COPIED)
    for name, entries in overrides.items():
        file = folder / "configs" / f"{name}.json"
        parser = ConfigParser(read_json(file))
        parser.update(entries)
        write_config(file, parser.get())
    if datalist:
        shutil.copyfile(datalist, folder / "configs" / "datalist.json")


def copy_weights(weights: Path, folder: Path) -> None:
    """Write weights that fit the bundle's network as its ``models/model.pt``, in half precision."""
    config = ConfigParser(read_json(folder / "configs" / "inference.json"))
    network = load_weights(config.get_parsed_content("network_def"), weights)
    save_weights(network, folder / "models" / "model.pt")


def measure(folder: Path, root: str | Path) -> dict[str, float]:
    """Metrics of the bundle's weights over its validation scans, by name.

    Raises:
        ValueError: if its datalist has no such scans, or they are not there.
    """
    file = folder / "configs" / "train.json"
    try:
        return validation_metrics(
            ConfigWorkflow(str(file), workflow_type="train", bundle_root=str(folder), dataset_dir=str(root))
        )[0]
    except RuntimeError as error:
        raise ValueError(str(root_cause(error))) from error


def note_weights(folder: Path, version: str | None, what: str, metrics: dict[str, float]) -> None:
    """Say in metadata and README which weights these are, instead of how others perform."""
    file = folder / "configs" / "metadata.json"
    metadata = read_json(file)
    if version is None:
        first, _, last = metadata["version"].rpartition(".")
        version = f"{first}.{int(last) + 1}"
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"A version has three numbers, such as 0.2.0; got '{version}'.")
    if version in metadata["changelog"]:
        raise ValueError(f"{folder.name}: version {version} is in its changelog already. Give another version.")
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has numbers only
    what += "".join(f"; {name} over the fold's scans: {value:.4f}" for name, value in metrics.items())
    metadata |= {"version": version, "changelog": {version: what, **metadata["changelog"]}}
    metadata.pop("eval_metrics", None)
    write_config(file, metadata | ({"eval_metrics": metrics} if metrics else {}))
    readme = folder / "docs" / "README.md"
    title, _, text = readme.read_text(encoding="utf-8").partition("\n")
    note = f"> **Version {version}**: {what}. Figures of performance below are those of the bundle it was made from."
    write_text(readme, f"{title}\n\n{note}\n{text}")


def fold_to_bundle(
    source: str | Path,
    output: str | Path,
    bundle: str | None = None,
    root: str | Path | None = None,
    datalist: str | Path | None = None,
    fold: int | None = None,
    version: str | None = None,
    bundle_dir: str | Path | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Make a bundle of a trained fold, or of a checkpoint.

    The result has the configs of the bundle that was trained, with the settings of that training, its datalist, the
    weights in half precision, and the fold's own validation metrics in its metadata.

    Args:
        source: a fold's folder in AutoRunner's work folder, or a file of weights.
        output: folder for the bundle, which has the name of the one it was made from.
        bundle: name of the bundle that a file of weights belongs to.
        root: folder of the data that a file of weights is validated on; without it nothing is measured.
        datalist: datalist of that training, instead of the bundle's.
        fold: fold that was left out of that training, instead of the bundle's.
        version: version of the result; by default, the last number one higher.
        bundle_dir: folder of the bundles, instead of the repository's.
        settings: entries of the bundle's configs that were replaced in that training.

    Returns:
        Folder of the bundle.

    Raises:
        ValueError: if the source is no trained fold, the weights do not fit the bundle, or the result is there already.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source}: no such folder or file. Give a trained fold's folder, or a file of weights.")
    if source.is_dir():
        trained, root, datalist = of_fold(source), None, None  # it brings its score and its datalist
    elif bundle in SEGMENTATION:
        chosen = {**({} if fold is None else {"fold": fold}), **(DATALIST if datalist else {})}
        trained = of_weights(source, find_bundle(bundle, bundle_dir), {**(settings or {}), **chosen})
    else:
        raise ValueError(f"{source}: which bundle do these weights belong to? One of {', '.join(SEGMENTATION)}.")
    folder = Path(output) / trained.bundle.name
    if folder.exists():
        raise ValueError(f"{folder} is there already. Choose another output folder.")
    part = folder.with_name(f".part-{os.getpid()}-{folder.name}")
    try:
        copy_bundle(trained.bundle, part, trained.overrides, datalist)
        copy_weights(trained.weights, part)
        metrics = trained.metrics if root is None else measure(part, root)
        note_weights(part, version, trained.what, metrics)
        part.rename(folder)
    except ValueError as error:
        raise ValueError(str(error).replace(part.name, folder.name)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not folder.exists():
            with contextlib.suppress(OSError):  # not empty
                folder.parent.rmdir()
    return folder
