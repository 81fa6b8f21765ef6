"""Settings and data shared by all tests: one thread per process, and ACDC where it is at hand."""

import gc
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are imported

import pytest
import torch

torch.set_num_threads(1)


SLOWEST = ("test_reproduce.py", "test_bundles.py", "test_export.py", "test_cohort.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that two processes end together."""
    items.sort(key=lambda item: item.path.name not in SLOWEST)


def pytest_collection_finish() -> None:
    """Spare the collector the million objects of the imported modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random weights in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def acdc_dir() -> Path:
    """Folder with ACDC's 100 training patients: ACDC_DIR, or ../shared/data/acdc/training beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "acdc" / "training"
    folder = Path(os.environ.get("ACDC_DIR", beside))
    if not folder.is_dir():
        pytest.skip("set ACDC_DIR to the folder with ACDC's patient folders")
    return folder


@pytest.fixture(scope="module")
def acdc_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms in ACDC's layout with a two-fold datalist, and predictions with errors beside them."""
    import numpy as np

    from cardiac_qc_plugin.data.acdc import acdc_datalist
    from cardiac_qc_plugin.data.phantom import write_acdc_like
    from cardiac_qc_plugin.workflows.files import read_volume, write_json, write_like

    root = tmp_path_factory.mktemp("acdc")
    write_acdc_like(root / "data", 10, shape=(48, 56), n_slices=2)
    datalist = acdc_datalist(root / "data", folds=2)
    write_json(root / "folds.json", datalist)
    for item in datalist["training"]:
        label = read_volume(root / "data" / item["label"])
        folder = root / "predictions" / Path(item["image"]).name.removesuffix(".nii.gz")
        shifted = np.roll(label.data.astype(np.uint8), 5, axis=0)
        write_like(folder / "segmentation.nii.gz", shifted, label)
        for name in ("bayesian", "entropy"):
            write_like(folder / f"{name}.nii.gz", (shifted != label.data).astype(np.float32), label)
    return root


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable:
    """The command line, as ``command("run", ..., cwd=folder)``; gives exit code and output, as a process would.

    In this process: one of its own takes seconds to import MONAI.
    """
    script = Path(__file__).resolve().parents[1] / "scripts" / "pipeline.py"

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
        code, handler = 0, signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
            if cwd is not None:
                patch.chdir(cwd)
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def launch_chromium() -> Iterator[Callable]:
    """Starts a browser by Playwright: CHROMIUM, or what Debian and Google call it."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e .[test]")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium: scripts/test_browser.sh installs one, or set CHROMIUM to the program")
    switches = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    switches += " disable-component-update disable-sync"
    with api.sync_playwright() as playwright:
        yield lambda: playwright.chromium.launch(
            executable_path=path, args=[f"--{switch}" for switch in switches.split()]
        )


@pytest.fixture(scope="module")
def chromium(launch_chromium: Callable) -> Iterator:
    """A browser for the tests of a file."""
    browser = launch_chromium()
    yield browser
    browser.close()
