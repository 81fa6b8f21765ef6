"""From image, map and segmentation to flagged regions, and what the detector is trained and judged on."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from sklearn.metrics import fbeta_score

from cardiac_qc_plugin.data.slices import SlicePatchDataset, positive_weight
from cardiac_qc_plugin.inferers import FailureRegionInferer
from cardiac_qc_plugin.networks import FailureResNet
from cardiac_qc_plugin.transforms import (
    FlagRegionsd,
    RegionLabelsd,
    crop_box,
    crop_slice,
    paint_regions,
)
from cardiac_qc_plugin.workflows.files import read_json
from cardiac_qc_plugin.workflows.operating_point import choose_operating_point, volume_detection

SHAPE = (100, 92, 3)


def stack():
    """Image, map and labels (1, 3, H, W, D): a heart in the first slice, one as wide as the slice, an empty slice."""
    rng = np.random.default_rng(0)
    labels = np.zeros(SHAPE)
    labels[30:60, 40:70, 0] = 3
    labels[2:95, 5:90, 1] = 1
    channels = [rng.random(SHAPE), rng.random(SHAPE), labels]
    return torch.from_numpy(np.stack(channels)[None].astype(np.float32))


@pytest.mark.parametrize("region_size", [4, 8, 16])
def test_inferer_paints_what_the_network_says_of_each_crop(region_size):
    torch.manual_seed(0)
    network = FailureResNet(region_size=region_size).eval()
    inputs = stack()
    painted = FailureRegionInferer(region_size, amp=False)(inputs, network)
    assert painted.shape == (1, 1, *SHAPE)
    for z in range(SHAPE[2]):
        volume = inputs[0, ..., z].numpy()
        box = crop_box(volume[2], region_size, 80)
        with torch.no_grad():
            logits = network(torch.from_numpy(crop_slice(volume[:2], box))[None])
        expected = logits.softmax(dim=1)[0, 1].numpy()
        expected = paint_regions(expected, box, SHAPE[:2], region_size)
        np.testing.assert_allclose(painted[0, 0, ..., z].numpy(), expected, rtol=1e-5)
        outside = np.ones(SHAPE[:2], dtype=bool)
        outside[max(box[0], 0) : box[1], max(box[2], 0) : box[3]] = False
        assert (painted[0, 0, ..., z].numpy()[outside] == 0).all()


@pytest.mark.parametrize("region_size", [4, 8])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_heart_of_a_failed_slice_is_flagged_whatever_the_network_says(region_size, mirrored):
    """All of where the neighbors have a heart; in the rest of the slice, and in other slices, the network decides."""
    network = FailureResNet(region_size=region_size).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()  # a probability of 0.5 everywhere
    shape = (160, 120, 4)
    labels = np.zeros(shape, np.float32)
    labels[5:45, 10:40, 0] = 3
    labels[15:55, 12:42, 2] = 1  # so slice 1 failed, and slice 3 did not
    inputs = torch.from_numpy(np.stack([np.ones(shape), np.zeros(shape), labels])[None].astype(np.float32))
    if mirrored:
        inputs = MetaTensor(inputs, affine=np.diag([-1.5, -1.5, 8.0, 1.0]), meta={"qform_code": 1, "sform_code": 1})
    painted = FailureRegionInferer(region_size, amp=False)(inputs, network)
    probability = painted[0, 0].numpy()
    heart = (labels[..., [0, 2]] > 0).any(axis=-1)
    assert set(np.unique(probability)) == {0, 0.5, 1}
    assert np.unique(np.nonzero(probability == 1)[2]).tolist() == [1]
    rows, cols = np.nonzero(probability[..., 1] == 1)
    flagged = set(zip(rows, cols, strict=True))
    assert flagged >= set(zip(*np.nonzero(heart), strict=True))
    top, left = crop_box(heart, region_size)[::2]
    cells = {
        ((row - top) // region_size, (col - left) // region_size) for row, col in zip(*np.nonzero(heart), strict=True)
    }
    assert {((row - top) // region_size, (col - left) // region_size) for row, col in flagged} == cells
    result = FlagRegionsd("pred", "segmentation", 0.9, region_size)(
        {"pred": painted[0], "segmentation": torch.from_numpy(labels[None]), "image": inputs[0]}
    )["result"]
    assert result["flagged_slices"] == [1]
    assert len(result["regions"]) == len(cells)


@pytest.mark.parametrize("batch", [[0], [0, 1, 2], [2, 1, 0]])
def test_a_mirrored_stack_is_turned_over_for_the_detector(batch):
    """The same cells as of the stack that is not mirrored, where they lie in it; each stack for itself."""
    torch.manual_seed(0)
    network, inputs = FailureResNet().eval(), stack()[..., :1]  # its crop is as far from both sides
    inputs[:, 2] = 0
    inputs[:, 2, 30:60, 31:61] = 3
    inferer = FailureRegionInferer(amp=False)
    expected = inferer(inputs, network)
    as_stored = inferer(inputs.flip(3), network)
    assert not torch.equal(as_stored, expected.flip(3))
    kinds = [(inputs.flip(3), 1.5, 1), (inputs, -1.5, 1), (inputs.flip(3), 1.5, 0)]  # the last header does not say
    stacks = [
        MetaTensor(x[0], affine=np.diag([-1.5, step, 8.0, 1.0]), meta={"qform_code": code, "sform_code": code})
        for x, step, code in kinds
    ]
    found = inferer(list_data_collate([stacks[i] for i in batch]), network)
    wanted = [expected.flip(3), expected, as_stored]
    torch.testing.assert_close(found, torch.cat([wanted[i] for i in batch]))


def test_inferer_shows_the_segmentation_and_restores_the_network():
    torch.manual_seed(0)
    network = FailureResNet(in_channels=3).train()
    inputs = stack()
    first = FailureRegionInferer(see_segmentation=True, amp=False)(inputs, network)
    assert all(module.training for module in network.modules())
    changed = inputs.clone()
    changed[0, 2][changed[0, 2] == 3] = 2  # same crops, other labels
    second = FailureRegionInferer(see_segmentation=True, amp=False)(changed, network)
    assert not torch.equal(first[..., 0], second[..., 0]) and torch.equal(first[..., 1], second[..., 1])
    with pytest.raises(ValueError, match="3, H, W, D"):
        FailureRegionInferer()(inputs[:, :2], network)


def test_flagged_regions_of_a_hand_made_map():
    labels = np.zeros((1, 80, 80, 2), dtype=np.float32)
    painted = np.zeros((1, 80, 80, 2), dtype=np.float32)
    painted[0, 8:16, 16:24, 0] = 0.9
    painted[0, 72:80, 0:8, 1] = 0.6
    painted[0, 0:8, 0:8, 1] = 0.3
    affine = np.diag([1.5, 1.5, 8.0, 1.0])
    data = {"image": MetaTensor(labels, affine=affine), "segmentation": labels, "pred": torch.from_numpy(painted)}
    result = FlagRegionsd("pred", "segmentation", threshold=0.5)(data)
    regions = np.asarray(result["regions"])[0]
    assert (regions[8:16, 16:24, 0] == 1).all() and (regions[72:80, 0:8, 1] == 2).all()
    assert np.count_nonzero(regions) == 128
    np.testing.assert_array_equal(result["regions"].affine, affine)
    report = result["result"]
    assert report["n_regions"] == 200 and report["flagged_slices"] == [0, 1]
    assert report["expected_failing_regions"] == pytest.approx(1.8)
    assert [region["slice"] for region in report["regions"]] == [0, 1]


def test_region_labels_of_a_batch():
    batch = {"label": torch.zeros(2, 1, 16, 16), "image": None}
    batch["label"][1, 0, 9, 3] = 1
    expected = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    expected[1, 0, 1, 0] = True
    assert torch.equal(RegionLabelsd("label", 8)(batch)["label"], expected)


def test_positive_weight_is_the_ratio_of_regions():
    label = np.zeros((1, 20, 16, 2), dtype=np.uint8)  # the last four rows make no whole region
    label[0, 0, 0, 0] = label[0, 9, 9, 1] = label[0, 19, 0, 1] = 1
    data = SlicePatchDataset([{}], lambda _: {"image": label, "label": label}, 8, 1, 1)
    assert positive_weight(data, 8) == (8 - 2) / 2
    with pytest.raises(ValueError, match="nothing to learn"):
        positive_weight(SlicePatchDataset([{}], lambda _: {"image": label, "label": 0 * label}, 8, 1, 1), 8)


def test_volume_detection_counts_failures_outside_the_crop():
    failures = np.zeros((100, 100, 1), dtype=bool)
    failures[12, 12] = failures[13, 13] = failures[99, 0] = True
    painted = np.zeros((100, 100, 1), dtype=np.float32)
    painted[10:18, 10:18] = 0.7
    volume = volume_detection(painted, failures, [(10, 90, 10, 90)], 8)
    assert volume.probability.size == 100 and volume.probability[0] == pytest.approx(0.7)
    assert volume.failure_voxels[0] == 2 and volume.failure_voxels.sum() == 2
    assert volume.failure_voxels_outside.tolist() == [1]


def test_cells_of_the_padding_are_no_regions():
    """An image of 64 x 64 pixels in a crop of 80 x 80: 36 of the 100 cells are padding."""
    painted = np.full((64, 64, 1), 0.2, np.float32)
    box = crop_box(np.zeros((64, 64)))
    assert box == (-8, 72, -8, 72)
    assert volume_detection(painted, painted > 0, [box], 8).failure_voxels.tolist() == [64] * 64
    data = {"p": painted[None], "labels": np.zeros((1, 64, 64, 1)), "image": painted[None]}
    result = FlagRegionsd("p", "labels", threshold=0.5)(data)["result"]
    assert result["n_regions"] == 64 and result["expected_failing_regions"] == pytest.approx(64 * 0.2)
    assert FlagRegionsd("p", "labels", threshold=0.5, min_size=48)(data)["result"]["n_regions"] == 36
    with pytest.raises(ValueError, match=r"shape \(64, 64, 1\), and labels of \(80, 80, 1\)"):
        FlagRegionsd("p", "labels", threshold=0.5)(data | {"labels": np.zeros((1, 80, 80, 1))})


@pytest.mark.parametrize("beta", [0.5, 2])
def test_operating_point_has_the_largest_f_beta(beta, tmp_path):
    """The chosen threshold against a search over all thresholds with scikit-learn."""
    rng = np.random.default_rng(0)
    cells = rng.random((10, 10))
    failing = rng.random((10, 10)) < cells**2
    painted, failures = (array.repeat(8, 0).repeat(8, 1)[..., None] for array in (cells, failing))
    volume = volume_detection(painted, failures, [(0, 80, 0, 80)], 8)
    file = tmp_path / "point.json"
    chosen = choose_operating_point([volume], file, beta=beta, region_size=8)
    score = {t: fbeta_score(failing.ravel(), cells.ravel() >= t, beta=beta) for t in [*cells.ravel(), chosen]}
    assert score[chosen] == max(score.values())
    record = read_json(file)
    assert record["threshold"] == chosen and record["n_volumes"] == 1 and record["beta"] == beta
    assert record["validation"]["region_recall"] == (failing & (cells >= chosen)).sum() / failing.sum()


@pytest.mark.parametrize("sign", [1, 0, -1])
def test_detector_that_learned_nothing_is_told(sign, tmp_path, caplog):
    """Also one that says the same of all regions, as a training that did not get going."""
    rng = np.random.default_rng(0)
    cells = rng.random((10, 10))
    failing = rng.random((10, 10)) < cells**2
    painted, failures = (array.repeat(8, 0).repeat(8, 1)[..., None] for array in (cells, failing))
    volume = volume_detection(0.5 + sign * (painted - 0.5), failures, [(0, 80, 0, 80)], 8)
    choose_operating_point([volume], tmp_path / "point.json", beta=2, region_size=8)
    assert ("has learned nothing" in caplog.text) == (sign < 1)
