import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, fbeta_score

from cardiac_qc_plugin.metrics import (
    VolumeDetection,
    aurc,
    choose_threshold,
    failing_slice_percentage,
    operating_point,
    patient_average_precision,
    pooled_average_precision,
    region_curve,
    slice_precision_recall,
)

GRID = np.linspace(0, 1, 40)


def random_volume(rng, n_slices=6, n_cells=16, failing=0.1, levels=None):
    probability = rng.random(n_slices * n_cells)
    if levels:  # ties, and values on the thresholds
        probability = np.round(probability * levels) / levels
    return VolumeDetection(
        probability=probability,
        failure_voxels=rng.integers(1, 60, probability.size) * (rng.random(probability.size) < failing),
        slice_index=rng.permutation(np.repeat(np.arange(n_slices), n_cells)),
        failure_voxels_outside=rng.integers(1, 30, n_slices) * (rng.random(n_slices) < failing),
    )


@pytest.fixture
def volumes():
    rng = np.random.default_rng(0)
    mixed = [random_volume(rng, failing=failing, levels=39) for failing in (0.02, 0.1, 0.0, 0.3)]
    only_outside = VolumeDetection([0.9, 0.2], [0, 0], [0, 1], [0, 25])
    return [*mixed, only_outside, random_volume(rng)]


# Two slices of three regions; slice 1 also has 10 failure voxels outside the crop.
HAND = VolumeDetection(
    probability=[0.9, 0.6, 0.1, 0.4, 0.3, 0.2],
    failure_voxels=[20, 0, 0, 0, 0, 10],
    slice_index=[0, 0, 0, 1, 1, 1],
    failure_voxels_outside=[0, 10],
)
CLEAN = VolumeDetection([0.5, 0.1], [0, 0], [0, 1], [0, 0])


def test_region_curve_by_hand():
    curve = region_curve([HAND, CLEAN], [0.0, 0.2, 0.5, 0.9, 1.0])
    np.testing.assert_allclose(curve.sensitivity, np.array([30, 30, 20, 20, 0]) / 40)  # never finds the 10 outside
    np.testing.assert_allclose(curve.false_positives, np.array([4 + 2, 3 + 1, 1 + 1, 0, 0]) / 2)
    assert (curve.n_volumes, curve.n_without_failures) == (2, 1)


def test_region_curve_brute_force(volumes):
    curve = region_curve(volumes)
    np.testing.assert_array_equal(curve.thresholds, GRID)
    for k, theta in enumerate(GRID):
        sensitivities, false_positives = [], []
        for volume in volumes:
            positive = [p >= theta for p in volume.probability]
            cells = list(zip(positive, volume.failure_voxels, strict=True))
            false_positives.append(sum(1 for flagged, count in cells if flagged and count == 0))
            total = sum(volume.failure_voxels) + sum(volume.failure_voxels_outside)
            if total:
                sensitivities.append(sum(count for flagged, count in cells if flagged) / total)
        assert curve.sensitivity[k] == pytest.approx(np.mean(sensitivities))
        assert curve.false_positives[k] == pytest.approx(np.mean(false_positives))
    assert curve.n_without_failures == 1


@pytest.mark.filterwarnings("error")
def test_region_curve_without_any_failure():
    curve = region_curve([CLEAN], [0.0, 0.5])
    assert np.isnan(curve.sensitivity).all() and curve.n_without_failures == 1
    assert curve.false_positives.tolist() == [2, 1]


def slices_of(volume):
    """(largest probability, any failure) of each slice, by plain loops."""
    found = []
    for index, outside in enumerate(volume.failure_voxels_outside):
        cells = [i for i, s in enumerate(volume.slice_index) if s == index]
        failures = sum(volume.failure_voxels[i] for i in cells) + outside
        found.append((max(volume.probability[i] for i in cells), failures > 0))
    return found


@pytest.mark.parametrize("thresholds", [GRID, [0.2, 0.55, 0.97]])
def test_slice_precision_recall_brute_force(volumes, thresholds):
    result = slice_precision_recall(volumes, thresholds)
    for k, theta in enumerate(thresholds):
        precisions, recalls = [], []
        for volume in volumes:
            flags = [(p >= theta, truth) for p, truth in slices_of(volume)]
            hits = sum(flagged and truth for flagged, truth in flags)
            positives, predicted = sum(t for _, t in flags), sum(f for f, _ in flags)
            recalls.append(hits / positives if positives else 1)
            precisions.append(hits / predicted if predicted else 1)
        assert result.precision[k] == pytest.approx(np.mean(precisions))
        assert result.recall[k] == pytest.approx(np.mean(recalls))
    area, last = 0.0, 0.0
    for precision, recall in list(zip(result.precision, result.recall, strict=True))[::-1]:
        area += precision * (recall - last)
        last = recall
    assert result.average_precision == pytest.approx(area)


def test_slice_failure_outside_the_crop_is_true():
    volume = VolumeDetection([0.9, 0.1], [0, 0], [0, 1], [0, 5])
    assert volume.slice_failing.tolist() == [False, True]
    assert pooled_average_precision([volume]) == pytest.approx(0.5)


def test_one_volume_with_every_threshold_has_scikit_learns_average_precision():
    volume = random_volume(np.random.default_rng(3), n_slices=30, n_cells=4, failing=0.08)
    scores, truth = zip(*slices_of(volume), strict=True)
    expected = average_precision_score(truth, scores)
    assert slice_precision_recall([volume], np.unique(scores)).average_precision == pytest.approx(expected)
    assert pooled_average_precision([volume]) == pytest.approx(expected)


def test_patient_average_precision(volumes):
    result = patient_average_precision(volumes, ["a", "a", "b", "c", "c", "d"])
    for patient, members in {"a": [0, 1], "c": [3, 4], "d": [5]}.items():
        scores, truth = zip(*(pair for i in members for pair in slices_of(volumes[i])), strict=True)
        assert result.by_patient[patient] == pytest.approx(average_precision_score(truth, scores))
    assert math.isnan(result.by_patient["b"]) and (result.n_excluded, result.spread.n) == (1, 3)
    assert result.spread.mean == pytest.approx(np.mean([result.by_patient[p] for p in "acd"]))
    with pytest.raises(ValueError, match="2 patients for 6 volumes"):
        patient_average_precision(volumes, ["a", "b"])


def test_pooled_average_precision(volumes):
    scores, truth = zip(*(pair for volume in volumes for pair in slices_of(volume)), strict=True)
    assert pooled_average_precision(volumes) == pytest.approx(average_precision_score(truth, scores))
    assert math.isnan(pooled_average_precision([CLEAN]))


def test_failing_slice_percentage():
    one_of_four = VolumeDetection([0.1] * 4, [0, 3, 0, 0], range(4), [0] * 4)
    assert failing_slice_percentage([HAND, CLEAN, one_of_four]) == pytest.approx((100 + 0 + 25) / 3)


def test_operating_point_by_hand():
    point = operating_point([HAND, CLEAN], 0.4)  # flagged: .9 and .6 of slice 0, .4 of slice 1, .5 of the clean volume
    assert point.voxel_sensitivity == pytest.approx(20 / 40)
    assert point.false_positive_regions == pytest.approx((2 + 1) / 2)
    assert (point.region_precision, point.region_recall) == (pytest.approx(1 / 4), pytest.approx(1 / 2))
    assert (point.regions_flagged, point.regions_failing) == (pytest.approx(4 / 8), pytest.approx(2 / 8))
    assert (point.slice_precision, point.slice_recall) == (pytest.approx(2 / 3), pytest.approx(2 / 2))
    assert (point.slices_flagged, point.slices_failing) == (pytest.approx(3 / 4), pytest.approx(2 / 4))
    assert point.failure_voxels_outside == pytest.approx(10 / 40)
    assert (point.n_volumes, point.n_slices, point.n_regions) == (2, 4, 8)


@pytest.mark.filterwarnings("error")
def test_operating_point_with_nothing_to_divide():
    point = operating_point([CLEAN], 0.99)
    for value in (point.region_precision, point.region_recall, point.slice_precision, point.slice_recall):
        assert math.isnan(value)
    assert math.isnan(point.voxel_sensitivity) and math.isnan(point.failure_voxels_outside)
    assert (point.regions_flagged, point.false_positive_regions) == (0, 0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_chosen_threshold_is_the_best_of_all(volumes, beta):
    probability = np.concatenate([v.probability for v in volumes])
    truth = np.concatenate([v.failure_voxels for v in volumes]) > 0
    values = {t: fbeta_score(truth, probability >= t, beta=beta) for t in np.unique(probability)}
    assert values[choose_threshold(volumes, beta)] == pytest.approx(max(values.values()))


def test_chosen_threshold_on_separable_regions():
    volume = VolumeDetection([0.8, 0.7, 0.3, 0.2], [5, 1, 0, 0], [0, 0, 0, 0], [0])
    assert choose_threshold([volume]) == 0.7
    perfect = operating_point([volume], choose_threshold([volume]))
    assert (perfect.region_precision, perfect.region_recall) == (1, 1)


def test_larger_beta_never_flags_less(volumes):
    thresholds = [choose_threshold(volumes, beta) for beta in (0.25, 0.5, 1, 2, 4, 8)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert choose_threshold(volumes) == thresholds[3] < thresholds[2]  # recall weighs twice by default


def test_of_equally_good_thresholds_the_highest_is_chosen():
    failing = [
        1,
        1,
        0,
        0,
        1,
        *[0] * 10,
        1,
    ]  # F1 = 2 * 2 / (4 + 2) at the second region, 2 * 3 / (4 + 5) at the fifth
    volume = VolumeDetection(np.linspace(0.9, 0.1, 16), failing, [0] * 16, [0])
    assert choose_threshold([volume], beta=1) == volume.probability[1]


def test_probabilities_in_single_precision():
    volume = VolumeDetection(np.array([0.1, 0.7, 0.4], np.float32), [0, 4, 3], [0, 0, 0], [0])
    assert operating_point([volume], choose_threshold([volume])).region_recall == 1
    point = operating_point([volume], 0.7)  # the float32 is 0.69999999
    assert point.voxel_sensitivity == point.region_recall == point.slices_flagged == 0


def test_choose_threshold_errors():
    with pytest.raises(ValueError, match="none of the 2 regions fails"):
        choose_threshold([CLEAN])
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        choose_threshold([HAND], beta=0)


def brute_force_aurc(order, risk):
    return np.mean([np.mean([risk[i] for i in order[: k + 1]]) for k in range(len(order))])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_all_orders_of_ties(scans):
    score, risk = map(list, zip(*scans, strict=True))
    orders = [o for o in itertools.permutations(range(len(score))) if sorted(score) == [score[i] for i in o]]
    assert aurc(score, risk) == pytest.approx(np.mean([brute_force_aurc(o, risk) for o in orders]))


def test_aurc_ranks_scores():
    risk = np.random.default_rng(5).random(200)
    best, worst = aurc(risk, risk), aurc(-risk, risk)
    noise = [aurc(np.random.default_rng(seed).random(200), risk) for seed in range(100, 150)]
    assert best < min(noise) and max(noise) < worst
    assert np.mean(noise) == pytest.approx(risk.mean(), abs=0.02)
    assert aurc(np.zeros(200), risk) == pytest.approx(risk.mean())
    assert aurc(np.exp(3 * risk), risk) == pytest.approx(best)


def test_aurc_against_the_trapezoidal_rule():
    score, risk = np.random.default_rng(6).random((2, 40))
    selective = risk[np.argsort(score)].cumsum() / np.arange(1, 41)
    area = np.trapezoid(selective, dx=1 / 40) + (selective[0] + selective[-1]) / 80
    assert aurc(score, risk) == pytest.approx(area)


def test_aurc_errors():
    with pytest.raises(ValueError, match="1 complete scans and 1 with nan"):
        aurc([0.1, 0.2], [0.3, np.nan])
    with pytest.raises(ValueError, match="0 complete scans"):
        aurc([], [])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"probability": [0.5, 1.2]}, r"probability .* values 0.5 to 1.2"),
        ({"probability": [0.5, np.nan]}, r"probability"),
        ({"probability": []}, r"probability"),
        ({"failure_voxels": [1, -1]}, r"failure_voxels .* values -1 to 1"),
        ({"failure_voxels": [0.5, 1]}, r"failure_voxels .* whole numbers"),
        ({"failure_voxels": [1, 2, 3]}, r"failure_voxels \(3,\)"),
        ({"slice_index": [0, 2]}, r"slices \[0, 2\], but failure_voxels_outside has 2 slices"),
        ({"failure_voxels_outside": [0, 0, 4]}, r"has 3 slices; every slice needs at least one region"),
    ],
)
def test_volume_that_does_not_fit(change, message):
    arguments = {
        "probability": [0.5, 0.1],
        "failure_voxels": [1, 0],
        "slice_index": [0, 1],
        "failure_voxels_outside": [0, 0],
    }
    with pytest.raises(ValueError, match=message):
        VolumeDetection(**arguments | change)


@pytest.mark.parametrize("function", [region_curve, slice_precision_recall])
def test_thresholds_and_volumes_are_checked(function):
    with pytest.raises(ValueError, match="no volumes"):
        function([])
    for thresholds in ([0.5, 0.2], [0.5, 0.5], [], [0.1, np.nan], 0.5):
        with pytest.raises(ValueError, match="ascending"):
            function([HAND], thresholds)
