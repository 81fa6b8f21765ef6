"""Detection of segmentation failures per region, slice and scan (paper, section IV, Fig. 3 and Table III).

A region is a cell of the detector's grid (8 x 8 voxels of a slice in the paper). Positive: p >= threshold.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score

from cardiac_qc_plugin.metrics.statistics import MeanSd, mean_sd, paired_values

THRESHOLDS = tuple(np.linspace(0, 1, 40))
"""The released code's thresholds; the paper names none."""


@dataclass(frozen=True, eq=False)
class VolumeDetection:
    """What the detector said about one volume of D slices, and what was true.

    Attributes:
        probability: of failure, per region, shape (N,), in [0, 1].
        failure_voxels: number of failure voxels, per region, shape (N,).
        slice_index: slice of each region, shape (N,), 0 to D - 1; every slice has a region, since a slice
            with an empty mask is cropped at its center (paper, V-B).
        failure_voxels_outside: number of failure voxels outside the detector's crop, per slice, shape (D,).
            They cannot be found and count as missed.

    Raises:
        ValueError: if the arrays do not fit together.
    """

    probability: np.ndarray
    failure_voxels: np.ndarray
    slice_index: np.ndarray
    failure_voxels_outside: np.ndarray

    def __post_init__(self) -> None:
        probability = np.asarray(self.probability, dtype=float)  # one precision for every p >= threshold
        in_range = (probability >= 0) & (probability <= 1)
        if probability.ndim != 1 or probability.size == 0 or not in_range.all():
            raise ValueError(f"probability must be a list of numbers in [0, 1], got {_describe(probability)}")
        object.__setattr__(self, "probability", probability)
        for name in ("failure_voxels", "slice_index", "failure_voxels_outside"):
            object.__setattr__(self, name, _check_counts(getattr(self, name), name))
        if not self.probability.shape == self.failure_voxels.shape == self.slice_index.shape:
            raise ValueError(
                f"probability {self.probability.shape}, failure_voxels {self.failure_voxels.shape} and "
                f"slice_index {self.slice_index.shape} differ in shape; give one entry per region"
            )
        slices, n_slices = np.unique(self.slice_index).tolist(), self.failure_voxels_outside.size
        if slices != list(range(n_slices)):
            raise ValueError(
                f"regions lie in the slices {slices}, but failure_voxels_outside has {n_slices} slices; "
                "every slice needs at least one region, and every region a slice"
            )

    @property
    def n_failure_voxels(self) -> int:
        """Failure voxels in the volume, inside and outside the crops."""
        return int(self.failure_voxels.sum() + self.failure_voxels_outside.sum())

    @property
    def slice_probability(self) -> np.ndarray:
        """Largest probability of each slice's regions, shape (D,)."""
        largest = np.zeros(self.failure_voxels_outside.size)
        np.maximum.at(largest, self.slice_index, self.probability)
        return largest

    @property
    def slice_failing(self) -> np.ndarray:
        """Whether each slice has a failure voxel, inside or outside the crop, shape (D,)."""
        inside = np.bincount(self.slice_index, weights=self.failure_voxels)
        return inside + self.failure_voxels_outside > 0


@dataclass(frozen=True, eq=False)
class RegionCurve:
    """Voxel detection rate against false positive regions (paper, Fig. 3a); arrays of shape (K,).

    Attributes:
        thresholds: ascending.
        sensitivity: share of a volume's failure voxels in positive regions, mean over the volumes with
            failures.
        false_positives: positive regions without a failure voxel per volume, mean over all volumes.
        n_volumes: all volumes.
        n_without_failures: volumes without a failure, not part of `sensitivity`.
    """

    thresholds: np.ndarray
    sensitivity: np.ndarray
    false_positives: np.ndarray
    n_volumes: int
    n_without_failures: int


@dataclass(frozen=True, eq=False)
class SlicePrecisionRecall:
    """Mean precision and recall of slices (paper, Fig. 3b); arrays of shape (K,), thresholds ascending."""

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    average_precision: float


@dataclass(frozen=True, eq=False)
class PatientAveragePrecision:
    """Average precision of slices by patient (nan without a failing slice), and the number of nan."""

    by_patient: dict[Hashable, float]
    spread: MeanSd
    n_excluded: int


@dataclass(frozen=True)
class OperatingPoint:
    """Detection at one threshold. Shares in [0, 1], nan where nothing can be divided.

    Attributes:
        threshold: positive means p >= threshold.
        voxel_sensitivity: as in `RegionCurve`.
        false_positive_regions: mean number per volume, as in `RegionCurve`.
        region_precision: share of the flagged regions of all volumes that have a failure voxel.
        region_recall: share of the failing regions of all volumes that are flagged. Only regions inside the
            crops.
        regions_flagged: share of all regions.
        regions_failing: share of all regions.
        slice_precision: share of the flagged slices of all volumes that have a failure.
        slice_recall: share of the failing slices of all volumes that are flagged.
        slices_flagged: share of all slices.
        slices_failing: share of all slices.
        failure_voxels_outside: share of all failure voxels that lie outside the crops.
        n_volumes: number of volumes.
        n_slices: number of slices.
        n_regions: number of regions.
    """

    threshold: float
    voxel_sensitivity: float
    false_positive_regions: float
    region_precision: float
    region_recall: float
    regions_flagged: float
    regions_failing: float
    slice_precision: float
    slice_recall: float
    slices_flagged: float
    slices_failing: float
    failure_voxels_outside: float
    n_volumes: int
    n_slices: int
    n_regions: int


def region_curve(volumes: Sequence[VolumeDetection], thresholds: ArrayLike = THRESHOLDS) -> RegionCurve:
    """Mean voxel sensitivity against the mean number of false positive regions (paper, IV and Fig. 3a).

    Failure voxels outside the crops stay in the denominator of the sensitivity (the released code dropped
    them).

    Args:
        volumes: at least one.
        thresholds: ascending, shape (K,).

    Returns:
        The curve; its sensitivity is nan if no volume has a failure.

    Raises:
        ValueError: if there are no volumes, or the thresholds do not ascend.
    """
    _check_volumes(volumes)
    thresholds = _check_thresholds(thresholds)
    false_positives = [sum_positive(v.probability, v.failure_voxels == 0, thresholds) for v in volumes]
    sensitivity = [
        sum_positive(v.probability, v.failure_voxels, thresholds) / v.n_failure_voxels
        for v in volumes
        if v.n_failure_voxels
    ]
    return RegionCurve(
        thresholds=thresholds,
        sensitivity=np.mean(sensitivity, axis=0) if sensitivity else np.full(thresholds.shape, np.nan),
        false_positives=np.mean(false_positives, axis=0),
        n_volumes=len(volumes),
        n_without_failures=len(volumes) - len(sensitivity),
    )


def slice_precision_recall(
    volumes: Sequence[VolumeDetection], thresholds: ArrayLike = THRESHOLDS
) -> SlicePrecisionRecall:
    """Mean precision and recall of slices that need correction (paper, IV and Fig. 3b), as released.

    Per volume, then averaged over volumes at the same threshold: recall is 1 if the volume has no failing
    slice, precision is 1 if none of its slices is positive. Average precision is the sum of P dR along this
    mean curve, from R = 0 at the highest threshold. See `patient_average_precision` for the wording of the
    paper's Table III.

    Args:
        volumes: at least one.
        thresholds: ascending, shape (K,). Recall reaches 1, and average precision its full area, only from 0
            on.

    Returns:
        The mean curve and its average precision.

    Raises:
        ValueError: if there are no volumes, or the thresholds do not ascend.
    """
    _check_volumes(volumes)
    thresholds = _check_thresholds(thresholds)
    precision, recall = np.ones((2, len(volumes), thresholds.size))
    for i, volume in enumerate(volumes):
        score, failing = volume.slice_probability, volume.slice_failing
        found = sum_positive(score, failing, thresholds)
        flagged = sum_positive(score, np.ones_like(failing), thresholds)
        np.divide(found, flagged, out=precision[i], where=flagged > 0)
        if failing.any():
            recall[i] = found / failing.sum()
    precision, recall = precision.mean(axis=0), recall.mean(axis=0)
    steps = np.diff(recall[::-1], prepend=0)
    return SlicePrecisionRecall(thresholds, precision, recall, float(precision[::-1] @ steps))


def patient_average_precision(
    volumes: Sequence[VolumeDetection], patients: Sequence[Hashable]
) -> PatientAveragePrecision:
    """Average precision of slices with failures per patient, the wording of the paper's Table III.

    Args:
        volumes: at least one.
        patients: patient of each volume; the slices of a patient's volumes (end-diastole, end-systole) are
            pooled. Give a different value to each volume for one average precision per volume.

    Returns:
        Average precision of each patient; patients without a failing slice have none (nan) and are counted.

    Raises:
        ValueError: if there are no volumes, or not one patient for each.
    """
    if len(patients) != len(volumes):
        raise ValueError(f"got {len(patients)} patients for {len(volumes)} volumes; name the patient of each volume")
    members: dict[Hashable, list[VolumeDetection]] = {}
    for patient, volume in zip(patients, volumes, strict=True):
        members.setdefault(patient, []).append(volume)
    by_patient = {patient: pooled_average_precision(own) for patient, own in members.items()}
    spread = mean_sd(list(by_patient.values()))
    return PatientAveragePrecision(by_patient, spread, n_excluded=len(by_patient) - spread.n)


def pooled_average_precision(volumes: Sequence[VolumeDetection]) -> float:
    """Average precision of slices with failures over the slices of all volumes together.

    Args:
        volumes: at least one.

    Returns:
        Average precision in (0, 1], nan if no slice has a failure.

    Raises:
        ValueError: if there are no volumes.
    """
    _check_volumes(volumes)
    return _average_precision([v.slice_failing for v in volumes], [v.slice_probability for v in volumes])


def region_average_precision(volumes: Sequence[VolumeDetection]) -> float:
    """Average precision of regions with failures over the regions of all volumes together.

    Args:
        volumes: at least one.

    Returns:
        Average precision in (0, 1], nan if no region has a failure.

    Raises:
        ValueError: if there are no volumes.
    """
    _check_volumes(volumes)
    return _average_precision([v.failure_voxels > 0 for v in volumes], [v.probability for v in volumes])


def failing_slice_percentage(volumes: Sequence[VolumeDetection]) -> float:
    """Percentage of a volume's slices that have a failure, mean over volumes (paper, Table III).

    Args:
        volumes: at least one.

    Returns:
        Percentage in [0, 100].

    Raises:
        ValueError: if there are no volumes.
    """
    _check_volumes(volumes)
    return float(100 * np.mean([v.slice_failing.mean() for v in volumes]))


def operating_point(volumes: Sequence[VolumeDetection], threshold: float) -> OperatingPoint:
    """What a reader meets who works with one threshold.

    Args:
        volumes: at least one.
        threshold: positive means p >= threshold.

    Returns:
        Figures at that threshold.

    Raises:
        ValueError: if there are no volumes.
    """
    curve = region_curve(volumes, [threshold])
    region_failing = np.concatenate([v.failure_voxels for v in volumes]) > 0
    region_flagged = np.concatenate([v.probability for v in volumes]) >= threshold
    slice_failing = np.concatenate([v.slice_failing for v in volumes])
    slice_flagged = np.concatenate([v.slice_probability for v in volumes]) >= threshold
    n_outside = sum(int(v.failure_voxels_outside.sum()) for v in volumes)
    n_failures = sum(v.n_failure_voxels for v in volumes)
    return OperatingPoint(
        threshold=float(threshold),
        voxel_sensitivity=float(curve.sensitivity[0]),
        false_positive_regions=float(curve.false_positives[0]),
        region_precision=_share(region_failing[region_flagged]),
        region_recall=_share(region_flagged[region_failing]),
        regions_flagged=_share(region_flagged),
        regions_failing=_share(region_failing),
        slice_precision=_share(slice_failing[slice_flagged]),
        slice_recall=_share(slice_flagged[slice_failing]),
        slices_flagged=_share(slice_flagged),
        slices_failing=_share(slice_failing),
        failure_voxels_outside=n_outside / n_failures if n_failures else float("nan"),
        n_volumes=curve.n_volumes,
        n_slices=slice_failing.size,
        n_regions=region_failing.size,
    )


def choose_threshold(volumes: Sequence[VolumeDetection], beta: float = 2.0) -> float:
    """Operating threshold with the largest F-beta over the regions of all volumes.

    To be called with validation patients, never with the test fold. Every distinct probability is tried; of
    equally good thresholds the highest, which flags fewest regions, is taken.

    Args:
        volumes: validation volumes, at least one failing region among them.
        beta: weight of recall against precision. 2, because a missed failure reaches the patient's report
            while a false region costs a reader one look.

    Returns:
        Threshold: positive means p >= threshold.

    Raises:
        ValueError: if there are no volumes, no failing region, or beta is not positive.
    """
    _check_volumes(volumes)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    probability = np.concatenate([v.probability for v in volumes])
    failing = np.concatenate([v.failure_voxels for v in volumes]) > 0
    if not failing.any():
        raise ValueError(f"none of the {failing.size} regions fails, so no threshold can be chosen; add volumes")
    thresholds = np.unique(probability)
    found = sum_positive(probability, failing, thresholds)
    flagged = sum_positive(probability, np.ones_like(failing), thresholds)
    f_beta = (1 + beta**2) * found / (beta**2 * failing.sum() + flagged)
    return float(thresholds[np.flatnonzero(f_beta == f_beta.max())[-1]])


def aurc(failure_score: ArrayLike, risk: ArrayLike) -> float:
    """Area under the risk-coverage curve of scans: does the score put the bad scans last? Lower is better.

    With the scans in ascending order of their failure score, the selective risk at coverage k/N is the mean
    risk of the first k; the area is the mean of it over k = 1..N. So a score without information has the mean
    risk as its expected area. Scans with equal scores share their mean risk, which is the expectation over
    their orders. (Code derived from fd-shifts integrates the same curve by the trapezoidal rule from coverage
    1/N on: without ties its area is smaller by (first + last selective risk) / 2N.)

    Args:
        failure_score: shape (N,), larger is more likely to have failed; give the negative of a confidence.
        risk: shape (N,), for instance 1 - mean Dice.

    Returns:
        Area, in the unit of `risk`.

    Raises:
        ValueError: if the lengths differ, there is no scan, or a value is not finite.
    """
    failure_score, risk, n_excluded = paired_values(failure_score, risk)
    if n_excluded or not risk.size:
        raise ValueError(
            f"aurc got {risk.size} complete scans and {n_excluded} with nan; leave these out and report it"
        )
    _, rank, sizes = np.unique(failure_score, return_inverse=True, return_counts=True)
    tied_mean = np.bincount(rank, weights=risk) / sizes
    selective_risk = tied_mean.repeat(sizes).cumsum() / np.arange(1, risk.size + 1)
    return float(selective_risk.mean())


def _average_precision(failing: Sequence[np.ndarray], score: Sequence[np.ndarray]) -> float:
    """Over all of them together; nan if nothing fails."""
    failing = np.concatenate(failing)
    return float(average_precision_score(failing, np.concatenate(score))) if failing.any() else float("nan")


def sum_positive(score: np.ndarray, weight: np.ndarray, thresholds: ArrayLike) -> np.ndarray:
    """Sum of the weights whose score is at or above each threshold, shape of `thresholds`."""
    order = np.argsort(score)
    from_here_on = np.append(weight[order][::-1].cumsum()[::-1], 0)
    return from_here_on[np.searchsorted(score[order], thresholds, side="left")]


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if hits.size else float("nan")


def _check_volumes(volumes: Sequence[VolumeDetection]) -> None:
    if len(volumes) == 0:
        raise ValueError("got no volumes; give at least one VolumeDetection")


def _check_thresholds(thresholds: ArrayLike) -> np.ndarray:
    checked = np.asarray(thresholds, dtype=float)
    if checked.ndim != 1 or checked.size == 0 or np.isnan(checked).any() or np.any(np.diff(checked) <= 0):
        raise ValueError(f"thresholds must be an ascending list of numbers, got {thresholds}")
    return checked


def _check_counts(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not np.all((values >= 0) & (values == np.floor(values))):
        raise ValueError(f"{name} must be a list of whole numbers >= 0, got {_describe(values)}")
    return values.astype(np.int64)


def _describe(values: np.ndarray) -> str:
    span = f" with values {values.min()} to {values.max()}" if values.size else ""
    return f"shape {values.shape}{span}"
