"""A hand-made output folder of ``run`` and its references, in ACDC's layout and with ACDC's headers."""

import json

import nibabel as nib
import numpy as np
from scipy.spatial.distance import directed_hausdorff

SHAPE, SPACING = (96, 96, 4), (1.5, 1.5, 8.0)
REGION = 8
# one per slice; the last reaches beyond the image
BOXES = [[8, 88, 8, 88], [8, 88, 0, 80], [0, 80, 16, 96], [24, 104, -8, 72]]


def heart(scale):
    """LV (3), LVM (2), RV (1) in the first three slices, smaller toward the apex; the last is empty."""
    labels = np.zeros(SHAPE, np.uint8)
    rows, cols = np.indices(SHAPE[:2])
    for z in range(3):
        size = scale * (1 - 0.2 * z)
        lv = np.hypot(rows - 48, cols - 54)
        labels[..., z][np.hypot(rows - 48, cols - 30) < 13 * size] = 1
        labels[..., z][lv < 16 * size] = 2
        labels[..., z][lv < 10 * size] = 3
    return labels


def spoiled(labels, seed):
    """A segmentation with errors: a shifted slice, a bitten RV, a blob below the apex, and a far blob."""
    rng = np.random.default_rng(seed)
    result = labels.copy()
    result[..., 0] = np.roll(labels[..., 0], rng.integers(3, 7), axis=int(rng.integers(2)))
    result[:48, :, 1][result[:48, :, 1] == 1] = 0
    result[40:46, 50:57, 3] = 3
    row = rng.integers(80, 90)
    result[row : row + 4, 20:24, 2] = 2
    return result


def save(path, array, spacing=SPACING):
    """The spacing in pixdim only; the affine says 1 mm, as in ACDC."""
    image = nib.Nifti1Image(array, np.diag([-1, -1, 1, 1]))
    image.set_sform(image.affine, code=2)
    image.set_qform(None, code=0)
    image.header.set_zooms(spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def load(path):
    return np.asanyarray(nib.load(path).dataobj)


def hausdorff(first, second):
    """Distance in mm of two masks."""
    a, b = (np.argwhere(mask) * SPACING for mask in (first, second))
    return max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])


def cells_inside(box):
    """Row, column, and the part in the image of every cell of a box that has one."""
    for i in range((box[1] - box[0]) // REGION):
        for j in range((box[3] - box[2]) // REGION):
            top, left = box[0] + i * REGION, box[2] + j * REGION
            rows, cols = (
                slice(max(top, 0), min(top + REGION, SHAPE[0])),
                slice(max(left, 0), min(left + REGION, SHAPE[1])),
            )
            if rows.start < rows.stop and cols.start < cols.stop:
                yield i, j, rows, cols


def write_case(folder, prediction, reference, seed, threshold=0.5):
    """All files of a case; the probability of a region follows the errors in it, with noise."""
    rng = np.random.default_rng(seed)
    wrong = prediction != reference
    probability, regions = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint16)
    for z, box in enumerate(BOXES):
        for _, _, rows, cols in cells_inside(box):
            value = np.clip(0.1 + 0.05 * wrong[rows, cols, z].sum() + rng.normal(0, 0.2), 0, 1)
            probability[rows, cols, z] = value
            if value >= threshold:
                regions[rows, cols, z] = regions.max() + 1
    save(folder / "segmentation.nii.gz", prediction)
    save(folder / "failure_probability.nii.gz", probability)
    save(folder / "failure_regions.nii.gz", regions)
    for name, noise in (("entropy", 0.8), ("bayesian", 0.5)):
        values = (1 - noise) * wrong + noise * rng.random(SHAPE)
        save(folder / f"{name}.nii.gz", values.round(2).astype(np.float32))  # rounded: ties
    detection = {"map": "bmap", "threshold": threshold, "region_size": REGION, "boxes": BOXES}
    scores = {"sample_disagreement": float(wrong.mean()), "region_failure": float(seed)}
    if seed == 0:
        scores["region_failure"] = None  # undefined
    (folder / "qc.json").write_text(json.dumps({"detection": detection, "scores": scores}))


def write_patients(root, n_patients):
    """Predictions in ``run``, references in ``acdc``: ED is frame 1, ES frame 5.

    Returns (prediction, reference) by case.
    """
    cases = {}
    for number in range(n_patients):
        patient = f"patient{number + 1:03d}"
        for frame, scale in ((1, 1.0 + 0.1 * number), (5, 0.8)):
            case, seed = f"{patient}_frame{frame:02d}", 2 * number + (frame == 5)
            reference = heart(scale)
            prediction = spoiled(reference, seed)
            save(root / "acdc" / patient / f"{case}_gt.nii.gz", reference)
            save(root / "acdc" / patient / f"{case}.nii.gz", reference.astype(np.int16) * 50)  # the scan
            write_case(root / "run" / case, prediction, reference, seed)
            cases[case] = prediction, reference
        (root / "acdc" / patient / "Info.cfg").write_text("ED: 1\nES: 5\nGroup: NOR\nNbFrame: 9\n")
    return cases
