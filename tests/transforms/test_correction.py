from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor

from cardiac_qc_plugin.transforms.correction import (
    SimulateCorrection,
    SimulateCorrectiond,
    apply_edits,
    simulate_correction,
)

SHAPE = (5, 4, 3)
RULES = ["paper", "released_code", "upper_bound"]
labels = arrays(np.uint8, SHAPE, elements=st.integers(0, 3))
masks = arrays(bool, SHAPE)


@settings(max_examples=50, deadline=None)
@given(labels, labels, masks, masks)
@pytest.mark.parametrize("rule", RULES)
def test_rules_voxel_by_voxel(rule, prediction, reference, flagged, failures):
    corrected = simulate_correction(prediction, reference, flagged, failures, rule)
    for voxel in np.ndindex(SHAPE):
        takes_reference = {
            "paper": flagged[voxel],
            "released_code": flagged[voxel] and failures[voxel],
            "upper_bound": failures[voxel],
        }[rule]
        assert corrected[voxel] == (reference if takes_reference else prediction)[voxel]
    again = simulate_correction(corrected, reference, flagged, failures, rule)
    np.testing.assert_array_equal(again, corrected)


def volumes(seed=0):
    rng = np.random.default_rng(seed)
    prediction, reference = (rng.integers(0, 4, SHAPE, dtype=np.uint8) for _ in range(2))
    flagged, failures = (rng.random(SHAPE) < 0.5 for _ in range(2))
    return prediction, reference, flagged, failures


def test_everything_flagged_gives_the_reference():
    prediction, reference, _, failures = volumes()
    everything = np.ones(SHAPE, bool)
    np.testing.assert_array_equal(simulate_correction(prediction, reference, everything), reference)
    partly = simulate_correction(prediction, reference, everything, failures, "released_code")
    np.testing.assert_array_equal(partly, simulate_correction(prediction, reference, None, failures, "upper_bound"))
    assert (partly != reference).any()
    np.testing.assert_array_equal(simulate_correction(prediction, reference, ~everything), prediction)


def test_a_map_of_region_ids_is_a_mask_and_inputs_stay():
    prediction, reference, flagged, _ = volumes()
    before = prediction.copy()
    corrected = simulate_correction(prediction, reference, flagged * np.uint16(300))
    np.testing.assert_array_equal(corrected, simulate_correction(prediction, reference, flagged))
    np.testing.assert_array_equal(prediction, before)
    assert corrected.dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "code"}, "'code'.*paper.*released_code.*upper_bound"),
        ({"rule": "released_code", "failures": None}, "'failures'"),
        ({"rule": "upper_bound", "failures": None}, "'failures'"),
        ({"rule": "paper", "flagged": None}, "'flagged'"),
        ({"rule": "released_code", "flagged": None}, "'flagged'"),
        ({"flagged": np.ones((5, 4, 2))}, r"flagged.*\(5, 4, 2\).*\(5, 4, 3\)"),
        ({"rule": "upper_bound", "failures": np.ones((5, 4))}, r"failures.*\(5, 4\)"),
        ({"reference": np.ones((4, 5, 3))}, r"reference.*\(4, 5, 3\)"),
        ({"reference": np.full(SHAPE, 5)}, r"reference.*\[5\]"),
    ],
)
def test_simulated_correction_errors(change, message):
    arguments = dict(zip(("prediction", "reference", "flagged", "failures"), volumes(), strict=True))
    with pytest.raises(ValueError, match=message):
        simulate_correction(**arguments | change)


# --- an expert's edits ----------------------------------------------------------------------------


def edits():
    prediction = np.zeros((6, 6, 4), np.uint8)
    prediction[1:4, 1:4, :] = 3
    flagged = np.zeros(prediction.shape, np.uint16)
    flagged[0:3, 0:3, 1] = 7
    flagged[0:3, 0:3, 2] = 8
    edited = prediction.copy()
    edited[1, 1:3, 1] = 2  # LV -> LVM, 2 voxels
    edited[0, 0, 2] = 1  # background -> RV
    edited[2, 2, 2] = 0  # LV -> background
    return prediction, edited, flagged


def test_edits_inside_are_accepted_and_counted():
    prediction, edited, flagged = edits()
    corrected, report = apply_edits(prediction, edited, flagged)
    np.testing.assert_array_equal(corrected, edited)
    assert asdict(report) == {
        "n_changed_inside": 4,
        "n_outside": 0,
        "slices_changed": (1, 2),
        "slices_outside": (),
        "gained": {1: 1, 2: 2, 3: 0},
        "lost": {1: 0, 2: 0, 3: 3},
    }


def test_edits_outside_are_refused_or_dropped():
    prediction, edited, flagged = edits()
    accepted = edited.copy()
    edited[3, 3, 0] = edited[5, 5, 1] = edited[4, 4, 1] = 1
    with pytest.raises(ValueError, match=r"3 voxel\(s\).*slice\(s\) 1, 2 .*drop"):
        apply_edits(prediction, edited, flagged)
    corrected, report = apply_edits(prediction, edited, flagged, on_outside="drop")
    np.testing.assert_array_equal(corrected, accepted)
    assert (report.n_changed_inside, report.n_outside) == (4, 3)
    assert (report.slices_changed, report.slices_outside) == ((1, 2), (0, 1))
    assert report.gained == {1: 1, 2: 2, 3: 0}  # dropped edits do not count


@settings(max_examples=50, deadline=None)
@given(labels, labels, masks)
def test_dropping_edits_equals_the_paper_rule(prediction, edited, flagged):
    corrected, report = apply_edits(prediction, edited, flagged, on_outside="drop")
    np.testing.assert_array_equal(corrected, simulate_correction(prediction, edited, flagged))
    assert report.n_changed_inside == (corrected != prediction).sum()
    assert report.n_changed_inside + report.n_outside == (edited != prediction).sum()
    for label in (1, 2, 3):
        net = (corrected == label).sum() - (prediction == label).sum()
        assert report.gained[label] - report.lost[label] == net


def test_edit_errors():
    prediction, edited, flagged = edits()
    with pytest.raises(ValueError, match="'ignore'"):
        apply_edits(prediction, edited, flagged, on_outside="ignore")
    with pytest.raises(ValueError, match=r"edited.*\[9\]"):
        apply_edits(prediction, np.full_like(edited, 9), flagged)
    with pytest.raises(ValueError, match=r"flagged.*\(6, 6, 1\)"):
        apply_edits(prediction, edited, flagged[..., :1])


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda a: MetaTensor(a, meta={"patient": "p1"})])
def test_transforms_agree_with_the_function(rule, kind):
    prediction, reference, flagged, failures = volumes()
    expected = simulate_correction(prediction, reference, flagged, failures, rule)
    data = {
        "pred": kind(prediction[None].astype(np.float32)),
        "label": kind(reference[None]),
        "flagged": kind(flagged[None]),
        "failures": kind(failures[None]),
    }
    out = SimulateCorrection(rule)(*data.values())
    keys = {"flagged_key": "flagged", "failure_key": "failures"}
    out_d = SimulateCorrectiond("pred", "label", **keys, rule=rule)(data)["pred"]
    for result in (out, out_d):
        assert type(result) is type(data["pred"]) and result.dtype == data["pred"].dtype
        np.testing.assert_array_equal(np.asarray(result)[0], expected)
        assert getattr(result, "meta", {"patient": "p1"})["patient"] == "p1"
    np.testing.assert_array_equal(np.asarray(data["pred"])[0], prediction)


def test_dictionary_transform_with_two_predictions():
    prediction, reference, flagged, _ = volumes()
    data = {"a": prediction[None], "b": prediction[None], "label": reference[None]}
    data |= {"flagged_a": flagged[None], "flagged_b": ~flagged[None]}
    out = SimulateCorrectiond(["a", "b"], "label", ["flagged_a", "flagged_b"])(data)
    np.testing.assert_array_equal(out["a"][0], simulate_correction(prediction, reference, flagged))
    np.testing.assert_array_equal(out["b"][0], simulate_correction(prediction, reference, ~flagged))
    out = SimulateCorrectiond("a", "label", failure_key="flagged_b", rule="upper_bound")(data)
    np.testing.assert_array_equal(out["a"], np.where(~flagged, reference, prediction)[None])


def test_transform_errors():
    prediction, reference, flagged, _ = volumes()
    with pytest.raises(ValueError, match="'code'"):
        SimulateCorrectiond("pred", "label", rule="code")
    with pytest.raises(ValueError, match=r"flagged.*\(5, 4, 3\)"):
        SimulateCorrection()(prediction[None], reference[None], flagged)
    with pytest.raises(ValueError, match="'flagged'"):
        SimulateCorrectiond("pred", "label")({"pred": prediction[None], "label": reference[None]})
