"""The cases of a folder, one by one, and the reference labels that belong to them."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
from tqdm import tqdm

from cardiac_qc_plugin.data.acdc import read_info
from cardiac_qc_plugin.data.inputs import PHASE
from cardiac_qc_plugin.data.predictions import files_below
from cardiac_qc_plugin.metrics.segmentation import check_order
from cardiac_qc_plugin.transforms.failure_labels import as_label_volumes
from cardiac_qc_plugin.transforms.spatial import says_how_it_lies
from cardiac_qc_plugin.workflows.files import Volume, case_folders, read_volume, without_nan, write_json, write_text

__all__ = [
    "MissingLabels",
    "Outcome",
    "References",
    "as_stored",
    "each_case",
    "fit_reference",
    "patient_and_phase",
    "read_labels",
    "read_reference",
    "told_by_volumes",
    "write_summary",
]

T = TypeVar("T")
NIFTI = re.compile(r"(?P<stem>[^.].*?)(?P<mark>_gt|_seg)?\.nii(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """What a stage did.

    Attributes:
        text: for the terminal, failures included.
        failures: what went wrong, by case; if there is any, the command has to exit non-zero.
    """

    text: str
    failures: dict[str, str]


def write_summary(output: Path, summary: dict[str, Any], describe: Callable[[dict[str, Any]], str]) -> Outcome:
    """Write ``summary.json``, and ``summary.md``, which is that in words; its entry ``failed`` are the failures."""
    summary = without_nan(summary)
    write_json(output / "summary.json", summary)
    text = describe(summary)
    write_text(output / "summary.md", text)
    return Outcome(text, summary["failed"])


def each_case(root: Path, work: Callable[[str, Path], T], description: str) -> tuple[dict[str, T], dict[str, str]]:
    """Call `work` with name and folder of every case under `root`; a broken case does not stop the others.

    Phases of a cine without labels are left out, with a word on stderr, if another phase of it has labels.

    Args:
        root: output folder of an earlier stage, or one case's folder.
        work: raises ValueError for a case that it cannot do; other errors stop all.
        description: what the progress bar says.

    Returns:
        The results and the error messages, both by case name: the folder's path under `root`.

    Raises:
        ValueError: there is no case.
    """
    results, failures, unlabelled = {}, {}, set()
    for folder in tqdm(case_folders(root), desc=description, unit="case", disable=None):
        name = folder.resolve().relative_to(root.resolve()).as_posix()
        name = folder.resolve().name if name == "." else name
        try:
            results[name] = work(name, folder)
        except ValueError as error:
            failures[name] = str(error)
            unlabelled |= {name} if isinstance(error, MissingLabels) else set()
    cines = {match[1] for name in (results | failures).keys() - unlabelled if (match := PHASE.fullmatch(name))}
    left_out = [name for name in unlabelled if (match := PHASE.fullmatch(name)) and match[1] in cines]
    if left_out:
        print(f"{description}: {len(left_out)} phase(s) of cines without labels left out.", file=sys.stderr)
    return results, {name: message for name, message in failures.items() if name not in left_out}


class MissingLabels(ValueError):
    """There is no label file for a case."""


class References:
    """Label files under a folder, found by the name of the case they belong to.

    For a case ``patient001_frame01``, anywhere under the folder: ``patient001_frame01_gt.nii.gz`` or
    ``_seg.nii.gz``; failing these ``patient001_frame01/segmentation.nii.gz``, as the stages write it; failing
    that ``patient001_frame01.nii.gz``, which beside a ``_gt`` file is the scan. ``.nii`` serves as well. A case that
    was named by its folder, ``patient001_sax`` for ``patient001/sax.nii.gz``, has its labels in that folder. A phase of
    a cine that has none by its own name, ``patient001_4d/phase00``, has those of ACDC's frame, which count from 1.

    Args:
        root: the folder; it is read once.

    Raises:
        ValueError: the folder is missing or holds no NIfTI file.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        # by the last part of the case's name: how good the file's name is, the name with folders, the file
        self.files: dict[str, list[tuple[int, tuple[str, ...], Path]]] = {}
        for path in files_below(self.root):
            if match := NIFTI.fullmatch(path.name):
                folders = path.parent.relative_to(self.root).parts
                if match["stem"] == "segmentation" and not match["mark"] and folders:
                    rank, parts = 1, folders
                else:
                    rank, parts = 0 if match["mark"] else 2, (*folders, match["stem"])
                self.files.setdefault(parts[-1], []).append((rank, parts, path))
                if rank != 1 and folders:
                    parts = (*folders[:-1], f"{folders[-1]}_{match['stem']}")
                    self.files.setdefault(parts[-1], []).append((rank + 3, parts, path))
        if not self.files:
            raise ValueError(f"{self.root}: no such folder, or no NIfTI file in it. Give a folder of label files.")

    def find(self, case: str, own: Path) -> Path:
        """The label file of a case.

        Args:
            case: name of the case; with folders (``cine/phase03``), these have to match as well.
            own: the case's own folder; nothing is measured against itself.

        Raises:
            MissingLabels: there is none.
            ValueError: there is more than one equally good.
        """
        frame = PHASE.sub(lambda match: f"{match[1].removesuffix('_4d')}_frame{int(match[2]) + 1:02d}", case)
        found = self._named(case, own) or self._named(frame, own)
        lowest = min((rank for rank, _ in found), default=0)
        best = [path for rank, path in found if rank == lowest]
        if not best:
            raise MissingLabels(
                f"{self.root}: no label file for {case}. Looked there and in all folders below for "
                f"{case}_gt.nii.gz, {case}_seg.nii.gz, {case}/segmentation.nii.gz, {case}.nii.gz (or .nii)"
                f"{f', and for {frame}' if frame != case else ''}."
            )
        if len(best) > 1:
            raise ValueError(
                f"{self.root}: {len(best)} label files for {case}: {', '.join(map(str, best))}. "
                "Keep one of them, or give a folder with only one."
            )
        return best[0]

    def _named(self, case: str, own: Path) -> list[tuple[int, Path]]:
        """Label files of a case by its name, outside of its own folder; the lower the number, the better."""
        wanted = tuple(case.split("/"))
        return [
            (rank, path)
            for rank, parts, path in self.files.get(wanted[-1], [])
            if parts[-len(wanted) :] == wanted and path.parent.resolve() != own.resolve()
        ]


def read_labels(path: Path, frame: int | None = None) -> Volume:
    """Read a label map as uint8 (H, W, D), values 0-3; of a 4-D file one phase.

    Raises:
        ValueError: if the file cannot be read, or has another value; the message names it.
    """
    volume = read_volume(path, frame)
    try:
        (labels,) = as_label_volumes(**{"the label map": volume.data})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Volume(labels, volume.spacing, volume.image)


def as_stored(path: Path, labels: Volume, prediction: Volume) -> Volume:
    """Labels of a file in the order of the prediction's voxels, where they were saved with axes turned or swapped.

    Raises:
        ValueError: if the axes are others than the prediction's, and turned back do not lie where it lies; or the
            labels have another shape or voxel size.
    """
    turned = _turned_back(path, labels, prediction)
    if turned.data.shape != prediction.data.shape:
        raise ValueError(
            f"{path}: shape {turned.data.shape}, but the prediction has {prediction.data.shape}. "
            "Give the labels of this scan, on its own grid."
        )
    if not np.allclose(turned.spacing, prediction.spacing, rtol=0.01):
        raise ValueError(
            f"{path}: voxel size {_listed(turned.spacing)} mm, but the prediction has "
            f"{_listed(prediction.spacing)} mm. Give the labels of this scan, or correct the header."
        )
    return turned


def _turned_back(path: Path, labels: Volume, prediction: Volume) -> Volume:
    own, other = labels.image.affine, prediction.image.affine
    both_say = all(says_how_it_lies(volume.image.header) for volume in (labels, prediction))
    if not both_say or nib.aff2axcodes(own) == nib.aff2axcodes(other):
        return labels
    turn = nib.orientations.ornt_transform(nib.io_orientation(own), nib.io_orientation(other))
    back = nib.orientations.inv_ornt_aff(turn, labels.data.shape)
    pairs = ((own, other), (_in_mm(labels), _in_mm(prediction)))
    if not any(np.allclose(first @ back, second, atol=0.01) for first, second in pairs):
        axes, wanted = ("".join(nib.aff2axcodes(affine)) for affine in (own, other))
        raise ValueError(
            f"{path}: its axes run otherwise than the prediction's ({axes}, not {wanted}), and turned back it lies "
            "elsewhere. Save it on the scan's grid; if its voxels are in the scan's order, give it the scan's affine."
        )
    spacing = tuple(labels.spacing[axis] for axis in np.argsort(turn[:, 0]).astype(int))
    return Volume(nib.orientations.apply_orientation(labels.data, turn), spacing, prediction.image)


def _in_mm(volume: Volume) -> np.ndarray:
    """The affine with the header's voxel sizes: ACDC's says 1 mm."""
    affine = volume.image.affine.copy()
    affine[:3, :3] *= np.array(volume.spacing) / np.linalg.norm(affine[:3, :3], axis=0)
    return affine


def read_reference(path: Path, prediction: Volume) -> np.ndarray:
    """Read the reference labels of a prediction, uint8 (H, W, D), in the order of its voxels.

    Raises:
        ValueError: if the file cannot be read, lies on another grid than the prediction, has values other
            than 0-3, no label at all, or RV and LV exchanged; the message names it.
    """
    try:
        labels = read_labels(path)
    except ValueError as error:
        name = NIFTI.fullmatch(path.name)
        if name["mark"] or name["stem"] == "segmentation":
            raise
        raise ValueError(f"{error} If it is the scan, its labels {name['stem']}_gt.nii.gz are missing.") from error
    return fit_reference(path, labels, prediction)


def fit_reference(path: Path, labels: Volume, prediction: Volume) -> np.ndarray:
    """Reference labels of a file in the order of a stack's voxels; raises as `read_reference`."""
    reference = as_stored(path, labels, prediction)
    if not reference.data.any():
        raise ValueError(f"{path}: no label at all, only background. Nothing can be measured against it.")
    check_order(reference.data, str(path))
    return reference.data


def _listed(spacing: tuple[float, float, float]) -> str:
    return " x ".join(f"{size:.4g}" for size in spacing)


def patient_and_phase(case: str, reference: Path) -> tuple[str, str]:
    """Patient of a case, and its phase: "ED", "ES" or "unknown".

    ``<patient>_ed`` and ``<patient>_es`` tell both. The phase of ``<patient>_frame01`` is in the ``Info.cfg``
    that ACDC has beside the reference; so is that of a cine's, ``<patient>_4d/phase00``, whose reference is such a
    frame's. Other phases of cines are unknown.

    Raises:
        ValueError: if that ``Info.cfg`` does not give the frames of end-diastole and end-systole.
    """
    if match := re.fullmatch(r"(.+)_(ed|es)", case, re.IGNORECASE):
        return match[1], match[2].upper()
    cine, info = PHASE.fullmatch(case), reference.parent / "Info.cfg"
    match = re.match(r"(.+)_frame(\d+)", reference.name) if cine else re.fullmatch(r"(.+)_frame(\d+)", case)
    patient = cine[1] if cine else match[1] if match else case
    if not match or not info.is_file():
        return patient, "unknown"
    frames = read_info(info)
    phases = {int(frames[phase]): phase for phase in ("ED", "ES")}
    return patient, phases.get(int(match[2]), "unknown")


def told_by_volumes(cases: Mapping[str, tuple[str, float]], others: Iterable[str] = ()) -> dict[str, str]:
    """End-diastole and end-systole of cines that nothing else tells: the two phases with labels.

    Args:
        cases: phase (`patient_and_phase`) and the reference's left ventricular volume of each measured case.
        others: cases with labels that were not measured; where a cine has one, nothing is told of it.

    Returns:
        "ED" and "ES" of the cases that were "unknown" and are told, the larger volume being end-diastole's.
    """
    cines: dict[str, list[str]] = {}
    for name in (*cases, *others):
        if match := PHASE.fullmatch(name):
            cines.setdefault(match[1], []).append(name)
    told = {}
    for names in cines.values():
        if len(names) == 2 and all(name in cases and cases[name][0] == "unknown" for name in names):
            ed, es = sorted(names, key=lambda name: -cases[name][1])
            told |= {ed: "ED", es: "ES"}
    return told
