import numpy as np
import pytest
import torch

from cardiac_qc_plugin.losses import BrierLoss, FailureLoss, segmentation_loss

NAMES = ("ce", "soft_dice", "brier")


def softmax(logits: np.ndarray) -> np.ndarray:
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponential / exponential.sum(axis=1, keepdims=True)


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Logits (3, 4, 5, 6) and labels (3, 1, 5, 6); the first image lacks class 1, the second has background only."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, (3, 1, 5, 6)).astype(np.float32)
    label[0][label[0] == 1] = 2
    label[1] = 0
    return 2 * rng.standard_normal((3, 4, 5, 6)), label


def value(loss, logits: np.ndarray, label: np.ndarray) -> float:
    result = loss(torch.from_numpy(logits), torch.from_numpy(label))
    assert result.ndim == 0
    return float(result)


def test_cross_entropy_is_equation_4_as_a_mean(batch):
    logits, label = batch
    probabilities = softmax(logits)
    terms = [
        -np.log(probabilities[b, int(label[b, 0, i, j]), i, j]) for b in range(3) for i in range(5) for j in range(6)
    ]
    assert value(segmentation_loss("ce"), logits, label) == pytest.approx(np.mean(terms), rel=1e-10)


def test_brier_is_equation_5_as_a_mean(batch):
    logits, label = batch
    probabilities = softmax(logits)
    total = 0.0
    for c in range(4):
        total += ((probabilities[:, c] - (label[:, 0] == c)) ** 2).sum()
    assert value(segmentation_loss("brier"), logits, label) == pytest.approx(total / (3 * 5 * 6), rel=1e-10)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ((0.0, 0.0, 0.0, 0.0), 0.75**2 + 3 * 0.25**2),
        ((100.0, 0.0, 0.0, 0.0), 2.0),  # sure and wrong
        ((0.0, 0.0, 100.0, 0.0), 0.0),  # sure and right
        ((-100.0, 0.0, 0.0, -100.0), 2 * 0.5**2),
    ],
)
def test_brier_examples(logits, expected):
    logits = torch.tensor(logits).view(1, 4, 1, 1).expand(2, 4, 3, 5)
    assert float(BrierLoss()(logits, torch.full((2, 1, 3, 5), 2))) == pytest.approx(expected, abs=1e-6)


def test_soft_dice_is_equation_3(batch):
    """Factor 2, sums over batch and pixels, all four classes."""
    logits, label = batch
    probabilities = softmax(logits)
    scores = []
    for c in range(4):
        reference = label[:, 0] == c
        scores.append(2 * probabilities[:, c][reference].sum() / (probabilities[:, c].sum() + reference.sum()))
    assert value(segmentation_loss("soft_dice"), logits, label) == pytest.approx(1 - np.mean(scores), abs=1e-6)


def test_soft_dice_penalizes_a_class_that_one_image_lacks(batch):
    """Sums per image, as in the released code, give a hallucinated structure no gradient at all."""
    logits, label = batch
    tensor = torch.from_numpy(logits).requires_grad_()
    segmentation_loss("soft_dice")(tensor, torch.from_numpy(label)).backward()
    probabilities = softmax(logits)
    by_probability = np.zeros_like(logits)  # derivative of 1 - 2 I / (R + A) over four classes
    for c in range(4):
        reference = (label[:, 0] == c).astype(float)
        total = reference.sum() + probabilities[:, c].sum()
        overlap = (reference * probabilities[:, c]).sum()
        by_probability[:, c] = -(2 * reference * total - 2 * overlap) / total**2 / 4
    average = (probabilities * by_probability).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(tensor.grad.numpy(), probabilities * (by_probability - average), atol=1e-7)
    for image in (0, 1):
        assert not (label[image] == 1).any()
        assert (by_probability[image, 1] > 0).all()  # less of the absent class is better


@pytest.mark.parametrize("name", NAMES)
def test_losses_agree_that_the_reference_is_best(name, batch):
    label = torch.from_numpy(batch[1])
    perfect = 50 * torch.nn.functional.one_hot(label[:, 0].long(), 4).movedim(-1, 1).float()
    loss = segmentation_loss(name)
    assert float(loss(perfect, label)) == pytest.approx(0, abs=1e-6)
    assert float(loss(torch.zeros_like(perfect), label)) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_losses_do_not_depend_on_the_patch_size(name, batch):
    """Four copies of the batch side by side: the scale of the gradient's sum, and so of weight decay, stays."""
    logits, label = batch
    loss = segmentation_loss(name)
    tiled = value(loss, np.tile(logits, (1, 1, 2, 2)), np.tile(label, (1, 1, 2, 2)))
    assert tiled == pytest.approx(value(loss, logits, label), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_losses_take_labels_of_any_type(name, dtype, batch):
    logits, label = (torch.from_numpy(array) for array in batch)
    loss = segmentation_loss(name)
    assert float(loss(logits, label.to(dtype))) == pytest.approx(float(loss(logits, label)), rel=1e-6)


@pytest.mark.parametrize("name", ["dice", "CE", ""])
def test_unknown_loss(name):
    with pytest.raises(ValueError, match=f"'{name}'.*'ce', 'soft_dice' or 'brier'"):
        segmentation_loss(name)


# Detection loss


def test_failure_loss_is_equation_6_as_a_mean():
    rng = np.random.default_rng(1)
    logits, target = rng.standard_normal((2, 2, 3, 4)), (rng.random((2, 1, 3, 4)) < 0.4).astype(np.float32)
    probability = softmax(logits)[:, 1]
    terms = -(7.5 * target[:, 0] * np.log(probability) + (1 - target[:, 0]) * np.log(1 - probability))
    assert value(FailureLoss(7.5), logits, target) == pytest.approx(terms.mean(), rel=1e-10)


def test_failure_loss_example():
    """One region with a failure at p = 0.8, three without at p = 0.5; a miss weighs 3."""
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0, 0] = np.log(4.0)
    target = torch.tensor([[[[1, 0], [0, 0]]]])
    expected = (-3 * np.log(0.8) - 3 * np.log(0.5)) / 4
    assert float(FailureLoss(3.0)(logits, target)) == pytest.approx(expected, rel=1e-6)


def test_failure_loss_is_finite_for_sure_and_wrong_regions():
    logits = torch.tensor([500.0, -500.0]).view(1, 2, 1, 1).requires_grad_()
    loss = FailureLoss(40.0)(logits, torch.ones(1, 1, 1, 1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(40_000)
    assert logits.grad.flatten().tolist() == pytest.approx([40.0, -40.0])


def test_failure_loss_keeps_no_state():
    """Its weight is a setting, so checkpoints of the loss are interchangeable."""
    assert FailureLoss(3.0).state_dict() == {}


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_failure_loss_needs_a_positive_weight(weight):
    with pytest.raises(ValueError, match=f"got {weight}"):
        FailureLoss(weight)
