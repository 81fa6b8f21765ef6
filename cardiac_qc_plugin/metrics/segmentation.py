"""Overlap and surface distance of segmented volumes (paper, section IV and Table I)."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage

from cardiac_qc_plugin.metrics.statistics import MeanSd, mean_sd

CLASS_NAMES = {1: "RV", 2: "LVM", 3: "LV"}
"""Foreground labels: right-ventricular cavity, left-ventricular myocardium, left-ventricular cavity."""


@dataclass(frozen=True)
class StructureScore:
    """Scores of one structure in one volume.

    Attributes:
        dice: 3-D Dice coefficient; 0 if the structure is in only one of the two masks, nan if it is in
            neither.
        hausdorff: 3-D Hausdorff distance in mm; nan unless the structure is in both masks.
        hausdorff_penalized: the same, but the diagonal of the scan if the structure is in only one of the
            masks.
        missing: whether the structure is in only one of the two masks.
    """

    dice: float
    hausdorff: float
    hausdorff_penalized: float
    missing: bool


@dataclass(frozen=True)
class SegmentationSummary:
    """Scores of one structure over volumes; distances in mm, standard deviations with ddof = 1.

    Attributes:
        dice: over all volumes but the `n_absent`; a missing structure counts as 0.
        hausdorff: over the volumes in which both masks have the structure.
        hausdorff_penalized: over the volumes of `dice`; a missing structure counts as the diagonal of its
            scan.
        n_missing: volumes in which only one of the masks has the structure.
        n_absent: volumes in which neither mask has it.
    """

    dice: MeanSd
    hausdorff: MeanSd
    hausdorff_penalized: MeanSd
    n_missing: int
    n_absent: int


def check_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Check a label volume and give it back as uint8.

    Args:
        labels: shape (H, W, D), values 0 (background) to 3, of any numeric type; within 0.001 of these they are
            rounded, since a file with a scale gives 1.00000002 for 1.
        name: what to call it in an error message.

    Returns:
        The labels as uint8.

    Raises:
        ValueError: if it is not a three-dimensional, non-empty volume or has another label.
    """
    labels = np.asarray(labels)
    if labels.ndim != 3 or labels.size == 0:
        raise ValueError(
            f"{name} must be a label volume (H, W, D), got shape {labels.shape}; drop channel and batch axes"
        )
    with np.errstate(invalid="ignore"):  # nan is no label either
        whole = labels.round().astype(np.uint8)
        known = (np.abs(labels - whole) <= 1e-3) & (whole <= max(CLASS_NAMES))  # ten times as fast as np.isin
        known &= (labels > -1) & (labels < max(CLASS_NAMES) + 1)  # a difference of integers may have overflown
    if not known.all():
        listed = ", ".join(f"{label} {structure}" for label, structure in CLASS_NAMES.items())
        raise ValueError(
            f"{name} has the values {np.unique(labels[~known])[:5].tolist()}; labels are 0 background, {listed} "
            "(map other conventions to these first, and resample label maps by nearest neighbor)."
        )
    return whole


def check_order(labels: np.ndarray, name: str) -> None:
    """Refuse references whose RV and LV are exchanged, as data sets that number the LV 1 and the RV 3 have them.

    Of the pixels beside the LV in a slice the LVM takes 98 to 100 % in ACDC's references, of those beside the RV 20 to
    39 % (100 volumes).

    Args:
        labels: labels 0 to 3, (H, W, D).
        name: what to call it in an error message.

    Raises:
        ValueError: if the LVM encloses what is numbered RV, and not what is numbered LV.
    """
    rv, lvm, lv = CLASS_NAMES
    cross = ndimage.generate_binary_structure(2, 1)[..., None]
    enclosed = {}
    for label in (rv, lv):
        inside = labels == label
        beside = labels[ndimage.binary_dilation(inside, cross) & ~inside]
        enclosed[label] = np.mean(beside == lvm) if beside.size else np.nan
    if enclosed[rv] > 0.75 > enclosed[lv]:
        raise ValueError(
            f"{name}: label 1 lies in the myocardium and label 3 does not, so RV and LV are exchanged, as in M&Ms. "
            "Labels are 1 RV, 2 LVM, 3 LV: map others to these first (of M&Ms and M&Ms-2 pipeline.py import_mnms does)."
        )


def check_spacing(spacing: Sequence[float]) -> np.ndarray:
    """Check a voxel spacing.

    Args:
        spacing: (row, column, slice) in mm.

    Returns:
        The spacing, shape (3,), float64.

    Raises:
        ValueError: if it does not have three positive, finite numbers.
    """
    checked = np.asarray(spacing, dtype=float)
    if checked.shape != (3,) or not np.all(np.isfinite(checked) & (checked > 0)):
        raise ValueError(f"spacing must be three positive numbers (row, column, slice) in mm, got {spacing}")
    return checked


def dice_and_hausdorff(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> dict[str, StructureScore]:
    """3-D Dice coefficient and 3-D Hausdorff distance of one volume (paper, section IV).

    The Hausdorff distance is taken between the surface voxels (those with a background face neighbor, or at
    the edge of the image) and in mm. A structure in neither mask is not counted (nan). A structure in only
    one of them gets Dice 0, a Hausdorff distance of nan, `missing`, and as penalized distance the diagonal of
    the scan's field of view including all slices, which no two voxels of it can exceed. (The released code
    gave it a perfect distance of 0.)

    Args:
        prediction: labels, shape (H, W, D), values 0-3.
        reference: labels, same shape and values.
        spacing: (row, column, slice) in mm.

    Returns:
        Scores by class name (`CLASS_NAMES`).

    Raises:
        ValueError: for unknown labels, unequal shapes or an invalid spacing.
    """
    prediction, reference = check_labels(prediction, "prediction"), check_labels(reference, "reference")
    if prediction.shape != reference.shape:
        raise ValueError(
            f"prediction {prediction.shape} and reference {reference.shape} differ in shape; "
            "bring the prediction back to the scan's own grid first"
        )
    spacing = check_spacing(spacing)
    diagonal = float(np.linalg.norm(spacing * prediction.shape))
    return {
        name: _structure_score(prediction == label, reference == label, spacing, diagonal)
        for label, name in CLASS_NAMES.items()
    }


def _structure_score(
    prediction: np.ndarray, reference: np.ndarray, spacing: np.ndarray, diagonal: float
) -> StructureScore:
    sizes = np.count_nonzero(prediction), np.count_nonzero(reference)
    if sizes == (0, 0):
        return StructureScore(float("nan"), float("nan"), float("nan"), missing=False)
    if 0 in sizes:
        return StructureScore(0.0, float("nan"), diagonal, missing=True)
    # All of both masks lies in the joint box, so what is outside is background, as beyond the edge of the
    # image: cropping moves no surface voxel.
    box = ndimage.find_objects((prediction | reference).view(np.int8))[0]
    prediction, reference = prediction[box], reference[box]
    dice = 2 * int(np.count_nonzero(prediction & reference)) / int(sum(sizes))
    distance = _hausdorff(prediction, reference, spacing)
    return StructureScore(dice, distance, distance, missing=False)


def _hausdorff(prediction: np.ndarray, reference: np.ndarray, spacing: np.ndarray) -> float:
    with warnings.catch_warnings():
        # MONAI 1.6 calls itself with an argument that it has deprecated.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        distance = compute_hausdorff_distance(
            prediction[None, None], reference[None, None], include_background=True, spacing=spacing.tolist()
        )
    return float(distance)


def summarize(scores: Iterable[StructureScore]) -> SegmentationSummary:
    """Aggregate the scores of one structure over volumes.

    Args:
        scores: one score per volume, all of the same structure (and, in the paper's tables, of the same
            phase).

    Returns:
        Means, sample standard deviations (ddof = 1) and counts.
    """
    scores = list(scores)
    return SegmentationSummary(
        dice=mean_sd([score.dice for score in scores]),
        hausdorff=mean_sd([score.hausdorff for score in scores]),
        hausdorff_penalized=mean_sd([score.hausdorff_penalized for score in scores]),
        n_missing=sum(score.missing for score in scores),
        n_absent=sum(bool(np.isnan(score.dice)) for score in scores),
    )
