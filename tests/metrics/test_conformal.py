"""Conformal risk control against its formula, its theorem, and the choice without correction, which breaks promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cardiac_qc_plugin.metrics.conformal import InfeasibleRisk, control_risk


def never_rising(shape):
    values = arrays(float, shape, elements=st.sampled_from(np.linspace(0, 1, 9).tolist()))
    return values.map(lambda losses: np.sort(losses, axis=1)[:, ::-1])


shapes = st.tuples(st.integers(2, 12), st.integers(1, 8))


@settings(max_examples=200, deadline=None)
@given(shapes.flatmap(never_rising), st.floats(0.01, 0.99))
def test_the_index_is_the_infimum_of_the_formula(losses, alpha):
    n = len(losses)
    fitting = [k for k in range(losses.shape[1]) if n / (n + 1) * losses[:, k].mean() + 1 / (n + 1) <= alpha + 1e-9]
    if fitting:
        assert control_risk(losses, alpha) == min(fitting)
    else:
        with pytest.raises(InfeasibleRisk) as caught:
            control_risk(losses, alpha)
        assert caught.value.smallest == pytest.approx(n / (n + 1) * losses[:, -1].mean() + 1 / (n + 1))
        assert caught.value.smallest > alpha


@settings(max_examples=300, deadline=None)
@given(shapes.flatmap(never_rising), st.floats(0.01, 0.99))
def test_whoever_is_left_out_the_mean_loss_is_as_promised(losses, alpha):
    """The theorem, for a finite bag of patients: over all choices of the one that is new, the mean is at most alpha."""
    total = 0.0
    for new in range(len(losses)):
        try:
            total += losses[new, control_risk(np.delete(losses, new, axis=0), alpha)]
        except InfeasibleRisk:
            pass  # no promise, no loss
    assert total / len(losses) <= alpha + 1e-6


def test_the_promise_is_kept_for_new_patients_and_hardly_more_than_kept():
    """All failures of a patient have one probability, so that it loses all or nothing."""
    rng, alpha, n, draws = np.random.default_rng(0), 0.25, 9, 1500
    thresholds = np.linspace(1, 0, 200)
    promised, uncorrected = [], []
    for _ in range(draws):
        losses = (rng.random(n + 1)[:, None] < thresholds).astype(float)
        promised.append(losses[-1, control_risk(losses[:-1], alpha)])
        uncorrected.append(losses[-1, np.argmax(losses[:-1].mean(axis=0) <= alpha)])
    error = 0.5 / np.sqrt(draws)
    assert alpha - 2 / (n + 1) <= np.mean(promised) <= alpha + 2 * error
    assert np.mean(uncorrected) > alpha + 2 * error  # the plain choice breaks the promise, so the check could fail


@pytest.mark.parametrize(
    "losses, message",
    [([0.5, 0.1], "shape"), ([[0.1, 0.5]], "rises"), ([[1.5, 0.1]], "outside"), (np.empty((0, 3)), "shape")],
)
def test_losses_of_another_kind(losses, message):
    with pytest.raises(ValueError, match=message):
        control_risk(losses, 0.1)


def test_a_share_that_just_fits():
    assert control_risk(np.zeros((9, 1)), 1 - 0.9) == 0  # 1 - 0.9 < 0.1 in floating point
