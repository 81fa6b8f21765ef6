"""Which items of a datalist a training sees, and which are kept from it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from monai.auto3dseg.utils import datafold_read
from tqdm import tqdm

from .acdc import SAME_SCAN

__all__ = ["check_scans", "hold_out", "read_fold", "training_items"]

KEYS = ("image", "label")


def read_fold(datalist: str | Path, root: str | Path, fold: int) -> tuple[list[dict], list[dict]]:
    """Items of a MONAI datalist outside and inside a fold, their paths below ``root``.

    Args:
        datalist: JSON file, ``{"training": [{"image", "label", "fold"}, ...]}``.
        root: folder that its paths are relative to.
        fold: the fold that is left out; -1 leaves none out.

    Returns:
        Items of the other folds, and items of this one.

    Raises:
        ValueError: if the datalist is missing or damaged, has an item without image or label or with a fold that is no
            number, has no such fold, or lists a file that is not there.
    """
    items = training_items(Path(datalist))
    others, left_out = datafold_read({"training": items}, str(root), fold)
    if not others or (not left_out and fold != -1):
        folds = sorted({item["fold"] for item in items if "fold" in item}, key=str)
        raise ValueError(
            f"{datalist}: fold {fold} would leave nothing on one side. Its folds are {folds}, and -1 leaves none out."
        )
    for item in others + left_out:
        for path in (item[key] for key in KEYS):
            if not Path(path).is_file():
                raise ValueError(
                    f"{path}: no such file, but {datalist} lists it. "
                    "Check the data set's folder (--dataset_dir, or --root)."
                )
    return others, left_out


def training_items(datalist: Path) -> list[dict]:
    """Items of a datalist's list ``training``.

    Raises:
        ValueError: if it is missing or damaged, or an item has no image, no label, or a fold that is no number; the
            message names the datalist and the item.
    """
    try:
        items = list(json.loads(datalist.read_text())["training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{datalist}: cannot be read as a datalist with the list 'training' ({error!r}).") from error
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict) or not all(item.get(key) and isinstance(item[key], str) for key in KEYS):
            raise ValueError(
                f"{datalist}: item {number} of 'training' has to name a file each as 'image' and 'label', and is "
                f"{str(item)[:200]}."
            )
        fold = item.get("fold")
        if fold is not None and type(fold) is not int:
            raise ValueError(
                f"{datalist}: item {number} of 'training' has the fold {json.dumps(fold)[:200]}. A fold is one whole "
                "number without quotes: 0, 1 and so on."
            )
    return items


def hold_out(items: Sequence[dict], every: int = 5) -> tuple[list[dict], list[dict]]:
    """Split training items by patient, to choose an operating point without the test fold.

    Patients are sorted by disease group and name, and every fifth goes to validation, so that each group gives its
    share.

    Args:
        items: datalist items with ``meta``: ``patient`` and ``group``.
        every: one patient in this many is held out.

    Returns:
        Training items and validation items, of which there are none with fewer than three patients.

    Raises:
        ValueError: if an item has no such ``meta``.
    """
    metas = [item.get("meta") for item in items]
    if any(not isinstance(meta, dict) or not {"patient", "group"} <= meta.keys() for meta in metas):
        raise ValueError(
            "Patients are held out to choose the operating point: every item of the datalist needs 'meta' with "
            "'patient' and 'group', as `python scripts/pipeline.py datalist` writes it; or take --fold -1."
        )
    twin = {second: first for first, second in SAME_SCAN}
    patients = sorted({(item["meta"]["group"], item["meta"]["patient"]) for item in items})
    held = {name for _, name in [p for p in patients if p[1] not in twin][every // 2 :: every]}
    held |= {second for second, first in twin.items() if first in held}
    return (
        [item for item in items if item["meta"]["patient"] not in held],
        [item for item in items if item["meta"]["patient"] in held],
    )


def check_scans(scans: Iterable) -> None:
    """Read each scan once and keep none: a damaged one should not be found after hours of training.

    Args:
        scans: a DataLoader; a MONAI dataset by itself would take an IndexError of a transform for its end.

    Raises:
        whatever reading or preprocessing a scan raises.
    """
    for _ in tqdm(scans, desc="Checking validation scans", unit="scan", disable=None):
        pass
