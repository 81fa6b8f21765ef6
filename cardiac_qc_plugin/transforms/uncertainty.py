"""Uncertainty maps from softmax probabilities (section III-B), and the split of the inferer's channels."""

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_tensor

__all__ = [
    "BayesianMap",
    "BayesianMapd",
    "PairwiseDiced",
    "PredictiveEntropy",
    "PredictiveEntropyd",
    "SplitUncertaintyd",
    "bayesian_map",
    "pairwise_dice",
    "predictive_entropy",
]


def predictive_entropy(probabilities: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """e-map: entropy of the class probabilities over its maximum ``ln C``, in [0, 1] (section III-B).

    Args:
        probabilities: softmax probabilities, ``(C, ...)`` for the default ``dim``.
        dim: the class axis; it is kept with size 1.
    """
    entropy = torch.special.entr(probabilities).sum(dim=dim, keepdim=True)
    return (entropy / math.log(probabilities.shape[dim])).clamp(0.0, 1.0)


def bayesian_map(std: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """b-map: twice the sample standard deviation of each class's probability, clipped, mean over classes (Eq. 1).

    The factor brings the measure to [0, 1]: no probability can have a population standard deviation above 0.5.

    Args:
        std: standard deviation over the samples, with ``T - 1``, ``(C, ...)`` for the default ``dim``.
        dim: the class axis; it is kept with size 1.
    """
    return (2.0 * std).clamp(0.0, 1.0).mean(dim=dim, keepdim=True)


def pairwise_dice(votes: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean agreement between the segmentations of ``T`` samples, per class: a scan-level confidence.

    A voxel that ``n`` samples give to a class lies in the intersection of ``n (n - 1) / 2`` of their pairs, so the Dice
    coefficient over all pairs, as a ratio of sums, needs the number of votes only:
    ``sum n (n - 1) / ((T - 1) sum n)``.

    Args:
        votes: share of the samples whose most probable class is this one, ``(C, ...)``.
        samples: ``T``, at least 2.

    Returns:
        ``(C,)`` values in [0, 1]; NaN for a class that no sample has.

    Raises:
        ValueError: for fewer than 2 samples.
    """
    if samples < 2:
        raise ValueError(f"Agreement between samples needs at least 2 of them, got {samples}.")
    n = (votes.flatten(1).double() * samples).round()
    return (n * (n - 1)).sum(dim=1) / ((samples - 1) * n.sum(dim=1))


class PredictiveEntropy(Transform):
    """e-map ``(1, ...)`` from probabilities ``(C, ...)``, see :func:`predictive_entropy`."""

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        return predictive_entropy(convert_to_tensor(probabilities, track_meta=True))


class BayesianMap(Transform):
    """b-map ``(1, ...)`` from the probabilities of ``T >= 2`` samples ``(T, C, ...)``, see :func:`bayesian_map`."""

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        tensor = convert_to_tensor(samples, track_meta=True)
        if tensor.shape[0] < 2:
            raise ValueError(f"A standard deviation needs at least 2 samples, got {tensor.shape[0]}.")
        return bayesian_map(tensor.std(dim=0, correction=1))


def check_one_key(keys: tuple[Hashable, ...], output_key: str) -> None:
    """Raise ValueError for several keys, whose maps would replace each other under the one output key."""
    if len(keys) > 1:
        raise ValueError(
            f"The maps of {', '.join(map(str, keys))} would all be stored under {output_key!r}: "
            "give each key a transform of its own, with another output_key."
        )


class PredictiveEntropyd(MapTransform):
    """Dictionary form of :class:`PredictiveEntropy`; the map of the one key is stored under ``output_key``."""

    def __init__(self, keys: KeysCollection, output_key: str = "emap", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        check_one_key(self.keys, output_key)
        self.output_key = output_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[self.output_key] = PredictiveEntropy()(d[key])
        return d


class BayesianMapd(MapTransform):
    """Dictionary form of :class:`BayesianMap`; the map of the one key is stored under ``output_key``."""

    def __init__(self, keys: KeysCollection, output_key: str = "bmap", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        check_one_key(self.keys, output_key)
        self.output_key = output_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[self.output_key] = BayesianMap()(d[key])
        return d


class SplitUncertaintyd(MapTransform):
    """Split the channels of :class:`~cardiac_qc_plugin.inferers.MCDropoutSliceInferer` into entries of their own.

    Args:
        keys: one key, a tensor or array ``(2 C + 2, H, W, D)``: probabilities, b-map, e-map, votes.

    Returns (in the dictionary):
        ``keys``: probabilities ``(C, H, W, D)``; ``bmap`` and ``emap``: ``(1, H, W, D)``; ``votes``: ``(C, H, W, D)``.
    """

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            tensor = convert_to_tensor(d[key], track_meta=True)  # Invertd passes other tensors by
            classes = tensor.shape[0] // 2 - 1
            if classes < 1 or tensor.shape[0] % 2:
                raise ValueError(f"Expected 2 C + 2 channels for C classes, got {tensor.shape[0]}.")
            parts = tensor.split([classes, 1, 1, classes])
            for name, part in zip((key, "bmap", "emap", "votes"), parts, strict=True):
                d[name] = part
        return d


class PairwiseDiced(MapTransform):
    """Agreement between the samples' segmentations, for reports, see :func:`pairwise_dice`.

    Args:
        keys: one key, the votes ``(C, H, W, D)``.
        samples: number of samples behind the votes; with fewer than 2 there is no agreement to measure.
        class_names: names of the classes after the background, in order.
        result_key: where ``{"pairwise_dice": {name: value or None}}`` goes; None for a class that no sample has.
    """

    def __init__(
        self, keys: KeysCollection, samples: int, class_names: Sequence[str], result_key: str = "result"
    ) -> None:
        super().__init__(keys)
        self.samples = samples
        self.class_names = class_names
        self.result_key = result_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            votes = convert_to_tensor(d[key])
            values = pairwise_dice(votes, self.samples)[1:].tolist() if self.samples > 1 else []
            agreement = {name: None for name in self.class_names}
            agreement |= {n: v for n, v in zip(self.class_names, values, strict=False) if not math.isnan(v)}
            d[self.result_key] = {"pairwise_dice": agreement}
        return d
