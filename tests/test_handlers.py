"""Metrics of the bundles' validation against brute force and scikit-learn."""

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.handlers import from_engine
from scipy.spatial.distance import directed_hausdorff
from sklearn.metrics import average_precision_score

from cardiac_qc_plugin.handlers import GradientClipping, HausdorffDistance, StructureHausdorff
from cardiac_qc_plugin.transforms import crop_box, paint_regions
from cardiac_qc_plugin.workflows.operating_point import RegionAveragePrecision


def onehot(labels, affine):
    return MetaTensor(torch.from_numpy(np.eye(4, dtype=np.float32)[labels]).movedim(-1, 0), affine=affine)


def measure(metric, outputs, name="metric"):
    """The metric of an engine that gives one list of volumes per iteration."""
    engine = Engine(lambda engine, batch: batch)
    metric.attach(engine, name)
    engine.run(outputs)
    return engine.state


def test_hausdorff_distance_is_in_millimetres_of_the_reference():
    """Single voxels, so that all are surface, against scipy on their positions in mm."""
    spacing = np.array([1.5, 1.25, 8.0])
    rng = np.random.default_rng(0)
    affine = np.diag([-1.5, -1.25, 8.0, 1.0])  # as NIfTI images lie
    outputs, expected = [], []
    for _ in range(3):
        volumes = np.zeros((2, 12, 14, 5), dtype=int)
        for label in (1, 2, 3):
            for volume in volumes:
                volume[tuple(rng.integers(0, volume.shape, (4, 3)).T)] = label
        prediction, reference = volumes
        points = [[np.argwhere(v == label) * spacing for v in volumes] for label in (1, 2, 3)]
        expected.append([max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0]) for a, b in points])
        outputs.append([{"pred": onehot(prediction, np.eye(4)), "label": onehot(reference, affine)}])
    state = measure(HausdorffDistance(from_engine(["pred", "label"])), outputs)
    np.testing.assert_allclose(state.metric_details["metric"], expected, rtol=1e-5)
    assert state.metrics["metric"] == pytest.approx(np.mean(expected))


def test_missing_structure_is_no_distance():
    labels = np.zeros((6, 6, 2), dtype=int)
    labels[1, 1, 0], labels[3, 3, 0] = 1, 2
    wrong = np.where(labels == 2, 0, labels)
    output = [{"pred": onehot(wrong, np.eye(4)), "label": onehot(labels, np.eye(4))}]
    state = measure(HausdorffDistance(from_engine(["pred", "label"])), [output])
    assert state.metric_details["metric"].isnan().tolist() == [[False, True, True]]
    assert state.metrics["metric"] == 0  # the RV's


def test_nothing_found_at_all_is_no_distance_of_zero():
    reference = np.zeros((8, 8, 2), dtype=int)
    reference[2:5, 2:5] = 3
    metric = StructureHausdorff()
    metric([onehot(np.zeros_like(reference), np.eye(4))], [onehot(reference, np.eye(4))])
    assert metric.aggregate().isnan()


@pytest.mark.parametrize(("size", "min_size"), [(8, 80), (4, 64)])
def test_region_average_precision_equals_scikit_learn(size, min_size):
    rng = np.random.default_rng(0)
    outputs, probabilities, failing = [], [], []
    for _ in range(3):
        labels = np.zeros((90, 84, 2), dtype=np.float32)
        labels[30:50, 20:60, 0] = 3
        painted, failures = np.zeros((2, 90, 84, 2), dtype=np.float32)
        for z in range(2):
            cells, wrong = rng.random((2, *[min_size // size] * 2))
            box = crop_box(labels[..., z], size, min_size)
            painted[..., z] = paint_regions(cells, box, (90, 84), size)
            failures[..., z] = paint_regions((wrong < 0.2).astype(float), box, (90, 84), size)
            probabilities.append(cells), failing.append(wrong < 0.2)
        stack = np.stack([0 * painted, 0 * painted, labels])  # which lies beside the center
        outputs.append(
            [
                {
                    "pred": torch.from_numpy(painted[None]),
                    "image": torch.from_numpy(stack),
                    "label": torch.from_numpy(failures[None]),
                }
            ]
        )
    metric = RegionAveragePrecision(size, min_size, from_engine(["pred", "image", "label"]))
    value = measure(metric, outputs).metrics["metric"]
    expected = average_precision_score(np.ravel(failing), np.ravel(probabilities).astype(np.float32))
    assert value == pytest.approx(expected)
    assert [volume.probability.size for volume in metric.volumes] == [2 * (min_size // size) ** 2] * 3
    metric.reset()
    assert metric.volumes == []  # those of the next validation are no more


@pytest.mark.parametrize(("max_norm", "step"), [(None, [3.0, 4.0]), (6.0, [3.0, 4.0]), (1.0, [0.6, 0.8])])
def test_gradient_is_shrunk_before_the_step(max_norm, step):
    """The loss is the product of weights and inputs, so that the gradient is the input: (3, 4), of norm 5."""
    network = torch.nn.Linear(2, 1, bias=False)
    before = network.weight.detach().clone()
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.tensor([[3.0, 4.0]]), "label": torch.zeros(1)}],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda prediction, label: prediction.sum(),
        train_handlers=[] if max_norm is None else [GradientClipping(max_norm)],
    ).run()
    torch.testing.assert_close((before - network.weight.detach())[0], torch.tensor(step))
