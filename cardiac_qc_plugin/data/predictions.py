"""Datalist items that point at the files a segmentation left behind."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["MAP_FILES", "case_name", "hold_out", "with_predictions"]

MAP_FILES = {"bmap": "bayesian.nii.gz", "emap": "entropy.nii.gz"}


def case_name(path: str | Path) -> str:
    """Name of an image file without ``.nii`` or ``.nii.gz``: the name of its case's folder."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def with_predictions(items: Sequence[dict], predictions_dir: str | Path, map: str) -> list[dict]:
    """Add ``segmentation`` and ``uncertainty`` files to datalist items.

    Args:
        items: datalist items with ``image``.
        predictions_dir: output folder of a segmentation run over these images.
        map: ``"bmap"`` or ``"emap"``, the uncertainty map.

    Raises:
        ValueError: for an unknown map, or if a file is missing; the message names the first one.
    """
    if map not in MAP_FILES:
        raise ValueError(f"Unknown uncertainty map '{map}': choose one of {sorted(MAP_FILES)}.")
    result = []
    for item in items:
        folder = Path(predictions_dir) / case_name(item["image"])
        files = {"segmentation": folder / "segmentation.nii.gz", "uncertainty": folder / MAP_FILES[map]}
        for path in files.values():
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing. Segment the images first: "
                    f"python scripts/pipeline.py segment --input ... --output {predictions_dir}"
                )
        result.append({**item, **{key: str(path) for key, path in files.items()}})
    return result


def hold_out(items: Sequence[dict], every: int = 5) -> tuple[list[dict], list[dict]]:
    """Split training items by patient, to choose an operating point without the test fold.

    Patients are sorted by disease group and name, and every fifth goes to validation, so that each group gives its
    share.

    Args:
        items: datalist items with ``meta``: ``patient`` and ``group``.
        every: one patient in this many is held out.

    Returns:
        Training items and validation items.
    """
    patients = sorted({(item["meta"]["group"], item["meta"]["patient"]) for item in items})
    held = {name for _, name in patients[every // 2 :: every]}
    return (
        [item for item in items if item["meta"]["patient"] not in held],
        [item for item in items if item["meta"]["patient"] in held],
    )
