"""From a folder of DICOM files to one NIfTI stack for each phase, the first stage of the pipeline."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib

from cardiac_qc_plugin.data.dicom import (
    Contents,
    Plane,
    Series,
    Skipped,
    Stack,
    decode_frames,
    dicom_files,
    find_stacks,
    read_phase,
    stack_digest,
    without_names,
)
from cardiac_qc_plugin.data.inputs import NoScans, Scan, check_list_options, find_scans, phase_names

from .files import OutputError, check_folder, read_json, write_file, write_json, write_rows
from .run import forget

__all__ = ["NAMES", "Inputs", "gather_scans", "import_dicom"]

NAMES = ("study", "patient_id", "patient_name", "folder")


@dataclass
class Inputs:
    """What a user's input comes to.

    Attributes:
        scans: what to process.
        skipped: images that are no short-axis cine, with the reason.
        failures: (case or series, reason) of what should have been processed, and cannot.
    """

    scans: list[Scan]
    skipped: list[Skipped] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)


def gather_scans(
    path: str | Path,
    output: str | Path,
    root: str | Path | None = None,
    fold: int | None = None,
    series: tuple[int, ...] = (),
    name_by: str = "study",
) -> Inputs:
    """The scans behind a path: NIfTI as :func:`~cardiac_qc_plugin.data.inputs.find_scans` has it, and DICOM.

    Args:
        path: a NIfTI file, a DICOM file, a folder of either or both, or a MONAI datalist.
        output: the pipeline's output folder; what is in DICOM is written there as NIfTI.
        root, fold: for a datalist.
        series, name_by: see :func:`import_dicom`.

    Raises:
        ValueError: if nothing is there, no file in it is a scan, or an option is given that is for other inputs.
        OutputError: if the output cannot be a folder.
    """
    path = Path(path)
    check_folder(Path(output))
    check_list_options(path, root, fold)
    files = dicom_files(path) if path.is_dir() or (path.is_file() and path.suffix != ".json") else []
    if not files:
        if path.exists() and (series or name_by != "study"):
            raise ValueError(f"{path}: --series and --name_by are for DICOM, and no file is. Leave them out.")
        return Inputs(find_scans(path, root, fold, output))
    inputs = import_dicom(files, Path(output), series, name_by)
    nothing = not inputs.scans and not inputs.failures
    if path.is_dir():
        with suppress(NoScans):
            inputs.scans += find_scans(path, output=output)
    write_skipped(Path(output) / "skipped_series.csv", inputs.skipped)
    if nothing and (series or not inputs.scans):  # series were asked for: scans beside them are no answer
        listed = "".join(f"\n  {item}" for item in inputs.skipped)
        raise ValueError(
            f"{path}: no short-axis cine among its {len(files)} DICOM files.{listed}\n"
            "If one of these is a short-axis stack, name it: --series NUMBER."
        )
    return inputs


def import_dicom(files: list[Path], output: Path, series: tuple[int, ...] = (), name_by: str = "study") -> Inputs:
    """Write every phase of every short-axis cine to ``<output>/<case>/phaseNN/image.nii.gz``.

    ``<output>/<case>/dicom.json`` says which image became which slice, and what was odd. A cine that is there already,
    from the same images, is left as it is. A stack with a single phase (asked for by ``series``) has no phase folder.

    Args:
        files: DICOM files.
        output: the pipeline's output folder.
        series: SeriesNumbers to take, instead of all short-axis cines.
        name_by: what a case is named by: "study" (a digest of the StudyInstanceUID, which tells nothing of the
            patient), "patient_id", "patient_name" or "folder"; the series number follows.
    """
    if name_by not in NAMES:
        raise ValueError(f"--name_by is one of {', '.join(NAMES)}, got '{name_by}'.")
    contents = find_stacks(files, series)
    inputs = Inputs([], [item for item in contents.skipped if not item.failed])
    inputs.failures = [(f"DICOM {item.series}", item.reason) for item in contents.skipped if item.failed]
    taken: set[str] = set()
    for stack in contents.stacks:
        first = stack.first
        named = names_of(Series(first.study, first.series, first.series_number, stack.names), name_by)
        name = next(name for name in named if name not in taken)
        taken.add(name)
        try:
            inputs.scans += _write_stack(stack, name, output)
        except OutputError:
            raise
        except ValueError as error:
            inputs.failures.append((name, str(error)))
    _forget_others(contents, taken, output, name_by)
    return inputs


def names_of(series: Series, name_by: str) -> Iterator[str]:
    """Names for a stack's case, of which the first one that is free is taken: a series may hold several stacks."""
    study = f"study_{_short(series.study)}"
    number = "" if series.series_number < 0 else series.series_number
    name = f"{series.names.get(name_by) or study}_series{number}"
    yield name
    yield (name := f"{name}_{_short(series.series)}")
    yield from (f"{name}_{further}" for further in itertools.count(2))


def _forget_others(contents: Contents, taken: set[str], output: Path, name_by: str) -> None:
    """Remove the results of an earlier run for cases that do not come of their series any more."""
    for series in contents.series:
        for name in names_of(series, name_by):
            record = output / name / "dicom.json"
            if not record.is_file():
                break
            with suppress(ValueError):  # a damaged record, which later commands name
                if name not in taken and _owner(series).items() <= read_json(record).items():
                    forget(output, name)


def _short(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:8]


def _write_stack(stack: Stack, name: str, output: Path) -> list[Scan]:
    """A stack's phases and its ``dicom.json``; nothing is written where they are there already.

    Raises:
        ValueError: if the folder is another series'.
    """
    record, count = output / name / "dicom.json", len(stack.phases)
    _claim(record, stack)
    cases = [name] if count == 1 else phase_names(name, count)
    images = [output / case / "image.nii.gz" for case in cases]
    digest = stack_digest(stack)
    done = record.is_file() and read_json(record).get("digest") == digest and all(path.is_file() for path in images)
    if not done:
        write_json(record, _owner(stack.first))
        for folder in set((output / name).glob("phase*")) - {path.parent for path in images}:
            shutil.rmtree(folder)  # of an import with more phases
        decode = lru_cache(len(stack.phases[0]))(decode_frames)  # slices may be multi-frame files of their own
        for planes, path in zip(stack.phases, images, strict=True):
            try:
                image = nib.Nifti1Image(read_phase(planes, decode), stack.affine)
            except ValueError as error:
                record.unlink()
                raise ValueError(without_names(str(error), [stack.names["patient_name"]])) from error
            image.header.set_xyzt_units("mm", "sec")
            image.set_qform(stack.affine, code=1)
            image.set_sform(stack.affine, code=1)
            write_file(path, image.to_filename)
        write_json(record, {"digest": digest, **_owner(stack.first), **_record(stack)})
    return [Scan(case, path.resolve()) for case, path in zip(cases, images, strict=True)]


def _owner(source: Plane | Series) -> dict[str, str]:
    """Whose folder a case's is."""
    return {"study_uid": source.study, "series_uid": source.series}


def _claim(record: Path, stack: Stack) -> None:
    """Take a case's folder for a series, also against other processes; names need not tell patients apart.

    Raises:
        ValueError: if it is another's.
    """
    if not record.is_file():
        write_file(record, lambda temporary: temporary.write_text(json.dumps(_owner(stack.first))), _name_unless_taken)
    if not _owner(stack.first).items() <= read_json(record).items():
        raise ValueError(
            f"{record.parent} holds another series of that name. Name the cases by --name_by study, or choose "
            "another output folder."
        )


def _name_unless_taken(temporary: Path, path: Path) -> None:
    """Give a complete file its name, where no other has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: two processes at the very same time could both get the name
        os.replace(temporary, path)


def _record(stack: Stack) -> dict[str, Any]:
    """What else ``dicom.json`` says; UIDs link it to the source images, nothing in it names the patient."""
    return {
        "series_numbers": sorted({plane.series_number for planes in stack.phases for plane in planes}),
        "notes": stack.notes,
        "spacing_mm": list(stack.spacing),
        "trigger_times_ms": [round(time, 1) for time in stack.times],
        "subject": stack.subject,
        "images": [[{"uid": plane.uid, "frame": plane.index} for plane in planes] for planes in stack.phases],
    }


def write_skipped(path: Path, skipped: list[Skipped]) -> None:
    """Series that were left out, as CSV; no file if there are none."""
    write_rows(path, [{"series": item.series, "images": item.images, "reason": item.reason} for item in skipped])
