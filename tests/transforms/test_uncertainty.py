import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy.special import softmax
from scipy.stats import entropy

from cardiac_qc_plugin.transforms import (
    BayesianMap,
    BayesianMapd,
    PairwiseDiced,
    PredictiveEntropy,
    PredictiveEntropyd,
    SplitUncertaintyd,
    bayesian_map,
    pairwise_dice,
    predictive_entropy,
)

AFFINE = np.diag([1.4, 1.4, 8.0, 1.0])


def probabilities(*shape: int, seed: int = 0) -> np.ndarray:
    return softmax(3 * np.random.default_rng(seed).standard_normal(shape), axis=0)


# e-map


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_entropy_equals_scipys(classes):
    p = probabilities(classes, 5, 6, 3)
    result = predictive_entropy(torch.from_numpy(p))
    assert result.shape == (1, 5, 6, 3)
    np.testing.assert_allclose(result[0], entropy(p, axis=0) / math.log(classes), rtol=1e-12)


def test_entropy_along_another_axis():
    p = np.moveaxis(probabilities(4, 2, 5, 6), 0, 1)
    result = predictive_entropy(torch.from_numpy(p), dim=1)
    assert result.shape == (2, 1, 5, 6)
    np.testing.assert_allclose(result[:, 0], entropy(p, axis=1) / math.log(4), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_of_certain_and_of_even_classes(dtype):
    one_hot = torch.eye(4, dtype=dtype)[:, :, None, None]
    np.testing.assert_array_equal(predictive_entropy(one_hot), 0)
    even = torch.full((4, 2, 2, 1), 0.25, dtype=dtype)
    np.testing.assert_allclose(predictive_entropy(even), 1, rtol=1e-6)
    coin = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=dtype)[:, None, None, None]
    np.testing.assert_allclose(predictive_entropy(coin), 0.5, rtol=1e-6)
    for classes in (6, 7, 12):  # of which rounding would make more than 1 in single precision
        assert predictive_entropy(torch.full((classes, 1), 1 / classes, dtype=dtype)).max() <= 1


LOGITS = arrays.arrays(np.float32, (4, 3, 2, 2), elements=st.floats(-80, 80, width=32))


@settings(max_examples=60, deadline=None)
@given(LOGITS)
def test_entropy_lies_between_0_and_1(logits):
    result = predictive_entropy(torch.from_numpy(logits).softmax(0))
    assert result.min() >= 0 and result.max() <= 1


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.permutations(range(4)))
def test_entropy_does_not_depend_on_the_order_of_classes(logits, order):
    p = torch.from_numpy(logits).softmax(0)
    np.testing.assert_allclose(predictive_entropy(p[order]), predictive_entropy(p), atol=1e-6)


# b-map


def test_bayesian_map_is_equation_1():
    samples = probabilities(4, 9, 5, 6, 3).swapaxes(0, 1) * 0.6
    expected = np.zeros((5, 6, 3))
    mean = sum(samples) / 9
    for c in range(4):
        expected += 2 * np.sqrt(sum((s[c] - mean[c]) ** 2 for s in samples) / 8) / 4
    assert expected.max() < 1
    result = BayesianMap()(samples)
    assert result.shape == (1, 5, 6, 3)
    np.testing.assert_allclose(result[0], expected, rtol=1e-9)
    np.testing.assert_allclose(bayesian_map(torch.from_numpy(samples.std(axis=0, ddof=1)))[0], expected, rtol=1e-9)


def test_bayesian_map_clips_each_class_at_1():
    """Two samples that contradict each other: the sample standard deviation is 0.707, over the population's 0.5."""
    samples = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])[:, :, None, None, None]
    assert float(BayesianMap()(samples)) == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_bayesian_map_example():
    """Probabilities 0.2 and 0.4 of one class: deviation 0.1414; the other class the same."""
    samples = torch.tensor([[0.2, 0.8], [0.4, 0.6]])[:, :, None, None, None]
    assert float(BayesianMap()(samples)) == pytest.approx(2 * math.sqrt(0.02))


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, (5, 4, 3, 2, 2), elements=st.floats(-80, 80, width=32)))
def test_bayesian_map_lies_between_0_and_1(logits):
    result = BayesianMap()(torch.from_numpy(logits).softmax(1))
    assert result.min() >= 0 and result.max() <= 1


def test_bayesian_map_of_equal_samples_is_0():
    samples = np.repeat(probabilities(4, 3, 3, 2)[None], 5, axis=0)
    np.testing.assert_allclose(BayesianMap()(samples), 0, atol=1e-12)


def test_bayesian_map_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        BayesianMap()(torch.zeros(1, 4, 2, 2, 1))


# Agreement between samples


def votes_of(segmentations: np.ndarray) -> torch.Tensor:
    """(T, ...) labels to the share of samples per class, in single precision as the inferer's."""
    return torch.stack([torch.from_numpy((segmentations == c).mean(axis=0).astype(np.float32)) for c in range(4)])


@pytest.mark.parametrize("samples", [2, 3, 10, 60])
def test_pairwise_dice_over_all_pairs(samples):
    rng = np.random.default_rng(samples)
    common = rng.integers(0, 4, (1, 6, 5, 4))
    drawn = np.where(rng.random((samples, 6, 5, 4)) < 0.7, common, rng.integers(0, 4, (samples, 6, 5, 4)))
    expected = []
    for c in range(4):
        overlap = sizes = 0
        for first, second in itertools.combinations(drawn == c, 2):
            overlap += 2 * (first & second).sum()
            sizes += first.sum() + second.sum()
        expected.append(overlap / sizes)
    np.testing.assert_allclose(pairwise_dice(votes_of(drawn), samples), expected, rtol=1e-9)


def test_pairwise_dice_is_the_mean_dice_of_structures_of_one_size():
    rng = np.random.default_rng(2)
    drawn = np.stack([rng.permutation(np.repeat([0, 1, 2, 3], 12)) for _ in range(6)])
    pairs = list(itertools.combinations(drawn, 2))
    dice = [[2 * ((a == c) & (b == c)).sum() / 24 for a, b in pairs] for c in range(4)]
    np.testing.assert_allclose(pairwise_dice(votes_of(drawn), 6), np.mean(dice, axis=1), rtol=1e-9)


def test_pairwise_dice_extremes():
    same = np.repeat(np.array([[0, 1, 2, 2]]), 3, axis=0)  # no sample has class 3
    result = pairwise_dice(votes_of(same), 3)
    np.testing.assert_array_equal(result[:3], 1)
    assert torch.isnan(result[3])
    disjoint = np.eye(3, dtype=int)  # each sample has class 1 elsewhere
    assert float(pairwise_dice(votes_of(disjoint), 3)[1]) == 0


@pytest.mark.parametrize("samples", [0, 1])
def test_pairwise_dice_needs_two_samples(samples):
    with pytest.raises(ValueError, match=f"at least 2 of them, got {samples}"):
        pairwise_dice(torch.ones(4, 2, 2), samples)


# Dictionary forms


def test_dictionary_forms_store_their_maps():
    p = MetaTensor(torch.from_numpy(probabilities(4, 3, 4, 2)), affine=AFFINE)
    samples = torch.from_numpy(np.stack([probabilities(4, 3, 4, 2, seed=s) for s in range(3)]))
    data = {"pred": p, "samples": samples, "image_path": "scan.nii.gz"}
    done = Compose([PredictiveEntropyd("pred"), BayesianMapd("samples")])(data)
    assert set(done) == {"pred", "samples", "image_path", "emap", "bmap"}
    np.testing.assert_array_equal(done["emap"], PredictiveEntropy()(p))
    np.testing.assert_array_equal(done["bmap"], BayesianMap()(samples))
    np.testing.assert_array_equal(done["emap"].affine, AFFINE)
    assert set(data) == {"pred", "samples", "image_path"}
    named = PredictiveEntropyd("pred", output_key="entropy")(data)
    np.testing.assert_array_equal(named["entropy"], done["emap"])
    assert "bmap2" in BayesianMapd("samples", output_key="bmap2")(data)


@pytest.mark.parametrize("transform", [PredictiveEntropyd, BayesianMapd])
def test_missing_keys(transform):
    with pytest.raises(KeyError, match="pred"):
        transform("pred")({"image": 1})
    assert transform("pred", allow_missing_keys=True)({"image": 1}) == {"image": 1}


@pytest.mark.parametrize("transform", [PredictiveEntropyd, BayesianMapd])
def test_maps_of_several_keys_do_not_replace_each_other(transform):
    with pytest.raises(ValueError, match="maps of one, two would all be stored under 'map'"):
        transform(["one", "two"], output_key="map")


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("track", [False, True])
def test_split(classes, track):
    maps = torch.arange(2.0 * classes + 2)[:, None, None, None].expand(-1, 3, 4, 2).clone()
    pred = MetaTensor(maps, affine=AFFINE, meta={"filename_or_obj": "scan.nii.gz"}) if track else maps
    done = SplitUncertaintyd("pred")({"pred": pred, "image": 5})
    assert set(done) == {"pred", "bmap", "emap", "votes", "image"}
    expected = {
        "pred": range(classes),
        "bmap": [classes],
        "emap": [classes + 1],
        "votes": range(classes + 2, 2 * classes + 2),
    }
    for key, channels in expected.items():
        assert done[key].shape == (len(channels), 3, 4, 2)
        assert done[key][:, 0, 0, 0].tolist() == list(channels), key
        assert isinstance(done[key], MetaTensor)  # Invertd passes other tensors by
        if track:
            np.testing.assert_array_equal(done[key].affine, AFFINE)
            assert done[key].meta["filename_or_obj"] == "scan.nii.gz"


def test_arrays_are_split_as_tensors():
    maps = np.random.default_rng(0).random((10, 3, 4, 2), dtype=np.float32)
    steps = Compose([SplitUncertaintyd("pred"), PairwiseDiced("votes", 10, ("RV", "LVM", "LV"))])
    found, expected = steps({"pred": maps}), steps({"pred": torch.from_numpy(maps)})
    for key in ("pred", "bmap", "emap", "votes"):
        assert isinstance(found[key], MetaTensor)
        np.testing.assert_array_equal(found[key], expected[key])
    agreement = PairwiseDiced("votes", 10, ("RV", "LVM", "LV"))({"votes": maps[6:]})
    assert agreement["result"] == found["result"] == expected["result"]


def test_split_entries_have_metadata_of_their_own():
    """Inverting or renaming one map must not touch the others."""
    pred = MetaTensor(torch.zeros(10, 2, 2, 1), affine=AFFINE, meta={"note": "all"})
    done = SplitUncertaintyd("pred")({"pred": pred})
    done["bmap"].meta["note"] = "b-map"
    done["bmap"].push_applied_operation({"class": "Other"})
    for key in ("pred", "emap", "votes"):
        assert done[key].meta["note"] == "all"
        assert done[key].applied_operations == []


@pytest.mark.parametrize("channels", [1, 2, 3, 9])
def test_split_refuses_other_tensors(channels):
    with pytest.raises(ValueError, match=str(channels)):
        SplitUncertaintyd("pred")({"pred": torch.zeros(channels, 2, 2, 1)})


def test_pairwise_dice_for_reports():
    drawn = np.array([[[1, 1, 2, 0]], [[1, 2, 2, 0]]])
    data = PairwiseDiced("votes", samples=2, class_names=("RV", "LVM", "LV"))({"votes": votes_of(drawn)})
    result = data["result"]["pairwise_dice"]
    assert result == {"RV": pytest.approx(2 / 3), "LVM": pytest.approx(2 / 3), "LV": None}
    assert all(type(value) in (float, type(None)) for value in result.values())  # fit for JSON


def test_no_agreement_with_one_sample():
    data = PairwiseDiced("votes", samples=1, class_names=("RV",), result_key="agreement")({"votes": torch.ones(2, 3)})
    assert data["agreement"] == {"pairwise_dice": {"RV": None}}
