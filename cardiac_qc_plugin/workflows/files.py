"""What the stages read and write. Every file appears under its name only when it is complete."""

import csv
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener

from cardiac_qc_plugin.data.predictions import SEGMENTATION_FILE, files_below
from cardiac_qc_plugin.transforms.spatial import check_checksum, check_spacing

__all__ = [
    "MASKS",
    "OutputError",
    "Volume",
    "case_folders",
    "file_sha256",
    "read_json",
    "read_like",
    "read_rows",
    "read_volume",
    "without_nan",
    "write_csv",
    "write_file",
    "write_json",
    "write_like",
    "write_rows",
    "write_text",
]

MASKS = ("segmentation", "failure_regions")  # results that are also written as DICOM Segmentations


@dataclass(frozen=True, eq=False)
class Volume:
    """A stack of slices as it lies in a file.

    Attributes:
        data: voxels, (H, W, D), slices last.
        spacing: voxel size in mm of (row, column, slice), from the header's ``pixdim``.
        image: the NIfTI image, for its affine and header.
    """

    data: np.ndarray
    spacing: tuple[float, float, float]
    image: nib.Nifti1Image


def check_readable(folder: Path) -> None:
    """Raise ValueError for a folder that may not be read."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise ValueError(
            f"{folder}: this folder cannot be read ({error.strerror}). Change its permissions, or leave it out."
        ) from error


def open_nifti(path: Path) -> nib.Nifti1Image:
    """A NIfTI image whose voxels have not been read yet.

    Raises:
        ValueError: if the file is missing, no NIfTI file, or holds colours or complex numbers.
    """
    if path.is_dir():
        check_readable(path)
    if not path.is_file():
        folder = " It is a folder: give it as --input, or take --engine ray, for lists of them." * path.is_dir()
        raise ValueError(f"{path}: no such file.{folder}")
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises its own, gzip's and zlib's errors
        raise ValueError(f"{path}: not a NIfTI image, or a damaged one ({error}).") from error
    if image.get_data_dtype().kind not in "iuf":
        kind = "complex numbers" if image.get_data_dtype().kind == "c" else "colours"
        raise ValueError(f"{path}: its voxels are {kind}. Convert it to one grey value for each voxel.")
    return image


def read_volume(path: str | Path, frame: int | None = None) -> Volume:
    """Read one stack of slices from a 3-D NIfTI file, or one phase of a 4-D file.

    Raises:
        ValueError: if the file is unreadable or truncated, has another number of dimensions, or a voxel size that no
            short-axis stack has; the message names the file.
    """
    path = Path(path)
    image = open_nifti(path)
    if image.ndim != (3 if frame is None else 4):
        expected = "one stack of slices (3-D)" if frame is None else "a cine (4-D)"
        raise ValueError(f"{path}: expected {expected}, got {image.ndim} dimensions of {image.shape}.")
    with ImageOpener(path) as stream:  # unchecked: nibabel turns a voxel size of 0 into 1
        pixdim = type(image.header).from_fileobj(stream, check=False)["pixdim"]
    spacing = tuple(float(size) for size in pixdim[1:4])
    check_spacing(spacing, str(path), image.affine)
    try:
        check_checksum(path)
        data = np.asanyarray(image.dataobj if frame is None else image.dataobj[..., frame])
    except Exception as error:
        raise ValueError(f"{path}: the file is truncated or damaged ({error}). Fetch it again.") from error
    return Volume(data, spacing, image)


def read_like(path: Path, other: Volume, name: str = "segmentation") -> np.ndarray:
    """Voxels of another file of a case, (H, W, D).

    Raises:
        ValueError: as `read_volume`, or if it has not the shape of the other one, which messages call by this name.
    """
    array = read_volume(path).data
    if array.shape != other.data.shape:
        raise ValueError(f"{path}: shape {array.shape}, but the {name} has {other.data.shape}. Run this case again.")
    return array


class OutputError(OSError):
    """A result could not be written: the folder cannot be written to, or the disk is full."""


def write_file(path: Path, write: Callable[[Path], Any], place: Callable[[Path, Path], None] = os.replace) -> None:
    """Write under a temporary name in the same folder, then rename; nothing is left behind on failure.

    Args:
        path: the file.
        write: writes what it is to hold, under the name that it is given.
        place: gives the complete file, at its first argument, the name that is its second.
    """
    # unique among the nodes that share a folder; the suffix decides nibabel's compression
    temporary = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        place(temporary, path)
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is where its folder should be" if in_the_way else error.strerror or error
        raise OutputError(error.errno, f"cannot write {path}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None


def write_like(path: Path, array: np.ndarray, volume: Volume) -> None:
    """Write an (H, W, D) array with its own data type on the grid, affine and header codes of a volume."""
    header = volume.image.header.copy()
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0
    # affine None: sform, qform and their codes stay as the scan's header has them
    write_file(path, nib.Nifti1Image(array, None, header).to_filename)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as CSV; a column that a row lacks stays empty in it. Of an empty table there is no file."""
    if rows:
        write_csv(path, lambda: rows)
    else:
        path.unlink(missing_ok=True)


def write_csv(path: Path, rows: Callable[[], Iterable[Mapping[str, Any]]], last: str | None = None) -> None:
    """Write a table of any length as CSV, with the columns of all its rows.

    Args:
        path: the file.
        rows: called twice, for the columns and for the rows.
        last: this column comes last.
    """
    columns = dict.fromkeys(column for row in rows() for column in row if column != last)
    columns |= {} if last is None else {last: None}

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows())

    write_file(path, write)


def write_json(path: Path, data: Any) -> None:
    """Write JSON; NaN is no JSON, so it has to be None by now."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """The same for JSON: None for nan, plain numbers for numpy's."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: if the file is missing or damaged, or holds something else; the message names it.
    """
    if not path.is_file():
        hint = " Give the output folder of run." if path.name == "qc.json" else ""
        raise ValueError(f"{path}: no such file.{hint}")
    return parse_json(path.read_bytes, str(path))


def parse_json(read: Callable[[], bytes], name: str) -> dict[str, Any]:
    """The JSON object in what a function reads; errors as of `read_json`, which call it by this name."""
    try:
        content = json.loads(read().decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} instead of an object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: cannot be read as JSON ({error}). Mend it; if a command wrote it, remove it and run that again."
        ) from error
    return content


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file, one after another; none where there is no file.

    Raises:
        ValueError: if it is damaged; the message names it.
    """
    if not path.is_file():
        return
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            yield from csv.DictReader(stream)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read as CSV ({error}). Remove it, and run the command again that wrote it."
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_folder(output: Path) -> None:
    """Refuse an output folder that cannot be one, before anything is done.

    Raises:
        OutputError: it is a file, or would lie in one; the message names both.
    """
    there = next(path for path in (output, *output.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise OutputError(errno.ENOTDIR, f"cannot write to {output}: {there} is no folder. Give another output folder.")


def check_output(output: Path, command: str, *inputs: str | Path) -> None:
    """Refuse an output folder that is one of the inputs, or a case, or has another command's ``summary.json``.

    Raises:
        ValueError: naming the folder.
        OutputError: see `check_folder`.
    """
    check_folder(output)
    if (output / SEGMENTATION_FILE).is_file() or any(output.resolve() == Path(one).resolve() for one in inputs):
        raise ValueError(f"{output} is an input of this command: write to another folder.")
    try:
        other = read_json(output / "summary.json")["command"]
    except (ValueError, KeyError, TypeError):  # none, damaged, or of an earlier version
        return
    if other != command:
        raise ValueError(f"{output} has the results of {other}: write to another folder.")


def case_folders(root: str | Path) -> list[Path]:
    """Folders under ``root`` that hold a segmentation, sorted.

    Raises:
        ValueError: if there is none.
    """
    folders = sorted(path.parent for path in files_below(Path(root)) if path.name == SEGMENTATION_FILE)
    if not folders:
        raise ValueError(f"{root}: no {SEGMENTATION_FILE} in it. Give the output folder of 'run'.")
    return folders
