"""Short-axis cines in a folder of DICOM files: found, sorted in space and time, and read as stacks of slices.

Positions come from ImagePositionPatient alone, phases from the trigger time or, without it, the instance number; file
names, SliceLocation and the order of files mean nothing. docs/inputs.md lists what each odd input gets.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydicom import Dataset, FileMetaDataset, config, dcmread
from pydicom.pixels import pixel_array
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedMRImageStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
)

from .predictions import files_below

__all__ = [
    "Contents",
    "Plane",
    "Skipped",
    "Stack",
    "decode_frames",
    "dicom_files",
    "find_stacks",
    "read_phase",
    "stack_digest",
    "without_names",
]

# Base to apex in LPS (left, front, feet) of an average heart; the axis of patients differs from it by 10 to 30 degrees.
LONG_AXIS = np.array([0.65, -0.55, -0.52])
LONG_AXIS_TOLERANCE = 45.0  # degrees; long-axis views are 90 away, axial, coronal and sagittal ones 49 and more
MIN_SLICES, MIN_PHASES = 4, 6  # fewer make neither a volume nor a cine
SAME_POSITION = 0.5  # mm
SPACING_TOLERANCE = 0.1  # of the distance between slices
SUBJECT = {  # by keyword: what it is here, its factor, and the least and largest that a body has, in the file's unit
    "PatientSize": ("height_cm", 100, 0.3, 2.5, "m"),
    "PatientWeight": ("weight_kg", 1, 1, 400, "kg"),
}
NO_CINE = re.compile(
    r"(?<![a-z])(loc|localizer|localiser|scout|survey|haste|lge|psir|ir|t1|t2|t2star|molli|shmolli|map|perf|perfusion|"
    r"flow|velocity|pc|phase contrast|tag|tagging|phase map)(?![a-z])",
    re.IGNORECASE,
)
PHASE_IMAGE = re.compile(r"\bP\b")  # in the ImageType; "p2" in a description is parallel imaging


class UnusableError(ValueError):
    """Why a file or a group of planes is no part of a short-axis cine."""


@dataclass(frozen=True)
class Plane:
    """One image plane: a single-frame file, or a frame of a multi-frame file.

    Attributes:
        file, index: the file, and the frame in it (from 0).
        uid: SOPInstanceUID of the file; digests of file and folder stand in for UIDs that were removed.
        study, series, frame_of_reference: their UIDs.
        series_number, instance: SeriesNumber and InstanceNumber (of a multi-frame file: index of the frame in time).
        text: SeriesDescription, ProtocolName, SequenceName and ImageType, in one.
        position: center of the first pixel in mm, LPS.
        orientation: unit vectors along a row and down a column, shape (2, 3), LPS.
        spacing: mm between rows, and between columns.
        shape: rows, columns.
        time: ms after the R wave; None where the file does not say.
        slope, intercept: from stored values to the scanner's.
    """

    file: Path
    index: int
    uid: str
    study: str
    series: str
    frame_of_reference: str
    series_number: int
    instance: int | None
    text: str
    position: np.ndarray = field(compare=False)
    orientation: np.ndarray = field(compare=False)
    spacing: tuple[float, float]
    shape: tuple[int, int]
    time: float | None
    slope: float
    intercept: float


@dataclass(frozen=True, eq=False)
class Stack:
    """A short-axis cine, base to apex.

    Attributes:
        phases: planes by phase and slice, in order; all phases have the same number of slices.
        affine: (column, row, slice) index to RAS in mm, (4, 4).
        spacing: mm between columns, rows and slices.
        times: ms after the R wave of each phase, mean over slices; empty where the files do not say.
        notes: what was not as it should be, and what was done about it.
        subject: ``height_cm`` and ``weight_kg`` where the files have them.
        names: PatientID, PatientName and folder, for callers that are asked to name cases by them.
    """

    phases: list[list[Plane]]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    times: list[float]
    notes: list[str]
    subject: dict[str, float] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def first(self) -> Plane:
        return self.phases[0][0]


@dataclass(frozen=True)
class Series:
    """A series by its files, also where no cine comes of it; attributes as of :class:`Plane` and :class:`Stack`."""

    study: str
    series: str
    series_number: int
    names: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Skipped:
    """Images that were left out: a series, or part of one.

    Attributes:
        series: its number and description.
        images: how many.
        reason: why.
        failed: whether it seems to be a short-axis cine that cannot be used, and not just something else.
    """

    series: str
    images: int
    reason: str
    failed: bool = False

    def __str__(self) -> str:
        return f"{self.series} ({self.images} image{'s' * (self.images != 1)}): {self.reason}"


@dataclass(frozen=True)
class Contents:
    """The short-axis cines of a folder, what else is in it, and all series that were asked for."""

    stacks: list[Stack]
    skipped: list[Skipped]
    series: list[Series]


def dicom_files(path: str | Path) -> list[Path]:
    """DICOM files in a folder and below it, by their content and whatever their names; or the file itself.

    A file that cannot be opened is among them, so that it is named with the reason where files are read.
    """
    path = Path(path)
    files = files_below(path) if path.is_dir() else [path]
    return [f for f in files if not f.name.endswith((".nii", ".nii.gz")) and _is_dicom(f)]


def _is_dicom(file: Path) -> bool:
    """With the preamble, or without it the first tag in group 2 or 8, as old files have it."""
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as stream:
            start = stream.read(132)
    except OSError:
        return True
    if start[128:] == b"DICM":
        return True
    if start[:2] not in (b"\x02\x00", b"\x08\x00") or start[3:4] != b"\x00":
        return False
    group_length = start[4:8] in (b"UL\x04\x00", b"\x04\x00\x00\x00")  # explicit and implicit, 4 bytes
    return start[2:3] != b"\x00" or group_length


def find_stacks(files: Iterable[Path], series: Sequence[int] = ()) -> Contents:
    """Short-axis cines among DICOM files.

    Args:
        files: from one or many studies.
        series: SeriesNumbers to take, and no others, whatever their orientation, description and number of phases.

    Returns:
        Stacks by study and series number, and what was left out. No text has a patient's name in it.
    """
    planes, skipped, headers, found = _read_headers(files)
    times, unique = Counter(map(_identity, planes)), {}
    for plane in planes:
        unique.setdefault(_identity(plane), plane)
    stacks = []
    for group in _groups(list(unique.values())):
        label = _label(group[0])
        try:
            _check_chosen(group, series)
        except UnusableError as error:
            skipped.append(Skipped(label, len(group), str(error)))
            continue
        try:
            stack = _arrange(group)
        except UnusableError as error:
            skipped.append(Skipped(label, len(group), str(error), failed=True))
            continue
        header = headers[stack.first.file]
        notes = [*stack.notes]
        if copies := sum(times[_identity(plane)] - 1 for plane in group):
            notes.append(f"{copies} image(s) were there more than once; one of each is used.")
        subject = _subject(header, notes)
        stacks.append(replace(stack, notes=notes, subject=subject, names=_names(header, stack.first.file)))
    names = {str(header.get("PatientName") or "") for header in headers.values()}
    return Contents(
        stacks,
        [replace(s, series=without_names(s.series, names), reason=without_names(s.reason, names)) for s in skipped],
        [one for one in found if not series or one.series_number in series],
    )


def _read_headers(files: Iterable[Path]) -> tuple[list[Plane], list[Skipped], dict[Path, Dataset], list[Series]]:
    """Planes of all files that have any; the others by series and reason; the headers; the series."""
    planes: list[Plane] = []
    found: dict[tuple[str, str, int], Series] = {}
    reasons: Counter[tuple[str, str]] = Counter()
    headers: dict[Path, Dataset] = {}
    with config.disable_value_validation():  # UIDs with leading zeros, invalid dates
        for file in files:
            damaged = f"file {file.name}"
            try:
                header = dcmread(file, stop_before_pixels=True, force=True)
                headers[file] = header
                if header.get("SOPClassUID") != MediaStorageDirectoryStorage:
                    of_series = "SOPClassUID" in header and ("SeriesInstanceUID" in header or "Rows" in header)
                    label = _label(header) if of_series else damaged
                    key = _series(file, header)
                    found.setdefault(key, Series(*key, _names(header, file)))
                    planes += _planes(file, header)
            except UnusableError as error:
                reasons[label, str(error)] += 1
            except OSError as error:
                reasons[damaged, f"cannot be read ({error.strerror or error})"] += 1
            except Exception as error:  # pydicom's errors are of many kinds
                reasons[damaged, f"cannot be read as DICOM ({type(error).__name__}: {error})"] += 1
    skipped = [Skipped(label, count, reason) for (label, reason), count in reasons.items()]
    return planes, skipped, headers, list(found.values())


def _series(file: Path, header: Dataset) -> tuple[str, str, int]:
    """UIDs of study and series, the folder's digest where they were removed, and SeriesNumber, -1 without one."""
    folder = f"none, {_digest(file.parent)}"
    study = str(header.get("StudyInstanceUID") or folder)
    series = str(header.get("SeriesInstanceUID") or f"{folder} {header.get('SeriesNumber')}")
    return study, series, -1 if (number := _integer(header.get("SeriesNumber"))) is None else number


def _digest(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:16]


def _label(source: Plane | Dataset) -> str:
    if isinstance(source, Plane):
        number, text = source.series_number, source.text.split("|")[0]
    else:
        number, text = _integer(source.get("SeriesNumber")), str(source.get("SeriesDescription", ""))
    return f"series {'?' if number in (None, -1) else number}" + (f" '{text}'" if text else "")


def _integer(value: Any) -> int | None:
    return None if value in (None, "") else int(value)


def _planes(file: Path, header: Dataset) -> list[Plane]:
    """The planes of a file.

    Raises:
        UnusableError: why it has none, as others of its series.
        Exception: it is damaged.
    """
    kind = header.get("SOPClassUID")
    if kind not in (MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage):
        name = getattr(kind, "name", None) or "no SOPClassUID"
        raise UnusableError(f"not an MR image ({name})")
    if "BitsAllocated" not in header:  # every image has it, after what tells its place
        raise EOFError("its header ends too early")
    if header.get("SamplesPerPixel", 1) != 1:
        raise UnusableError("a color picture, not an MR image")
    if header.get("PhotometricInterpretation", "MONOCHROME2") != "MONOCHROME2":
        raise UnusableError(f"PhotometricInterpretation is {header.PhotometricInterpretation}")
    if kind == MRImageStorage:
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise UnusableError("several frames in a single-frame MR image; convert to Enhanced MR")
        return [_plane(file, 0, header, lambda _: header)]
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(frames) != int(header.get("NumberOfFrames") or 1):
        raise ValueError(f"{len(frames)} frames described, {header.get('NumberOfFrames')} in the file")
    return [_plane(file, index, header, partial(frame_group, header, index)) for index in range(len(frames))]


def frame_group(header: Dataset, index: int, name: str) -> Dataset:
    """What a multi-frame file says of one frame (from 0), its own or of all; ``name`` as in ``PlanePosition``."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frame, name = header.PerFrameFunctionalGroupsSequence[index], f"{name}Sequence"
    return (frame.get(name) or shared.get(name) or [Dataset()])[0]


def _plane(file: Path, index: int, header: Dataset, group: Callable[[str], Dataset]) -> Plane:
    """A plane, each of its attributes from where its kind of file has it: a group of a frame's, or the header."""
    numbers = {}
    for source, name, count in (
        ("PlanePosition", "ImagePositionPatient", 3),
        ("PlaneOrientation", "ImageOrientationPatient", 6),
        ("PixelMeasures", "PixelSpacing", 2),
    ):
        numbers[name] = np.array(group(source).get(name), dtype=float).ravel()
        if numbers[name].size != count or not np.isfinite(numbers[name]).all():
            raise UnusableError(f"no valid {name}, so its place in the patient is unknown")
    axes = numbers["ImageOrientationPatient"].reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.any(abs(lengths - 1) > 0.01) or abs(axes[0] @ axes[1]) > 0.01:
        raise UnusableError("ImageOrientationPatient is not two unit vectors at a right angle")
    if np.any(numbers["PixelSpacing"] <= 0):
        raise UnusableError(f"PixelSpacing is {numbers['PixelSpacing'].tolist()}")
    trigger, values = group("CardiacSynchronization"), group("PixelValueTransformation")
    time = trigger.get("TriggerTime", trigger.get("NominalCardiacTriggerDelayTime"))
    content = group("FrameContent")
    instance = header.get("InstanceNumber") if content is header else content.get("TemporalPositionIndex", index)
    study, series, number = _series(file, header)
    text = "|".join(
        str(header.get(name) or "").replace("|", " ") for name in ("SeriesDescription", "ProtocolName", "SequenceName")
    )
    kind = header.get("ImageType") or []  # pydicom gives a single value as it is
    return Plane(
        file=file,
        index=index,
        uid=str(header.get("SOPInstanceUID") or f"none, {_digest(file)}"),
        study=study,
        series=series,
        frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
        series_number=number,
        instance=_integer(instance),
        text="|".join([text, " ".join([kind] if isinstance(kind, str) else kind)]),
        position=numbers["ImagePositionPatient"],
        orientation=axes / lengths[:, None],
        spacing=tuple(numbers["PixelSpacing"].tolist()),
        shape=(int(header.Rows), int(header.Columns)),
        time=None if time in (None, "") or not np.isfinite(float(time)) else float(time),
        slope=float(values.get("RescaleSlope") or 1),
        intercept=float(values.get("RescaleIntercept") or 0),
    )


def _identity(plane: Plane) -> tuple[str, int]:
    """What a second copy of a file shares with the first."""
    return plane.uid, plane.index


def _groups(planes: list[Plane]) -> list[list[Plane]]:
    """Planes that are parallel, equally large and of one study: a series, or several that have one slice each."""
    groups: list[list[Plane]] = []
    for plane in planes:
        for group in groups:
            if _alike(plane, group[0]) and plane.series == group[0].series:
                group.append(plane)
                break
        else:
            groups.append([plane])
    merged: list[list[Plane]] = []
    for group in groups:
        partner = next((m for m in merged if _one_slice_each(group, m)), None)
        if partner is None:
            merged.append(group)
        else:
            partner += group
    return sorted(merged, key=lambda group: (group[0].study, group[0].series_number, group[0].series))


def _alike(a: Plane, b: Plane) -> bool:
    return (
        (a.study, a.shape) == (b.study, b.shape)  # not the frame of reference: some de-identifiers draw one per file
        and np.allclose(a.spacing, b.spacing, rtol=1e-3)
        and bool(np.all(abs((a.orientation * b.orientation).sum(axis=1)) > 0.9999))  # within 0.8 degrees, or mirrored
        and bool(_no_cine(a)) == bool(_no_cine(b))
    )


def _no_cine(plane: Plane) -> re.Match | None:
    """What in the description or image type says that a plane is of no cine."""
    return NO_CINE.search(plane.text) or PHASE_IMAGE.search(plane.text.rpartition("|")[2])


def _one_slice_each(group: list[Plane], other: list[Plane]) -> bool:
    """Whether a series of one slice belongs to the stack of another series, or of several, of one slice each."""
    if not _alike(group[0], other[0]) or group[0].frame_of_reference != other[0].frame_of_reference:
        return False
    series = [group, *([p for p in other if p.series == uid] for uid in {plane.series for plane in other})]
    return all(len(_positions(planes)) == 1 for planes in series)


def _normal(plane: Plane) -> np.ndarray:
    """Unit normal of the plane, toward the apex (LPS)."""
    normal = np.cross(*plane.orientation)
    return normal if normal @ LONG_AXIS >= 0 else -normal


def _positions(group: list[Plane]) -> list[list[Plane]]:
    """The planes of each slice, base to apex."""
    normal = _normal(group[0])
    slices: list[list[Plane]] = []
    last = -np.inf
    for offset, plane in sorted(((p.position @ normal, p) for p in group), key=lambda pair: pair[0]):
        if offset - last > SAME_POSITION:
            slices.append([])
        slices[-1].append(plane)
        last = offset
    return slices


def _check_chosen(group: list[Plane], series: Sequence[int]) -> None:
    """Raise if the group is not asked for, or without being asked for is no short-axis cine."""
    first = group[0]
    if series:
        if not {plane.series_number for plane in group} & set(series):
            raise UnusableError("not among the series asked for")
        return
    if match := _no_cine(first):
        raise UnusableError(f"its description or image type says '{match[0]}', which is no cine")
    angle = np.degrees(np.arccos(min(1.0, _normal(first) @ LONG_AXIS / np.linalg.norm(LONG_AXIS))))
    if angle > LONG_AXIS_TOLERANCE:
        raise UnusableError(f"not short-axis: its normal is {angle:.0f} degrees from the usual long axis of the heart")
    slices = _positions(group)
    if len(slices) < MIN_SLICES:
        raise UnusableError(f"{len(slices)} slice(s), fewer than {MIN_SLICES}")
    phases = Counter(map(len, slices)).most_common(1)[0][0]
    if phases < MIN_PHASES:
        raise UnusableError(f"{phases} image(s) for each slice, fewer than {MIN_PHASES} phases")


def _arrange(group: list[Plane]) -> Stack:
    """Sort planes into slices and phases, and work out the grid they lie on."""
    if any(((plane.orientation * group[0].orientation).sum(axis=1) < 0).any() for plane in group):
        raise UnusableError(
            "some of its images are stored mirrored or upside down against the others (ImageOrientationPatient); "
            "export it again with all images in one orientation"
        )
    notes: list[str] = []
    columns = [_phases(planes, notes) for planes in _positions(group)]
    count = max(Counter(map(len, columns)).items(), key=lambda item: (item[1], item[0]))[0]
    short = [column for column in columns if 2 * len(column) < count]
    if short:
        notes.append(f"{len(short)} slice(s) with fewer than half of the {count} phases are left out.")
        columns = [column for column in columns if 2 * len(column) >= count]
    full = [[plane.time for plane in column] for column in columns if len(column) == count]
    timed = all(plane.time is not None for column in columns for plane in column) and len({*sum(full, [])}) > 1
    times = np.mean(full, axis=0).tolist() if timed else []
    columns, step = _regular([_resampled(column, count, times, notes) for column in columns], notes)
    first = columns[0][0]
    axes = np.stack([*first.orientation, _normal(first)], axis=1)
    spacing = (first.spacing[1], first.spacing[0], step)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * spacing, first.position
    phases = [list(planes) for planes in zip(*columns, strict=True)]
    return Stack(phases, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, spacing, times, list(dict.fromkeys(notes)))


def _phases(planes: list[Plane], notes: list[str]) -> list[Plane]:
    """The planes of a slice in order of time; of several acquisitions the last one."""
    if len(planes) == 1:
        return planes
    by_number = all(plane.instance is not None for plane in planes)
    timed = all(plane.time is not None for plane in planes) and len({plane.time for plane in planes}) > 1
    if not timed:
        last = max((p.series_number, p.series) for p in planes)
        chosen = [plane for plane in planes if (plane.series_number, plane.series) == last]
        if not by_number or len({plane.instance for plane in chosen}) < len(chosen):
            raise UnusableError("neither trigger times nor instance numbers tell its phases apart")
        if len(chosen) < len(planes):
            notes.append("A slice was acquired several times; the last series is used.")
        return sorted(chosen, key=lambda plane: plane.instance)
    ordered = sorted(planes, key=lambda p: (p.series_number, p.series, p.instance if by_number else 0, p.time))
    runs: list[list[Plane]] = []
    for plane in ordered:
        if not runs or plane.series != runs[-1][-1].series or plane.time <= runs[-1][-1].time:
            runs.append([])
        runs[-1].append(plane)
    if len(runs[-1]) >= MIN_PHASES and min(map(len, runs)) > 0.6 * max(map(len, runs)) and not _one_cycle(runs):
        notes.append("A slice was acquired several times; the last acquisition is used.")
        return runs[-1]
    latest = {plane.time: plane for plane in ordered}  # instance numbers say nothing about time here
    if len(latest) < len(planes):
        notes.append("Several images have the same position and trigger time; the one with the last number is used.")
    return [latest[time] for time in sorted(latest)]


def _one_cycle(runs: list[list[Plane]]) -> bool:
    """Whether runs of rising trigger times are parts of one acquisition, whose numbers do not follow the cycle.

    Either the R wave came within the numbers, and the runs' times do not overlap; or the runs took turns, and their
    times mesh in even steps, as those of two acquisitions would not.
    """
    runs = sorted(runs, key=lambda run: run[0].time)
    apart = all(run[-1].time < following[0].time for run, following in itertools.pairwise(runs))
    steps = np.diff(sorted(plane.time for run in runs for plane in run))
    return apart or steps.min() > 0.5 * steps.max()


def _resampled(column: list[Plane], count: int, times: list[float], notes: list[str]) -> list[Plane]:
    """A slice with ``count`` phases: where it has another number, the nearest in time."""
    if len(column) == count:
        return column
    notes.append(f"A slice has {len(column)} phases instead of {count}; the nearest in time are used.")
    if times:
        return [min(column, key=lambda plane: abs(plane.time - time)) for time in times]
    return [column[index * len(column) // count] for index in range(count)]


def _regular(columns: list[list[Plane]], notes: list[str]) -> tuple[list[list[Plane]], float]:
    """Slices at equal distances, and that distance in mm; a single missing slice is its neighbor's copy."""
    normal = _normal(columns[0][0])
    positions = np.array([column[0].position for column in columns])
    along = positions @ normal
    drift = np.linalg.norm((positions - positions[0]) - np.outer(along - along[0], normal), axis=1).max()
    if drift > max(columns[0][0].spacing):
        raise UnusableError(f"its slices are shifted in plane against each other by up to {drift:.1f} mm")
    gaps = np.diff(along)
    if not gaps.size:
        raise UnusableError("one slice only")
    counts = np.round(gaps / gaps.min()).astype(int)
    step = (along[-1] - along[0]) / counts.sum()
    if np.abs(gaps - counts * step).max() > SPACING_TOLERANCE * step or counts.max() > 2:
        listed = ", ".join(f"{gap:g}" for gap in sorted({round(float(gap), 1) for gap in gaps}))
        raise UnusableError(f"its slices are {listed} mm apart, which no regular grid can hold")
    filled = [columns[0]]
    for column, n in zip(columns[1:], counts, strict=True):
        if n == 2:
            notes.append(f"Slice {len(filled) + 1} is missing: a copy of slice {len(filled)} stands in its place.")
            filled.append(filled[-1])
        filled.append(column)
    return filled, float(step)


def _subject(header: Dataset, notes: list[str]) -> dict[str, float]:
    """Height and weight, without those that cannot be: the body surface area goes by them."""
    found = {}
    for keyword, (name, factor, least, most, unit) in SUBJECT.items():
        try:
            value = float(header.get(keyword) or 0)
        except (TypeError, ValueError):
            notes.append(f"{keyword} is not one number; it is not used.")
            continue
        if least <= value <= most:
            found[name] = round(factor * value, 1)
        elif value != 0:  # which stands for an unknown one
            notes.append(f"{keyword} is {value:g}, not from {least:g} to {most:g} {unit}; it is not used.")
    return found


def _names(header: Dataset, file: Path) -> dict[str, str]:
    names = {
        "patient_id": header.get("PatientID"),
        "patient_name": header.get("PatientName"),
        "folder": file.parent.name,
    }
    return {key: re.sub(r"[^\w.-]+", "_", str(value or "")).strip("_.") for key, value in names.items()}


def without_names(text: str, names: Iterable[str]) -> str:
    """The same, with dots for every part of these patients' names that occurs in it."""
    parts = {part for name in names for part in re.findall(r"[^\W_]{3,}", name)}
    name = "|".join(map(re.escape, sorted(parts, key=len, reverse=True)))
    return re.sub(name, "...", text, flags=re.IGNORECASE) if parts else text


def decode_frames(file: Path) -> np.ndarray:
    """Stored values of all frames of a file, (frame, row, column), where pydicom has no decoder or the file no meta.

    Raises:
        ValueError: if the file cannot be decoded; the message has its name.
    """
    try:
        image = dcmread(file, force=True)
        syntax = ImplicitVRLittleEndian if image.original_encoding[0] else ExplicitVRLittleEndian
        syntax = image.file_meta.get("TransferSyntaxUID", syntax)
        # the pixels alone: ITK would refuse frames that share a position, and scale all frames as the first
        pixels = Dataset({tag: image[tag] for tag in image.keys() if tag.group in (0x0028, 0x7FE0)})
        for name in ("RescaleSlope", "RescaleIntercept"):
            pixels.pop(name, None)
        pixels.SOPClassUID, pixels.SOPInstanceUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage, "1.2"
        pixels.file_meta = FileMetaDataset()
        pixels.file_meta.TransferSyntaxUID = syntax
        if not syntax.is_encapsulated:
            return pixel_array(pixels, raw=True).reshape(-1, image.Rows, image.Columns)
        import itk  # large, and rarely needed

        with TemporaryDirectory() as folder:
            pixels.save_as(path := Path(folder, "image.dcm"), enforce_file_format=True)
            return itk.array_from_image(itk.imread(str(path), imageio=itk.GDCMImageIO.New()))
    except Exception as error:  # ITK's and pydicom's, of many kinds and with the path
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(f"{file.name}: its pixels cannot be decoded ({reason}).") from error


def read_phase(planes: Sequence[Plane], decode: Callable[[Path], np.ndarray] = decode_frames) -> np.ndarray:
    """The slices of a phase, (column, row, slice): the scanner's values, int16 where they are integers, else float32.

    Args:
        planes: its planes.
        decode: :func:`decode_frames`; with a cache for several phases, as it decodes all of a multi-frame file.

    Raises:
        ValueError: if an image cannot be decoded; the message has the file's name.
    """
    slices = np.stack([_pixels(plane, decode).T for plane in planes], axis=-1)
    whole = np.array_equal(slices, np.round(slices)) and slices.min() >= -(2**15) and slices.max() < 2**15
    return slices.astype(np.int16 if whole else np.float32)


def _pixels(plane: Plane, decode: Callable[[Path], np.ndarray]) -> np.ndarray:
    """A plane's values, (row, column)."""
    try:
        with config.disable_value_validation():
            stored = pixel_array(plane.file, index=plane.index, raw=True)
    except Exception as error:  # of many kinds, by transfer syntax and damage
        if not re.search("decod|plugin|transfer_syntax_uid", str(error), re.IGNORECASE):
            # an OSError has the path, and folders may be named by patients
            reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else error
            raise ValueError(f"{plane.file.name}: its pixels cannot be read ({reason}). Fetch it again.") from error
        stored = decode(plane.file)[plane.index]
    if stored.shape != plane.shape:
        raise ValueError(f"{plane.file.name}: {stored.shape} pixels, but its header says {plane.shape}.")
    return stored.astype(np.float64) * plane.slope + plane.intercept


def stack_digest(stack: Stack) -> str:
    """Digest of which images make up the stack: equal digests give equal images."""
    parts = [
        f"{p.uid} {p.index} {p.file.stat().st_size} {p.file.stat().st_mtime_ns}" for ps in stack.phases for p in ps
    ]
    return hashlib.sha256("\n".join([*parts, str(stack.affine.tolist())]).encode()).hexdigest()
