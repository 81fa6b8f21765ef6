"""Slice-wise inference with Monte Carlo dropout."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.inferers import Inferer, SimpleInferer
from monai.utils import convert_to_numpy
from torch import nn
from torch.nn import functional as F

from .checkpoints import load_weights
from .transforms.regions import crop_box, crop_slice, paint_regions
from .transforms.uncertainty import bayesian_map, predictive_entropy

__all__ = ["AutocastInferer", "EnsembleSliceInferer", "FailureRegionInferer", "MCDropoutSliceInferer"]

_DROPOUT = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")


def reduced_precision(device: torch.device) -> bool:
    """Whether bf16 convolutions are fast on the device: GPUs, and CPUs with AMX instructions.

    With AVX512-bf16 alone it does not pay: a training step of the DRN takes 2.4 s in bf16 and 1.3 s in fp32 (two cores,
    torch 2.13).
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def forward(network: Callable[..., torch.Tensor], inputs: torch.Tensor, amp: bool) -> torch.Tensor:
    """One pass of a 2-D network in channels-last memory format, in bf16 where asked for and fast; fp32 logits."""
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp and reduced_precision(inputs.device)):
        return network(inputs).float()


class AutocastInferer(SimpleInferer):
    """Training step's forward pass of a 2-D network in channels-last memory format and bf16 mixed precision.

    MONAI's trainer casts on CUDA devices only; on CPUs with AMX this is what makes training ten times faster.

    Args:
        amp: use bf16 where the device has fast bf16 convolutions; fp32 elsewhere.
    """

    def __init__(self, amp: bool = True) -> None:
        super().__init__()
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
        return forward(network, inputs, self.amp)


def dropout_modules(network: nn.Module) -> list[nn.Module]:
    """Modules that drop something; a scripted module goes by the name of the class it was made from."""

    def drops(m: nn.Module) -> bool:
        return isinstance(m, nn.modules.dropout._DropoutNd) or getattr(m, "original_name", "") in _DROPOUT

    return [m for m in network.modules() if drops(m) and m.p > 0]


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


class MCDropoutSliceInferer(Inferer):
    """Segment a stack slice by slice, with the uncertainty maps of section III-B from the same pass.

    Only dropout is active while sampling: batch normalization uses its running statistics, and all modules are left
    as they were found. Mean and variance are accumulated (Welford), so memory does not grow with the number of
    samples. Random numbers come from ``seed``; the global generator is left untouched.

    Args:
        samples: T, stochastic passes. With 1 the b-map is 0 (a spread needs two). With 0 dropout stays off: the
            probabilities are the deterministic pass's, and the b-map is 0.
        prediction: where the probabilities come from: ``"mean"`` of the samples (Eq. 2, what the paper pairs with the
            b-map), or the ``"deterministic"`` pass without dropout (paired with the e-map).
        sw_batch_size: slices per forward pass.
        seed: seed of the samples; the same seed gives the same maps.
        amp: bf16 where the device is fast at it, see :func:`reduced_precision`.
        progress: called after each pass over a batch of slices with the share of the work done, in (0, 1].

    Attributes:
        sample_areas: of the last call: pixels of each class in each sample and slice, (B * D, T, K); the spread of a
            structure's volume over the samples.

    Shape:
        ``(B, C, H, W, D)``, slices last, to ``(B, 2 K + 2, H, W, D)`` for ``K`` classes: probabilities (K), b-map,
        e-map (entropy of the deterministic pass), and votes (K): the share of samples whose most probable class is
        this one. Two-dimensional input ``(B, C, H, W)`` gives the same without ``D``.
        :class:`~cardiac_qc_plugin.transforms.SplitUncertaintyd` takes it apart.

    Raises:
        ValueError: if samples are asked of a network without dropout, or for another input rank or setting.

    Example::

        >>> from cardiac_qc_plugin.networks import DilatedCNN
        >>> MCDropoutSliceInferer(samples=3)(torch.rand(1, 1, 32, 32, 5), DilatedCNN()).shape
        torch.Size([1, 10, 32, 32, 5])
    """

    def __init__(
        self,
        samples: int = 10,
        prediction: str = "mean",
        sw_batch_size: int = 4,
        seed: int = 0,
        amp: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__()
        if samples < 0:
            raise ValueError(f"samples has to be 0 or more, got {samples}.")
        if prediction not in ("mean", "deterministic"):
            raise ValueError(f"prediction is 'mean' or 'deterministic', got '{prediction}'.")
        self.samples = samples
        self.prediction = prediction
        self.sw_batch_size = sw_batch_size
        self.seed = seed
        self.amp = amp
        self.progress = progress
        self.sample_areas: torch.Tensor | None = None

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs) -> torch.Tensor:
        if inputs.ndim not in (4, 5):
            raise ValueError(f"Expected (B, C, H, W) or (B, C, H, W, D), got shape {tuple(inputs.shape)}.")
        if self.samples > 0 and not dropout_modules(network):
            raise ValueError(
                f"{type(network).__name__} has no dropout module, so there is nothing to sample. "
                "Use a network built with dropout, or samples=0."
            )
        inputs = inputs.as_subclass(torch.Tensor)  # a MetaTensor would track every operation
        slices = inputs if inputs.ndim == 4 else inputs.movedim(-1, 1).flatten(0, 1)
        cuda = inputs.device.type == "cuda"
        # not torch.manual_seed, which seeds all devices
        generator = torch.cuda.default_generators[inputs.device.index] if cuda else torch.default_generator
        with torch.no_grad(), torch.random.fork_rng(devices=[inputs.device] if cuda else []):
            generator.manual_seed(self.seed)
            chunks = slices.split(self.sw_batch_size)
            parts = [self._maps(chunk, network, i, len(chunks)) for i, chunk in enumerate(chunks)]
        maps, self.sample_areas = (torch.cat(part) for part in zip(*parts, strict=True))
        if inputs.ndim == 4:
            return maps
        return maps.unflatten(0, (inputs.shape[0], inputs.shape[-1])).movedim(1, -1)

    def _maps(
        self, slices: torch.Tensor, network: nn.Module, chunk: int, chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels and areas described in the class for ``(B, C, H, W)`` slices; chunk ``chunk`` of ``chunks``."""

        def probabilities() -> torch.Tensor:
            return forward(network, slices, self.amp).softmax(dim=1)

        def report(passes: int) -> None:
            if self.progress is not None:
                each = self.samples + 1
                self.progress((chunk * each + passes) / (chunks * each))

        with sampling(network, active=False):
            deterministic = probabilities()
        report(1)
        mean, m2, votes = (torch.zeros_like(deterministic) for _ in range(3))
        areas = torch.zeros(slices.shape[0], self.samples, deterministic.shape[1], dtype=torch.long)
        with sampling(network, active=True):
            for t in range(1, self.samples + 1):
                sample = probabilities()
                labels = sample.argmax(dim=1, keepdim=True)
                votes.scatter_add_(1, labels, torch.ones_like(votes[:, :1]))
                areas[:, t - 1] = torch.stack([(labels == k).sum(dim=(1, 2, 3)) for k in range(areas.shape[2])], 1)
                delta = sample - mean
                mean += delta / t
                m2 += delta * (sample - mean)
                report(t + 1)
        std = (m2 / max(self.samples - 1, 1)).clamp_min(0).sqrt()
        if self.samples == 0:
            votes.scatter_(1, deterministic.argmax(dim=1, keepdim=True), 1.0)
        use_mean = self.prediction == "mean" and self.samples > 0
        channels = [
            mean if use_mean else deterministic,
            bayesian_map(std, dim=1),
            predictive_entropy(deterministic, dim=1),
            votes / max(self.samples, 1),
        ]
        return torch.cat(channels, dim=1), areas


class EnsembleSliceInferer(Inferer):
    """Segment a stack by several networks, whose disagreement is the b-map: a deep ensemble instead of dropout.

    It takes the place of :class:`MCDropoutSliceInferer` in a bundle's ``inferer``, with ``samples`` set to the number
    of members (Lakshminarayanan et al., NeurIPS 2017). They may be snapshots of one training (Huang et al., ICLR 2017).

    Args:
        members: files of the members' weights, two or more.
        sw_batch_size: slices per forward pass.
        amp: bf16 where the device is fast at it, see :func:`reduced_precision`.

    Attributes:
        sample_areas: of the last call: pixels of each class by each member and in each slice, (D, T, K).
        progress: called after each member with the share of the work done, in (0, 1].

    Shape:
        ``(1, C, H, W, D)``, slices last, to ``(1, 2 K + 2, H, W, D)`` for ``K`` classes: mean probabilities of the
        members (K), b-map of their sample standard deviation, e-map (entropy of the mean), and votes (K).

    Raises:
        ValueError: for fewer than two members, or weights that do not fit the network.
    """

    def __init__(self, members: Sequence[str | Path], sw_batch_size: int = 4, amp: bool = True) -> None:
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"Members can only disagree if there are two or more of them, got {len(members)}.")
        self.members = members
        self.sw_batch_size = sw_batch_size
        self.amp = amp
        self.progress: Callable[[float], None] | None = None
        self.networks: list[nn.Module] = []
        self.sample_areas: torch.Tensor | None = None

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs) -> torch.Tensor:
        if not self.networks:
            self.networks = [load_weights(copy.deepcopy(network), path).eval() for path in self.members]
        slices = inputs.as_subclass(torch.Tensor)[0].movedim(-1, 0)
        parts = []
        for member in self.networks:
            with torch.no_grad():
                logits = torch.cat([forward(member, chunk, self.amp) for chunk in slices.split(self.sw_batch_size)])
            parts.append(logits.softmax(dim=1))
            if self.progress is not None:
                self.progress(len(parts) / len(self.members))
        stack = torch.stack(parts)
        mean = stack.mean(dim=0)
        labels = F.one_hot(stack.argmax(dim=2), stack.shape[2]).movedim(-1, 2)
        self.sample_areas = labels.sum(dim=(3, 4)).movedim(0, 1).cpu()
        spread = bayesian_map(stack.std(dim=0, correction=1), dim=1)
        maps = [mean, spread, predictive_entropy(mean, dim=1), labels.float().mean(dim=0)]
        return torch.cat(maps, dim=1).movedim(0, -1)[None]


class FailureRegionInferer(Inferer):
    """Probability of a segmentation failure for each region of each slice (sections III-D and V-B).

    The network sees a crop around the automatic segmentation of each slice, see
    :func:`~cardiac_qc_plugin.transforms.crop_box`; the probability of a region is painted on all its pixels, and
    pixels outside the crop are 0.

    Args:
        region_size: edge of a region in pixels, the network's output stride.
        min_size: smallest side of a crop in pixels, a multiple of ``region_size``.
        see_segmentation: give the network the segmentation too, label numbers as its third channel.
        amp: bf16 where the device is fast at it, see :func:`reduced_precision`.

    Shape:
        ``(B, 3, H, W, D)``: image, uncertainty map and automatic labels 0-3, to ``(B, 1, H, W, D)`` in [0, 1].

    Raises:
        ValueError: for another number of channels or axes.
    """

    def __init__(
        self, region_size: int = 8, min_size: int = 80, see_segmentation: bool = False, amp: bool = True
    ) -> None:
        super().__init__()
        self.region_size = region_size
        self.min_size = min_size
        self.see_segmentation = see_segmentation
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs) -> torch.Tensor:
        if inputs.ndim != 5 or inputs.shape[1] != 3:
            raise ValueError(
                f"Expected image, uncertainty map and segmentation as (B, 3, H, W, D), got shape {tuple(inputs.shape)}."
            )
        stacks = convert_to_numpy(inputs).astype(np.float32)
        painted = np.zeros((stacks.shape[0], 1, *stacks.shape[2:]), dtype=np.float32)
        with torch.no_grad(), sampling(network, active=False):
            for index, stack in enumerate(stacks):
                for z in range(stack.shape[-1]):
                    box = crop_box(stack[2, ..., z], self.region_size, self.min_size)
                    crop = crop_slice(stack[..., z], box)
                    patch = torch.from_numpy(crop[None, : 3 if self.see_segmentation else 2])
                    logits = forward(network, patch.to(inputs.device), self.amp)
                    cells = logits.softmax(dim=1)[0, 1].cpu().numpy()
                    painted[index, 0, ..., z] = paint_regions(cells, box, stack.shape[1:3], self.region_size)
        return torch.from_numpy(painted).to(inputs.device)
