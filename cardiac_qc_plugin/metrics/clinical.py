"""Clinical indices and their agreement with the reference (paper, section IV and Table II)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES, check_labels, check_spacing
from cardiac_qc_plugin.metrics.statistics import mean_sd, paired_values, pearson


@dataclass(frozen=True)
class ClinicalIndices:
    """End-diastolic and end-systolic volumes (ml), ejection fractions (%), LVM mass at end-diastole (g)."""

    lv_edv: float
    lv_esv: float
    lv_ef: float
    rv_edv: float
    rv_esv: float
    rv_ef: float
    lvm_mass: float


@dataclass(frozen=True)
class Agreement:
    """Agreement of an index with its reference, in the index's unit; undefined numbers are nan.

    Attributes:
        bias: mean of automatic - reference.
        sd: sample standard deviation (ddof = 1) of these differences.
        mae: mean absolute difference.
        r: Pearson correlation.
        n: patients with both values.
        n_excluded: patients in whom either value is nan.
    """

    bias: float
    sd: float
    mae: float
    r: float
    n: int
    n_excluded: int


def structure_volumes(labels: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Volume of each structure: number of voxels times the volume of a voxel.

    Args:
        labels: shape (H, W, D), values 0-3.
        spacing: (row, column, slice) in mm.

    Returns:
        Volumes in ml by class name (`CLASS_NAMES`).

    Raises:
        ValueError: for unknown labels or an invalid spacing.
    """
    counts = np.bincount(check_labels(labels, "labels").ravel(), minlength=len(CLASS_NAMES) + 1)
    voxel_ml = check_spacing(spacing).prod() / 1000
    return {name: float(counts[label] * voxel_ml) for label, name in CLASS_NAMES.items()}


def clinical_indices(
    ed_labels: np.ndarray,
    es_labels: np.ndarray,
    spacing_ed: Sequence[float],
    spacing_es: Sequence[float],
    density: float = 1.05,
) -> ClinicalIndices:
    """EDV, ESV and EF of both ventricles and the mass of the LVM (paper, section IV).

    EF = 100 (EDV - ESV) / EDV. A mask without the cavity at end-diastole has no EF (nan); an EF below zero is
    given as it is, since it tells of a failed segmentation.

    Args:
        ed_labels: labels at end-diastole, shape (H, W, D), values 0-3.
        es_labels: labels at end-systole, shape (H', W', D'), values 0-3.
        spacing_ed: (row, column, slice) in mm at end-diastole.
        spacing_es: the same at end-systole.
        density: of myocardium, in g/ml. The paper gives none; 1.05 is the usual value.

    Returns:
        The indices.

    Raises:
        ValueError: for unknown labels, an invalid spacing or a density that is not positive.
    """
    if not density > 0:
        raise ValueError(f"density must be positive (g/ml), got {density}")
    ed, es = structure_volumes(ed_labels, spacing_ed), structure_volumes(es_labels, spacing_es)
    return ClinicalIndices(
        lv_edv=ed["LV"],
        lv_esv=es["LV"],
        lv_ef=_ejection_fraction(ed["LV"], es["LV"]),
        rv_edv=ed["RV"],
        rv_esv=es["RV"],
        rv_ef=_ejection_fraction(ed["RV"], es["RV"]),
        lvm_mass=density * ed["LVM"],
    )


def _ejection_fraction(edv: float, esv: float) -> float:
    return 100 * (edv - esv) / edv if edv > 0 else float("nan")


def agreement(automatic: ArrayLike, reference: ArrayLike) -> Agreement:
    """Bias, spread, mean absolute error and correlation of one index (paper, Table II, after Bernard et al.).

    Args:
        automatic: shape (N,), one value per patient, nan where undefined.
        reference: shape (N,), same patients in the same order.

    Returns:
        The agreement over the patients with both values, and how many were excluded.

    Raises:
        ValueError: if the lengths differ or a value is infinite.
    """
    automatic, reference, n_excluded = paired_values(automatic, reference)
    difference = mean_sd(automatic - reference)
    return Agreement(
        bias=difference.mean,
        sd=difference.sd,
        mae=mean_sd(np.abs(automatic - reference)).mean,
        r=pearson(automatic, reference),
        n=difference.n,
        n_excluded=n_excluded,
    )
