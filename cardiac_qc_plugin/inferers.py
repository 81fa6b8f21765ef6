"""Slice-wise inference: a network with Monte Carlo dropout, an ensemble, and the detector of failures."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from monai.utils import convert_to_numpy
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from .checkpoints import load_weights
from .sampling import (
    FusedNetwork,
    SequentialNetwork,
    dropout_modules,
    forward,
    passes_of,
    reduced_precision,
    sample_seed,
    sampling,
)
from .transforms.regions import (
    MIN_SIZE,
    REGION_SIZE,
    crop_boxes,
    crop_slice,
    expected_heart,
    paint_regions,
    region_labels,
)
from .transforms.spatial import CODES, seen_from_base
from .transforms.uncertainty import bayesian_map, predictive_entropy

__all__ = ["AutocastInferer", "EnsembleSliceInferer", "FailureRegionInferer", "MCDropoutSliceInferer"]

Window: TypeAlias = tuple[slice, slice]  # rows and columns of the field

STRIDE = 16  # of the networks, the largest
# bytes of the largest layer's output in a forward pass: above 32 MiB glibc asks the kernel for every buffer anew
LARGEST = {"cpu": 16 << 20, "cuda": 1 << 30}


class AutocastInferer(SimpleInferer):
    """Training step's forward pass of a 2-D network in channels-last memory format and bf16 mixed precision.

    MONAI's trainer casts on CUDA devices only; CPUs with fast bf16 train 1.5 to 10 times as fast with it.

    Args:
        amp: use bf16 where the device has fast bf16 convolutions; fp32 elsewhere.
    """

    def __init__(self, amp: bool = True) -> None:
        super().__init__()
        self.amp = amp

    def __call__(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
        return forward(network, inputs, self.amp)


class MCDropoutSliceInferer(Inferer):
    """Segment a stack slice by slice, with the uncertainty maps of section III-B from the same passes.

    Only dropout is active while sampling: batch normalization uses its running statistics, and the network is left as
    it was found. Mean and variance are accumulated (Welford), so memory does not grow with the number of samples. The
    masks of a sample of a slice follow from ``seed`` and the slice's number in its stack: they are the same in any
    batch, with any number of samples, and in a part of the field. The global generator is left untouched.

    Any network with dropout modules of torch's will do; dropout that it does otherwise, by ``F.dropout`` or a module of
    its own, stays off. A network that is not of this package is compared once with its own passes, and takes these if
    faster ones would give something else.

    Args:
        samples: T, stochastic passes. With 1 the b-map is 0 (a spread needs two). With 0 dropout stays off: the
            probabilities are the deterministic pass's, and the b-map is 0.
        prediction: where the probabilities come from: ``"mean"`` of the samples (Eq. 2, what the paper pairs with the
            b-map), or the ``"deterministic"`` pass without dropout (paired with the e-map).
        region: ``"whole"`` field, or the ``"heart"``: the samples see a box around what the deterministic pass takes
            for heart, and its margin. Outside, the probabilities are the deterministic pass's, and the b-map is 0.
        margin: of the heart's box, in pixels.
        turns: quarter turns in which slices are seen, 1 to 4 (test-time augmentation; the networks are trained in all
            four): sample t sees its slice after ``t mod turns`` of them, and the deterministic pass is the mean of one
            after each.
        sw_batch_size: images per forward pass; None for as many as the cache or the device is fast with.
        seed: seed of the samples; the same seed gives the same maps.
        amp: bf16 or 8-bit integers, where the device is fast at them, see
            :func:`~cardiac_qc_plugin.sampling.precision`; fp32 elsewhere.
        progress: called after each forward pass with the share of the work done, in (0, 1].

    Attributes:
        sample_areas: of the last call: pixels of each class in each sample and slice, (B * D, T, K); the spread of a
            structure's volume over the samples.
        precision: of the last call's convolutions: ``"fp32"``, ``"bf16"`` or ``"int8"``.

    Shape:
        ``(B, C, H, W, D)``, slices last, to ``(B, 2 K + 2, H, W, D)`` for ``K`` classes: probabilities (K), b-map,
        e-map (entropy of the deterministic pass), and votes (K): the share of samples whose most probable class is
        this one. The slices of one stack ``(D, C, H, W)`` give the same as ``(D, 2 K + 2, H, W)``.
        :class:`~cardiac_qc_plugin.transforms.SplitUncertaintyd` takes it apart.

    Raises:
        ValueError: if samples are asked of a network without dropout, for another input rank or setting, or for values
            that are not finite.

    Example::

        >>> from cardiac_qc_plugin.networks import DilatedCNN
        >>> MCDropoutSliceInferer(samples=3)(torch.rand(1, 1, 32, 32, 5), DilatedCNN()).shape
        torch.Size([1, 10, 32, 32, 5])
    """

    def __init__(
        self,
        samples: int = 10,
        prediction: str = "mean",
        region: str = "whole",
        margin: int = 16,
        turns: int = 1,
        sw_batch_size: int | None = None,
        seed: int = 0,
        amp: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__()
        if samples < 0:
            raise ValueError(f"samples has to be 0 or more, got {samples}.")
        if prediction not in ("mean", "deterministic"):
            raise ValueError(
                f"prediction is 'mean' (in a bundle: map bmap) or 'deterministic' (emap), got '{prediction}'."
            )
        if region not in ("heart", "whole"):
            raise ValueError(f"region is 'heart' or 'whole', got '{region}'.")
        if turns not in range(1, 5):
            raise ValueError(f"turns is 1 to 4, got {turns}.")
        self.samples = samples
        self.prediction = prediction
        self.region = region
        self.margin = margin
        self.turns = turns
        self.sw_batch_size = sw_batch_size
        self.seed = seed
        self.amp = amp
        self.progress = progress
        self.sample_areas: torch.Tensor | None = None
        self.precision: str | None = None

    def prepare(self, network: nn.Module) -> FusedNetwork | SequentialNetwork:
        """What each call makes of a network. Calls take it instead, as long as the weights stay as they are."""
        if self.samples > 0 and not dropout_modules(network):
            raise ValueError(
                f"{type(network).__name__} has no dropout module, so there is nothing to sample. "
                "Use a network built with dropout, or samples=0."
            )
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module
        with torch.no_grad():
            return passes_of(network, self.amp)

    def __call__(
        self, inputs: torch.Tensor, network: nn.Module | FusedNetwork | SequentialNetwork, *args, **kwargs
    ) -> torch.Tensor:
        if inputs.ndim not in (4, 5):
            raise ValueError(f"Expected (B, C, H, W, D) or (D, C, H, W), got shape {tuple(inputs.shape)}.")
        passes = network if isinstance(network, FusedNetwork | SequentialNetwork) else self.prepare(network)
        inputs = inputs.as_subclass(torch.Tensor)  # a MetaTensor would track every operation
        stacks = inputs[None] if inputs.ndim == 4 else inputs.movedim(-1, 1)
        if not inputs.numel() or not torch.isfinite(inputs).all():
            raise ValueError(f"Expected finite values, got {'none' if not inputs.numel() else 'nan or infinite ones'}.")
        with torch.no_grad():
            if isinstance(passes, FusedNetwork):
                passes = passes.trusted(stacks[0, :1])
            passes.begin()
            self.precision = passes.precision
            parts = [self._maps(stack, passes, self._report(i, len(stacks))) for i, stack in enumerate(stacks)]
        maps, areas = zip(*parts, strict=True)
        self.sample_areas = torch.cat(areas)
        return maps[0] if inputs.ndim == 4 else torch.stack(maps).movedim(1, -1)

    def _report(self, index: int, count: int) -> Callable[[float], None]:
        """Report the share of stack ``index`` as a share of all stacks."""
        return lambda share: self.progress((index + share) / count) if self.progress is not None else None

    def _maps(
        self, stack: torch.Tensor, passes: FusedNetwork | SequentialNetwork, report: Callable[[float], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels (D, 2 K + 2, H, W) and areas (D, T, K) described in the class, for ``(D, C, H, W)`` slices."""
        sure, moments, window = None, None, None
        for turn in range(self.turns):
            turned = stack.rot90(turn, (2, 3)).contiguous()
            seen = self._deterministic(turned, passes, report, turn)
            sure = seen if sure is None else sure + seen.rot90(-turn, (2, 3))
            if self.samples > 0:
                window = window or self._window(sure)
                moments = moments or Moments(sure[(..., *window)], self.samples)
                self._sample(turned, seen, turned_window(window, sure.shape[2:], turn), passes, moments, report, turn)
        if self.turns > 1:
            sure /= self.turns
        mean, std, votes = sure, torch.zeros_like(sure), most_probable(sure)
        areas = votes.sum(dim=(2, 3), dtype=torch.long)[:, None].repeat(1, self.samples, 1)
        if moments is not None:
            mean = sure.clone()
            areas += moments.areas - votes[(..., *window)].sum(dim=(2, 3), dtype=torch.long)[:, None]
            for field, inside in zip((mean, std, votes), moments.result(), strict=True):
                field[(..., *window)] = inside
        channels = [
            mean if self.prediction == "mean" else sure,
            bayesian_map(std, dim=1),
            predictive_entropy(sure, dim=1),
            votes,
        ]
        report(1.0)
        return torch.cat(channels, dim=1), areas.cpu()

    def _window(self, sure: torch.Tensor) -> Window:
        """The part of the field that the samples see."""
        if self.region == "heart":
            return heart_window(sure, self.margin)
        return slice(0, sure.shape[2]), slice(0, sure.shape[3])

    def _own_samples(self, turn: int) -> range:
        """Numbers of the samples that see their slice after ``turn`` quarter turns."""
        return range(turn, self.samples, self.turns)

    def _done(self, turn: int, passes: float) -> float:
        """Share of the work that is done after so many passes of a turn."""
        before = sum(1 + len(self._own_samples(earlier)) for earlier in range(turn))
        return (before + passes) / (self.turns + self.samples)

    def _batch(self, passes: FusedNetwork | SequentialNetwork, device: torch.device, share: float = 1.0) -> int:
        """Images for a forward pass; ``share`` of the whole field that an image is."""
        if self.sw_batch_size is not None:
            return self.sw_batch_size
        if passes.precision == "int8":  # each image is quantized, and convolved, for itself
            return 1
        return max(1, int(LARGEST.get(device.type, LARGEST["cuda"]) / (passes.widest * share))) if passes.widest else 1

    def _deterministic(
        self,
        stack: torch.Tensor,
        passes: FusedNetwork | SequentialNetwork,
        report: Callable[[float], None],
        turn: int,
    ) -> torch.Tensor:
        """Probabilities (D, K, H, W) of the pass without dropout, of slices after ``turn`` quarter turns."""
        parts: list[torch.Tensor] = []
        done = 0
        while done < len(stack):
            positions = range(len(stack))[done : done + self._batch(passes, stack.device)]
            logits = passes.deterministic(stack[positions.start : positions.stop], positions, "whole")
            parts.append(logits.softmax(dim=1))
            done = positions.stop
            report(self._done(turn, done / len(stack)))
        return torch.cat(parts).contiguous()

    def _sample(
        self,
        stack: torch.Tensor,
        sure: torch.Tensor,
        window: Window,
        passes: FusedNetwork | SequentialNetwork,
        moments: "Moments",
        report: Callable[[float], None],
        turn: int,
    ) -> None:
        """Add the samples of a turn to the moments.

        ``stack``, ``sure``, the probabilities of the pass without dropout, and ``window``, the part of the field that
        counts, are turned.
        """
        crops, share, kind, shift, cut = stack, 1.0, None, None, ()
        if window != (slice(0, sure.shape[2]), slice(0, sure.shape[3])):
            rows, cols = (aligned(w.start, w.stop, size) for w, size in zip(window, sure.shape[2:], strict=True))
            starts = zip(window, (rows.start, cols.start), strict=True)
            cut = (..., *(slice(w.start - start, w.stop - start) for w, start in starts))
            kind, p = "region", passes.border
            crops = F.pad(stack, (p, p, p, p))[:, :, rows.start : rows.stop + 2 * p, cols.start : cols.stop + 2 * p]
            share = crops[0].numel() / F.pad(stack[0], (p, p, p, p)).numel()
        batch = self._batch(passes, stack.device, share)
        if kind and not passes.border:  # what the border of the region changes without dropout is taken away
            parts = [
                passes.deterministic(crops[positions], positions.tolist(), kind).log_softmax(dim=1)
                for positions in torch.arange(len(stack)).split(batch)
            ]
            shift = sure[..., rows, cols].clamp_min(torch.finfo(sure.dtype).tiny).log() - torch.cat(parts)
        own = self._own_samples(turn)
        group = max(1, batch // max(1, len(own)))  # slices
        for start in range(0, len(stack), group):
            pairs = [(z, t) for z in range(start, min(start + group, len(stack))) for t in own]
            for first in range(0, len(pairs), batch):
                part = pairs[first : first + batch]
                positions = [z for z, _ in part]
                seeds = [sample_seed(self.seed, z, t) for z, t in part]
                logits = passes.sample(crops[positions], positions, seeds, kind)
                logits = (logits if shift is None else logits + shift[positions])[cut].rot90(-turn, (2, 3))
                moments.add(part, logits.contiguous().softmax(dim=1))
                report(self._done(turn, 1 + (start * len(own) + first + len(part)) / len(stack)))
            passes.forget()


class Moments:
    """Mean, spread and votes of the samples of each slice, accumulated (Welford).

    Args:
        like: probabilities (D, K, H, W) of the part of the field that the samples see.
        samples: T.

    Attributes:
        areas: pixels of each class in each sample, (D, T, K).
    """

    def __init__(self, like: torch.Tensor, samples: int) -> None:
        self.mean, self.m2, self.votes = (like.new_zeros(like.shape) for _ in range(3))
        self.areas = torch.zeros(len(like), samples, like.shape[1], dtype=torch.long, device=like.device)
        self.count = [0] * len(like)

    def add(self, part: Sequence[tuple[int, int]], drawn: torch.Tensor) -> None:
        """Add the probabilities (B, K, H, W) of samples, given as pairs of slice and number of the sample."""
        for (z, t), sample, chosen in zip(part, drawn, most_probable(drawn), strict=True):
            self.votes[z] += chosen
            self.areas[z, t] += chosen.sum(dim=(1, 2)).long()
            delta = sample - self.mean[z]
            self.count[z] += 1
            self.mean[z].add_(delta, alpha=1 / self.count[z])
            self.m2[z].addcmul_(delta, delta, value=1 - 1 / self.count[z])

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, standard deviation, with ``T - 1``, and share of votes, in place of the sums."""
        samples = self.areas.shape[1]
        self.m2 /= max(samples - 1, 1)
        return self.mean, self.m2.sqrt_(), self.votes.div_(samples)


def most_probable(probabilities: torch.Tensor) -> torch.Tensor:
    """1 for the most probable class (the first, if several are), 0 for the others: (B, K, ...) float.

    Forty times faster than ``argmax``, whose kernel walks along the class axis.
    """
    highest = probabilities.amax(dim=1, keepdim=True)
    chosen = torch.lt(probabilities, highest, out=torch.empty_like(probabilities))  # 1 where it is not
    left = torch.ones_like(probabilities[:, 0])
    for k in range(probabilities.shape[1]):
        after = left * chosen[:, k]
        chosen[:, k] = left - after
        left = after
    return chosen


def aligned(start: int, stop: int, size: int) -> slice:
    """The smallest range with this one that starts and ends at a multiple of the networks' strides or the field's end.

    There a network's grid lies as in the whole field.
    """
    return slice(max(0, start // STRIDE * STRIDE), min(size, -(-stop // STRIDE) * STRIDE))


def turned_window(window: Window, shape: Sequence[int], turn: int) -> Window:
    """Rows and columns of a part of a field (H, W) after quarter turns, as ``rot90`` makes them."""
    rows, cols = window
    height, width = shape
    for _ in range(turn):
        rows, cols = slice(width - cols.stop, width - cols.start), rows
        height, width = width, height
    return rows, cols


def heart_window(probabilities: torch.Tensor, margin: int) -> Window:
    """Rows and columns, for all slices, of the heart and a margin; the whole field where nothing is found.

    The heart is what is not background with a probability above 0.1, in one piece or in several of which the
    smallest has at least a tenth of the largest's voxels. The box is :func:`aligned`.

    Args:
        probabilities: (D, K, H, W), background first.
        margin: in pixels.
    """
    pieces, count = ndimage.label((probabilities[:, 0] < 0.9).cpu().numpy(), np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())[1:]
    heart = np.isin(pieces, 1 + np.flatnonzero(sizes >= sizes.max(initial=1) / 10))
    window = []
    for axis, size in ((1, pieces.shape[1]), (2, pieces.shape[2])):
        found = np.flatnonzero(heart.any(axis=tuple({0, 1, 2} - {axis})))
        low, high = (found[0] - margin, found[-1] + 1 + margin) if count else (0, size)
        window.append(aligned(low, high, size))
    return window[0], window[1]


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
        precision: of the last call's convolutions: ``"fp32"`` or ``"bf16"``.
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
        self.precision: str | None = None

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs) -> torch.Tensor:
        if inputs.ndim != 5 or inputs.shape[0] != 1:
            raise ValueError(f"Expected one stack of slices (1, C, H, W, D), got shape {tuple(inputs.shape)}.")
        if not self.networks:
            self.networks = [load_weights(copy.deepcopy(network), path).eval() for path in self.members]
        self.precision = "bf16" if self.amp and reduced_precision(inputs.device) else "fp32"
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
    :func:`~cardiac_qc_plugin.transforms.crop_boxes`; the probability of a region is painted on all its pixels, and
    pixels outside the crop are 0. Crops of a stack that is seen from the base, by the affine of a ``MetaTensor``, are
    mirrored for the network, see :class:`~cardiac_qc_plugin.transforms.SeenFromApexd`.

    In a slice whose segmentation failed, regions in which the heart has to be have probability 1, whatever the network
    says: a map may be sure that there is nothing, see :func:`~cardiac_qc_plugin.transforms.expected_heart`.

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
        self, region_size: int = REGION_SIZE, min_size: int = MIN_SIZE, see_segmentation: bool = False, amp: bool = True
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
        mirrored = _seen_from_base(inputs)
        stacks = convert_to_numpy(inputs).astype(np.float32)
        painted = np.zeros((stacks.shape[0], 1, *stacks.shape[2:]), dtype=np.float32)
        with torch.no_grad(), sampling(network, active=False):
            for index, stack in enumerate(stacks):
                heart = expected_heart(stack[2])
                for z, box in enumerate(crop_boxes(stack[2], self.region_size, self.min_size)):
                    crop = crop_slice(stack[..., z], box)
                    patch = torch.from_numpy(crop[None, : 3 if self.see_segmentation else 2])
                    patch = patch.flip(3) if mirrored[index] else patch
                    logits = forward(network, patch.to(inputs.device), self.amp)
                    cells = logits.softmax(dim=1)[0, 1].cpu().numpy()
                    cells = cells[:, ::-1] if mirrored[index] else cells
                    failed = region_labels(crop_slice(heart[..., z], box), self.region_size)
                    painted[index, 0, ..., z] = np.maximum(
                        *(paint_regions(values, box, stack.shape[1:3], self.region_size) for values in (cells, failed))
                    )
        return torch.from_numpy(painted).to(inputs.device)


def _seen_from_base(inputs: torch.Tensor) -> list[bool]:
    """For each stack of a batch, see `seen_from_base`; no plain tensor is."""
    if not isinstance(inputs, MetaTensor):
        return [False] * len(inputs)
    count = len(inputs)
    affines = np.broadcast_to(convert_to_numpy(inputs.affine).reshape(-1, 4, 4), (count, 4, 4))
    codes = {c: np.broadcast_to(np.ravel(convert_to_numpy(inputs.meta[c])), count) for c in CODES if c in inputs.meta}
    return [seen_from_base(affines[i], {code: values[i] for code, values in codes.items()}) for i in range(count)]
