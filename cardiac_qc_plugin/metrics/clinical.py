"""Clinical indices and their agreement with the reference (paper, section IV and Table II)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES, check_labels, check_spacing
from cardiac_qc_plugin.metrics.statistics import mean_sd, paired_values, pearson

DENSITY = 1.05
"""Of myocardium, g/ml. The paper gives none; this is the usual value."""
ENOUGH_PHASES = 12
"""Of a cine, to tell a jump from a beat; ACDC's have that many at least."""


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


def indices_of_volumes(ed: Mapping[str, float], es: Mapping[str, float]) -> ClinicalIndices:
    """EDV, ESV and EF of both ventricles and the mass of the LVM (paper, section IV), from volumes of two phases.

    EF = 100 (EDV - ESV) / EDV. A mask without the cavity at end-diastole has no EF (nan); an EF below zero is
    given as it is, since it tells of a failed segmentation.

    Args:
        ed: volumes in ml at end-diastole by class name (`CLASS_NAMES`).
        es: the same at end-systole.
    """
    return ClinicalIndices(
        lv_edv=ed["LV"],
        lv_esv=es["LV"],
        lv_ef=_ejection_fraction(ed["LV"], es["LV"]),
        rv_edv=ed["RV"],
        rv_esv=es["RV"],
        rv_ef=_ejection_fraction(ed["RV"], es["RV"]),
        lvm_mass=DENSITY * ed["LVM"],
    )


def _ejection_fraction(edv: float, esv: float) -> float:
    return 100 * (edv - esv) / edv if edv > 0 else float("nan")


def body_surface_area(height_cm: float, weight_kg: float) -> float:
    """Body surface area in m² (Mosteller, NEJM 317, 1987): the root of height in cm times weight in kg over 3600.

    Raises:
        ValueError: unless both are positive.
    """
    if not (height_cm > 0 and weight_kg > 0):
        raise ValueError(f"height and weight must be positive (cm, kg), got {height_cm} and {weight_kg}")
    return float(np.sqrt(height_cm * weight_kg / 3600))


def volume_jumps(volumes: ArrayLike, tolerance: float = 0.1) -> list[int]:
    """Phases of a cine whose volume stands out from both neighbors: hearts do not do that, failed segmentations do.

    A phase stands out if it differs from the median of itself and its two neighbors by more than `tolerance` of the
    cine's largest volume that does not stand out. The last phase and the first are neighbors, since a cine covers one
    cycle. In a cine of fewer than `ENOUGH_PHASES` a beat itself is as steep, so that nothing is called a jump.

    Args:
        volumes: shape (phases,), ml; at least 3.
        tolerance: share of the largest volume.

    Raises:
        ValueError: for other than one axis of at least three finite volumes.
    """
    return _repair(volumes, tolerance)[1]


def _repair(volumes: ArrayLike, tolerance: float = 0.1) -> tuple[np.ndarray, list[int]]:
    """The volumes with jumps replaced by the mean of their neighbors, and the jumps, see `volume_jumps`."""
    repaired, jumps = np.array(volumes, dtype=float), []
    if repaired.ndim != 1 or repaired.size < 3 or not np.isfinite(repaired).all():
        raise ValueError(f"volumes must be three or more finite numbers on one axis, got {repaired}")
    while ENOUGH_PHASES <= repaired.size > len(jumps):
        before, after = np.roll(repaired, 1), np.roll(repaired, -1)
        deviation = np.abs(repaired - np.median([before, repaired, after], axis=0))
        worst = int(deviation.argmax())
        if deviation[worst] <= tolerance * repaired.max():
            break
        jumps.append(worst)
        repaired[worst] = (before[worst] + after[worst]) / 2  # so that its neighbors do not stand out in turn
    return repaired, sorted(set(jumps))


def find_ed_es(lv_volumes: ArrayLike) -> tuple[int, int]:
    """End-diastole and end-systole: the phases with the largest and the smallest LV volume.

    Jumps, and phases without an LV, are left aside.

    Of phases whose volumes are within 1 % of the largest, or a tenth of the change if that is less, end-diastole is the
    last before end-systole, when contraction begins, and end-systole the one whose neighbors are the smallest too.

    Args:
        lv_volumes: shape (phases,), ml; at least 3.

    Returns:
        Indices of both phases.

    Raises:
        ValueError: as `volume_jumps`, or if there is no LV in any phase, or one that never changes.
    """
    volumes = np.asarray(lv_volumes, dtype=float)
    repaired, jumps = _repair(volumes)
    trusted = np.setdiff1d(np.flatnonzero(volumes), jumps)  # a phase without an LV is a failure in any cine
    if not trusted.size:
        raise ValueError("no phase has an LV, so there is no end-diastole")
    smooth = (np.roll(repaired, 1) + 2 * repaired + np.roll(repaired, -1)) / 4

    change = float(np.ptp(volumes[trusted]))
    if change == 0:
        raise ValueError("the LV's volume does not change, so there is no end-diastole")
    close = min(0.01 * repaired.max(), 0.1 * change)
    smallest = trusted[volumes[trusted] <= volumes[trusted].min() + close]
    largest = trusted[volumes[trusted] >= volumes[trusted].max() - close]
    es = int(smallest[np.argmin(smooth[smallest])])
    return int(largest[np.argmin((es - largest) % volumes.size)]), es


def slice_levels(labels: np.ndarray) -> list[str]:
    """Third of the left ventricle that each slice of a stack shows: ``"basal"``, ``"mid"`` or ``"apical"``.

    Slices beyond the left ventricle count to the third next to them. The slices may be in either order: the base is the
    end toward which the heart is larger, in all of ACDC's 200 reference volumes the first slice. (The right ventricle
    alone does not tell: at end-systole it may begin below the base.)

    Args:
        labels: shape (H, W, D), slices last: 1 RV, 2 LVM, 3 LV.

    Returns:
        One name for each slice; none if there are fewer than three slices of left ventricle to divide.
    """
    inside = np.flatnonzero(np.isin(labels, (2, 3)).any(axis=(0, 1)))
    if inside.size < 3:
        return []
    first, count = inside[0], inside[-1] - inside[0] + 1
    index, area = np.arange(labels.shape[2]), (labels > 0).sum(axis=(0, 1))
    third = np.clip((index - first) * 3 // count, 0, 2)
    heart = np.flatnonzero(area)
    if np.average(index, weights=area) > (heart[0] + heart[-1]) / 2:
        third = 2 - third
    return [("basal", "mid", "apical")[level] for level in third]


def sample_interval(
    value: float, samples: ArrayLike, level: float = 0.95, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float, float]:
    """Interval around an index from the same index of Monte Carlo samples.

    ``value`` plus and minus Student's quantile for T - 1 degrees of freedom times the samples' standard deviation
    (ddof = 1). It is centered on the reported value, because single samples are neither averaged nor reduced to
    their largest component.

    Args:
        value: the index of the reported segmentation.
        samples: shape (T,), the index of each sample.
        level: of the interval.
        bounds: least and largest possible value, where the interval ends at the latest.

    Returns:
        Lower and upper end; nan with fewer than two samples or where a sample has no such index.
    """
    samples = np.asarray(samples, dtype=float)
    if samples.size < 2:
        return float("nan"), float("nan")
    half = float(student_t.ppf((1 + level) / 2, samples.size - 1) * samples.std(ddof=1))
    return max(value - half, bounds[0]), min(value + half, bounds[1])


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
