import itertools
import math

import numpy as np
import pytest
from scipy import stats

from cardiac_qc_plugin.metrics import mann_whitney_u, mean_sd, paired_values, pearson, wilcoxon_signed_rank

NAN = float("nan")


def test_mean_sd():
    result = mean_sd([2.0, NAN, 4.0, 9.0])
    assert (result.mean, result.n) == (5.0, 3)
    assert result.sd == pytest.approx(math.sqrt(26 / 2))


@pytest.mark.filterwarnings("error")
def test_mean_sd_of_too_few_values():
    assert math.isnan(mean_sd([]).mean) and mean_sd([NAN]).n == 0
    assert mean_sd([3.0]).mean == 3 and math.isnan(mean_sd([3.0]).sd)


def test_paired_values():
    first, second, n_excluded = paired_values([1, NAN, 3, 4], [5, 6, NAN, 8])
    assert first.tolist() == [1, 4] and second.tolist() == [5, 8] and n_excluded == 2


def test_pearson():
    assert pearson([1, 2, 3], [5, 3, 1]) == pytest.approx(-1)
    first, second = np.random.default_rng(0).normal(size=(2, 30))
    assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1])
    with pytest.raises(ValueError, match="1 pair"):
        pearson([1, NAN], [1, 2])


def test_mann_whitney_by_enumeration():
    first, second = np.array([1.2, 3.4, 0.5, 2.2]), np.array([4.1, 2.9, 5.5, 3.9])
    pooled = np.concatenate([first, second])

    def u_of(chosen):
        others = [i for i in range(8) if i not in chosen]
        return sum(pooled[i] > pooled[j] for i in chosen for j in others)

    counts = np.array([u_of(chosen) for chosen in itertools.combinations(range(8), 4)])
    u = u_of(range(4))
    result = mann_whitney_u(first, second)
    assert result.statistic == u
    assert result.p_value == pytest.approx(2 * min((counts <= u).mean(), (counts >= u).mean()))


def test_mann_whitney_is_two_sided_and_unpaired():
    rng = np.random.default_rng(2)
    first, second = rng.normal(0, 1, 60), rng.normal(0.4, 1, 60)
    one_sided = stats.mannwhitneyu(first, second, alternative="less").pvalue
    assert mann_whitney_u(first, second).p_value == pytest.approx(2 * one_sided, rel=1e-6)
    assert mann_whitney_u(first, rng.permutation(second)).p_value == mann_whitney_u(first, second).p_value


def test_wilcoxon_by_enumeration():
    difference = np.array([0.3, -1.1, 2.5, 4.0, -0.2, 3.3, 1.7])
    ranks = np.abs(difference).argsort().argsort() + 1
    observed = ranks[difference > 0].sum()
    sums = np.array([np.dot(ranks, signs) for signs in itertools.product((0, 1), repeat=7)])
    result = wilcoxon_signed_rank(10 + difference, np.full(7, 10.0))
    assert result.statistic == min(observed, ranks.sum() - observed)
    assert result.p_value == pytest.approx(2 * min((sums <= observed).mean(), (sums >= observed).mean()))


def test_wilcoxon_uses_the_pairing():
    rng = np.random.default_rng(3)
    before = rng.normal(0.85, 0.1, 100)
    after = before + rng.uniform(0.001, 0.01, 100)
    assert wilcoxon_signed_rank(before, after).p_value < 1e-10
    assert mann_whitney_u(before, after).p_value > 0.05


@pytest.mark.filterwarnings("error")
def test_wilcoxon_without_any_difference():
    result = wilcoxon_signed_rank([1.0, 2.0, NAN, 3.0], [1.0, 2.0, 5.0, 3.0])
    assert (result.p_value, result.n, result.n_excluded) == (1.0, 3, 1)


def test_unchanged_patients_do_not_count_in_the_ranks():
    before, after = np.array([1.0, 2.0, 3.5, 4.0, 6.0]), np.array([1.5, 1.8, 4.5, 4.1, 4.8])
    unchanged = np.arange(20.0)
    result = wilcoxon_signed_rank(np.append(before, unchanged), np.append(after, unchanged))
    assert result.n == 25
    assert result.statistic == 2 + 5  # ranks of the two decreases, 0.2 and 1.2, among five changes


@pytest.mark.parametrize("unchanged", [0, 20, 95])
def test_few_changes_among_many_patients_by_enumeration(unchanged):
    """Five patients that all gain: by chance one in 32 ways of signs, and as many to the other side."""
    before = np.arange(5.0 + unchanged)
    after = before + np.append([0.1, 0.2, 0.3, 0.4, 0.5], np.zeros(unchanged))
    assert wilcoxon_signed_rank(before, after).p_value == pytest.approx(2 / 2**5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("test", [mann_whitney_u, wilcoxon_signed_rank])
def test_pairs_with_nan_are_dropped_and_counted(test):
    first, second = np.random.default_rng(4).normal(size=(2, 30))
    with_nan = first.copy(), second.copy()
    with_nan[0][3], with_nan[1][[3, 7]] = NAN, NAN
    keep = np.delete(np.arange(30), [3, 7])
    expected, result = test(first[keep], second[keep]), test(*with_nan)
    assert (result.n, result.n_excluded) == (28, 2)
    assert (result.statistic, result.p_value) == (expected.statistic, expected.p_value)
    empty = test([NAN], [1.0])
    assert (empty.n, empty.n_excluded) == (0, 1) and math.isnan(empty.p_value)


@pytest.mark.parametrize("test", [mann_whitney_u, wilcoxon_signed_rank, pearson])
def test_wrong_input(test):
    with pytest.raises(ValueError, match="equally long"):
        test([1.0, 2.0], [1.0])
    for pair in (([1.0, np.inf], [1.0, 2.0]), ([1.0, 2.0], [-np.inf, 2.0])):
        with pytest.raises(ValueError, match="inf"):
            test(*pair)
