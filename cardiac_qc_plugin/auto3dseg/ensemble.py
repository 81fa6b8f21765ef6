"""Ensemble of folds with an uncertainty map: how far its members disagree."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.apps.auto3dseg import AlgoEnsembleBestByFold
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.utils.enums import AlgoKeys

from cardiac_qc_plugin.transforms.uncertainty import bayesian_map, predictive_entropy

__all__ = ["UncertaintyEnsemble", "ensemble_maps"]


def ensemble_maps(preds: Sequence[torch.Tensor]) -> dict[str, MetaTensor]:
    """Mean of the members' probabilities, and how far they disagree.

    Args:
        preds: probabilities of each member ``(C, ...)``, at least two.

    Returns:
        ``probabilities`` ``(C, ...)``, the mean; ``bmap`` ``(1, ...)``, the b-map of the members' sample standard
        deviation (:func:`~cardiac_qc_plugin.transforms.uncertainty.bayesian_map`); ``emap`` ``(1, ...)``, the entropy
        of the mean; with the first member's metadata.

    Raises:
        ValueError: for fewer than two members.
    """
    if len(preds) < 2:
        raise ValueError(f"Members can only disagree if there are two or more of them, got {len(preds)}.")
    stack = torch.stack([torch.as_tensor(pred).as_subclass(torch.Tensor).cpu() for pred in preds])
    mean = stack.mean(dim=0)
    maps = {
        "probabilities": mean,
        "bmap": bayesian_map(stack.std(dim=0, correction=1)),
        "emap": predictive_entropy(mean),
    }
    return {key: MetaTensor(value, meta=getattr(preds[0], "meta", None)) for key, value in maps.items()}


class UncertaintyEnsemble(AlgoEnsembleBestByFold):
    """The best algorithm of each fold: mean of their probabilities, and their standard deviation as a b-map.

    Folds that have no trained algorithm are left out. Where the segmentations are saved (``image_save_func``), the
    maps are saved beside them, as ``bayesian``.

    Args:
        n_fold: number of folds.

    Example::

        builder = AlgoEnsembleBuilder(import_bundle_algo_history(work_dir), f"{work_dir}/input.yaml")
        builder.set_ensemble_method(UncertaintyEnsemble(n_fold=4))
        save = {"_target_": "SaveImage", "output_dir": "out"}
        builder.get_ensemble()({"infer_files": scans, "image_save_func": save})  # or the datalist's "testing"
    """

    def __init__(self, n_fold: int = 5) -> None:
        super().__init__(n_fold)
        self.save_map = None

    def collect_algos(self) -> None:
        """Choose the members.

        Raises:
            ValueError: if there are fewer than two.
        """
        super().collect_algos()
        self.algo_ensemble = [member for member in self.algo_ensemble if member is not None]
        if len(self.algo_ensemble) < 2:
            raise ValueError(f"An ensemble needs two trained folds or more, got {len(self.algo_ensemble)}.")

    def inferers(self, **settings: Any) -> dict[str, Any]:
        """The members' :class:`~cardiac_qc_plugin.auto3dseg.FoldInferer`, by name."""
        return {member[AlgoKeys.ID]: member[AlgoKeys.ALGO].get_inferer(**settings) for member in self.algo_ensemble}

    def ensemble_pred(self, preds: Sequence[torch.Tensor], sigmoid: bool = False) -> torch.Tensor:
        """Labels ``(1, ...)`` of the mean of the members' probabilities ``(C, ...)``; the map is saved.

        Raises:
            ValueError: for Auto3DSeg's other ways to combine members, which leave no probabilities.
        """
        if self.mode != "mean" or sigmoid:
            raise ValueError("This ensemble takes the mean of probabilities: leave mode and sigmoid as they are.")
        maps = ensemble_maps(preds)
        if self.save_map:
            self.save_map(maps["bmap"])
        return super().ensemble_pred([maps["probabilities"]])

    def __call__(self, pred_param: dict | None = None) -> list:
        """See :meth:`monai.apps.auto3dseg.AlgoEnsemble.__call__`."""
        save = (pred_param or {}).get("image_save_func")
        if save:
            save = {**save, "output_postfix": "bayesian", "output_dtype": np.float32}
        self.save_map = ConfigParser(save).get_parsed_content() if save else None
        return super().__call__(pred_param)
