from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor

from cardiac_qc_plugin.transforms.failure_labels import (
    FailureCriterion,
    FailureLabel,
    FailureLabeld,
    failure_mask,
)

RELEASED = FailureCriterion.preset("released_code")


def brute_distance(mask, spacing):
    """Distance of each pixel to the nearest mask pixel that has a 4-neighbor outside the mask."""
    padded = np.pad(mask, 1)
    edge = [
        (i, j)
        for i, j in np.argwhere(mask)
        if not (padded[i, j + 1] and padded[i + 2, j + 1] and padded[i + 1, j] and padded[i + 1, j + 2])
    ]
    rows, cols = np.indices(mask.shape)
    return np.min([np.hypot((rows - i) * spacing[0], (cols - j) * spacing[1]) for i, j in edge], axis=0)


def brute_clusters(mask):
    """4-connected clusters of a 2-D mask as lists of pixels, by flood fill."""
    left, clusters = {tuple(pixel) for pixel in np.argwhere(mask).tolist()}, []
    while left:
        queue, cluster = [left.pop()], []
        while queue:
            i, j = queue.pop()
            cluster.append((i, j))
            for neighbor in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if neighbor in left:
                    left.remove(neighbor)
                    queue.append(neighbor)
        clusters.append(cluster)
    return clusters


def paper_rule(cluster, inside, distance, is_apex):
    if distance is None:
        return cluster  # a class that the reference slice does not have
    if len(cluster) < 10 and not is_apex:
        return []
    return [p for p in cluster if distance[p] > (2 if inside[p] else 3) + 1e-9]


def released_code_rule(cluster, inside, distance, is_apex):
    """The integer distance map of the released code, literally: subtract, truncate, test for > 0."""
    if is_apex:
        return cluster if len(cluster) >= 15 else []
    stored = [9999 if distance is None else int(max(distance[p] - (3.1 if inside[p] else 4.6), 0)) for p in cluster]
    return cluster if len(cluster) >= 10 and max(stored) > 0 else []


def oracle(prediction, reference, spacing, rule, apex):
    out = np.zeros(reference.shape, dtype=bool)
    labeled = [d for d in range(reference.shape[2]) if (reference[..., d] > 0).any()]
    apical = max(labeled) if apex == "last" else min(labeled)
    for d in range(reference.shape[2]):
        for label in (1, 2, 3):
            target = reference[..., d] == label
            errors = (prediction[..., d] == label) != target
            distance = brute_distance(target, spacing) if target.any() else None
            for cluster in brute_clusters(errors):
                for i, j in rule(cluster, target, distance, d == apical):
                    out[i, j, d] = True
    return out


def blocks():
    """Label volumes (18, 15, 3) of 3 x 3 blocks, so that clusters and distances of all sizes occur."""
    return arrays(np.uint8, (6, 5, 3), elements=st.sampled_from([0, 0, 0, 1, 2, 3, 3])).map(
        lambda a: a.repeat(3, axis=0).repeat(3, axis=1)
    )


@settings(max_examples=60, deadline=None)
@given(
    blocks(),
    blocks(),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(["last", "first"]),
)
@pytest.mark.parametrize(
    ("preset", "rule", "spacing", "rule_spacing"),
    [
        ("paper", paper_rule, None, (1, 1)),
        ("released_code", released_code_rule, (1.5625, 1.5625), (1.5625, 1.5625)),
        ("released_code", released_code_rule, (1.25, 1.68), (1.25, 1.68)),
    ],
)
def test_presets_agree_with_brute_force(preset, rule, spacing, rule_spacing, prediction, reference, empty, apex):
    reference = reference * ~np.array(empty)  # slices above the base and below the apex
    assume(reference.any())
    expected = oracle(prediction, reference, rule_spacing, rule, apex)
    np.testing.assert_array_equal(failure_mask(prediction, reference, spacing, preset, apex), expected)


@settings(max_examples=20, deadline=None)
@given(blocks(), blocks(), st.tuples(*[st.integers(0, 4)] * 4), st.sampled_from(["paper", "released_code"]))
def test_background_around_the_image_changes_nothing(prediction, reference, margin, preset):
    reference, prediction = (np.pad(v, [(1, 1), (1, 1), (0, 0)]) for v in (reference, prediction))
    assume(reference.any())
    widths = [margin[:2], margin[2:], (0, 0)]
    small = failure_mask(prediction, reference, (1.4, 1.4), preset)
    large = failure_mask(np.pad(prediction, widths), np.pad(reference, widths), (1.4, 1.4), preset)
    np.testing.assert_array_equal(large, np.pad(small, widths))


# --- smallest distance that counts: the table of section 6.2 of the comparison with the released code


def smallest_distances(criterion, spacing):
    """Smallest distances in voxels, (outside, inside), at which a single error is beyond tolerance."""
    criterion = replace(criterion, min_cluster=1, whole_component=False)
    rows, cols = np.indices((31, 31)) - 15
    point = np.zeros((31, 31, 2), np.uint8)
    point[15, 15] = 1  # outside distances: those to a single pixel; the second slice is the apex
    outside = failure_mask(np.ones_like(point), point, (spacing, spacing), criterion)[..., 0]
    hole = 1 - point  # inside distances: those to the 4 pixels around a hole
    missing = np.zeros_like(hole)
    inside = failure_mask(missing, hole, (spacing, spacing), criterion)[..., 0]
    to_rim = np.min([np.hypot(rows - i, cols - j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))], axis=0)
    return round(np.hypot(rows, cols)[outside].min(), 2), round(to_rim[inside].min(), 2)


@pytest.mark.parametrize(
    ("spacing", "truncated", "intended"),
    [
        (1.25, (5.00, 3.61), (4.00, 2.83)),
        (1.37, (4.12, 3.00), (3.61, 2.83)),
        (1.40, (4.00, 3.00), (3.61, 2.24)),
        (1.5625, (3.61, 2.83), (3.00, 2.00)),
        (1.68, (3.61, 2.83), (2.83, 2.00)),
    ],
)
def test_smallest_distances_in_mm(spacing, truncated, intended):
    assert smallest_distances(RELEASED, spacing) == truncated
    assert smallest_distances(RELEASED, float(np.float32(spacing))) == truncated
    float_map = replace(RELEASED, tolerance_outside=4.6, tolerance_inside=3.1, strict=True)
    assert smallest_distances(float_map, spacing) == intended


def test_paper_tolerance_is_strict_and_in_voxels():
    paper = FailureCriterion.preset("paper")
    assert paper == FailureCriterion()
    assert smallest_distances(paper, 1.4) == (3.16, 2.24)  # sqrt(10), sqrt(5)
    assert smallest_distances(replace(paper, strict=False), 1.4) == (3.0, 2.0)
    assert smallest_distances(replace(paper, tolerance_outside=0, tolerance_inside=0), 1.4) == (1.0, 1.0)
    scaled = replace(paper, unit="mm", tolerance_outside=3.3, tolerance_inside=2.2)
    for spacing in (1.1, float(np.float32(1.1))):  # 3 x 1.1 mm is not more than 3.3 mm, whatever the rounding
        assert smallest_distances(scaled, spacing) == (3.16, 2.24)


# --- clusters, apex, absent classes: small cases by hand ------------------------------------------


def heart(n_slices=3):
    """RV block with its lower boundary in row 9, in each slice of a 40 x 40 image."""
    reference = np.zeros((40, 40, n_slices), np.uint8)
    reference[2:10, 5:35] = 1
    return reference


def count(prediction, reference, criterion, **kwargs):
    return int(failure_mask(prediction, reference, (1.5625, 1.5625), criterion, **kwargs).sum())


def test_strip_of_77_voxels_with_50_beyond_tolerance():
    reference = heart()
    prediction = reference.copy()
    prediction[10:13, 10:19, 0] = 1  # 27 voxels at distances 1-3
    prediction[13:18, 10:20, 0] = 1  # 50 voxels at distances 4-8
    assert count(prediction, reference, "released_code") == 77
    assert count(prediction, reference, "paper") == 50
    np.testing.assert_array_equal(
        np.argwhere(failure_mask(prediction, reference)[..., 0]),
        np.argwhere(prediction[13:18, ..., 0]) + [13, 0],
    )
    assert count(prediction, reference, replace(RELEASED, whole_component=False)) == 50


def test_the_cluster_is_of_errors_not_of_voxels_beyond_tolerance():
    reference = heart()
    prediction = reference.copy()
    prediction[10:15, 10:12, 0] = 1  # 10 errors, 4 of them beyond tolerance
    assert count(prediction, reference, "paper") == 4
    prediction[10, 10, 0] = 0  # 9 errors
    assert count(prediction, reference, "paper") == 0


def test_clusters_are_4_connected_and_in_plane():
    reference = heart()
    prediction = reference.copy()
    prediction[20, 10:15, 0] = 1
    prediction[21, 15:20, 0] = 1  # touches by a corner only
    prediction[20, 10:15, 1] = 1  # touches across slices only
    assert count(prediction, reference, "paper") == 0
    prediction[21, 14, 0] = 1
    assert count(prediction, reference, "paper") == 11


@pytest.mark.parametrize(("apex", "apical"), [("last", 2), ("first", 1)])
def test_apical_slice(apex, apical):
    reference = np.pad(heart(2), [(0, 0), (0, 0), (1, 1)])  # labels in slices 1 and 2 of 4
    prediction = reference.copy()
    prediction[10, 10:24, apical] = 1  # 14 errors at distance 1
    assert count(prediction, reference, "paper", apex=apex) == 0
    assert count(prediction, reference, "released_code", apex=apex) == 0
    prediction[10, 24, apical] = 1
    assert count(prediction, reference, "released_code", apex=apex) == 15
    prediction[20, 10:14, apical] = 1  # far away, but few
    assert count(prediction, reference, "paper", apex=apex) == 4
    assert count(prediction, reference, "released_code", apex=apex) == 15
    prediction[30, 10:22, apical] = 3  # 12 voxels of a class that is absent there: the apex's rule has precedence
    assert count(prediction, reference, "released_code", apex=apex) == 15


def test_class_absent_from_the_reference_slice():
    reference = np.pad(heart(2), [(0, 0), (0, 0), (1, 1)])
    prediction = reference.copy()
    prediction[20, 10:13, 0] = 1  # above the base: 3 voxels
    prediction[4, 10:13, 1] = 3  # a slice with RV only: 3 voxels of LV, next to nothing of it
    assert count(prediction, reference, "paper") == 6
    assert count(prediction, reference, "released_code") == 0
    prediction[20, 10:20, 0] = 1
    assert count(prediction, reference, "released_code") == 10


def test_missing_structure_follows_the_inside_rule():
    reference = heart()
    failures = failure_mask(np.zeros_like(reference), reference)
    expected = np.zeros_like(failures)
    expected[5:7, 8:32] = True  # more than 2 voxels from the boundary rows 2, 9 and columns 5, 34
    np.testing.assert_array_equal(failures, expected)


def test_a_mislabeled_voxel_is_an_error_of_both_classes():
    reference = np.zeros((40, 40, 2), np.uint8)
    reference[5:35, 5:35] = 2
    reference[10:30, 10:30] = 3
    prediction = reference.copy()
    prediction[10:12, 10:30, 0] = 2  # tolerated inside LV (distances 0, 1) and outside LVM (1, 2)
    assert count(prediction, reference, "paper") == 0
    prediction[12, 10:30, 0] = 2  # inside LV 2, outside LVM 3, but for 2 columns at each end
    assert count(prediction, reference, "paper") == 0
    assert count(prediction, reference, {"tolerance_outside": 2.0, "tolerance_inside": 9}) == 16
    assert count(prediction, reference, {"tolerance_outside": 9, "tolerance_inside": 1}) == 16


def test_no_error_no_failure():
    assert count(heart(), heart(), "paper") == count(heart(), heart(), "released_code") == 0


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tolerance_outside": -1}, "tolerance_outside.*-1"),
        ({"tolerance_inside": float("nan")}, "tolerance_inside.*nan"),
        ({"min_cluster": 0}, "min_cluster.*0"),
        ({"apex_min_cluster": 1.5}, "apex_min_cluster.*1.5"),
        ({"absent_min_cluster": 0}, "absent_min_cluster.*0"),
        ({"unit": "cm"}, "cm"),
        ({"cluster": 10}, "cluster"),
        ("code", "code.*paper.*released_code"),
        (3, "3"),
    ],
)
def test_wrong_criterion(fields, message):
    with pytest.raises(ValueError, match=message):
        FailureCriterion.parse(fields)


@pytest.mark.parametrize(
    ("prediction", "reference", "options", "message"),
    [
        (heart()[..., 0], heart()[..., 0], {}, r"prediction.*\(40, 40\)"),
        (heart(2), heart(3), {}, r"reference.*\(40, 40, 3\)"),
        (heart() * 4, heart(), {}, r"prediction.*\[4\]"),
        (heart(), heart() - 0.5, {}, r"reference.*-0.5, 0.5"),
        (heart(), heart() * np.nan, {}, "reference.*nan"),
        (heart(), heart() * 0, {}, "reference has no label"),
        (heart(), heart(), {"apex": "top"}, "top"),
        (heart(), heart(), {"criterion": "released_code"}, "in-plane spacing"),
        (heart(), heart(), {"criterion": "released_code", "spacing": (1, 1, 5)}, "two positive.*5.0"),
        (heart(), heart(), {"criterion": "released_code", "spacing": (1, 0)}, "two positive.*0.0"),
    ],
)
def test_wrong_input(prediction, reference, options, message):
    with pytest.raises(ValueError, match=message):
        failure_mask(prediction, reference, **options)


# --- transforms -----------------------------------------------------------------------------------


def example():
    """Prediction and reference (1, H, W, D) whose failures depend on the spacing of both axes."""
    reference = heart()
    prediction = reference.copy()
    prediction[10:14, 10:14, 0] = 1  # up to 4 rows away
    prediction[2:10, 35:39, 1] = 1  # up to 4 columns away
    return prediction[None], reference[None]


def with_spacing(volume, spacing):
    return MetaTensor(torch.as_tensor(volume), affine=np.diag([*spacing, 8.0, 1.0]), meta={"patient": "p1"})


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_array_transform_keeps_the_kind(kind, dtype):
    prediction, reference = (kind(v.astype(dtype)) for v in example())
    label = FailureLabel()(prediction, reference)
    assert type(label) is type(prediction)
    assert str(label.dtype).endswith("uint8")
    np.testing.assert_array_equal(np.asarray(label)[0], failure_mask(*(v[0] for v in example())))


@pytest.mark.parametrize(("spacing", "slices"), [((1.4, 1.3), [0]), ((1.3, 1.4), [1]), ((1.4, 1.4), [0, 1])])
def test_array_transform_takes_the_spacing_from_the_affine(spacing, slices):
    prediction, reference = (with_spacing(v, spacing) for v in example())
    label = FailureLabel("released_code")(prediction, reference)  # 4 x 1.4 mm = 5.6 mm
    assert isinstance(label, MetaTensor) and label.meta["patient"] == "p1"
    torch.testing.assert_close(label.affine, prediction.affine)
    assert np.flatnonzero(label.numpy().any(axis=(0, 1, 2))).tolist() == slices
    plain = reference.as_tensor()
    np.testing.assert_array_equal(FailureLabel("released_code")(prediction, plain).numpy(), label.numpy())


def test_array_transform_errors():
    prediction, reference = example()
    with pytest.raises(ValueError, match="MetaTensor"):
        FailureLabel("released_code")(prediction, reference)
    with pytest.raises(ValueError, match="differ in spacing"):
        FailureLabel("released_code")(with_spacing(prediction, (1.4, 1.39)), with_spacing(reference, (1.4, 1.4)))
    with pytest.raises(ValueError, match=r"prediction.*\(40, 40, 3\)"):
        FailureLabel()(prediction[0], reference)
    with pytest.raises(ValueError, match=r"reference.*\(2, 40, 40, 3\)"):
        FailureLabel()(prediction, reference.repeat(2, axis=0))


def test_dictionary_transform():
    prediction, reference = (with_spacing(v, (1.4, 1.4)) for v in example())
    data = {"pred": prediction, "pred_mc": reference.clone(), "label": reference}
    keys = ["pred", "pred_mc"], "label", ["failures", "failures_mc"]
    criterion = {"min_cluster": 16, "unit": "mm", "tolerance_outside": 4.0}
    out = FailureLabeld(*keys, criterion=criterion)(data)
    expected = failure_mask(*(v[0] for v in example()), (1.4, 1.4), FailureCriterion(**criterion))
    np.testing.assert_array_equal(out["failures"][0].numpy(), expected)
    assert expected.any() and not out["failures_mc"].any()
    assert set(data) == {"pred", "pred_mc", "label"}

    del data["pred_mc"]
    assert set(FailureLabeld(*keys, allow_missing_keys=True)(data)) == {"pred", "label", "failures"}
    with pytest.raises(KeyError):
        FailureLabeld(*keys)(data)
    with pytest.raises(ValueError, match="one label_key for each"):
        FailureLabeld(["pred", "pred_mc"], "label", "failures")


def test_dictionary_transform_passes_the_apex_on():
    prediction, reference = example()
    prediction[:, 10:14, 10:14, 0] = 0
    prediction[:, 20, 10:14, 0] = 1  # a small, far cluster: a failure at the apex only
    data = {"pred": prediction, "label": reference}
    counts = [FailureLabeld("pred", "label", "out", apex=apex)(data)["out"][..., 0].sum() for apex in ("last", "first")]
    assert counts == [0, 4]
