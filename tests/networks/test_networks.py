import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cardiac_qc_plugin.networks import BayesianUNet, DilatedCNN, DilatedResNet22, FailureResNet
from cardiac_qc_plugin.networks.dilated_cnn import joined_edges
from cardiac_qc_plugin.networks.failure_resnet import ByteDropout

SMALL_UNET = (3, 4, 5, 6, 8)
SEGMENTATION = [
    pytest.param(lambda **k: DilatedCNN(features=(4,) * 8, classifier_features=6, **k), id="dn"),
    pytest.param(DilatedResNet22, id="drn"),
    pytest.param(lambda **k: BayesianUNet(features=SMALL_UNET, **k), id="unet"),
]
DETECTORS = [
    pytest.param(lambda r=r, **k: FailureResNet(in_channels=3, region_size=r, **k), id=f"detector{r}")
    for r in (4, 8, 16)
]


def parameters(make, **options) -> int:
    with torch.device("meta"):  # counts without allocating
        return sum(p.numel() for p in make(**options).parameters())


def input_for(network: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    channels = next(network.parameters()).shape[1]
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(7))


def settle(network: nn.Module) -> nn.Module:
    """Random batch normalization statistics and affine terms, so that no layer is an identity; evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
                (module.weight.data, 0.5),
                (module.bias.data, -0.5),
            ):
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return network.eval()


# Parameter counts, by hand


def conv(i: int, o: int, kernel: int, bias: bool = True) -> int:
    return i * o * kernel**2 + bias * o


def test_dn_parameters():
    by_hand = conv(1, 32, 3) + 7 * (conv(32, 32, 3) + 2 * 32) + conv(32, 128, 1) + 2 * 128 + conv(128, 4, 1)
    assert by_hand == 70_500
    assert parameters(DilatedCNN) == by_hand


def test_dn_widths_are_an_argument():
    """The released code's widths, and the number of parameters counted there."""
    assert parameters(DilatedCNN, features=(32,) * 6 + (64, 128)) == 156_900


def test_drn_parameters():
    def level(i: int, o: int) -> int:  # two blocks, the first one with a strided shortcut
        return conv(i, o, 3, False) + 3 * conv(o, o, 3, False) + conv(i, o, 1, False) + 5 * 2 * o

    stem = conv(1, 16, 7, False) + conv(16, 16, 3, False) + conv(16, 32, 3, False) + 2 * (16 + 16 + 32)
    tail = 2 * (conv(512, 512, 3, False) + 2 * 512) + conv(512, 4, 1)
    by_hand = stem + level(32, 64) + level(64, 128) + level(128, 256) + level(256, 512) + tail
    assert by_hand == 15_881_236
    assert parameters(DilatedResNet22) == by_hand


def test_unet_parameters():
    widths = [64, 128, 256, 512, 1024]
    by_hand = sum(conv(i, o, 3) + conv(o, o, 3) for i, o in zip([1, *widths[:-1]], widths, strict=True))
    for o, i in zip(widths[:-1], widths[1:], strict=True):
        by_hand += conv(i, o, 2) + conv(2 * o, o, 3) + conv(o, o, 3)
    by_hand += conv(64, 4, 1)
    assert by_hand == 31_030_788
    assert parameters(BayesianUNet) == by_hand


@pytest.mark.parametrize(("channels", "expected"), [(1, 346_290), (2, 347_074), (3, 347_858)])
def test_detector_parameters(channels, expected):
    def block(i: int, o: int) -> int:
        return conv(i, o, 3, False) + conv(o, o, 3, False) + conv(i, o, 1, False) + 3 * 2 * o

    stem = conv(channels, 16, 7, False) + conv(16, 32, 3, False) + 2 * (16 + 32)
    classifier = 2 * conv(128, 128, 1) + conv(128, 2, 1)
    assert stem + block(32, 32) + block(32, 64) + block(64, 128) + classifier == expected
    assert parameters(FailureResNet, in_channels=channels) == expected


def test_detector_variants_share_the_trunk():
    trunk = parameters(FailureResNet)
    assert parameters(FailureResNet, region_size=4) == trunk
    extra = 3 * 2 * 128 + 2 * conv(128, 128, 3, False) + conv(128, 128, 1, False)
    assert parameters(FailureResNet, region_size=16) == trunk + extra


# Receptive fields


def gradient_support(network: nn.Module, size: int, row: int, col: int) -> tuple[int, int, int, int]:
    """Bounding box (first and last row, first and last column) of the input pixels that move one output pixel.

    With positive weights and no dead unit no two paths cancel, so that the gradient is above 0 in the whole field.
    """
    network = network.double().eval()
    for name, parameter in network.named_parameters():
        parameter.data.fill_(0.0 if name.endswith("bias") else 1.0 / parameter[0].numel())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(1.0)
    channels = next(network.parameters()).shape[1]
    x = torch.ones(1, channels, size, size, dtype=torch.float64, requires_grad=True)
    network(x)[0, :, row, col].sum().backward()
    touched = x.grad[0].abs().sum(0).nonzero()
    first, last = touched.min(0).values.tolist(), touched.max(0).values.tolist()
    return first[0], last[0], first[1], last[1]


def test_dn_receptive_field_is_131():
    network = DilatedCNN(features=(2,) * 8, classifier_features=2)
    assert gradient_support(network, 141, 70, 68) == (70 - 65, 70 + 65, 68 - 65, 68 + 65)


def test_dn_receptive_field_follows_the_dilations():
    network = DilatedCNN(features=(2, 2), dilations=(3, 2), classifier_features=2)
    assert gradient_support(network, 21, 10, 10) == (5, 15, 5, 15)


def test_detector_receptive_field():
    """51 pixels at stride 8, as the released code's detector; its centers lie 8 apart."""
    first = gradient_support(FailureResNet(), 112, 6, 6)
    assert first[1] - first[0] + 1 == 51
    assert gradient_support(FailureResNet(), 112, 6, 7) == (*first[:2], first[2] + 8, first[3] + 8)


# The dilated CNN layer by layer, in numpy


def valid_convolution(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, dilation: int) -> np.ndarray:
    taps = weight.shape[-1]
    height, width = (n - dilation * (taps - 1) for n in x.shape[1:])
    out = np.tile(bias[:, None, None], (1, height, width))
    for i in range(taps):
        for j in range(taps):
            window = x[:, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
            out += np.einsum("oc,chw->ohw", weight[:, :, i, j], window)
    return out


def test_dn_is_the_zero_padded_valid_network():
    network = settle(DilatedCNN(in_channels=2, features=(3, 4, 2), dilations=(1, 2, 4), classifier_features=5)).double()
    state = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    x = np.random.default_rng(0).random((2, 9, 12))
    value = np.pad(x, ((0, 0), (7, 7), (7, 7)))
    dilations = iter((1, 2, 4, 1, 1))
    for index, module in enumerate(state):
        numbers = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        if isinstance(module, nn.Conv2d):
            value = valid_convolution(value, numbers["weight"], numbers["bias"], next(dilations))
            value = np.maximum(value, 0.0) if index < len(state) - 1 else value
        else:
            scale = numbers["weight"] / np.sqrt(numbers["running_var"] + module.eps)
            value = (value - numbers["running_mean"][:, None, None]) * scale[:, None, None]
            value += numbers["bias"][:, None, None]
    with torch.no_grad():
        result = network(torch.from_numpy(x)[None])[0].numpy()
    assert result.shape == (4, 9, 12)
    np.testing.assert_allclose(result, value, atol=1e-12)


def test_dn_batch_normalization_is_in_layers_2_to_9():
    names = [type(module).__name__ for module in DilatedCNN().layers]
    layers = " ".join(names).split("Conv2d")[1:]
    assert [("BatchNorm2d" in layer, "Dropout2d" in layer) for layer in layers] == (
        [(False, True)] + [(True, True)] * 8 + [(False, False)]
    )


def test_dn_widths_and_dilations_have_one_length():
    with pytest.raises(ValueError, match="8 and 2"):
        DilatedCNN(dilations=(1, 2))


# Output grids


@pytest.mark.parametrize("make", SEGMENTATION)
@pytest.mark.parametrize("size", [(33, 50), (17, 64), (1, 5)])
def test_segmentation_keeps_the_grid(make, size):
    network = make(in_channels=2, out_channels=3).eval()
    with torch.no_grad():
        logits = network(input_for(network, size))
    assert logits.shape == (2, 3, *size)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("make", SEGMENTATION)
def test_outputs_are_logits(make):
    network = make().eval()
    with torch.no_grad():
        logits = network(5 * input_for(network, (24, 20)))
    assert logits.min() < 0
    assert (logits.sum(dim=1) - 1).abs().max() > 1e-3


def test_drn_upsamples_the_classifiers_logits():
    """By 8 exactly, cropped to the input: a size that is no multiple of 8 does not stretch the grid."""
    network = settle(DilatedResNet22()).double()
    x = input_for(network, (40, 27)).double()
    with torch.no_grad():
        coarse = network.classifier(network.features(x))
        assert coarse.shape == (2, 4, 5, 4)  # output stride 8, rounded up
        # bilinear interpolation by hand, half-pixel centers, along each axis in turn
        for axis, size in ((2, 40), (3, 27)):
            n = coarse.shape[axis]
            position = ((torch.arange(size, dtype=torch.float64) + 0.5) / 8 - 0.5).clamp(0, n - 1)
            low = position.floor().long().clamp(max=n - 1)
            high = (low + 1).clamp(max=n - 1)
            share = (position - low).view([-1 if a == axis else 1 for a in range(4)])
            coarse = coarse.index_select(axis, low) * (1 - share) + coarse.index_select(axis, high) * share
        torch.testing.assert_close(network(x), coarse)


@pytest.mark.parametrize("size", [(32, 48), (20, 33)])
def test_unet_pads_by_replication_and_crops(size):
    network = BayesianUNet(features=SMALL_UNET).eval()
    x = input_for(network, size)
    rows, cols = (max(32, -(-n // 16) * 16) for n in size)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, rows - size[0]), (0, cols - size[1])), mode="edge")
    with torch.no_grad():
        whole = network(torch.from_numpy(padded))
        torch.testing.assert_close(network(x), whole[:, :, : size[0], : size[1]])


def test_unet_normalizes_in_the_contracting_path_only():
    network = BayesianUNet(features=SMALL_UNET)

    def count(part: nn.Module, kind: type) -> int:
        return sum(isinstance(module, kind) for module in part.modules())

    assert count(network.contracting, nn.InstanceNorm2d) == 8
    assert count(network.bottleneck, nn.InstanceNorm2d) == 2
    assert count(network.expanding, nn.InstanceNorm2d) == 0
    for block in [*network.contracting, *network.expanding]:
        assert isinstance(block[-1], nn.Dropout2d)
    assert count(network, nn.Dropout2d) == 8


@pytest.mark.parametrize("region_size", [4, 8, 16])
def test_detector_gives_two_logits_per_region(region_size):
    network = FailureResNet(region_size=region_size).eval()
    with torch.no_grad():
        logits = network(input_for(network, (80, 48)))
    assert logits.shape == (2, 2, 80 // region_size, 48 // region_size)


@pytest.mark.parametrize(("region_size", "size"), [(4, (82, 80)), (8, (80, 84)), (16, (88, 80))])
def test_detector_refuses_partial_regions(region_size, size):
    network = FailureResNet(region_size=region_size)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} .* {region_size}"):
        network(input_for(network, size))


def test_detector_refuses_other_region_sizes():
    with pytest.raises(ValueError, match="got 12"):
        FailureResNet(region_size=12)


# Dropout


@pytest.mark.parametrize("make", SEGMENTATION + DETECTORS[1:2])
def test_dropout_is_an_argument(make):
    """Its value reaches every dropout module; 0 drops nothing and keeps the names of all weights."""
    with_dropout, without = make(dropout=0.3), make(dropout=0.0)
    drops = [module for module in with_dropout.modules() if isinstance(module, nn.Dropout | nn.Dropout2d)]
    assert drops and {module.p for module in drops} == {0.3}
    without.load_state_dict(with_dropout.state_dict())
    x = input_for(without, (32, 32))
    with torch.no_grad():
        reference = with_dropout.eval()(x)
        torch.testing.assert_close(without.eval()(x), reference, rtol=0, atol=0)
        for module in [*without.modules(), *with_dropout.modules()]:
            module.training = isinstance(module, nn.Dropout | nn.Dropout2d)
        torch.testing.assert_close(without(x), reference, rtol=0, atol=0)
        torch.manual_seed(0)
        assert not torch.allclose(with_dropout(x), reference)


@pytest.mark.parametrize("make", SEGMENTATION)
def test_segmentation_drops_whole_feature_maps(make):
    assert not any(type(module) is nn.Dropout for module in make().modules())


def test_drn_has_the_released_codes_17_dropout_modules():
    assert sum(isinstance(module, nn.Dropout2d) for module in DilatedResNet22().modules()) == 17


def test_detector_drops_single_elements():
    drops = [module for module in FailureResNet().modules() if isinstance(module, nn.Dropout)]
    assert len(drops) == 6 and {module.p for module in drops} == {0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.25, 0.3, 0.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_by_bytes(p, dtype, memory_format):
    """Each value by itself, with the probability asked for, and the mean kept: what torch's dropout is."""
    x = torch.ones(5, 8, 99, 101, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    torch.manual_seed(4)
    y = ByteDropout(p)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # of ones, the factor
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).to(dtype).item()}
    zero = (y == 0).double()
    n = zero.numel()
    assert abs(zero.mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    for axis in (1, 2, 3):  # neighbours know nothing of each other
        pairs = zero.narrow(axis, 0, zero.shape[axis] - 1) * zero.narrow(axis, 1, zero.shape[axis] - 1)
        assert abs(pairs.mean() - p**2) < 5 * p / n**0.5
    torch.manual_seed(4)
    assert torch.equal(ByteDropout(p)(x), y)
    assert torch.equal(ByteDropout(p).eval()(x), x)


def test_dropout_by_bytes_of_a_view():
    x = torch.ones(2, 3, 8, 8)[:, :, ::2, ::2]
    assert set(ByteDropout(0.5)(x).unique().tolist()) == {0.0, 2.0}
    assert ByteDropout(1.0)(x).eq(0).all() and ByteDropout(0.0)(x).equal(x)


# Export and training


@pytest.mark.parametrize("make", SEGMENTATION + DETECTORS)
def test_torchscript_equals_eager(make):
    network = settle(make()).double()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(network), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    sizes = [(32, 48)] if isinstance(network, FailureResNet) else [(32, 48), (35, 21)]
    with torch.no_grad():
        for size in sizes:
            x = input_for(network, size).double()
            torch.testing.assert_close(scripted(x), network(x))


@pytest.mark.parametrize("make", SEGMENTATION + DETECTORS[1:2])
def test_every_weight_gets_a_gradient(make):
    torch.manual_seed(0)
    network = make(dropout=0.0)
    logits = network(input_for(network, (48, 48)))
    F.cross_entropy(logits, torch.randint(logits.shape[1], (2, *logits.shape[2:]))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if parameter.ndim > 1:  # a bias before a normalization has none
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (33, 33), (0, 0)])
def test_joined_edges_are_torchs_replicate_padding(rows, columns):
    values = torch.rand(2, 3, 7, 5, dtype=torch.double)
    weights = torch.rand(2, 3, 7 + 2 * rows, 5 + 2 * columns, dtype=torch.double)
    results = []
    for pad in (joined_edges, lambda x, r, c: F.pad(x, (c, c, r, r), mode="replicate")):
        x = values.clone().requires_grad_()
        padded = pad(x, rows, columns)
        (padded * weights).sum().backward()
        results.append((padded, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1])
