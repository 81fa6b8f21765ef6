import gc
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.networks.nets import BasicUNet, DynUNet, UNet
from monai.transforms import Compose, Invertd
from scipy.stats import entropy
from torch import nn
from torch.nn import functional as F

from cardiac_qc_plugin import inferers
from cardiac_qc_plugin import sampling as sampling_module
from cardiac_qc_plugin.inferers import (
    AutocastInferer,
    EnsembleSliceInferer,
    FailureRegionInferer,
    MCDropoutSliceInferer,
    heart_window,
    turned_window,
)
from cardiac_qc_plugin.networks import BayesianUNet, DilatedCNN, DilatedResNet22, FailureResNet
from cardiac_qc_plugin.networks.residual import ResidualBlock
from cardiac_qc_plugin.sampling import reduced_precision, sample_seed
from cardiac_qc_plugin.transforms import InPlaneSpacingd, SplitUncertaintyd

CPU = torch.device("cpu")


@pytest.fixture
def may_be_plain():
    """For tests of networks that cannot be fused."""


@pytest.fixture(autouse=True)
def fused(request, monkeypatch):
    """No network of these tests may fall back to its own passes, which are always right."""
    if "may_be_plain" not in request.fixturenames:
        monkeypatch.setattr(sampling_module, "_warn_of_plain", lambda network, reason: pytest.fail(reason))


def small_network(dropout: float = 0.4) -> DilatedCNN:
    """A trained network's stand-in: batch normalization with statistics of its own, dropout in every layer but one."""
    torch.manual_seed(11)
    network = DilatedCNN(features=(6, 6), dilations=(1, 2), classifier_features=8, dropout=dropout)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.2, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def stack(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5))


def infer(inputs, network=None, **options):
    options = {"samples": 4, "amp": False, **options}
    return MCDropoutSliceInferer(**options)(inputs, network or small_network())


def split(maps: np.ndarray) -> dict[str, np.ndarray]:
    """The inferer's channels, classes first."""
    maps = np.moveaxis(np.asarray(maps), 1, 0)
    return {"probabilities": maps[:4], "bmap": maps[4], "emap": maps[5], "votes": maps[6:]}


def softmax(logits: torch.Tensor) -> np.ndarray:
    value = np.exp(logits.numpy().astype(np.float64))
    return value / value.sum(axis=1, keepdims=True)


def drawn_by_hand(slices: torch.Tensor, network: nn.Module, samples: int, seed: int = 0) -> np.ndarray:
    """(T, D, K, H, W): each sample of each slice is a pass of the network itself, its dropout in training mode."""
    drawn = np.empty((samples, len(slices), 4, *slices.shape[2:]))
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.train()
    with torch.no_grad():
        for z in range(len(slices)):
            for t in range(samples):
                torch.manual_seed(sample_seed(seed, z, t))
                image = slices[z : z + 1].contiguous(memory_format=torch.channels_last)
                drawn[t, z] = softmax(network(image))[0]
    network.eval()
    return drawn


def by_hand(slices: torch.Tensor, network: nn.Module, samples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """All samples in memory, then numpy."""
    drawn = drawn_by_hand(slices, network, samples, seed)
    with torch.no_grad():
        deterministic = softmax(network.eval()(slices))
    most = drawn.argmax(axis=2)
    return {
        "probabilities": np.moveaxis(drawn.mean(axis=0), 1, 0),
        "deterministic": np.moveaxis(deterministic, 1, 0),
        "bmap": np.minimum(2 * drawn.std(axis=0, ddof=min(samples - 1, 1)), 1).mean(axis=1),
        "emap": entropy(deterministic, axis=1) / np.log(4),
        "votes": np.stack([(most == c).mean(axis=0) for c in range(4)]),
    }


# The maps


NETWORKS = {
    "dn": lambda **k: DilatedCNN(features=(4, 4), dilations=(1, 1), **k),
    "drn": DilatedResNet22,
    "unet": lambda **k: BayesianUNet(features=(4, 4, 4), **k),
    "detector": lambda **k: FailureResNet(in_channels=1, **k),
}


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 7, None])
@pytest.mark.parametrize("name", ["small", "dn", "drn", "unet"])
def test_maps_equal_those_of_stored_samples(name, chunk, onednn):
    """Fused, folded, in any batch: the textbook's maps, from the same masks."""
    torch.manual_seed(1)
    network = small_network() if name == "small" else NETWORKS[name](dropout=0.3)
    slices = stack(3, 1, 32, 41)
    expected = by_hand(slices, network, samples=4, seed=3)
    with torch.backends.mkldnn.flags(enabled=onednn):
        result = split(infer(slices, network, samples=4, sw_batch_size=chunk, seed=3))
    assert expected["bmap"].max() > 0.05  # otherwise nothing was sampled
    for key, value in result.items():
        np.testing.assert_allclose(value, expected[key], atol=2e-5, err_msg=key)


def test_element_wise_dropout_and_dropout_of_another_kind():
    """The first is replaced, the second keeps its own forward pass."""

    class MyDropout(nn.Dropout2d):
        pass

    for dropout in (nn.Dropout(0.4), MyDropout(0.4)):
        torch.manual_seed(2)
        network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), dropout, nn.Conv2d(4, 4, 1))
        slices = stack(2, 2, 9, 11)
        expected, result = by_hand(slices, network, samples=3), split(infer(slices, network, samples=3))
        assert expected["bmap"].max() > 0.02
        np.testing.assert_allclose(result["bmap"], expected["bmap"], atol=2e-6)


class AroundDropout(nn.Module):
    """Paths that pass the first dropout by, and a dropout whose input somebody else has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Dropout2d(0.5))
        self.dropout = nn.Dropout2d(0.5)
        self.last = nn.Sequential(
            nn.Dropout2d(0.5),
            nn.BatchNorm2d(4),
            nn.Dropout2d(0.5),
            nn.Conv2d(4, 4, 1, groups=2),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.Dropout2d(0.5),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x) + x
        y = y + self.dropout(y) + self.inner(x)  # the second time it is behind a dropout
        return self.last(y) + y


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_other_ways_through_a_network(chunk):
    torch.manual_seed(3)
    network, slices = AroundDropout(), stack(2, 1, 7, 8)
    expected, result = by_hand(slices, network, samples=4), split(infer(slices, network, sw_batch_size=chunk))
    for key, value in result.items():
        np.testing.assert_allclose(value, expected[key], atol=2e-6, err_msg=key)


def convolution(channels: int = 4) -> list[nn.Module]:
    return [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU()]


SEQUENCES = {
    "dropout on both sides of the first": lambda: [nn.Dropout2d(0.4), *convolution(2), nn.Dropout2d(0.4)],
    "batch normalization between": lambda: [
        *convolution(2), nn.BatchNorm2d(4), nn.Dropout2d(0.4), *convolution(), nn.Dropout2d(0.4)
    ],
    "elementwise, then maps": lambda: [*convolution(2), nn.Dropout(0.4), *convolution(), nn.Dropout2d(0.4)],
    "two after another": lambda: [*convolution(2), nn.Dropout2d(0.4), nn.Dropout2d(0.2)],
    "all of a layer": lambda: [*convolution(2), nn.Dropout2d(1.0), *convolution(), nn.Dropout2d(0.4)],
    "residual block first": lambda: [ResidualBlock(2, 2, dropout=0.4), nn.Dropout2d(0.4), *convolution(2)],
    "residual block of a distributed training": lambda: [
        nn.SyncBatchNorm.convert_sync_batchnorm(ResidualBlock(2, 4, dropout=0.4)), *convolution()
    ],
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", SEQUENCES)
def test_places_of_dropout(name, chunk):
    """A convolution that applies dropout itself, between all kinds of neighbours."""
    torch.manual_seed(3)
    network, slices = nn.Sequential(*SEQUENCES[name](), nn.Conv2d(4, 4, 1)), stack(2, 2, 7, 8)
    expected, result = by_hand(slices, network, samples=4), split(infer(slices, network, sw_batch_size=chunk))
    assert expected["bmap"].max() > 1e-3
    for key, value in result.items():
        np.testing.assert_allclose(value, expected[key], atol=2e-6, err_msg=key)


in_bf16 = pytest.mark.skipif(
    not getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)(),
    reason="oneDNN's bf16 needs AVX512 instructions",
)


def block(channels_in: int) -> nn.Sequential:
    layers = [nn.Conv2d(channels_in, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.4))


class Peculiar(nn.Module):
    """What a user's network may do with its layers, by name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.encoder = nn.Sequential(block(1), block(4))
        if way == "one dropout at two places":
            self.encoder[0][6] = self.encoder[1][6] = nn.Dropout2d(0.4)
        if way == "one dropout by two names":
            self.encoder[0][6] = self.encoder[1][6] = nn.Identity()
            self.first = self.second = nn.Dropout2d(0.4)
        if way == "block with two parents":
            self.again = nn.ModuleList([self.encoder[1]])
        if way == "hook":
            self.encoder[0][3].register_forward_hook(lambda module, args, output: 2 * output)
        if way == "normalization without weights":
            self.encoder[0][5] = self.encoder[1][5] = nn.BatchNorm2d(4, affine=False)
        if way == "statistics of the batch":
            self.encoder[0][1] = nn.BatchNorm2d(4, track_running_stats=False)
        if way == "weight norm":
            nn.utils.weight_norm(self.encoder[0][0])
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "index":
            first = self.encoder[0](x)
            return self.last(first + self.encoder[1](first))
        if self.way == "iteration":
            parts = [x := part(x) for part in self.encoder]
            return self.last(sum(parts))
        if self.way == "slice":
            return self.last(self.encoder[0][:4](x) + self.encoder(x))
        if self.way == "one dropout by two names":
            return self.last(self.second(self.encoder[1](self.first(self.encoder[0](x)))))
        return self.last(self.encoder(x))


PECULIAR = (
    "index",
    "iteration",
    "slice",
    "one dropout at two places",
    "one dropout by two names",
    "block with two parents",
    "hook",
    "normalization without weights",
    "statistics of the batch",
    "weight norm",
)


@pytest.mark.usefixtures("may_be_plain")
@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("way", PECULIAR)
def test_network_that_does_more_with_its_layers_than_fusing_sees(way, amp):
    torch.manual_seed(1)
    network, slices = Peculiar(way), stack(1 if way == "statistics of the batch" else 3, 1, 16, 20)
    if way == "index":
        slices[0] = 0  # a blank slice tells nothing
    inferer, expected = MCDropoutSliceInferer(samples=4, amp=amp), by_hand(slices, network, samples=4)
    prepared = inferer.prepare(network)
    for passes in (network, prepared, prepared):
        result = split(inferer(slices, passes).numpy())
        for key, value in result.items():
            close = {"votes": 1}.get(key, 0.3) if amp else 2e-5  # all may vote otherwise where classes are equal
            np.testing.assert_allclose(value, expected[key], atol=close, err_msg=key)
            assert not amp or np.abs(value - expected[key]).mean() < 0.01, key


@pytest.mark.usefixtures("may_be_plain")
def test_networks_of_monai():
    torch.manual_seed(1)
    sizes = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)}
    slices = stack(2, 1, 32, 32)
    for network in (
        DynUNet(2, 1, 4, **sizes, filters=(4, 4, 8), dropout=0.3),
        BasicUNet(2, 1, 4, features=(4, 4, 4, 4, 4, 4), dropout=0.3),
        UNet(2, 1, 4, channels=(4, 8), strides=(2,), dropout=0.3),
    ):
        expected, result = by_hand(slices, network, samples=3), split(infer(slices, network, samples=3))
        for key, value in result.items():
            np.testing.assert_allclose(value, expected[key], atol=2e-5, err_msg=f"{type(network).__name__} {key}")


@pytest.mark.usefixtures("may_be_plain")
def test_network_that_returns_a_list_is_refused():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.dropout = nn.Conv2d(1, 4, 1), nn.Dropout2d()

        def forward(self, x):
            return [self.dropout(self.layer(x))] * 2

    with pytest.raises(ValueError, match=r"has to return its logits \(B, K, H, W\); it returned a list"):
        infer(stack(1, 1, 8, 8), Deep())


@pytest.mark.parametrize("inputs", [torch.full((2, 1, 8, 8), torch.nan), torch.zeros(0, 1, 8, 8)])
def test_values_that_are_not_finite_are_refused(inputs):
    with pytest.raises(ValueError, match="Expected finite values"):
        infer(inputs)


@in_bf16
def test_residual_block_in_bf16_gets_an_image_in_fp32(monkeypatch):
    monkeypatch.setattr(sampling_module, "reduced_precision", lambda device: True)
    network = nn.Sequential(ResidualBlock(2, 2, dropout=0.4), *convolution(2))
    maps = infer(stack(2, 2, 16, 16), network, amp=True)
    assert maps.isfinite().all()


def test_layers_before_the_first_dropout_run_once_for_each_slice(monkeypatch):
    seen = []
    plain = torch.ops.mkldnn._convolution_pointwise

    def counting(x, *args):
        seen.extend([x.shape[1]] * x.shape[0])
        return plain(x, *args)

    monkeypatch.setattr(sampling_module, "convolution_pointwise", counting)
    infer(stack(3, 1, 16, 16), samples=5, sw_batch_size=2)
    assert seen.count(1) == 3 + 3  # of one channel, the first: without dropout, and for the samples
    assert seen.count(6) == 3 * (1 + 5) * 2


def test_most_probable_class_is_that_of_argmax():
    """Also where two are alike, or none is a number."""
    for p in (stack(2, 4, 5, 6), stack(2, 4, 5, 6).round(decimals=1), torch.full((1, 3, 2, 2), torch.nan)):
        expected = F.one_hot(p.argmax(dim=1), p.shape[1]).movedim(-1, 1).float()
        assert torch.equal(inferers.most_probable(p), expected)


def test_members_of_an_ensemble_take_the_place_of_samples(tmp_path):
    network, slices, drawn = small_network(), stack(1, 1, 12, 9, 5), []
    for number in range(3):
        network.layers[0].weight.data.normal_(generator=torch.Generator().manual_seed(number))
        torch.save(network.state_dict(), tmp_path / f"{number}.pt")
        with torch.no_grad():
            drawn.append(softmax(network(slices[0].movedim(-1, 0))))
    drawn, shares = np.stack(drawn), []
    inferer = EnsembleSliceInferer([tmp_path / f"{number}.pt" for number in range(3)], sw_batch_size=2, amp=False)
    inferer.progress = shares.append
    result = split(inferer(slices, network).movedim(-1, 1)[0])
    most = drawn.argmax(axis=2)
    expected = {
        "probabilities": np.moveaxis(drawn.mean(axis=0), 1, 0),
        "bmap": np.minimum(2 * drawn.std(axis=0, ddof=1), 1).mean(axis=1),
        "emap": entropy(drawn.mean(axis=0), axis=1) / np.log(4),
        "votes": np.stack([(most == c).mean(axis=0) for c in range(4)]),
    }
    assert expected["bmap"].max() > 0.1
    for name, value in result.items():
        np.testing.assert_allclose(value, expected[name], atol=2e-6, err_msg=name)
    areas = np.stack([(most == c).sum(axis=(2, 3)) for c in range(4)], axis=-1)
    np.testing.assert_array_equal(inferer.sample_areas, np.moveaxis(areas, 0, 1))
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])
    with pytest.raises(ValueError, match=r"one stack of slices .* got shape \(2, 1, 12, 9, 5\)"):
        inferer(stack(2, 1, 12, 9, 5), network)
    with pytest.raises(ValueError, match="two or more of them, got 1"):
        EnsembleSliceInferer([tmp_path / "0.pt"])


def test_deterministic_prediction_has_the_same_maps():
    network, slices = small_network(), stack(3, 1, 8, 8)
    mean, sure = split(infer(slices, network)), split(infer(slices, network, prediction="deterministic"))
    expected = by_hand(slices, network, samples=4)["deterministic"]
    np.testing.assert_allclose(sure["probabilities"], expected, atol=2e-6)
    assert np.abs(mean["probabilities"] - sure["probabilities"]).max() > 0.01
    for name in ("bmap", "emap", "votes"):
        np.testing.assert_array_equal(mean[name], sure[name])


def test_probabilities_and_votes_sum_to_1():
    result = split(infer(stack(2, 1, 10, 10, 3), samples=7))
    np.testing.assert_allclose(result["probabilities"].sum(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(result["votes"].sum(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(result["votes"] * 7, (result["votes"] * 7).round(), atol=1e-5)
    for name in ("bmap", "emap"):
        assert result[name].min() >= 0 and result[name].max() <= 1


def test_stack_equals_its_slices():
    """Each stack of (B, C, H, W, D) is the same as alone, and as its slices (D, C, H, W)."""
    network, volume = small_network(), stack(2, 1, 7, 10, 3)
    whole = infer(volume, network)
    assert whole.shape == (2, 10, 7, 10, 3)
    for b in range(2):
        torch.testing.assert_close(infer(volume[b : b + 1], network)[0], whole[b], rtol=0, atol=1e-6)
        flat = infer(volume[b].movedim(-1, 0), network)
        torch.testing.assert_close(flat.movedim(0, -1), whole[b], rtol=0, atol=1e-6)


def test_number_of_classes_is_the_networks():
    network = DilatedCNN(out_channels=2, features=(3,), dilations=(1,))
    assert infer(stack(1, 1, 6, 6, 2), network).shape == (1, 2 * 2 + 2, 6, 6, 2)


def test_several_input_channels():
    assert infer(stack(1, 2, 16, 16), FailureResNet()).shape == (1, 6, 2, 2)


def test_one_sample():
    network, slices = small_network(), stack(2, 1, 8, 8)
    result = split(infer(slices, network, samples=1))
    expected = by_hand(slices, network, samples=1)
    np.testing.assert_allclose(result["probabilities"], expected["probabilities"], atol=2e-6)
    np.testing.assert_array_equal(result["votes"], expected["votes"])
    np.testing.assert_array_equal(result["bmap"], 0)


@pytest.mark.parametrize("prediction", ["mean", "deterministic"])
@pytest.mark.parametrize("make", [small_network, lambda: nn.Conv2d(1, 4, 3, padding=1)], ids=["dropout", "none"])
def test_no_samples(make, prediction):
    network, slices = make().eval(), stack(2, 1, 8, 8)
    result = split(infer(slices, network, samples=0, prediction=prediction))
    with torch.no_grad():
        expected = softmax(network(slices))
    np.testing.assert_allclose(np.moveaxis(result["probabilities"], 0, 1), expected, atol=2e-6)
    np.testing.assert_allclose(result["emap"], entropy(expected, axis=1) / np.log(4), atol=2e-6)
    np.testing.assert_array_equal(result["bmap"], 0)
    np.testing.assert_array_equal(result["votes"].argmax(0), result["probabilities"].argmax(0))
    assert set(np.unique(result["votes"])) == {0.0, 1.0}


def test_no_amp_is_exact():
    """Also where the caller's autocast is on."""
    network, slices = small_network(), stack(2, 1, 9, 9)
    with torch.no_grad():
        expected = network(slices.contiguous(memory_format=torch.channels_last)).softmax(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        result = infer(slices, network, samples=0)[:, :4]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_amp_stays_close(monkeypatch):
    monkeypatch.setattr(sampling_module, "fast_integers", lambda device: False)
    network, slices = small_network(), stack(2, 1, 16, 16)
    exact, fast = (infer(slices, network, samples=0, amp=amp) for amp in (False, True))
    assert fast.dtype == torch.float32
    assert (fast - exact)[:, :4].abs().max() < 0.03
    assert torch.equal(fast, exact) != reduced_precision(CPU)


# Random numbers


def test_seed_decides():
    network, volume = small_network(), stack(1, 1, 8, 8, 3)
    torch.manual_seed(1)
    first = infer(volume, network, seed=1)
    torch.manual_seed(2)
    assert torch.equal(infer(volume, network, seed=1), first)
    assert not torch.allclose(infer(volume, network, seed=2)[:, 4], first[:, 4])


@pytest.mark.parametrize("samples", [0, 3])
def test_global_generator_is_untouched(samples):
    before = torch.manual_seed(4).get_state()
    inferer, network, volume = (
        MCDropoutSliceInferer(samples=samples, amp=False),
        small_network(),
        stack(1, 1, 6, 6, 2),
    )
    torch.set_rng_state(before)
    inferer(volume, network)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_devices_generators_are_untouched(monkeypatch):
    """torch.manual_seed would seed every GPU, in use by this inferer or not."""
    seeded, network = [], small_network()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    infer(stack(1, 1, 6, 6, 2), network)
    assert seeded == []


def test_samples_and_slices_differ():
    """Each slice and each sample has a mask of its own: the b-map of repeated slices is not the same."""
    volume = stack(1, 1, 10, 10, 1).expand(-1, -1, -1, -1, 3)
    bmap = infer(volume)[0, 4]
    assert not torch.allclose(bmap[..., 0], bmap[..., 1])
    assert not torch.allclose(bmap[..., 1], bmap[..., 2])


@pytest.mark.parametrize("name", ["drn", "unet"])
def test_masks_do_not_depend_on_batch_or_number_of_samples(name):
    """The first samples of many are the samples of few, and a stack's first slices are those of a shorter stack."""
    torch.manual_seed(4)
    network, volume = NETWORKS[name](), stack(1, 1, 32, 32, 5)
    few = infer(volume[..., :2], network, samples=2, sw_batch_size=1)
    inferer = MCDropoutSliceInferer(samples=6, sw_batch_size=4, amp=False)
    inferer(volume, network)
    areas = inferer.sample_areas
    inferer = MCDropoutSliceInferer(samples=2, amp=False)
    torch.testing.assert_close(inferer(volume, network)[..., :2], few, rtol=0, atol=1e-5)
    assert (areas[:, :2] - inferer.sample_areas).abs().max() <= 1  # a pixel between two classes


# The region


def wide_network(name: str) -> nn.Module:
    """With a receptive field that ends inside the images of these tests, and more than background in its output."""
    torch.manual_seed(6)
    if name == "dn":
        return DilatedCNN(features=(6, 6), dilations=(1, 2), classifier_features=8, dropout=0.3).eval()
    return NETWORKS[name](dropout=0.3).eval()


@pytest.fixture
def window(monkeypatch):
    chosen = (slice(16, 48), slice(32, 80))
    monkeypatch.setattr(inferers, "heart_window", lambda probabilities, margin: chosen)
    return chosen


@pytest.mark.parametrize("form", ["eager", "scripted"])
def test_region_of_a_network_with_valid_convolutions_is_exact(form, window):
    network, volume = wide_network("dn"), stack(1, 1, 64, 96, 2)
    whole = infer(volume, network)
    network = torch.jit.script(network) if form == "scripted" else network
    part = infer(volume, network, region="heart")
    inside = (..., *window, slice(None))
    torch.testing.assert_close(part[inside], whole[inside], rtol=0, atol=2e-6)
    assert whole[inside][:, 4].max() > 0.05


def test_region_is_close_to_the_whole_field(monkeypatch):
    """Closer than a region by itself, whose border and instance normalization are others."""
    window = rows, cols = slice(32, 96), slice(32, 96)
    monkeypatch.setattr(inferers, "heart_window", lambda probabilities, margin: window)
    torch.manual_seed(0)
    network, volume = BayesianUNet(features=(8, 16, 32)), stack(1, 1, 128, 144, 1)
    volume[:, :, rows, cols] *= 0.2
    whole, part = (infer(volume, network, region=region, samples=8)[0] for region in ("whole", "heart"))
    alone, whole, part = (
        infer(volume[:, :, rows, cols], network, samples=8)[0],
        whole[:, rows, cols],
        part[:, rows, cols],
    )
    for channels in (slice(0, 4), slice(4, 5)):
        error = (part[channels] - whole[channels]).abs().mean()
        assert error < 0.5 * (alone[channels] - whole[channels]).abs().mean()


@pytest.mark.parametrize("name", ["dn", "drn", "unet"])
def test_outside_the_region_is_the_pass_without_dropout(name, window):
    network, volume = wide_network(name), stack(1, 1, 64, 96, 2)
    inferer = MCDropoutSliceInferer(samples=3, region="heart", amp=False)
    result = inferer(volume, network)
    sure = infer(volume, network, samples=0)
    outside = torch.ones(64, 96, dtype=torch.bool)
    outside[window] = False
    for channels in (slice(0, 4), slice(4, 5), slice(6, 10)):
        assert torch.equal(result[0, channels, outside], sure[0, channels, outside])
    torch.testing.assert_close(result[:, 5], sure[:, 5])
    assert result[0, 4][window].max() > 0.01
    areas = inferer.sample_areas
    assert (areas.sum(dim=2) == 64 * 96).all()
    torch.testing.assert_close(areas.sum(dim=1).float() / 3, result[0, 6:].sum(dim=(1, 2)).T, rtol=0, atol=0.1)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", ["dn", "drn", "unet"])
def test_prepared_network_remembers_nothing_of_other_scans(name, amp, window):
    network, inferer = wide_network(name), MCDropoutSliceInferer(samples=2, region="heart", amp=amp)
    prepared = inferer.prepare(network)
    large, small = stack(1, 1, 96, 112, 3), stack(1, 1, 64, 96, 2)
    inferer(large, prepared)
    torch.testing.assert_close(inferer(small, prepared), inferer(small, network), rtol=0, atol=0)
    inferer.region = "whole"
    torch.testing.assert_close(inferer(large, prepared), inferer(large, network), rtol=0, atol=0)


def test_window_around_the_heart():
    probabilities = torch.zeros(3, 4, 100, 120)
    probabilities[:, 0] = 1
    assert heart_window(probabilities, 8) == (slice(0, 100), slice(0, 120))  # nothing found: the whole field
    probabilities[1, 0, 40:60, 50:75] = 0.5
    probabilities[0, 0, 2:4, 3:5] = 0.5  # too small to be the heart
    assert heart_window(probabilities, 0) == (slice(32, 64), slice(48, 80))
    assert heart_window(probabilities, 9) == (slice(16, 80), slice(32, 96))
    assert heart_window(probabilities, 45) == (slice(0, 100), slice(0, 120))
    probabilities[2, 0, 90:98, 50:60] = 0.5  # large enough to be part of it
    assert heart_window(probabilities, 0) == (slice(32, 100), slice(48, 80))


# Quarter turns


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["small", "drn", "unet"])
def test_samples_see_the_slices_turned(name, turns):
    """Sample t is that of the turned stack, turned back; the deterministic pass is the mean of one of each turn."""
    torch.manual_seed(1)
    network = small_network() if name == "small" else NETWORKS[name](dropout=0.3)
    slices, samples = stack(2, 1, 32, 41), 6
    turned = [slices.rot90(turn, (2, 3)) for turn in range(turns)]
    drawn = np.stack(
        [np.rot90(drawn_by_hand(turned[t % turns], network, t + 1)[t], -(t % turns), (2, 3)) for t in range(samples)]
    )
    with torch.no_grad():
        sure = np.mean([np.rot90(softmax(network(s)), -turn, (2, 3)) for turn, s in enumerate(turned)], axis=0)
    inferer = MCDropoutSliceInferer(samples=samples, turns=turns, amp=False)
    result = split(inferer(slices, network))
    np.testing.assert_allclose(result["probabilities"], np.moveaxis(drawn.mean(axis=0), 1, 0), atol=2e-5)
    np.testing.assert_allclose(result["bmap"], np.minimum(2 * drawn.std(axis=0, ddof=1), 1).mean(axis=1), atol=2e-5)
    np.testing.assert_allclose(result["emap"], entropy(sure, axis=1) / np.log(4), atol=2e-5)
    areas = np.stack([(drawn.argmax(axis=2) == c).sum(axis=(2, 3)) for c in range(4)], axis=2)
    assert np.abs(np.moveaxis(areas, 0, 1) - inferer.sample_areas.numpy()).max() <= 1
    sure_only = split(infer(slices, network, samples=samples, turns=turns, prediction="deterministic"))
    np.testing.assert_allclose(sure_only["probabilities"], np.moveaxis(sure, 1, 0), atol=2e-5)


@pytest.mark.parametrize("name", ["dn", "drn", "unet"])
def test_maps_of_four_turns_turn_with_the_stack(name):
    network, volume = wide_network(name), stack(1, 1, 48, 64, 2)
    expected = infer(volume, network, samples=0, turns=4).rot90(1, (2, 3))
    torch.testing.assert_close(infer(volume.rot90(1, (2, 3)), network, samples=0, turns=4), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dn", "drn", "unet"])
def test_region_with_turns_is_as_close_to_the_whole_field(name, window):
    """Also where a side is no multiple of the networks' strides, so that a turned box has to begin elsewhere."""
    network, volume = wide_network(name), stack(1, 1, 71, 101, 2)
    error = {}
    for turns in (1, 4):
        whole, part = (infer(volume, network, region=r, samples=8, turns=turns)[0] for r in ("whole", "heart"))
        error[turns] = (part - whole)[(slice(0, 5), *window)].abs().mean()
        outside = torch.ones(71, 101, dtype=torch.bool)
        outside[window] = False
        sure = infer(volume, network, samples=0, turns=turns)[0]
        torch.testing.assert_close(part[:4][:, outside], sure[:4][:, outside])
    assert error[4] < max(1.2 * error[1], 1e-6)


@settings(deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_turned_window_holds_the_same_pixels(data, height, width, turn):
    rows, cols = (slice(*sorted(data.draw(st.tuples(*2 * [st.integers(0, n)])))) for n in (height, width))
    field = torch.arange(height * width).view(height, width)
    turned = field.rot90(turn)[turned_window((rows, cols), field.shape, turn)]
    assert torch.equal(turned, field[rows, cols].rot90(turn))


@pytest.mark.parametrize("turns", [0, 5, 2.5])
def test_other_turns_are_refused(turns):
    with pytest.raises(ValueError, match=f"turns is 1 to 4, got {turns}"):
        MCDropoutSliceInferer(turns=turns)


# The network is left as it was found


@pytest.mark.parametrize("name", ["dn", "drn", "unet"])
def test_samples_do_not_copy_the_weights(name):
    """But for convolutions with batch normalization, whose weights are others."""
    network = NETWORKS[name]()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    fused = sampling_module.FusedNetwork(network.train(), amp=False)
    assert network.training and all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(module.training for module in fused.network.modules() if isinstance(module, nn.BatchNorm2d))


class Failing(nn.Module):
    """Raises in its n-th pass."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.network = small_network()
        self.passes = passes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes -= 1
        if self.passes < 0:
            raise RuntimeError("out of memory")
        return self.network(x)


def mixed_modes(network: nn.Module) -> nn.Module:
    """As a user may have frozen parts of a network in training."""
    network.train()
    for index, module in enumerate(network.modules()):
        if index % 3 == 0:
            module.training = False
    return network


def snapshot(network: nn.Module) -> tuple[list[bool], dict[str, torch.Tensor]]:
    return [m.training for m in network.modules()], {k: v.clone() for k, v in network.state_dict().items()}


@pytest.mark.usefixtures("may_be_plain")
@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval, mixed_modes])
@pytest.mark.parametrize("passes", [0, 1, 3, 100])
def test_network_is_unchanged(mode, passes):
    network, volume = mode(Failing(passes)), stack(1, 1, 6, 6, 3)
    flags, state = snapshot(network)
    rng = torch.get_rng_state()
    if passes < 100:
        with pytest.raises(RuntimeError, match="out of memory"):
            infer(volume, network, sw_batch_size=1)
    else:
        infer(volume, network, sw_batch_size=1)
    assert torch.equal(torch.get_rng_state(), rng)
    after, values = snapshot(network)
    assert after == flags
    assert all(torch.equal(values[name], state[name]) for name in state)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval, mixed_modes])
def test_maps_do_not_depend_on_the_mode_before(mode):
    volume = stack(1, 1, 6, 6, 2)
    assert torch.equal(infer(volume, mode(small_network())), infer(volume))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_maps_do_not_depend_on_the_grad_mode(context):
    volume, expected = stack(1, 1, 6, 6, 2), infer(stack(1, 1, 6, 6, 2))
    with context():
        enabled = torch.is_grad_enabled()
        result = infer(volume)
        assert torch.is_grad_enabled() == enabled
    assert not result.requires_grad and torch.equal(result, expected)


def test_input_is_unchanged():
    volume = stack(1, 1, 6, 6, 2)
    infer(volume)
    assert torch.equal(volume, stack(1, 1, 6, 6, 2))


# Memory and progress


def alive_tensors() -> list[torch.Tensor]:
    return [o for o in gc.get_objects() if type(o) is torch.Tensor and o.layout is torch.strided]


def peak_of_new_tensors(samples: int) -> int:
    """Most values in tensors that were alive at any pass, without those that were before."""
    peak = 0
    gc.collect()
    before = alive_tensors()  # held, so that none of them goes, nor its address to another
    old = {tensor.data_ptr() for tensor in before}

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal peak
            new = {o.data_ptr(): o.numel() for o in alive_tensors() if o.data_ptr() not in old}
            peak = max(peak, sum(new.values()))
            return self.network(x)

    infer(stack(2, 1, 30, 40), Counting(), samples=samples, sw_batch_size=2)
    return peak


def test_memory_does_not_grow_with_the_samples():
    few, many = peak_of_new_tensors(4), peak_of_new_tensors(16)
    assert many - few < 30 * 40  # the areas of the samples, but no map


@pytest.mark.parametrize("region", ["whole", "heart"])
@pytest.mark.parametrize(("slices", "samples"), [(3, 4), (1, 0), (21, 10)])
def test_progress(slices, samples, region):
    seen = []
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout2d(0.5))
    infer(stack(1, 1, 2, 2, slices), network, samples=samples, sw_batch_size=1, region=region, progress=seen.append)
    assert len(seen) >= slices * (samples + 1)
    assert (np.diff([0.0, *seen]) >= 0).all()
    np.testing.assert_allclose(seen[-1], 1.0, atol=1e-9)


# Other forms of network and input


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_torchscript_gives_the_same_maps(reload, training):
    network, volume = small_network(), stack(1, 1, 9, 8, 3)
    scripted = torch.jit.script(network.train(training))
    if reload:
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        scripted = torch.jit.load(buffer)
    flags, state = snapshot(scripted)
    assert any(flags) == training
    result = infer(volume, scripted)
    torch.testing.assert_close(result, infer(volume, network), rtol=0, atol=1e-6)
    assert result[:, 4].max() > 0.1
    after, values = snapshot(scripted)
    assert after == flags
    assert all(torch.equal(values[name], state[name]) for name in state)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_of_the_paper_can_be_sampled(name):
    network = NETWORKS[name]()
    flags = [module.training for module in network.modules()]
    result = infer(stack(2, 1, 16, 24), network, samples=2)
    assert torch.isfinite(result).all() and result[:, (result.shape[1] - 2) // 2].max() > 0  # b-map
    assert [module.training for module in network.modules()] == flags


@pytest.mark.parametrize("form", ["eager", "scripted"])
@pytest.mark.parametrize("name", ["dn", "unet", "detector"])
def test_network_built_without_dropout_cannot_be_sampled(name, form):
    """Instead of a b-map of zeros, which would look like certainty."""
    network = NETWORKS[name](dropout=0.0)
    network = torch.jit.script(network) if form == "scripted" else network
    with pytest.raises(ValueError, match="dropout"):
        infer(stack(1, 1, 16, 16), network, samples=1)
    infer(stack(1, 1, 16, 16), network, samples=0)


@pytest.mark.parametrize("samples", [1, 10])
def test_network_that_has_no_dropout_module(samples):
    with pytest.raises(ValueError, match="Conv2d has no dropout.*samples=0"):
        infer(stack(1, 1, 6, 6), nn.Conv2d(1, 4, 1), samples=samples)


def test_subclass_of_a_dropout_module_is_sampled():
    class MyDropout(nn.Dropout2d):
        pass

    network = nn.Sequential(nn.Conv2d(1, 4, 1), MyDropout(0.5))
    assert infer(stack(1, 1, 6, 6), network)[:, 4].max() > 0


def test_maps_return_to_each_scans_own_grid():
    """As the evaluator does it: two scans in a batch, decollated, split, and inverted by their own metadata."""
    affines = [np.diag([1.6, 1.8, 8.0, 1.0]), np.diag([-1.6, 1.8, 6.0, 1.0])]
    before = Compose([InPlaneSpacingd("image")])
    scans = [
        before({"image": MetaTensor(stack(1, 11, 15, 3) + i, affine=affine, meta={"filename_or_obj": f"{i}.nii"})})
        for i, affine in enumerate(affines)
    ]
    batch = list_data_collate(scans)
    batch["pred"] = infer(batch["image"], sw_batch_size=4)
    plain = infer(torch.stack([scan["image"].as_tensor() for scan in scans]), sw_batch_size=4)
    np.testing.assert_array_equal(np.asarray(batch["pred"]), plain)
    after = Compose([SplitUncertaintyd("pred"), Invertd(["pred", "bmap", "emap"], before, orig_keys="image")])
    for i, item in enumerate(decollate_batch(batch)):
        done = after(item)
        for key, channels in (("pred", 4), ("bmap", 1), ("emap", 1)):
            assert done[key].shape == (channels, 11, 15, 3), key
            np.testing.assert_allclose(done[key].affine, affines[i])
            assert done[key].meta["filename_or_obj"] == f"{i}.nii"


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 1, 8, 8, 2, 2)])
def test_other_ranks_are_refused(shape):
    with pytest.raises(ValueError, match="B, C, H, W"):
        infer(stack(*shape))


@pytest.mark.parametrize("options", [{"samples": -1}, {"prediction": "median"}, {"region": "lung"}])
def test_unknown_settings_are_refused(options):
    with pytest.raises(ValueError, match=str(*options.values())):
        MCDropoutSliceInferer(**options)


# The training step's inferer


@pytest.mark.parametrize("amp", [False, True])
def test_autocast_inferer(amp):
    network, image = small_network(), stack(2, 1, 16, 16)
    result = AutocastInferer(amp=amp)(image, network)
    expected = network(image.contiguous(memory_format=torch.channels_last))
    assert result.dtype == torch.float32 and result.requires_grad
    assert (result - expected).abs().max() <= (0.03 * expected.abs().max() if amp else 0.0)
    assert torch.equal(result, expected) != (amp and reduced_precision(CPU))
    result.sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all()


@in_bf16
@pytest.mark.parametrize("name", ["small", "dn", "drn", "unet"])
def test_samples_in_bf16_stay_close(name, monkeypatch):
    """The path of CPUs that are fast in bf16 and of GPUs, which this CPU can compute as well."""
    network = small_network() if name == "small" else wide_network(name)
    volume = stack(1, 1, 32, 48, 2)
    exact = infer(volume, network, samples=6)
    monkeypatch.setattr(sampling_module, "reduced_precision", lambda device: True)
    fast = infer(volume, network, samples=6, amp=True)
    assert not torch.equal(fast, exact)
    assert (fast - exact)[:, :5].abs().max() < 0.08 and (fast - exact)[:, :5].abs().mean() < 0.01


@in_bf16
@pytest.mark.parametrize("name", ["dn", "drn", "unet"])
def test_convolutions_in_bf16_get_images_in_bf16(name, monkeypatch):
    """On CPUs with AMX a convolution of bf16 weights with an fp32 image fails; others compute it slowly."""
    seen = []

    class Recorder:
        def __call__(self, x, weight, *rest):
            seen.append((x.dtype, weight.dtype))
            return computed(x, weight, *rest)

        def binary(self, x, other, weight, *rest):
            seen.append((x.dtype, weight.dtype))
            return computed.binary(x, other, weight, *rest)

    computed = sampling_module.convolution_pointwise
    monkeypatch.setattr(sampling_module, "convolution_pointwise", Recorder())
    monkeypatch.setattr(sampling_module, "reduced_precision", lambda device: True)
    network = DilatedCNN().eval() if name == "dn" else wide_network(name)  # whose later layers repeat edges
    infer(stack(1, 1, 32, 48, 1), network, samples=2, amp=True)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


integers = pytest.mark.skipif(not sampling_module.fast_integers(CPU), reason="8-bit convolutions need AVX2")


@pytest.fixture(params=[False, True], ids=["16_bits", "32_bits"])
def adds_in_32(monkeypatch, request):
    """As on a CPU that is slow in bf16; whether it adds all products of bytes in 32 bits, or two of them in 16."""
    if request.param and not torch.cpu._is_vnni_supported():
        pytest.skip("adding in 32 bits needs AVX512-VNNI")
    monkeypatch.setattr(sampling_module, "reduced_precision", lambda device: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: request.param)
    monkeypatch.setattr(sampling_module, "SMALLEST_WITHOUT_VNNI", 16)
    return request.param


@integers
@pytest.mark.parametrize(("name", "expected"), [("dn", "fp32"), ("drn", "int8"), ("unet", "int8")])
def test_networks_with_integers_where_sums_have_16_bits(name, expected, monkeypatch):
    """The DN's 32 channels lose too much by coarser kernels; what is computed is what is reported."""
    monkeypatch.setattr(sampling_module, "reduced_precision", lambda device: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    network = {"dn": DilatedCNN, "drn": DilatedResNet22, "unet": BayesianUNet}[name]().eval()
    exact, fast = (infer(stack(1, 1, 32, 32, 1), network, samples=2, amp=amp) for amp in (False, True))
    assert sampling_module.FusedNetwork(network, amp=True).precision == expected
    assert torch.allclose(fast, exact, rtol=0, atol=1e-5) == (expected == "fp32")


class ConvolutionOfIntegers(nn.Module):
    """By the definition, in integers: 255 steps, or the square of it, for an image's range, and those of a kernel's."""

    def __init__(self, convolution: nn.Conv2d, most: int, most_weight: int = 127) -> None:
        super().__init__()
        self.of, self.most, self.most_weight = convolution, most, most_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = min(x.min().item(), 0), max(x.max().item(), 0)
        step = (high - low) / self.most
        zero = round(-low / step)
        levels = ((x.double() / step).round() + zero).clamp(0, self.most) - zero
        steps = self.of.weight.abs().amax(dim=(1, 2, 3), keepdim=True) / self.most_weight
        weight = (self.of.weight / steps).round()
        sums = F.conv2d(levels, weight.double(), None, self.of.stride, self.of.padding, self.of.dilation)
        return (sums * step * steps.view(1, -1, 1, 1) + self.of.bias.view(1, -1, 1, 1)).float()


@integers
@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.LeakyReLU(0.01)])
@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": 2, "dilation": 2}, {"stride": 2}])
@pytest.mark.parametrize("low", [0.0, -0.3, -2.0])
def test_convolution_in_integers(low, geometry, activation, adds_in_32):
    """Equal to the definition but for rounding, and within the steps' size of the exact result."""
    torch.manual_seed(7)
    convolution = nn.Conv2d(16, 24, 3, **geometry)
    x = low + 2 * torch.rand(1, 16, 20, 17)
    with torch.no_grad():
        fused = sampling_module.FusedNetwork(nn.Sequential(convolution, activation), amp=True)
        result = fused.deterministic(x, [0], "whole")
        most, exact = 255**2 if isinstance(activation, nn.LeakyReLU) else 255, activation(convolution(x))
        expected = activation(ConvolutionOfIntegers(convolution, most, 127 if adds_in_32 else 63)(x))
    if isinstance(activation, nn.LeakyReLU) and not adds_in_32:  # two 8-bit convolutions would take as long
        assert fused.precision == "fp32"
        torch.testing.assert_close(result, exact)
        return
    assert fused.precision == "int8"
    # a value between two steps may be rounded to either of them
    torch.testing.assert_close(result, expected, rtol=0, atol=2 * (2 / 255) * convolution.weight.abs().max().item())
    assert (result - expected).abs().mean() < 1e-3 < (exact - expected).abs().max()
    assert (result - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.skipif(sampling_module.convolution_pointwise is None, reason="this build of PyTorch has no oneDNN")
def test_weights_are_in_the_order_for_their_images(monkeypatch):
    """In another one the result is the same, and takes up to four times as long; two orders are kept."""
    reorder, shapes = torch.ops.mkldnn._reorder_convolution_weight, []
    recorder = lambda *given: (shapes.append(tuple(given[-1])), reorder(*given))[1]  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", recorder)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout2d(0.5)).eval()
    fused = sampling_module.FusedNetwork(network, amp=False)
    small, large = torch.rand(1, 1, 8, 8), torch.rand(2, 1, 12, 10)
    with torch.no_grad():
        for images in (small, large, small, large[:1], small):
            result = fused.deterministic(images, range(len(images)), "whole")
            torch.testing.assert_close(result, network(images))
    assert shapes == [(1, 1, 8, 8), (2, 1, 12, 10), (1, 1, 12, 10), (1, 1, 8, 8)]
    assert all(len(m.packed) <= 2 for m in fused.network.modules() if isinstance(m, sampling_module._Convolution))


@integers
def test_sums_of_integers_do_not_overflow(adds_in_32, monkeypatch):
    """All products are as large as they can be, and of one sign."""
    prepack, largest = torch.ops.onednn.qconv_prepack, []
    recorder = lambda weight, *rest: (largest.append(int(weight.abs().max())), prepack(weight, *rest))[1]  # noqa: E731
    monkeypatch.setattr(torch.ops.onednn, "qconv_prepack", recorder)
    convolution = nn.Conv2d(16, 16, 3)
    nn.init.ones_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    with torch.no_grad():
        fused = sampling_module.FusedNetwork(nn.Sequential(convolution, nn.ReLU()), amp=True)
        result = fused.deterministic(torch.ones(1, 16, 12, 12), [0], "whole")
    torch.testing.assert_close(result, torch.full((1, 16, 10, 10), 144.0))
    assert largest == [127 if adds_in_32 else 63]  # 2 * 255 * 63 is less than 2 ** 15


@integers
def test_few_large_values_leave_steps_to_all_others(adds_in_32, monkeypatch):
    """Without normalization, before a LeakyReLU, a single value can be a hundred times as large as others."""
    monkeypatch.setattr(sampling_module._Convolution, "_takes_integers", lambda self: True)  # also where it is no gain
    torch.manual_seed(13)
    convolution = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.rand(1, 16, 40, 40)
    x[0, :, 0, 0] = 100
    with torch.no_grad():
        fused = sampling_module.FusedNetwork(nn.Sequential(convolution, nn.LeakyReLU(0.01)), amp=True)
        result, exact = fused.deterministic(x, [0], "whole"), F.leaky_relu(convolution(x), 0.01)
        coarse = F.leaky_relu(ConvolutionOfIntegers(convolution, 255, 127 if adds_in_32 else 63)(x), 0.01)
    difference, of_8_bits = ((maps - exact)[..., 2:, 2:].abs().mean() for maps in (result, coarse))
    assert difference < 0.01 * exact[..., 2:, 2:].abs().mean() and difference < 0.1 * of_8_bits


@integers
def test_channels_of_any_size_before_a_normalization(adds_in_32):
    """A channel that is a thousand times smaller than another until the normalization makes it as large."""
    torch.manual_seed(14)
    first, second, norm = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)
    scale = torch.logspace(-3, 0, 16)
    with torch.no_grad():
        first.weight *= scale.view(-1, 1, 1, 1)
        first.bias *= scale
        norm.running_var.copy_(scale**2 / 20)
        norm.running_mean.copy_(scale / 10)
        norm.weight.copy_(torch.randn(16))
        norm.eps = 1e-12
        network = nn.Sequential(first, nn.ReLU(), norm, nn.Dropout2d(0.5), second).eval()
        x = torch.rand(1, 16, 60, 60)
        exact = network(x)
        result = sampling_module.FusedNetwork(network, amp=True).deterministic(x, [0], "whole")
    assert (result - exact).abs().mean() < (0.01 if adds_in_32 else 0.02) * exact.std()


@integers
@pytest.mark.parametrize("region", ["whole", "heart"])
@pytest.mark.parametrize("name", ["dn", "drn", "unet"])
def test_samples_in_integers_stay_close(name, region, adds_in_32, window):
    """Five times closer to the exact maps of the same masks than those are to another seed's."""
    torch.manual_seed(8)
    options = {"dn": {}, "drn": {}, "unet": {"features": (16, 16, 32)}}[name]
    network = {"dn": DilatedCNN, "drn": DilatedResNet22, "unet": BayesianUNet}[name](**options).eval()
    volume = stack(1, 1, 64, 96, 2)
    exact, other = (infer(volume, network, samples=4, region=region, seed=seed) for seed in (0, 1))
    inferer = MCDropoutSliceInferer(samples=4, region=region)
    fast = inferer(volume, network)
    assert inferer.precision == "int8" and not torch.equal(fast, exact)
    rows, cols = window
    fast, exact, other = (maps[:, :6, rows, cols] for maps in (fast, exact, other))
    assert 5 * (fast - exact)[:, :5].abs().mean() < (other - exact)[:, :5].abs().mean()
    assert (fast - exact)[:, 5].abs().mean() < 0.01


@integers
@pytest.mark.parametrize("name", ["dn", "drn", "unet"])
def test_maps_in_integers_do_not_depend_on_the_batch(name, adds_in_32):
    """But for rounding: batch normalization goes into a single image's weights, and into a batch's images."""
    torch.manual_seed(9)
    network = {"dn": DilatedCNN, "drn": DilatedResNet22, "unet": BayesianUNet}[name]().eval()
    volume = stack(1, 1, 32, 48, 3) * torch.tensor([1.0, 0.2, 0.6])
    together, alone = (infer(volume, network, samples=3, amp=True, sw_batch_size=size) for size in (5, 1))
    torch.testing.assert_close(together[:, :6], alone[:, :6], rtol=0, atol=0.01)
    first = infer(volume[..., :1], network, samples=3, amp=True)
    torch.testing.assert_close(infer(volume, network, samples=3, amp=True)[..., :1], first, rtol=0, atol=0)


@integers
def test_diverged_network_gives_nan_in_integers_too(adds_in_32):
    network = DilatedResNet22()
    for parameter in network.parameters():
        parameter.data.fill_(torch.inf)
    assert infer(stack(1, 1, 16, 16, 1), network, samples=0, amp=True).isnan().any()


AMD = {"cpu_name": "AMD EPYC 9654 96-Core Processor", "avx512_bf16": True}
INTEL = {"cpu_name": "Intel(R) Xeon(R) Platinum 8480+", "avx512_bf16": True}


@pytest.mark.parametrize(
    ("amx", "known", "capability", "expected"),
    [
        (True, INTEL, "AVX512", "bf16"),
        (False, AMD, "AVX512", "bf16"),
        (False, INTEL, "AVX512", "int8"),
        (False, AMD | {"avx512_bf16": False}, "AVX512", "int8"),
        (False, {}, "AVX2", "int8"),
        (False, {}, "DEFAULT", "fp32"),
    ],
)
def test_precision_follows_the_instructions(amx, known, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert sampling_module.precision(CPU) == expected
    inferer = MCDropoutSliceInferer(samples=0, amp=False)
    inferer(stack(1, 1, 8, 8, 1), small_network())
    assert inferer.precision == "fp32"


@pytest.mark.parametrize("edge", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_transposed_convolution_that_tiles_is_a_convolution(edge, bias):
    torch.manual_seed(10)
    network = nn.Sequential(nn.ConvTranspose2d(2, 3, edge, stride=edge, bias=bias), nn.Dropout2d(0.5))
    x = stack(2, 2, 5, 7)
    with torch.no_grad():
        fused = sampling_module.FusedNetwork(network, amp=False)
        torch.testing.assert_close(fused.deterministic(x, [0, 1], "whole"), network[0](x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_only_where_it_is_fast(fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    seen = []
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Identity())
    network[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    AutocastInferer()(stack(1, 1, 4, 4), network)
    assert seen == [torch.bfloat16 if fast else torch.float32]


# The detector's inferer


class RegionMeans(nn.Module):
    """Logit of a failure: mean of each channel in a region, the channels weighted 1, 10, 100, ..."""

    def __init__(self, region_size: int = 8) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(region_size)
        self.dropout = nn.Dropout(0.5)  # must stay off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = 10.0 ** torch.arange(x.shape[1]).view(1, -1, 1, 1)
        failure = self.dropout((self.pool(x) * weights).sum(dim=1, keepdim=True))
        return torch.cat([torch.zeros_like(failure), failure], dim=1)


def labelled_stack() -> torch.Tensor:
    """Image, map and labels (2, 3, 40, 48, 3): a structure off the center, one at the edge, and an empty slice."""
    volume = stack(2, 3, 40, 48, 3) - 0.5
    volume[:, 2] = 0
    volume[:, 2, 8:30, 20:33, 0] = 2
    volume[:, 2, 0:7, 40:48, 1] = 3
    return volume


@pytest.mark.parametrize("channels", [2, 3])
def test_regions_cover_the_crop_around_the_segmentation(channels):
    volume = labelled_stack()
    result = FailureRegionInferer(min_size=24, see_segmentation=channels == 3, amp=False)(volume, RegionMeans().train())
    # the fewest cells around the structure, as large on both sides; the center where there is none
    boxes = [(7, 31, 15, 39), (0, 24, 24, 48), (8, 32, 12, 36)]
    expected = np.zeros((2, 1, 40, 48, 3))
    for b in range(2):
        for z, (r0, r1, c0, c1) in enumerate(boxes):
            for row in range(r0, r1, 8):
                for col in range(c0, c1, 8):
                    cell = volume[b, :channels, row : row + 8, col : col + 8, z].numpy()
                    logit = (cell.mean(axis=(1, 2)) * [1, 10, 100][:channels]).sum()
                    expected[b, 0, row : row + 8, col : col + 8, z] = 1 / (1 + np.exp(-logit))
    assert isinstance(result, torch.Tensor) and result.dtype == torch.float32
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_regions_beyond_a_small_image_see_zeros():
    volume = labelled_stack()[:1, :, 8:30, 20:33, :1]  # 22 x 13 pixels in a crop of 24 x 24
    result = FailureRegionInferer(min_size=24, amp=False)(volume, RegionMeans())
    padded = np.zeros((2, 24, 24))
    padded[:, 1:23, 6:19] = volume[0, :2, :, :, 0]
    means = padded.reshape(2, 3, 8, 3, 8).mean(axis=(2, 4))
    cells = 1 / (1 + np.exp(-(means[0] + 10 * means[1])))
    painted = cells.repeat(8, axis=0).repeat(8, axis=1)[1:23, 6:19]
    np.testing.assert_allclose(result[0, 0, :, :, 0], painted, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_detector_is_unchanged(fails):
    network = nn.Sequential(Failing(2), RegionMeans()) if fails else FailureResNet()
    mixed_modes(network)
    flags, state = snapshot(network)
    before = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            FailureRegionInferer(min_size=16)(labelled_stack()[:, [0, 0, 2]], FirstChannel(network))
    else:
        result = FailureRegionInferer(min_size=16)(labelled_stack(), network)
        assert not result.requires_grad and 0 <= result.min() and result.max() <= 1
        assert torch.equal(torch.get_rng_state(), before)
    after, values = snapshot(network)
    assert after == flags
    assert all(torch.equal(values[name], state[name]) for name in state)


class FirstChannel(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x[:, :1])


def test_detector_of_another_region_size_is_refused():
    with pytest.raises(ValueError, match="crop"):
        FailureRegionInferer(region_size=8, min_size=16)(labelled_stack(), RegionMeans(16))


@pytest.mark.parametrize("shape", [(1, 2, 16, 16, 2), (1, 4, 16, 16, 2), (1, 3, 16, 16)])
def test_detector_needs_image_map_and_segmentation(shape):
    with pytest.raises(ValueError, match="segmentation"):
        FailureRegionInferer()(stack(*shape), RegionMeans())


def test_sample_areas_are_those_of_the_samples():
    """Against samples of one at a time, whose most probable class the votes tell."""
    torch.manual_seed(0)
    network, image = DilatedCNN(), torch.rand(1, 1, 24, 24, 3)
    inferer = MCDropoutSliceInferer(samples=4, sw_batch_size=2, amp=False)
    votes = inferer(image, network)[0, 6:]
    areas = inferer.sample_areas
    assert areas.shape == (3, 4, 4) and (areas.sum(dim=2) == 24 * 24).all()
    torch.testing.assert_close(areas.sum(dim=1).float() / 4, votes.sum(dim=(1, 2)).T)
    single = MCDropoutSliceInferer(samples=1, sw_batch_size=4, amp=False)
    expected = single(image, network)[0, 6:].sum(dim=(1, 2)).T.long()
    torch.testing.assert_close(single.sample_areas[:, 0], expected)
    assert MCDropoutSliceInferer(samples=0)(image, network) is not None
