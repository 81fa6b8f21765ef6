"""Means, paired samples and the significance tests of the paper's tables (section IV)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class MeanSd:
    """Mean and sample standard deviation (ddof = 1) of the `n` values that are not nan."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class SignificanceTest:
    """Two-sided test over `n` complete pairs; `n_excluded` had a nan. With n = 0 the numbers are nan."""

    statistic: float
    p_value: float
    n: int
    n_excluded: int


def mean_sd(values: ArrayLike) -> MeanSd:
    """Mean and sample standard deviation, nan not counted.

    The released code mixed two definitions of the spread between the rows of one table; here every spread is
    the standard deviation over volumes (or patients) with ddof = 1.

    Args:
        values: shape (N,), any unit; nan marks a value that does not count.

    Returns:
        Mean (nan where no value counts), standard deviation (nan below two values) and number of values.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if values.size else float("nan")
    sd = float(values.std(ddof=1)) if values.size > 1 else float("nan")
    return MeanSd(mean, sd, int(values.size))


def paired_values(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray, int]:
    """Drop the pairs in which either value is nan.

    Args:
        first: shape (N,).
        second: shape (N,), in the same order of patients.

    Returns:
        Both arrays without those pairs, as float64, and the number of dropped pairs.

    Raises:
        ValueError: if the arrays are not one-dimensional and equally long, or hold an infinite value.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"paired values must be two equally long lists, got shapes {first.shape} and {second.shape}; "
            "give one value per patient in both, nan where it is undefined"
        )
    if np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("paired values hold inf; mark an undefined value with nan, so that it is counted as excluded")
    complete = ~(np.isnan(first) | np.isnan(second))
    return first[complete], second[complete], int((~complete).sum())


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson correlation; nan where it is undefined (fewer than two pairs, or one side constant).

    Args:
        first: shape (N,), finite.
        second: shape (N,), finite, in the same order.

    Returns:
        Correlation coefficient in [-1, 1].

    Raises:
        ValueError: if the lengths differ or a value is not finite.
    """
    first, second, n_excluded = paired_values(first, second)
    if n_excluded:
        raise ValueError(
            f"pearson got {n_excluded} pair(s) with nan; exclude them with paired_values and report how many"
        )
    if first.size < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(stats.pearsonr(first, second).statistic)


def mann_whitney_u(first: ArrayLike, second: ArrayLike) -> SignificanceTest:
    """Two-sided Mann-Whitney U test, the paper's test (section IV).

    It ignores the pairing. A pair with a nan is dropped from both samples all the same, so that this test and
    `wilcoxon_signed_rank` speak about the same patients.

    Args:
        first: shape (N,), one value per patient.
        second: shape (N,), same patients in the same order.

    Returns:
        U of `first`, p, and the counts.

    Raises:
        ValueError: see `paired_values`.
    """
    first, second, n_excluded = paired_values(first, second)
    if first.size == 0:
        return SignificanceTest(float("nan"), float("nan"), 0, n_excluded)
    result = stats.mannwhitneyu(first, second, alternative="two-sided")
    return SignificanceTest(float(result.statistic), float(result.pvalue), first.size, n_excluded)


def wilcoxon_signed_rank(first: ArrayLike, second: ArrayLike) -> SignificanceTest:
    """Two-sided Wilcoxon signed-rank test: the same patients before and after correction are paired data.

    Pairs without a difference (patients in whom nothing was corrected) are left out, as Wilcoxon did; if all are
    such pairs, p = 1.

    Args:
        first: shape (N,), one value per patient.
        second: shape (N,), same patients in the same order.

    Returns:
        Smaller of the two rank sums, p, and the counts (pairs without a difference are part of `n`).

    Raises:
        ValueError: see `paired_values`.
    """
    first, second, n_excluded = paired_values(first, second)
    if first.size == 0:
        return SignificanceTest(float("nan"), float("nan"), 0, n_excluded)
    changes = (first - second)[first != second]  # given the others as well, scipy approximates p, however few changed
    if not changes.size:
        return SignificanceTest(0.0, 1.0, first.size, n_excluded)
    result = stats.wilcoxon(changes, alternative="two-sided")
    return SignificanceTest(float(result.statistic), float(result.pvalue), first.size, n_excluded)
