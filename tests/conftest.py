"""Settings and data shared by all tests: one thread per process, and ACDC where it is at hand."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy are imported

import pytest
import torch

torch.set_num_threads(1)


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
