import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cardiac_qc_plugin.metrics import voxel_risk_coverage

GRID = np.linspace(0, 1, 101)


def brute_force(prediction, reference, uncertainty, coverage):
    """One pass over the box for each threshold; slices of the box by explicit search."""
    box = tuple(
        slice(min(index), max(index) + 1) for index in ([v[axis] for v in np.argwhere(reference)] for axis in range(3))
    )
    prediction, reference, uncertainty = prediction[box], reference[box], uncertainty[box]
    points = [(0.0, 0)]
    for threshold in sorted(set(uncertainty.ravel().tolist())):
        kept = uncertainty <= threshold
        points.append((kept.sum() / kept.size, ((prediction != reference) & kept).sum()))
    return np.interp(coverage, *zip(*points, strict=True))


def small(elements):
    return arrays(np.uint8, (4, 5, 3), elements=elements)


@settings(max_examples=60, deadline=None)
@given(small(st.integers(0, 3)), small(st.integers(0, 3)), small(st.integers(0, 9)), st.integers(0, 20))
def test_brute_force_with_ties(prediction, reference, uncertainty, blank):
    reference.ravel()[:blank] = 0
    if not reference.any():
        reference[2, 2, 1] = 1
    curve = voxel_risk_coverage(prediction, reference, uncertainty / 10)
    np.testing.assert_allclose(curve.risk, brute_force(prediction, reference, uncertainty / 10, GRID), atol=1e-9)
    assert curve.n_errors + curve.n_errors_outside == np.sum(prediction != reference)


def one_row(prediction, reference, uncertainty, **options):
    return voxel_risk_coverage(*(np.reshape(v, (1, -1, 1)) for v in (prediction, reference, uncertainty)), **options)


def test_hand_computed():
    # Box: columns 1-4. Ascending uncertainty in it: .1 (right), .2 and .2 (one wrong), .9 (wrong).
    curve = one_row(
        [3, 1, 2, 0, 3, 0],
        [0, 1, 0, 0, 1, 0],
        [0.0, 0.1, 0.2, 0.2, 0.9, 1.0],
        coverage=[0, 0.25, 0.5, 0.75, 1],
    )
    np.testing.assert_allclose(curve.risk, [0, 0, 0.5, 1, 2])
    assert (curve.n_voxels, curve.n_errors, curve.n_errors_outside) == (4, 2, 1)


def test_equal_uncertainty_everywhere_is_the_diagonal():
    reference = np.ones((4, 4, 2), int)
    prediction = reference.copy()
    prediction[:2, :, 0] = 2
    curve = voxel_risk_coverage(prediction, reference, np.zeros((4, 4, 2)))
    np.testing.assert_allclose(curve.risk, 8 * GRID)


def test_perfect_and_worst_ranking():
    reference = np.ones((10, 10, 1), int)
    prediction = reference.copy()
    prediction[:3] = 3  # 30 of 100 voxels wrong
    wrong = (prediction != reference).astype(float)
    noise = np.random.default_rng(0).uniform(0, 0.5, wrong.shape)
    best = voxel_risk_coverage(prediction, reference, wrong + noise)
    worst = voxel_risk_coverage(prediction, reference, -wrong + noise)
    np.testing.assert_allclose(best.risk, np.maximum(0, 100 * GRID - 70), atol=1e-9)
    np.testing.assert_allclose(worst.risk, np.minimum(30, 100 * GRID), atol=1e-9)
    np.testing.assert_allclose(best.coverage, GRID)


def test_only_the_order_of_the_uncertainty_matters():
    rng = np.random.default_rng(1)
    prediction, reference = rng.integers(0, 4, (2, 8, 8, 4))
    uncertainty = rng.random((8, 8, 4)).astype(np.float32)
    curve = voxel_risk_coverage(prediction, reference, uncertainty)
    np.testing.assert_array_equal(curve.risk, voxel_risk_coverage(prediction, reference, uncertainty * 4 + 1).risk)
    assert np.all(np.diff(curve.risk) >= 0) and curve.risk[0] == 0 and curve.risk[-1] == curve.n_errors


def test_box_is_three_dimensional():
    reference = np.zeros((6, 6, 4), int)
    reference[1, 1, 1] = reference[3, 4, 2] = 1
    curve = voxel_risk_coverage(np.zeros_like(reference), reference, np.zeros(reference.shape))
    assert curve.n_voxels == 3 * 4 * 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reference": np.zeros((2, 2, 2), int)}, "no structure"),
        ({"uncertainty": np.zeros((2, 2, 3))}, r"uncertainty \(2, 2, 3\)"),
        ({"uncertainty": np.full((2, 2, 2), np.nan)}, "8 voxels that are not finite"),
        ({"prediction": np.full((2, 2, 2), 7)}, r"has the values \[7\]"),
        ({"coverage": [0, 50, 100]}, "got 0.0 to 100.0"),
    ],
)
def test_wrong_input(change, message):
    arguments = {name: np.ones((2, 2, 2), int) for name in ("prediction", "reference", "uncertainty")} | change
    with pytest.raises(ValueError, match=message):
        voxel_risk_coverage(**arguments)
