"""What the app imports, read from the sources: its own environment need not be there."""

import ast
from collections.abc import Iterable, Iterator

from cardiac_qc_plugin.workflows.export import ROOT, imported_names, read_source, source_file


def run_by_import(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Syntax trees and all below them, without the bodies of functions."""
    for node in nodes:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_by_import(ast.iter_child_nodes(node))


def imported(modules: Iterable[str]) -> dict[str, set[str]]:
    """What each module of the package imports that importing some of them runs, the packages they lie in included."""
    todo, found = set(modules), {}
    while todo:
        module = todo.pop()
        nodes = run_by_import([read_source(module)[1]])
        found[module] = {full for node in nodes for full in imported_names(module, node).values()}
        parts = [full.split(".") for full in (module, *found[module])]
        names = {".".join(words[: n + 1]) for words in parts for n in range(len(words)) if words[0] == ROOT.name}
        todo |= {name for name in names - found.keys() if source_file(name)}
    return found


def importers_of_pydicom(modules: Iterable[str]) -> set[str]:
    """Those that import it, or what does."""
    return {
        module
        for module, names in imported(modules).items()
        if {name.split(".")[0] for name in names} & {"pydicom", "highdicom"}
    }


def test_the_app_imports_no_pydicom():
    """MONAI Label's environment has an older one."""
    app = [f"{ROOT.name}.monailabel.{file.stem}" for file in (ROOT / "monailabel").glob("[!_]*.py")]
    assert {f"{ROOT.name}.{name}" for name in ("monailabel", "workflows.run", "reports.pages")} < imported(app).keys()
    assert not importers_of_pydicom(app)
    assert importers_of_pydicom([f"{ROOT.name}.workflows.import_dicom"]) == {f"{ROOT.name}.data.dicom"}
