"""What a user may point the pipeline at, taken apart into single stacks of slices."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import nibabel as nib

from .predictions import CORRECTION_FILE, case_name, results_among

__all__ = ["PHASE", "InputFile", "NoScans", "Scan", "find_scans", "input_files", "phase_names", "phases"]

SUFFIXES = (".nii", ".nii.gz")
RECORDS = ("qc.json", CORRECTION_FILE, "dicom.json")  # left by a stage in a case's folder
PHASE = re.compile(r"(.+)/phase(\d+)")
BLOCK = 1 << 14  # characters of a datalist at once


class NoScans(ValueError):
    """There is no scan in a folder or list."""


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


@dataclass(frozen=True)
class InputFile:
    """A file that a listing names.

    Attributes:
        path: the file; a manifest may name a folder of DICOM files too.
        case: its case's name where a manifest gives one, otherwise None: see `name`.
    """

    path: Path
    case: str | None = None

    @property
    def name(self) -> str:
        """Name of the case: the given one, or the file's."""
        return self.case or case_name(self.path)

    @property
    def name_with_folder(self) -> str:
        """The given name, or the file's with its folder's, where other folders have the same."""
        return self.case or f"{self.path.parent.name}_{self.name}"

    @property
    def heart(self) -> str:
        """Name without the phase: the later stages make one heart of all cases that have it, wherever they lay."""
        return heart_of(self.name)

    @property
    def home(self) -> Path:
        """Folder of the heart: the one above where phases have folders of their own, as in ``ED/p1_ed.nii.gz``."""
        folder = Path(os.path.normpath(self.path.parent))  # a list may write one folder in two ways
        return folder.parent if folder.name.lower() in ("ed", "es") else folder


def heart_of(case: str) -> str:
    """Name of a case without the phase."""
    return re.sub(r"(_(ed|es|frame\d+)|/phase\d+)$", "", case, flags=re.IGNORECASE)


def two_homes(heart: str, first: Path, second: Path) -> ValueError:
    """What is said of files that later stages would make one heart of, though they lie in different folders."""
    return ValueError(
        f"{first} and {second} lie in different folders, and would be one heart, '{heart}'. Rename one of the files or "
        "folders, or name the cases in a manifest's column 'case'."
    )


def find_scans(
    path: str | Path, root: str | Path | None = None, fold: int | None = None, output: str | Path | None = None
) -> list[Scan]:
    """Scans behind a path, in order.

    Args:
        path, root, fold, output: see :func:`input_files`.

    Raises:
        NoScans: if no file in it is a scan.
        ValueError: if nothing is there, no file of a list is there, or files of different folders would give one case
            or one heart.
    """
    files = list(input_files(path, root, fold, output))
    counts = Counter(file.name for file in files)
    folders = Counter(heart for heart, _ in {(file.heart, file.home) for file in files})
    scans, hearts, scattered = [], {}, None
    for file in files:
        alone = counts[file.name] == folders[file.heart] == 1
        name = file.name if alone else file.name_with_folder
        scans += phases(name, Path(os.path.realpath(file.path)))
        if file.case is None and (other := hearts.setdefault(heart_of(name), file)).home != file.home:
            scattered = scattered or two_homes(heart_of(name), other.path, file.path)
    doubled = [case for case, count in Counter(scan.case for scan in scans).items() if count > 1]
    if doubled:
        raise ValueError(f"{path}: several files would give the case '{doubled[0]}'. Rename them.")
    if scattered:
        raise scattered
    if Path(path).suffix in READERS and not any(file.path.exists() for file in files):
        raise ValueError(
            f"{path}: of its {len(files)} files none is there, the first would be {files[0].path}. "
            "Give the folder that its paths are relative to (--root)."
        )
    return scans


def input_files(
    path: str | Path, root: str | Path | None = None, fold: int | None = None, output: str | Path | None = None
) -> Iterator[InputFile]:
    """Files behind a path, one after another; a list of any length is never in memory as a whole.

    Args:
        path: a NIfTI file (3-D, or 4-D with phases last); a folder, searched through all its subfolders, in which
            references (``*_gt``) are left out, and so are results of the pipeline, and 4-D files (``*_4d``) whose
            frames lie beside them, as in ACDC; a MONAI datalist (``.json``); or a manifest (``.csv``, ``.parquet``)
            with a column ``image``, and ``case`` where cases are not named by their files.
        root: folder that the paths of a datalist or manifest are relative to; its own folder by default.
        fold: take the items with this ``fold`` of a datalist or manifest only.
        output: where results go; if that is a folder below, what an interrupted run left in it is no scan.

    Raises:
        NoScans: if there is no such file in a folder, or no item in a list.
        ValueError: if nothing is there, a list cannot be read, or `root` or `fold` is given for what is no list; the
            message names the file.
    """
    path = Path(path)
    check_list_options(path, root, fold)
    if path.is_dir():
        files, nothing = (
            map(InputFile, folder_files(path, output)),
            "no NIfTI file (.nii, .nii.gz) and no DICOM file in this folder or below it.",
        )
    elif path.suffix in READERS and path.is_file():
        files = listed_files(path, path.parent if root is None else Path(root), fold)
        nothing = "no item" + ("." if fold is None else f" in fold {fold}.")
    elif path.exists():
        files, nothing = iter([InputFile(path)]), ""
    else:
        raise ValueError(f"{path}: no such file or folder.")
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise NoScans(f"{path}: {nothing}")


def check_list_options(path: Path, root: str | Path | None, fold: int | None) -> None:
    """Raise ValueError for options of a list where the input is none: all of it would be taken without a word."""
    given = [name for name, value in (("--root", root), ("--fold", fold)) if value is not None]
    if given and path.exists() and (path.is_dir() or path.suffix not in READERS):
        raise ValueError(
            f"{path}: {', '.join(given)}: for a datalist or manifest only ({', '.join(READERS)}). "
            "Leave these out, or give the list."
        )


def folder_files(folder: Path, output: str | Path | None = None) -> Iterator[Path]:
    """NIfTI files in a folder and its subfolders, sorted, without references and what a stage of the pipeline wrote.

    Links are followed; no folder is searched twice, nor the `output` if it lies below. A folder that may not be read
    stands for itself: its case fails with the reason, and the others go on.
    """
    yield from _search(folder, set() if output is None else {Path(output).resolve()} - {folder.resolve()})


def _search(folder: Path, seen: set[Path]) -> Iterator[Path]:
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    names = [entry.name for entry in entries]
    if any(record in names for record in RECORDS):
        return
    results = results_among(names)  # of a bundle, which leaves no record
    for entry in entries:
        # not of a link alone: that raises where it leads to itself, or to where one may not look
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(folder / entry.name)):
            yield from _search(folder / entry.name, seen)
        elif entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
            name = case_name(entry.name)
            cine = name.removesuffix("_4d")
            has_frames = cine != name and any(other.startswith(f"{cine}_frame") for other in names)  # ACDC's layout
            if not name.endswith("_gt") and not has_frames and entry.name not in results:
                yield folder / entry.name


def listed_files(path: Path, root: Path, fold: int | None) -> Iterator[InputFile]:
    """Files of a datalist or manifest, or those of one fold."""
    kind, _ = READERS[path.suffix]
    for number, item in enumerate(list_items(path), start=1):
        if isinstance(item, str) and item.lower().endswith(SUFFIXES):
            item = {"image": item}
        if not isinstance(item, dict):  # names or numbers of classes, say
            continue
        if fold is None or is_number(item.get("fold"), fold):
            if "image" not in item:
                raise ValueError(
                    f"{path}: item {number} has no 'image', only {sorted(map(str, item))}. This has to be {kind}."
                )
            if not isinstance(item["image"], str) or not item["image"]:
                raise ValueError(f"{path}: item {number} names no image. Give its file, or remove the item.")
            yield InputFile(root / item["image"], given_case(path, item.get("case")))


def list_items(path: Path) -> Iterator[Any]:
    """Items of a datalist or manifest."""
    kind, read = READERS[path.suffix]
    try:
        yield from read(path)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not {kind} ({error!r}).") from error


def is_number(value: Any, number: int) -> bool:
    """Whether an entry of a list is this number, whatever its type: tables with gaps hold 1 as 1.0."""
    try:
        return float(value) == number
    except (TypeError, ValueError):
        return False


def given_case(path: Path, value: Any) -> str | None:
    """A case's name from the list at a path, which may be a number; None where there is none.

    Raises:
        ValueError: if results would be written outside the output folder.
    """
    if value is None or value == "" or value != value:  # the last is NaN
        return None
    case = Path(str(value)).as_posix()
    if Path(case).is_absolute() or case == "." or ".." in Path(case).parts:
        raise ValueError(f"{path}: the case '{case}' is no name of a folder below the output folder.")
    return case


def datalist_items(path: Path) -> Iterator[Any]:
    """Items of all lists of a datalist."""
    with open(path, encoding="utf-8") as stream:
        text = JsonText(stream)
        text.take("{")
        while text.peek() != "}":
            text.value()  # the list's name
            text.take(":")
            if text.peek() != "[":
                text.value()  # a description, say
            else:
                text.take("[")
                while text.peek() != "]":
                    yield text.value()
                    if text.peek() != "]":
                        text.take(",")
                text.take("]")
            if text.peek() != "}":
                text.take(",")


class JsonText:
    """JSON read piece by piece.

    Args:
        stream: the text.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text = ""
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while not (text := self.text.lstrip()) and (more := self.stream.read(BLOCK)):
            self.text = more
        self.text = text
        return text[:1]

    def take(self, expected: str) -> None:
        """Go past the next character, which has to be this one."""
        if self.peek() != expected:
            raise ValueError(f"expected {expected}, got {self.text[:20] or 'the end'}")
        self.text = self.text[1:]

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text)
            except json.JSONDecodeError:
                if not (more := self.stream.read(BLOCK)):
                    raise
            else:
                rest = self.text[end : end + 1]  # "." or "e" where the block ends inside a number, as in 1. of 1.4
                if rest not in ("", ".", "e", "E") or not (more := self.stream.read(BLOCK)):
                    self.text = self.text[end:]
                    return value
            self.text += more


def csv_items(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV manifest."""
    with open(path, newline="", encoding="utf-8-sig") as stream:
        yield from csv.DictReader(stream)


def parquet_items(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet manifest."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install 'cardiac-qc-plugin[cluster]'") from error
    with parquet.ParquetFile(path) as file:
        columns = [name for name in ("image", "case", "fold") if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()


READERS = {
    ".json": ("a MONAI datalist, which is a JSON object of lists of items", datalist_items),
    ".csv": ("a manifest, which is a table with a column 'image'", csv_items),
    ".parquet": ("a manifest, which is a Parquet table with a column 'image'", parquet_items),
}


def phases(name: str, file: Path) -> list[Scan]:
    """The file as one scan, or as one scan for each phase. A damaged file stays one scan: reading it reports why."""
    try:
        shape = nib.load(file).shape
    except Exception:  # noqa: BLE001 (reported with its cause where the scan is read)
        shape = ()
    if len(shape) != 4:
        return [Scan(name, file)]
    return [Scan(case, file, frame) for frame, case in enumerate(phase_names(name, shape[3]))]


def phase_names(name: str, count: int) -> list[str]:
    """Cases of the phases of a cine, which `PHASE` takes apart."""
    width = max(2, len(str(count - 1)))
    return [f"{name}/phase{index:0{width}d}" for index in range(count)]
