"""What a user may point the pipeline at, taken apart into single stacks of slices."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib

from .predictions import case_name

__all__ = ["Scan", "find_scans"]

SUFFIXES = (".nii", ".nii.gz")
RECORDS = ("qc.json", "correction.json", "dicom.json")  # left by a stage in a case's folder


@dataclass(frozen=True)
class Scan:
    """One stack of slices: a 3-D file, or one phase of a 4-D file.

    Attributes:
        case: name of the case, and of its folder below the output folder.
        path: the file.
        frame: index of the phase in a 4-D file, None for a 3-D file.
    """

    case: str
    path: Path
    frame: int | None = None


def find_scans(path: str | Path, root: str | Path | None = None, fold: int | None = None) -> list[Scan]:
    """Scans behind a path, in order.

    Args:
        path: a NIfTI file (3-D, or 4-D with phases last); a folder, searched through all its subfolders, in which
            references (``*_gt``) are left out, and so are results of the pipeline, and 4-D files (``*_4d``) whose
            frames lie beside them, as in ACDC; or a MONAI datalist (``.json``).
        root: folder that the paths of a datalist are relative to; the datalist's own folder by default.
        fold: take the items of this fold of a datalist only.

    Raises:
        ValueError: if nothing is there, or no file in it is a scan.
    """
    path = Path(path)
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.name.endswith(SUFFIXES) and not f.name.startswith(".")]
        files = [f for f in files if not case_name(f).endswith("_gt") and not has_frames(f) and not is_result(f, path)]
        if not files:
            raise ValueError(f"{path}: no NIfTI file (.nii, .nii.gz) and no DICOM file in this folder or below it.")
    elif path.suffix == ".json" and path.is_file():
        files = datalist_files(path, path.parent if root is None else Path(root), fold)
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{path}: no such file or folder.")
    counts = Counter(case_name(f) for f in files)
    scans = []
    for file in files:
        name = case_name(file)
        if counts[name] > 1:  # the same name in several folders
            name = f"{file.parent.name}_{name}"
        scans += phases(name, file.resolve())
    doubled = [case for case, count in Counter(scan.case for scan in scans).items() if count > 1]
    if doubled:
        raise ValueError(f"{path}: several files would give the case '{doubled[0]}'. Rename them.")
    return scans


def is_result(file: Path, root: Path) -> bool:
    """Whether a file below ``root`` was written by a stage of the pipeline."""
    folders = [folder for folder in file.parents if folder.is_relative_to(root)]
    return any((folder / record).is_file() for folder in folders for record in RECORDS)


def has_frames(file: Path) -> bool:
    """Whether a 4-D file's end-diastole and end-systole lie beside it as files of their own (ACDC's layout)."""
    name = case_name(file)
    return name.endswith("_4d") and any(file.parent.glob(f"{name.removesuffix('_4d')}_frame*"))


def datalist_files(path: Path, root: Path, fold: int | None) -> list[Path]:
    """Images of all lists of a datalist, or those of one fold."""
    try:
        lists = json.loads(path.read_text())
        items = [item for value in lists.values() if isinstance(value, list) for item in value]
        if fold is not None:
            items = [item for item in items if item.get("fold") == fold]
        files = [root / (item if isinstance(item, str) else item["image"]) for item in items]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a MONAI datalist, which is a JSON object of lists of items ({error!r})."
        ) from error
    if not files:
        raise ValueError(f"{path}: no item" + ("." if fold is None else f" in fold {fold}."))
    return files


def phases(name: str, file: Path) -> list[Scan]:
    """The file as one scan, or as one scan for each phase. A damaged file stays one scan: reading it reports why."""
    try:
        shape = nib.load(file).shape
    except Exception:  # noqa: BLE001 (reported with its cause where the scan is read)
        shape = ()
    if len(shape) != 4:
        return [Scan(name, file)]
    width = max(2, len(str(shape[3] - 1)))
    return [Scan(f"{name}/phase{frame:0{width}d}", file, frame) for frame in range(shape[3])]
