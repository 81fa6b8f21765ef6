"""A small folder of predictions as `run` leaves it, made by hand: a box of a heart with two wrong slices."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from cardiac_qc_plugin.workflows.files import file_sha256

PIPELINE = Path(__file__).resolve().parents[2] / "scripts" / "pipeline.py"
SHAPE, SPACING = (64, 48, 4), (1.5, 1.5, 8.0)
# number: slice, first row, first column, probability; region 2 lies beside region 1
REGIONS = {1: (1, 16, 16, 0.98), 2: (1, 24, 16, 0.95), 3: (3, 32, 24, 0.92)}


def automatic():
    """Labels: RV beside a ring of LVM around the LV, in three slices."""
    rows, cols = np.indices(SHAPE[:2])
    plane = np.zeros(SHAPE[:2], np.uint8)
    plane[np.hypot(rows - 18, cols - 20) < 9] = 1
    plane[np.hypot(rows - 34, cols - 26) < 12] = 2
    plane[np.hypot(rows - 34, cols - 26) < 7] = 3
    return np.repeat(plane[..., None], SHAPE[2], axis=2) * np.array([1, 1, 1, 0], np.uint8)


def flagged():
    labels = np.zeros(SHAPE, np.uint16)
    for number, (z, row, col, _) in REGIONS.items():
        labels[row : row + 8, col : col + 8, z] = number
    return labels


def save(path, array):
    image = nib.Nifti1Image(array, np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def write_predictions(root, cases=("p1_ed", "p1_es"), with_regions=True):
    """Cases of which the first is the most urgent; returns the folder of predictions."""
    for index, case in enumerate(cases):
        folder, scan = root / "run" / case, root / "scans" / f"{case}.nii.gz"
        labels, regions = automatic(), flagged() * with_regions
        save(scan, (labels * 60.0 + 20 + np.random.default_rng(index).normal(0, 5, SHAPE)).astype(np.float32))
        save(folder / "segmentation.nii.gz", labels)
        save(folder / "failure_regions.nii.gz", regions.astype(np.uint16))
        probability = np.full(SHAPE, 0.1, np.float32)
        for number, (*_, value) in REGIONS.items():
            probability[regions == number] = value
        save(folder / "failure_probability.nii.gz", probability)
        save(folder / "bayesian.nii.gz", (probability * 0.4).astype(np.float32))
        source = {"path": str(scan), "frame": None, "sha256": file_sha256(scan), "shape": SHAPE}
        listed = [{"id": number} for number in REGIONS] if with_regions else []
        detection = {"map": "bmap", "regions": listed, "threshold": 0.9, "region_size": 8}
        detection["boxes"] = [[8, 56, 8, 48]] * SHAPE[2]
        scores = {"region_failure": 1.0 - 0.1 * index, "urgency": 1.0 - 0.1 * index}
        qc = {"case": case, "input": source, "detection": detection, "scores": scores}
        (folder / "qc.json").write_text(json.dumps(qc))
    return root / "run"
