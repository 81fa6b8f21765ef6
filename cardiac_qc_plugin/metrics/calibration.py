"""Voxel risk-coverage curves: does the uncertainty map cover the errors? (Paper, III-C and Fig. 4.)"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cardiac_qc_plugin.metrics.segmentation import check_labels

COVERAGES = tuple(np.linspace(0, 1, 101))
"""0 to 100 % in steps of 1 %, so that the curves of patients can be averaged point by point."""


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Risk-coverage curve of one volume.

    Attributes:
        coverage: share of the box's voxels that is segmented automatically, shape (K,), in [0, 1].
        risk: number of wrong voxels among these, shape (K,); a fraction of a voxel where interpolated.
        n_voxels: voxels in the box.
        n_errors: wrong voxels in the box: the risk at full coverage.
        n_errors_outside: wrong voxels outside the box, which the curve does not show.
    """

    coverage: np.ndarray
    risk: np.ndarray
    n_voxels: int
    n_errors: int
    n_errors_outside: int


def voxel_risk_coverage(
    prediction: np.ndarray,
    reference: np.ndarray,
    uncertainty: np.ndarray,
    coverage: Sequence[float] = COVERAGES,
) -> RiskCoverage:
    """Number of wrong voxels that remain when the most uncertain are referred to an expert (paper, III-C).

    The volume is cropped to the smallest 3-D box around the reference. A threshold keeps the voxels whose
    uncertainty is at or below it and refers the others; every distinct uncertainty is a threshold, so the
    curve is exact and not sampled at percentiles, and voxels of equal uncertainty are referred together.
    Between these points, and from (0, 0), risk is interpolated linearly. Risk and coverage are measured in
    the same box, unlike in the released code.

    Args:
        prediction: labels, shape (H, W, D), values 0-3.
        reference: labels, same shape and values.
        uncertainty: e-map or b-map, same shape; larger is less certain.
        coverage: shares in [0, 1] at which to give the risk.

    Returns:
        The curve at `coverage`, and the counts.

    Raises:
        ValueError: for unequal shapes, unknown labels, an empty reference, an uncertainty that is not finite,
            or a coverage outside [0, 1].
    """
    prediction, reference = check_labels(prediction, "prediction"), check_labels(reference, "reference")
    uncertainty, coverage = np.asarray(uncertainty), np.asarray(coverage, dtype=float)
    if not prediction.shape == reference.shape == uncertainty.shape:
        raise ValueError(
            f"prediction {prediction.shape}, reference {reference.shape} and uncertainty {uncertainty.shape} "
            "differ in shape; bring all to the scan's own grid first"
        )
    if not np.all(np.isfinite(uncertainty)):
        raise ValueError(f"uncertainty has {np.count_nonzero(~np.isfinite(uncertainty))} voxels that are not finite")
    if not np.all((coverage >= 0) & (coverage <= 1)):
        raise ValueError(f"coverage must lie in [0, 1] (1 = 100 %), got {coverage.min()} to {coverage.max()}")
    if not reference.any():
        raise ValueError("reference has no structure, so there is no box to crop to; leave this volume out")
    box = ndimage.find_objects((reference > 0).view(np.int8))[0]
    wrong = prediction != reference
    n_voxels, n_errors = _cumulative_by_uncertainty(wrong[box], uncertainty[box])
    return RiskCoverage(
        coverage=coverage,
        risk=np.interp(coverage, n_voxels / n_voxels[-1], n_errors),
        n_voxels=int(n_voxels[-1]),
        n_errors=int(n_errors[-1]),
        n_errors_outside=int(wrong.sum() - n_errors[-1]),
    )


def _cumulative_by_uncertainty(wrong: np.ndarray, uncertainty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, and wrong voxels, at or below each distinct uncertainty, ascending; both start with 0."""
    order = np.argsort(uncertainty, axis=None)
    ascending = uncertainty.ravel()[order]
    last = np.append(np.flatnonzero(ascending[1:] != ascending[:-1]), ascending.size - 1)  # of each distinct value
    return np.append(0, last + 1), np.append(0, wrong.ravel()[order].cumsum()[last])
