"""Passes of a network with dropout made cheap: fused layers, and dropout masks drawn for each slice and sample."""

import contextlib
import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = [
    "FusedNetwork",
    "SequentialNetwork",
    "forward",
    "passes_of",
    "precision",
    "reduced_precision",
    "sample_seed",
]

# what torch.compile uses: a convolution with its activation and packed weights; builds without oneDNN have none
convolution_pointwise = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
# multiplying, rounding and converting instead takes five times as long
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
SMALLEST = 16  # channels in and out from which on 8-bit integers pay, with AVX512-VNNI instructions
SMALLEST_WITHOUT_VNNI = 64  # the kernels are coarser there
_DROPOUT = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "ByteDropout")


def reduced_precision(device: torch.device) -> bool:
    """Whether bf16 convolutions are fast on the device: GPUs, CPUs with AMX, and AMD's with AVX512-bf16 instructions.

    With AVX512-bf16 they take half the time of fp32 on AMD's CPUs, but 1.4 to 1.9 times as long on Intel's
    (docs/performance.md).
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or fast_avx512_bf16()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def fast_avx512_bf16() -> bool:
    """Whether this is a CPU by AMD with AVX512-bf16 instructions (Zen 4 and later), as far as this PyTorch can tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return known.get("avx512_bf16", False) and known.get("cpu_name", "").startswith("AMD")


def fast_integers(device: torch.device) -> bool:
    """Whether convolutions in 8-bit integers are fast on the device: x86 CPUs with AVX2 instructions or later ones.

    They were twice as fast as in fp32 on the CPUs that were tried, and four times with AVX512-VNNI
    (docs/performance.md).
    """
    available = hasattr(torch.ops.onednn, "qconv2d_pointwise") and hasattr(torch, "quantize_per_tensor")
    is_fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return device.type == "cpu" and available and torch.backends.mkldnn.enabled and is_fast


def adds_in_32_bits() -> bool:
    """Whether 8-bit convolutions surely add up all products in 32 bits: oneDNN on CPUs with AVX512-VNNI instructions.

    Others add two products of an image's byte and a weight in 16 bits first, so that weights go up to 63 only.
    """
    limits = {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}  # the user's own limit on oneDNN's instructions
    return torch.cpu._is_vnni_supported() and not limits & os.environ.keys()


def precision(device: torch.device) -> str:
    """What a fused network's convolutions are computed in if it need not be fp32: ``bf16``, ``int8`` or ``fp32``."""
    if reduced_precision(device):
        return "bf16"
    return "int8" if fast_integers(device) else "fp32"


def forward(network: Callable[..., torch.Tensor], inputs: torch.Tensor, amp: bool) -> torch.Tensor:
    """One pass of a 2-D network in channels-last memory format, in bf16 where asked for and fast; fp32 logits.

    Raises:
        ValueError: the network returns something else than one tensor.
    """
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp and reduced_precision(inputs.device)):
        logits = network(inputs)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"The network has to return its logits (B, K, H, W); it returned a {type(logits).__name__}.")
    return logits.float()


@contextlib.contextmanager
def sampling(network: nn.Module, active: bool) -> Iterator[None]:
    """Evaluation mode with dropout on or off; every module's own mode is put back afterwards, also after an error."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        for module in dropout_modules(network) if active else []:
            module.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def dropout_modules(network: nn.Module) -> list[nn.Module]:
    """Modules that drop something; a scripted module goes by the name of the class it was made from."""

    def drops(m: nn.Module) -> bool:
        return isinstance(m, nn.modules.dropout._DropoutNd) or getattr(m, "original_name", "") in _DROPOUT

    return [m for m in network.modules() if drops(m) and m.p > 0]


def sample_seed(seed: int, position: int, sample: int) -> int:
    """Seed of the masks of one sample of one slice: they do not depend on what else is computed, or in which order."""
    return int(np.random.SeedSequence([seed, position, sample]).generate_state(1)[0])


def can_be_fused(network: nn.Module) -> bool:
    """Whether dropout can be replaced: an eager network (not TorchScript) whose dropout modules are torch's own.

    And leave something: the others are divided by the share that is left.
    """
    scripted = any(isinstance(m, torch.jit.ScriptModule) for m in network.modules())
    return not scripted and all(_kind(m) in (nn.Dropout, nn.Dropout2d) and m.p < 1 for m in dropout_modules(network))


class _Pass:
    """What the layers of a fused network have to know of the pass they are in.

    Attributes:
        positions: for each image of the batch, the slice that it shows.
        generators: for each image, the generator of its masks; None in a pass without dropout.
        masked: whether a mask was applied in this pass already.
        shared: by layer and slice, what comes before the first mask, and so is the same for all samples.
        statistics: by kind, layer and slice, mean and variance of instance normalizations without dropout.
        kind: ``"whole"`` and ``"region"`` passes without dropout record the statistics; None does not.
        inner: whether convolutions do not pad: the images come with what lies around them.
        integers: whether convolutions are computed in 8-bit integers.
        widest: most bytes of a layer's output, for one image.
    """

    def __init__(self) -> None:
        self.positions: Sequence[int] = ()
        self.generators: list[torch.Generator] | None = None
        self.masked = False
        self.shared: dict[tuple[nn.Module, int], torch.Tensor] = {}
        self.statistics: dict[tuple[str, nn.Module, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.kind: str | None = None
        self.inner = False
        self.integers = False
        self.widest = 0

    def mask(self, x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
        """0 and 1 for the channels (or the values, for ``nn.Dropout``) of each image, as torch draws them."""
        self.masked = True
        like = x[:1, :, :1, :1] if isinstance(dropout, nn.Dropout2d) else x[:1]
        like = torch.empty_like(like, device="cpu")
        draws = [torch.empty_like(like).bernoulli_(1 - dropout.p, generator=g) for g in self.generators]
        return _joined(draws).to(x.device)

    def drop(self, x: torch.Tensor, dropout: nn.Module, inplace: bool) -> torch.Tensor:
        """Dropout as a product; the factor is not rounded to ``x``'s precision, where 1.11 is 1.109 in every layer."""
        if self.generators is None:
            return x
        return _affine(x, self.mask(x, dropout), None, 1 / (1 - dropout.p), inplace)

    def before_mask(self, layers: Callable[[torch.Tensor], torch.Tensor], key: nn.Module, x: torch.Tensor, copy: bool):
        """Layers that no mask has reached yet, computed once for each slice; ``copy`` if the result is changed."""
        if self.generators is None or self.masked:
            return layers(x)
        first = {position: index for index, position in reversed(list(enumerate(self.positions)))}
        for position, index in first.items():
            if (key, position) not in self.shared:
                positions, self.positions = self.positions, [position]
                self.shared[key, position] = layers(x[index : index + 1])
                self.positions = positions
        if len(first) == 1:
            x = self.shared[key, self.positions[0]].expand(len(self.positions), -1, -1, -1)
            return x.clone(memory_format=torch.channels_last) if copy else x
        return torch.cat([self.shared[key, position] for position in self.positions])

    def normalization(self, x: torch.Tensor, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance over the whole field (B, C, 1, 1), also where ``x`` is a region of it.

        In a region they are the region's own, with the difference that it makes without dropout taken away.
        """
        # ten times faster than torch.var_mean in channels-last format; fp32 running statistics make the result fp32
        running = torch.zeros(x.shape[1], device=x.device)
        parts = [torch.batch_norm_update_stats(image, running, running, 0.0) for image in x.split(1)]
        mean, var = (torch.stack(part)[:, :, None, None] for part in zip(*parts, strict=True))
        if self.kind is None:
            return mean, var
        if self.generators is None:
            for index, position in enumerate(self.positions):
                key = (self.kind, layer, position)
                self.statistics[key] = mean[index : index + 1].clone(), var[index : index + 1].clone()
            if self.kind == "whole":
                return mean, var
        (mean_whole, var_whole), (mean_region, var_region) = (
            (torch.cat(part) for part in zip(*(self.statistics[kind, layer, p] for p in self.positions), strict=True))
            for kind in ("whole", "region")
        )
        return mean + (mean_whole - mean_region), var * (var_whole / var_region.clamp_min(1e-12))


def _joined(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along the first axis, without a copy of a single one."""
    return torch.cat(images) if len(images) > 1 else images[0]


def _affine(
    x: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor | None, value: float = 1.0, inplace: bool = True
) -> torch.Tensor:
    """``x * factor * value + shift``; ``value`` is not rounded to ``x``'s precision.

    Row by row, with factor and shift repeated along it: broadcasting over 16 channels, pixel by pixel, takes eight
    times as long.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if shift is None:
        shift = factor.new_zeros(1, 1, 1, 1)
    if factor.shape[2:] != (1, 1) or inplace and not channels_last:
        return torch.addcmul(shift, x, factor, value=value, out=x if inplace else None)
    out = x if inplace else torch.empty_like(x, memory_format=torch.channels_last)
    factor, shift = (term.flatten(1).repeat(1, x.shape[3] if term.shape[1] > 1 else 1) for term in (factor, shift))
    torch.addcmul(shift[:, None], _rows(x), factor[:, None], value=value, out=_rows(out))
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, H, W * C), a view of a channels-last tensor (B, C, H, W)."""
    return x.permute(0, 2, 3, 1).flatten(2)


class _Convolution(nn.Module):
    """Convolution and what follows it in one pass: batch normalization, folded into the weights, and an activation.

    Also either dropout, or a sum before the activation. ``scale`` is dropout, and batch normalization, of its input.
    """

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module | None, state: _Pass, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = convolution.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = None if convolution.bias is None else convolution.bias.detach().to(dtype)
        self.padding, self.replicates = convolution.padding, convolution.padding_mode == "replicate"
        self.geometry = (convolution.stride, convolution.dilation, convolution.groups)
        self.slope = getattr(activation, "negative_slope", 0.0) if activation is not None else None
        self.state = state
        self.scale: _Scale | None = None
        self.dropout: nn.Dropout2d | None = None
        self.onednn = (
            convolution_pointwise is not None and self.weight.device.type == "cpu" and torch.backends.mkldnn.enabled
        )
        self.exact = False  # not in integers
        self.packed: dict[tuple[float, torch.Size], torch.Tensor] = {}
        self.quantized: dict[bool, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def can_drop(self) -> bool:
        """Whether a mask of the output is free: oneDNN multiplies by it before the activation, which may be a ReLU."""
        return self.onednn and not self.state.integers and not self.slope

    def forward(self, x: torch.Tensor, dropout: bool = True, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``residual`` is added before the activation, a ReLU."""
        x = x.to(self.weight.dtype)
        weight, bias = self.weight, self.bias
        stride, dilation, groups = self.geometry
        padding = (0, 0) if self.state.inner or self.replicates else self.padding
        if self.scale is not None:
            if self._folds(x, padding):
                weight, bias = self.scale.fold(x, weight, bias)
            else:
                x = self.scale(x)
        if self.replicates and not self.state.inner and any(self.padding):
            with torch.autocast(x.device.type, enabled=False):  # it would repeat edges in fp32 on CPUs
                x = F.pad(x, [self.padding[1]] * 2 + [self.padding[0]] * 2, mode="replicate")
        if self._takes_integers():
            x = _joined([self._in_integers(image, weight, bias, padding, residual is None) for image in x.split(1)])
        elif self.onednn:
            drops = dropout and self.dropout is not None and self.state.generators is not None
            x = self._in_onednn(x, weight, bias, padding, drops, residual)
            residual = None
        else:
            x = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            if self.slope is not None and residual is None:
                x = F.leaky_relu_(x, self.slope) if self.slope else F.relu_(x)
        if residual is not None:
            x = F.relu_(x.add_(residual))
        self.state.widest = max(self.state.widest, x.nbytes // x.shape[0])
        return x

    def _takes_integers(self) -> bool:
        """Whether it is computed in 8-bit integers; not where two such convolutions take as long as one in fp32."""
        smallest = SMALLEST if adds_in_32_bits() else SMALLEST_WITHOUT_VNNI
        large = min(self.weight.shape[:2]) >= smallest and self.geometry[2] == 1
        pays = adds_in_32_bits() or not self.slope
        return large and pays and self.state.integers and self.onednn and not self.exact

    def _folds(self, x: torch.Tensor, padding: Sequence[int]) -> bool:
        """Whether to scale the weights instead of the image; integers have to be made of them anew then."""
        smaller = self.weight.numel() * (8 if self._takes_integers() else 1) < x.numel()
        return x.shape[0] == 1 and smaller and self.scale.can_be_folded(padding, self.geometry[2])

    def _in_onednn(self, x, weight, bias, padding, drops: bool, residual: torch.Tensor | None) -> torch.Tensor:
        """With the activation, and the mask or the sum, in one pass."""
        stride, dilation, groups = self.geometry
        geometry = (padding, stride, dilation, groups)
        mask = self.state.mask(x.new_empty(1, len(weight), 1, 1), self.dropout) if drops else None
        kept = 1 - self.dropout.p if drops else 1.0  # divides the weights: bf16 would round it in the mask
        weight = self._pack(kept, x, padding) if weight is self.weight else weight / kept
        bias = None if bias is None else bias / kept
        if residual is None and mask is None:
            name = "none" if self.slope is None else "leaky_relu" if self.slope else "relu"
            return convolution_pointwise(x, weight, bias, *geometry, name, [self.slope] if self.slope else [], "")
        other, operation = (mask, "mul") if residual is None else (residual.to(x.dtype), "add")
        name = None if self.slope is None and residual is None else "relu"
        return convolution_pointwise.binary(x, other, weight, bias, *geometry, operation, None, name, [], "")

    def _in_integers(
        self, image: torch.Tensor, weight: torch.Tensor, bias, padding: Sequence[int], activates: bool
    ) -> torch.Tensor:
        """Of one image (1, C, H, W), by 8-bit integers: 255 steps for its range, 254 (126) for a kernel's; fp32 result.

        Before a LeakyReLU, which no batch normalization bounds, an image's few large values leave too few steps to all
        others: there it takes 16 bits, as two convolutions.
        """
        stride, dilation, groups = self.geometry
        slope = self.slope if activates else None
        low, high = min(float(image.amin()), 0.0), max(float(image.amax()), 0.0)
        step = max(high - low, 1e-12) / 255
        if not math.isfinite(step):  # of a diverged network, say: the result is not finite either
            x = F.conv2d(image, weight, bias, stride, padding, dilation, groups)
            return x if slope is None else F.leaky_relu_(x, slope)
        quantized = self.quantized if weight is self.weight else {}

        def convolve(levels: torch.Tensor, bias: torch.Tensor | None, activation: str, to: torch.Tensor | None = None):
            # its bytes, without the copy that int_repr makes
            unsigned = torch.empty(0, dtype=torch.uint8)
            unsigned.set_(levels.untyped_storage(), 0, levels.size(), levels.stride())
            zero = levels.q_zero_point()
            image = unsigned, levels.q_scale(), zero
            geometry = stride, padding, dilation, groups
            if bool(zero) not in quantized:
                quantized[bool(zero)] = self._quantize(weight, unsigned, padding, zero)
            packed = quantized[bool(zero)]
            if to is None:
                return torch.ops.onednn.qconv2d_pointwise(
                    *image, *packed, bias, *geometry, 1.0, 0, torch.float32, activation, [], ""
                )
            return torch.ops.onednn.qconv2d_pointwise.binary(
                *image, *packed, to, bias, *geometry, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, activation, [], ""
            )

        levels = torch.quantize_per_tensor(image, step, round(-low / step), torch.quint8)
        x = convolve(levels, bias, "relu" if slope == 0 else "none")
        if not slope:
            return x
        rest = levels.dequantize()
        rest = torch.quantize_per_tensor(torch.sub(image, rest, out=rest), step / 255, 128, torch.quint8)
        return F.leaky_relu_(convolve(rest, None, "none", x), slope)

    def _quantize(self, weight: torch.Tensor, image: torch.Tensor, padding: Sequence[int], zero: int):
        """Weights as signed bytes in oneDNN's order, what a step of each kernel is, and where its zero lies.

        The order is another one for images whose zero is not 0; large weights in the wrong one take twice the time.
        """
        stride, dilation, groups = self.geometry
        steps = weight.abs().amax(dim=(1, 2, 3)).clamp_min(1e-12) / (127 if adds_in_32_bits() else 63)
        signed = (weight / steps.view(-1, 1, 1, 1)).round_().to(torch.int8)
        packed = torch.ops.onednn.qconv_prepack(
            signed, steps, 1.0, zero, stride, padding, dilation, groups, list(image.shape)
        )
        return packed, steps, torch.zeros(len(steps), dtype=torch.long)

    def _pack(self, kept: float, x: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
        """Weights, divided by ``kept``, in the order that oneDNN computes with, for inputs of this shape.

        With those of another shape a convolution can take four times as long.
        """
        key = kept, x.shape
        if key not in self.packed:
            if len(self.packed) > 1:  # they are as large as the network
                del self.packed[next(iter(self.packed))]
            stride, dilation, groups = self.geometry
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self.packed[key] = reorder(self.weight / kept, padding, stride, dilation, groups, list(x.shape))
        return self.packed[key]


class _Scale(nn.Module):
    """Dropout, after batch normalization where there is one, as one product and sum for each channel."""

    def __init__(self, dropout: nn.Module, norm: nn.BatchNorm2d | None, inplace: bool, state: _Pass) -> None:
        super().__init__()
        self.dropout = dropout
        self.inplace = inplace
        self.state = state
        self.factor = self.shift = None
        if norm is not None:
            self.factor = (norm.weight * (norm.running_var + norm.eps).rsqrt()).detach().view(1, -1, 1, 1)
            self.shift = (norm.bias.detach() - norm.running_mean * self.factor.flatten()).view(1, -1, 1, 1)

    def can_be_folded(self, padding: Sequence[int], groups: int) -> bool:
        """Into a convolution that pads by so many zeros, and not by its input's edges, which are scaled as well."""
        return isinstance(self.dropout, nn.Dropout2d) and groups == 1 and (self.shift is None or not any(padding))

    def terms(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Factor and shift (B, C, 1, 1); None where they would change nothing."""
        if self.state.generators is None:
            return None if self.factor is None else (self.factor, self.shift)
        factor = self.state.mask(x, self.dropout).float() / (1 - self.dropout.p)
        return (factor, None) if self.factor is None else (factor * self.factor, factor * self.shift)

    def balance(self, before: _Convolution) -> None:
        """Let the convolution before scale its output, all but the sign: its channels then have similar ranges.

        A step of 8-bit integers is too coarse for a channel that is small until the normalization makes it large, and
        weights that do that leave too few steps to the other channels'.
        """
        size = self.factor.abs().flatten()
        before.weight = before.weight * size.view(-1, 1, 1, 1)
        before.bias = None if before.bias is None else before.bias * size
        self.factor = self.factor.sign()

    def fold(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        """The next convolution's weights and bias for one image."""
        terms = self.terms(x)
        if terms is None:
            return weight, bias
        factor, shift = terms
        if shift is not None:
            extra = (weight.float() * shift).sum(dim=(1, 2, 3))
            bias = (extra if bias is None else bias + extra).to(weight.dtype)
        return (weight * factor).to(weight.dtype).contiguous(memory_format=torch.channels_last), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factor is None:
            return self.state.drop(x, self.dropout, self.inplace)
        factor, shift = (term.to(x.dtype) for term in self.terms(x))
        return _affine(x, factor, shift, inplace=self.inplace)


class _InstanceNorm(nn.Module):
    """Instance normalization, LeakyReLU and dropout: two passes, the mask in the factor of the normalization."""

    def __init__(
        self, norm: nn.InstanceNorm2d, activation: nn.Module | None, dropout: nn.Module | None, state: _Pass
    ) -> None:
        super().__init__()
        self.norm, self.activation, self.dropout, self.state = norm, activation, dropout, state

    def forward(self, x: torch.Tensor, dropout: bool = True) -> torch.Tensor:
        mean, var = self.state.normalization(x, self)
        factor = (var + self.norm.eps).rsqrt()
        if self.norm.affine:
            factor = factor * self.norm.weight.view(1, -1, 1, 1)
        shift = -mean * factor
        if self.norm.affine:
            shift = shift + self.norm.bias.view(1, -1, 1, 1)
        if dropout and self.dropout is not None and self.state.generators is not None:
            mask = self.state.mask(x, self.dropout) / (1 - self.dropout.p)
            factor, shift = factor * mask, shift * mask
        x = _affine(x, factor.to(x.dtype), shift.to(x.dtype))
        return x if self.activation is None else F.leaky_relu_(x, getattr(self.activation, "negative_slope", 0.0))


class _Layers(nn.Sequential):
    """Layers one after another; those before the first dropout of the network once for all samples of a slice."""

    def __init__(self, layers: list[nn.Module], state: _Pass) -> None:
        super().__init__(*layers)
        self.first = next((i for i, layer in enumerate(layers) if _drops(layer)), len(layers))
        self.state = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers, first = list(self), self.first

        def before(part: torch.Tensor) -> torch.Tensor:
            for layer in layers[:first]:
                part = layer(part)
            return layers[first](part, dropout=False) if splits else part

        # a layer applies its mask itself, but not where the rest of it is the same for all samples
        splits = first < len(layers) and isinstance(layers[first], _InstanceNorm | _Convolution)
        splits = splits and layers[first].dropout is not None and not self.state.masked
        splits = splits and getattr(layers[first], "scale", None) is None  # which would draw a mask before
        x = self.state.before_mask(before, self, x, copy=not splits) if first < len(layers) else before(x)
        if splits:
            x = self.state.drop(x, layers[first].dropout, inplace=False)
        for layer in layers[first + splits :]:
            x = layer(x)
        return x


def _kind(module: nn.Module) -> type:
    """Its class; ``nn.Conv2d`` or ``nn.Dropout`` for one that says that it computes the same."""
    if getattr(module, "same_as_dropout", False):
        return nn.Dropout
    return nn.Conv2d if getattr(module, "same_as_conv2d", False) else type(module)


def _pads_otherwise(module: nn.Module) -> bool:
    """Whether it is a convolution that does not pad by a number of zeros or edge pixels: it stays as it is."""
    if not isinstance(module, nn.Conv2d):
        return False
    return module.padding_mode not in ("zeros", "replicate") or isinstance(module.padding, str)


def _tiles(module: nn.ConvTranspose2d) -> bool:
    """Whether each pixel becomes a square of its own."""
    edge = module.stride[0]
    sizes = (module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation)
    return module.groups == 1 and sizes == ((edge, edge), (edge, edge), (0, 0), (0, 0), (1, 1))


class _Tiles(nn.Module):
    """Transposed convolution that tiles, as a 1x1 convolution whose channels are the pixels of the squares.

    Two to five times faster in oneDNN.
    """

    def __init__(self, module: nn.ConvTranspose2d, state: _Pass, dtype: torch.dtype) -> None:
        super().__init__()
        self.edge, self.channels = module.stride[0], module.out_channels
        n = self.edge**2
        convolution = nn.utils.skip_init(  # initial weights would be drawn from the global generator
            nn.Conv2d, module.in_channels, self.channels * n, 1, bias=module.bias is not None
        )
        weight = module.weight.detach().permute(2, 3, 1, 0)
        convolution.weight = nn.Parameter(weight.reshape(-1, module.in_channels, 1, 1))
        if module.bias is not None:
            convolution.bias = nn.Parameter(module.bias.detach().repeat(n))
        self.convolution = _Convolution(convolution, None, state, dtype)
        self.convolution.exact = True  # little of the time, and its input is not normalized

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Behind the channels of ``skip``, where given."""
        x = self.convolution(x)
        batch, _, height, width = x.shape
        n, before = self.edge, 0 if skip is None else skip.shape[1]
        size = (batch, before + self.channels, height * n, width * n)
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        if skip is not None:
            out[:, :before] = skip
        squares = x.permute(0, 2, 3, 1).reshape(batch, height, width, n, n, self.channels).transpose(2, 3)
        out.permute(0, 2, 3, 1)[..., before:].view(squares.shape).copy_(squares)
        return out


class _Residual(nn.Module):
    """Residual block whose sum is computed with its last convolution."""

    def __init__(self, block: nn.Module, state: _Pass, dtype: torch.dtype) -> None:
        super().__init__()
        *before, self.last = _fuse_sequence([block.first, block.dropout, block.second], state, dtype)
        self.before = _Layers(before, state)
        self.shortcut = _fuse(block.shortcut, state, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.before(x), residual=self.shortcut(x))


def _drops(layer: nn.Module) -> bool:
    """Whether a layer applies a mask, itself or inside."""
    return any(getattr(m, "dropout", None) is not None for m in layer.modules())


def _flat(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules of nested sequences, without those that do nothing when dropout is handled elsewhere."""
    flat: list[nn.Module] = []
    for module in modules:
        if type(module).forward is nn.Sequential.forward:
            flat += _flat(list(module))
        elif not (isinstance(module, nn.Identity) or isinstance(module, nn.Dropout | nn.Dropout2d) and module.p == 0):
            flat.append(module)
    return flat


def _fuse_sequence(modules: list[nn.Module], state: _Pass, dtype: torch.dtype) -> nn.Module:
    """What a sequence of modules computes, with neighbours fused."""
    layers: list[nn.Module] = []
    scale: _Scale | None = None
    queue = _flat(modules)

    def take(*types: type) -> nn.Module | None:
        return queue.pop(0) if queue and _kind(queue[0]) in types and not _pads_otherwise(queue[0]) else None

    def fresh() -> bool:
        """Whether what comes next may be changed in place: nobody else has it."""
        return bool(layers) and isinstance(layers[-1], _Convolution | _InstanceNorm | _Residual)

    while queue:
        if convolution := take(nn.Conv2d):
            norm = take(nn.BatchNorm2d)
            if norm is not None:
                convolution = fuse_conv_bn_eval(convolution.eval(), norm.eval())
            layer = _Convolution(convolution, take(nn.ReLU, nn.LeakyReLU), state, dtype)
            layer.scale, scale = scale, None
            if layer.can_drop():
                layer.dropout = take(nn.Dropout2d)
            layers.append(layer)
            continue
        if scale is not None:
            layers.append(scale)
            scale = None
        if dropout := take(nn.Dropout, nn.Dropout2d):
            scale = _Scale(dropout, None, fresh(), state)
        elif len(queue) > 1 and type(queue[0]) is nn.BatchNorm2d and _kind(queue[1]) in (nn.Dropout, nn.Dropout2d):
            norm, dropout = take(nn.BatchNorm2d), take(nn.Dropout, nn.Dropout2d)
            scale = _Scale(dropout, norm, fresh(), state)
            if state.integers and layers and isinstance(layers[-1], _Convolution):
                scale.balance(layers[-1])
        elif (norm := take(nn.InstanceNorm2d)) and not norm.track_running_stats and fresh():
            layers.append(_InstanceNorm(norm, take(nn.ReLU, nn.LeakyReLU), take(nn.Dropout2d), state))
        else:
            layers.append(_fuse(norm if norm is not None else queue.pop(0), state, dtype))
    return _Layers(layers + ([] if scale is None else [scale]), state)


def _fuse(module: nn.Module, state: _Pass, dtype: torch.dtype) -> nn.Module:
    """Replace, in a module and below, sequences, single convolutions and dropout."""
    if _pads_otherwise(module):
        return module
    if type(module).forward is nn.Sequential.forward or _kind(module) in (nn.Conv2d, nn.Dropout, nn.Dropout2d):
        return _fuse_sequence([module], state, dtype)
    if (type(module) is nn.ConvTranspose2d or getattr(module, "joins_skip", False)) and _tiles(module):
        return _Tiles(module, state, dtype)
    if getattr(module, "is_residual_block", False) and [type(m) for m in module.second] == [nn.Conv2d, nn.BatchNorm2d]:
        return _Residual(module, state, dtype)
    for name, child in module.named_children():
        setattr(module, name, _fuse(child, state, dtype))
    return module


class FusedNetwork:
    """A network for many samples: a copy with the same parameters, whose layers are fused and whose masks are keyed.

    Batch normalization is folded into convolutions, activations are computed with them (oneDNN), dropout is a product
    with a vector, folded into the next layer's weights where that is less work, and layers before the first dropout
    are computed once for each slice. The network itself is left as it is.

    Args:
        network: an eager network, see :func:`can_be_fused`.
        amp: bf16 or 8-bit integers, where the device is fast at them, see :func:`precision`.

    Attributes:
        precision: what its convolutions are computed in.
    """

    def __init__(self, network: nn.Module, amp: bool) -> None:
        self.plain = SequentialNetwork(network, amp)
        own = type(network).__module__.startswith(f"{__package__}.")  # tests compare these
        self.agrees: bool | None = True if own else None
        self.state = _Pass()
        self.border = getattr(network, "border", 0)
        self.amp = amp
        tensors = [*network.parameters(), *network.buffers()]
        self.precision = precision(tensors[0].device) if amp and tensors else "fp32"
        self.state.integers = self.precision == "int8"
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.network = _fuse(copy.deepcopy(network, {id(t): t for t in tensors}).eval(), self.state, dtype)
        convolutions = [module for module in self.network.modules() if isinstance(module, _Convolution)]
        if self.state.integers and not any(convolution._takes_integers() for convolution in convolutions):
            self.precision = "fp32"

    def trusted(self, image: torch.Tensor) -> "FusedNetwork | SequentialNetwork":
        """This; or the network's own passes, if fused ones give something else.

        What a network's ``forward`` does with its layers, cannot be seen from outside: it may take a part of a
        sequence, or share a layer. So one that is not of this package is compared with its own passes, without dropout
        and with the same masks, in fp32, on an image of the size (1, C, H, W) that it is first asked about.
        """
        if self.agrees is None:
            network = self.plain.network
            if image.device.type != "cpu":  # where the masks of both are the same
                network = copy.deepcopy(network).cpu()
            try:
                noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))  # the image may be blank
                self.agrees = _same_passes(network, noise)
                reason = "their maps are others"
            except Exception as error:  # of any layer that meets what it does not know
                self.agrees, reason = False, repr(error)
            if not self.agrees:
                _warn_of_plain(network, reason)
        return self if self.agrees else self.plain

    def begin(self) -> None:
        """Forget all of earlier images: nothing of what follows depends on them, to the last bit."""
        self.forget()
        self.state.statistics.clear()
        self.state.widest = 0
        for module in self.network.modules():
            if isinstance(module, _Convolution):
                module.packed.clear()  # the order of fp32 sums; those of integers are exact

    @property
    def widest(self) -> int:
        """Most bytes of a layer's output for one image, in the passes so far."""
        return self.state.widest

    def deterministic(self, images: torch.Tensor, positions: Sequence[int], kind: str) -> torch.Tensor:
        """Logits (B, K, H, W) without dropout; ``kind`` is ``"whole"`` or ``"region"``, see :meth:`sample`."""
        return self._pass(images, positions, None, kind)

    def sample(
        self, images: torch.Tensor, positions: Sequence[int], seeds: Sequence[int], kind: str | None
    ) -> torch.Tensor:
        """Logits (B, K, H, W), each image with the masks of its seed; ``kind`` is None for the whole field.

        Args:
            images: (B, C, H, W).
            positions: number of the slice that each image shows.
            seeds: of each image's masks.
            kind: None, or ``"region"`` after :meth:`deterministic` has seen the whole field and the region; its images
                come with ``border`` pixels on every side, without logits.
        """
        return self._pass(images, positions, [torch.Generator().manual_seed(s) for s in seeds], kind)

    def _pass(self, images, positions, generators, kind) -> torch.Tensor:
        state = self.state
        state.positions, state.generators, state.kind, state.masked = positions, generators, kind, False
        state.inner = kind == "region" and self.border > 0
        return forward(self.network, images, self.amp)

    def forget(self) -> None:
        """Let go of what was computed once for all samples of a slice."""
        self.state.shared.clear()


def _same_passes(network: nn.Module, image: torch.Tensor) -> bool:
    """Whether a network's fused passes give the probabilities of its own, without dropout and with one seed's masks."""
    maps = []
    for passes in (FusedNetwork(network, amp=False), SequentialNetwork(network, amp=False)):
        sure, drawn = passes.deterministic(image, [0], "whole"), passes.sample(image, [0], [0], None)
        maps.append(torch.stack([sure, drawn]).softmax(dim=2))
    return torch.allclose(*maps, rtol=0, atol=1e-3, equal_nan=True)


def _warn_of_plain(network: nn.Module, reason: str) -> None:
    logging.getLogger(__name__).warning(
        "%s is sampled by its own passes, which take longer than fused ones: %s.", type(network).__name__, reason
    )


def passes_of(network: nn.Module, amp: bool) -> "FusedNetwork | SequentialNetwork":
    """Fused passes of a network, or, where it cannot be fused, its own."""
    if can_be_fused(network):
        try:
            return FusedNetwork(network, amp)
        except Exception as error:  # of any layer that meets what it does not know
            _warn_of_plain(network, repr(error))
    return SequentialNetwork(network, amp)


class SequentialNetwork:
    """As :class:`FusedNetwork`, for TorchScript and other kinds of dropout: each slice and sample is a pass of its own.

    The masks are those that torch draws from a seed on the network's device, on CPUs the same as of a fused network.
    """

    widest = 0

    def __init__(self, network: nn.Module, amp: bool) -> None:
        self.network = network
        tensor = next(network.parameters(), torch.empty(0))
        self.precision = "bf16" if amp and reduced_precision(tensor.device) else "fp32"
        self.border = getattr(network, "border", 0)
        self.amp = amp

    def deterministic(self, images: torch.Tensor, positions: Sequence[int], kind: str) -> torch.Tensor:
        with sampling(self.network, active=False):
            return self._pass(images, kind)

    def sample(
        self, images: torch.Tensor, positions: Sequence[int], seeds: Sequence[int], kind: str | None
    ) -> torch.Tensor:
        cuda = images.device.type == "cuda"
        # not torch.manual_seed, which seeds all devices
        generator = torch.cuda.default_generators[images.device.index] if cuda else torch.default_generator
        logits = []
        with torch.random.fork_rng(devices=[images.device] if cuda else []), sampling(self.network, active=True):
            for image, seed in zip(images.split(1), seeds, strict=True):
                generator.manual_seed(seed)
                logits.append(self._pass(image, kind))
        return torch.cat(logits)

    def _pass(self, images: torch.Tensor, kind: str | None) -> torch.Tensor:
        logits = forward(self.network, images, self.amp)
        return F.pad(logits, [-self.border] * 4) if kind == "region" else logits

    def begin(self) -> None:
        pass

    def forget(self) -> None:
        pass
