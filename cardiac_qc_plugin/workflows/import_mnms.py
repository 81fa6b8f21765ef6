"""From the files of the challenges M&Ms and M&Ms-2 to ACDC's layout, which every stage reads."""

import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from cardiac_qc_plugin.data.predictions import files_below
from cardiac_qc_plugin.metrics.clinical import slice_levels
from cardiac_qc_plugin.metrics.segmentation import check_order
from cardiac_qc_plugin.transforms.spatial import says_how_it_lies

from .files import Volume, check_folder, read_rows, read_volume, write_like, write_text
from .references import Outcome, fit_reference, read_labels

__all__ = ["import_mnms"]

LABELS = re.compile(r"(?P<patient>.+)_(sa|SA_(?P<phase>ED|ES))_gt\.nii(\.gz)?")
EXCHANGED = np.array([0, 3, 2, 1], np.uint8)  # the challenges number LV 1, LVM 2, RV 3
PLAUSIBLE = {"Height": (30, 250), "Weight": (1, 400)}  # cm, kg
Phase = tuple[int, Volume, np.ndarray]  # frame from 1, image, labels (H, W, D)


def import_mnms(root: str | Path, output: str | Path) -> Outcome:
    """Write end-diastole and end-systole of each patient with labels as ACDC has them.

    ``<output>/<patient>/<patient>_frameNN.nii.gz``, ``..._gt.nii.gz`` and ``Info.cfg``: labels 1 RV, 2 LVM, 3 LV, the
    apex in the last slice. Of M&Ms (``<patient>_sa.nii.gz``, ``_sa_gt.nii.gz``, both 4-D) the two phases with labels
    are taken, the one with the larger LV as end-diastole; of M&Ms-2 ``<patient>_SA_ED.nii.gz``, ``_SA_ED_gt.nii.gz``
    and the same of ES, as frames 1 and 2. Group, vendor, centre, height and weight come from the challenge's table
    (``.csv``), wherever it lies below the folder.

    Args:
        root: folder of a challenge's files, with any folders between.
        output: folder to write to.

    Returns:
        What was done; patients that cannot be read are its failures.

    Raises:
        ValueError: if no file below the root is a challenge's labels.
        OutputError: if the output cannot be written.
    """
    root, output = Path(root), Path(output)
    check_folder(output)
    patients: dict[str, list[Path]] = {}
    for path in files_below(root):
        if match := LABELS.fullmatch(path.name):
            patients.setdefault(match["patient"], []).append(path)
    if not patients:
        raise ValueError(
            f"{root}: no such folder, or no labels of M&Ms (<patient>_sa_gt.nii.gz) or M&Ms-2 "
            "(<patient>_SA_ED_gt.nii.gz) in it or below. Give the folder of the challenge's unpacked files."
        )
    table, failures, turned = read_table(root), {}, 0
    for patient, files in tqdm(sorted(patients.items()), desc="import", unit="patient", disable=None):
        try:
            turned += import_patient(patient, files, table.get(patient.lstrip("0"), {}), output)
        except ValueError as error:
            failures[patient] = str(error)
    if missing := [patient for patient in patients if patient.lstrip("0") not in table]:
        print(f"Not in a table (.csv) below {root}: {', '.join(missing[:5])} ({len(missing)} in all).", file=sys.stderr)
    done = len(patients) - len(failures)
    lines = [f"{output}: end-diastole and end-systole of {done} patients, {turned} of them with the slices turned."]
    return Outcome("\n".join(lines + [f"FAILED {name}: {reason}" for name, reason in failures.items()]), failures)


def read_table(root: Path) -> dict[str, dict[str, str]]:
    """Entries of ``Info.cfg`` for each patient, whose leading zeros are left out, from a challenge's tables."""
    table = {}
    for path in sorted(root.rglob("*.csv")):
        for row in read_rows(path):
            if code := row.get("External code") or row.get("SUBJECT_CODE"):
                info = {
                    "Group": row.get("Pathology") or row.get("DISEASE"),
                    "Vendor": row.get("VendorName") or row.get("VENDOR"),
                    "Centre": row.get("Centre"),
                }
                info |= {name: row.get(name) for name, limits in PLAUSIBLE.items() if _lies_in(row.get(name), *limits)}
                table[code.strip().lstrip("0")] = {name: value.strip() for name, value in info.items() if value}
    return table


def _lies_in(text: str | None, low: float, high: float) -> bool:
    try:
        return low <= float(text or "nan") <= high
    except ValueError:
        return False


def import_patient(patient: str, files: list[Path], info: dict[str, str], output: Path) -> bool:
    """Write a patient's folder; returns whether the slices were turned.

    Raises:
        ValueError: if a file is damaged, labels do not fit their image, or there are not two phases with labels.
    """
    phases = [phase for path in files for phase in labelled_phases(path)]
    if len(phases) != 2:
        names = ", ".join(map(str, files))
        raise ValueError(f"{names}: {len(phases)} phase(s) with labels, but end-diastole and end-systole are needed.")
    named = LABELS.fullmatch(files[0].name)["phase"]
    ed, es = sorted(phases, key=lambda phase: phase[0] if named else -np.count_nonzero(phase[2] == 3))
    turn = slice_levels(ed[2])[:1] == ["apical"]
    folder = output / patient
    for frame, image, labels in (ed, es):
        if turn:
            image, labels = turned_slices(image), labels[..., ::-1]
        write_like(folder / f"{patient}_frame{frame:02d}.nii.gz", image.data, image)
        write_like(folder / f"{patient}_frame{frame:02d}_gt.nii.gz", labels, image)
    entries = {"ED": ed[0], "ES": es[0], "Group": "unknown"} | info
    write_text(folder / "Info.cfg", "".join(f"{name}: {value}\n" for name, value in entries.items()))
    return turn


def labelled_phases(path: Path) -> list[Phase]:
    """Phases of a label file that have any label."""
    match = LABELS.fullmatch(path.name)
    image = path.with_name(path.name.replace("_gt.nii", ".nii"))
    if match["phase"]:
        return [(1 + (match["phase"] == "ES"), *read_phase(image, path, None))]
    labels = read_volume(path, frame=0).image
    frames = np.flatnonzero(np.asanyarray(labels.dataobj).any(axis=(0, 1, 2)))
    return [(int(frame) + 1, *read_phase(image, path, int(frame))) for frame in frames]


def read_phase(image_file: Path, label_file: Path, frame: int | None) -> tuple[Volume, np.ndarray]:
    """Image and labels of a phase, in ACDC's numbers."""
    image, labels = read_volume(image_file, frame), read_labels(label_file, frame)
    labels = Volume(EXCHANGED[labels.data], labels.spacing, labels.image)
    try:
        check_order(labels.data, "")
    except ValueError:
        raise ValueError(
            f"{label_file}: label 3 lies in the myocardium and label 1 does not, so these are numbered as in ACDC, not "
            "as the challenges have them (1 LV, 3 RV)."
        ) from None
    return image, fit_reference(label_file, labels, image)


def turned_slices(volume: Volume) -> Volume:
    """The same stack in the other order of slices, each at its place in the patient."""
    shape, header = volume.data.shape, volume.image.header.copy()
    affine = volume.image.affine @ nib.orientations.inv_ornt_aff([[0, 1], [1, 1], [2, -1]], shape)
    zooms = header.get_zooms()
    if says_how_it_lies(header):
        header.set_sform(affine, int(header["sform_code"]))
        header.set_qform(affine, int(header["qform_code"]))
        header.set_zooms(zooms)
    return Volume(volume.data[..., ::-1], volume.spacing, nib.Nifti1Image(volume.data, None, header))
