import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist

from cardiac_qc_plugin.data.phantom import ShortAxisPhantom
from cardiac_qc_plugin.metrics import CLASS_NAMES, StructureScore, dice_and_hausdorff, summarize
from cardiac_qc_plugin.metrics.segmentation import check_labels, check_order

SPACING = (1.5, 1.25, 10.0)


def surface(mask):
    """Voxels of the mask with a face neighbor that is background or beyond the image, by plain loops."""
    found = []
    for voxel in np.argwhere(mask):
        for axis, step in itertools.product(range(3), (-1, 1)):
            neighbor = voxel.copy()
            neighbor[axis] += step
            inside = np.all((neighbor >= 0) & (neighbor < mask.shape))
            if not inside or not mask[tuple(neighbor)]:
                found.append(voxel)
                break
    return np.array(found)


def brute_force_hausdorff(first, second, spacing):
    distances = cdist(surface(first) * spacing, surface(second) * spacing)
    return max(distances.min(axis=0).max(), distances.min(axis=1).max())


def heart(shape=(20, 18, 5)):
    labels = np.zeros(shape, np.uint8)
    labels[4:16, 3:9, 1:4] = 1
    labels[6:14, 9:17, 1:4] = 2
    labels[8:12, 11:15, 1:4] = 3
    return labels


def test_perfect_segmentation():
    scores = dice_and_hausdorff(heart(), heart(), SPACING)
    assert scores == {name: StructureScore(1.0, 0.0, 0.0, False) for name in ("RV", "LVM", "LV")}


def test_hand_computed():
    prediction, reference = np.zeros((2, 10, 12, 4), np.uint8)
    reference[2:4, 2:4, 1:3] = 3  # 8 voxels
    prediction[2:4, 2:5, 1:4] = 3  # 12 more columns and slices: 2 * 3 * 3 = 18 voxels, 8 shared
    score = dice_and_hausdorff(prediction, reference, SPACING)["LV"]
    assert score.dice == pytest.approx(2 * 8 / (8 + 18))
    assert score.hausdorff == pytest.approx(math.hypot(1.25, 10))  # one column and one slice too far
    assert score.hausdorff_penalized == score.hausdorff
    assert not score.missing


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.uint8, (5, 4, 3), elements=st.integers(0, 3)),
    arrays(np.uint8, (5, 4, 3), elements=st.integers(0, 3)),
    st.tuples(*[st.floats(0.5, 10)] * 3),
)
def test_brute_force_on_noise_that_touches_every_edge(prediction, reference, spacing):
    for label, name in CLASS_NAMES.items():
        score = dice_and_hausdorff(prediction, reference, spacing)[name]
        ours, theirs = prediction == label, reference == label
        if ours.any() and theirs.any():
            assert score.hausdorff == pytest.approx(brute_force_hausdorff(ours, theirs, spacing), rel=1e-5)
            assert score.hausdorff < np.linalg.norm(np.multiply(spacing, ours.shape))
            shared = sum(1 for a, b in zip(ours.flat, theirs.flat, strict=True) if a and b)
            assert score.dice == pytest.approx(2 * shared / (ours.sum() + theirs.sum()))


@pytest.mark.parametrize("corner", itertools.product((0, 1), repeat=3))
def test_solid_structures_at_the_edge_of_the_image(corner):
    # A solid block has an interior, so a surface that the crop invented or lost would show.
    prediction, reference = np.zeros((2, 14, 13, 7), np.uint8)
    low = [slice(-8, None) if far else slice(0, 8) for far in corner[:2]] + [slice(-5, None)]
    high = [slice(-5, None) if far else slice(0, 5) for far in corner[:2]] + [slice(0, 5)]
    prediction[tuple(low)], reference[tuple(high)] = 1, 1
    score = dice_and_hausdorff(prediction, reference, SPACING)["RV"]
    assert score.hausdorff == pytest.approx(brute_force_hausdorff(prediction == 1, reference == 1, SPACING), rel=1e-6)


def test_a_ring_is_measured_to_its_inner_surface_too():
    reference = np.zeros((15, 15, 3), np.uint8)
    reference[2:13, 2:13] = 2
    prediction = reference.copy()
    prediction[5:10, 5:10] = 0  # the filled disk has no surface in its middle slice
    score = dice_and_hausdorff(prediction, reference, (1.0, 1.0, 9.0))["LVM"]
    expected = brute_force_hausdorff(prediction == 2, reference == 2, (1.0, 1.0, 9.0))
    assert score.hausdorff == pytest.approx(expected) and expected > 0


@pytest.mark.parametrize("missing_in", ["prediction", "reference"])
def test_structure_in_one_mask_only(missing_in):
    full, without = heart(), heart()
    without[without == 1] = 0
    masks = (without, full) if missing_in == "prediction" else (full, without)
    scores = dice_and_hausdorff(*masks, SPACING)
    diagonal = math.sqrt((20 * 1.5) ** 2 + (18 * 1.25) ** 2 + (5 * 10.0) ** 2)
    assert scores["RV"].dice == 0 and math.isnan(scores["RV"].hausdorff) and scores["RV"].missing
    assert scores["RV"].hausdorff_penalized == pytest.approx(diagonal)
    assert scores["LV"] == StructureScore(1.0, 0.0, 0.0, False)


def test_structure_in_neither_mask_is_not_counted():
    without = heart()
    without[without == 1] = 0
    score = dice_and_hausdorff(without, without, SPACING)["RV"]
    assert math.isnan(score.dice) and math.isnan(score.hausdorff) and math.isnan(score.hausdorff_penalized)
    assert not score.missing


def test_no_warning_escapes_and_inputs_stay():
    prediction, reference = np.roll(heart(), 2, axis=0), heart()
    prediction[prediction == 3] = 0
    before = prediction.copy(), reference.copy()
    with warnings.catch_warnings(record=True) as escaped:
        warnings.simplefilter("always")
        dice_and_hausdorff(prediction, reference, SPACING)
    assert not escaped
    np.testing.assert_array_equal(prediction, before[0])
    np.testing.assert_array_equal(reference, before[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, ">i2"])
def test_any_label_type(dtype):
    prediction, reference = np.roll(heart(), 2, axis=1), heart()
    scores = dice_and_hausdorff(prediction.astype(dtype), reference.astype(dtype), SPACING)
    assert scores == dice_and_hausdorff(prediction, reference, SPACING)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.float32, np.float64])
def test_labels_of_any_type_are_whole_numbers(dtype):
    labels = heart().astype(dtype)
    noise = np.random.default_rng(0).uniform(-9e-4, 9e-4, labels.shape) if dtype in (np.float32, np.float64) else 0
    found = check_labels((labels + noise).astype(dtype), "labels")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize(
    "value, quoted", [(4, "4"), (-1, "-1"), (1.5, "1.5"), (1.002, "1.002"), (np.nan, "nan"), (np.inf, "inf")]
)
def test_unknown_label_is_quoted(value, quoted):
    prediction = heart().astype(float)
    prediction[0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"prediction has the values \[{quoted}\.?0?\]"):
        dice_and_hausdorff(prediction, heart(), SPACING)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint64])
def test_the_ends_of_integers_are_no_labels(dtype):
    for value in {np.iinfo(dtype).min, np.iinfo(dtype).max} - {0}:
        with pytest.raises(ValueError, match="labels has the values"):
            check_labels(np.full((2, 2, 2), value, dtype), "labels")


@pytest.mark.parametrize("seed", [0, 1])
def test_exchanged_ventricles_are_refused(seed):
    """And nothing else is: no side of the body, and no label map that lacks a structure."""
    labels = ShortAxisPhantom(seed=seed, shape=(112, 112)).frame()[1]
    for good in (
        labels,
        labels[::-1],
        labels[:, ::-1],
        np.where(labels == 1, 0, labels),
        np.where(labels > 1, 0, labels),
    ):
        check_order(good, "labels")
    check_order(np.zeros_like(labels), "labels")
    with pytest.raises(ValueError, match="^a_gt.nii.gz: label 1 lies in the myocardium and label 3 does not"):
        check_order(np.uint8([0, 3, 2, 1])[labels], "a_gt.nii.gz")


def test_unequal_shapes():
    with pytest.raises(ValueError, match=r"prediction \(20, 18, 4\) and reference \(20, 18, 5\)"):
        dice_and_hausdorff(heart()[..., :4], heart(), SPACING)
    with pytest.raises(ValueError, match=r"\(1, 20, 18, 5\)"):
        dice_and_hausdorff(heart()[None], heart()[None], SPACING)


@pytest.mark.parametrize("spacing", [(1.5, 1.5), (1.5, 1.5, 0.0), (1.5, 1.5, np.nan), 1.5])
def test_invalid_spacing(spacing):
    with pytest.raises(ValueError, match="spacing must be three positive numbers"):
        dice_and_hausdorff(heart(), heart(), spacing)


def test_summarize_by_hand():
    nan = float("nan")
    scores = [
        StructureScore(0.9, 4.0, 4.0, False),
        StructureScore(0.6, 8.0, 8.0, False),
        StructureScore(0.0, nan, 300.0, True),
        StructureScore(nan, nan, nan, False),
    ]
    summary = summarize(iter(scores))
    assert (summary.dice.mean, summary.dice.n) == (pytest.approx(0.5), 3)
    assert summary.dice.sd == pytest.approx(math.sqrt((0.16 + 0.01 + 0.25) / 2))
    assert (summary.hausdorff.mean, summary.hausdorff.n) == (6.0, 2)
    assert summary.hausdorff.sd == pytest.approx(math.sqrt(8))
    assert (summary.hausdorff_penalized.mean, summary.hausdorff_penalized.n) == (104.0, 3)
    assert (summary.n_missing, summary.n_absent) == (1, 1)
