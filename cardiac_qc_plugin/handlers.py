"""Handlers of ignite engines for the bundles' training and validation, where MONAI has none that fits."""

from collections.abc import Callable

import torch
from ignite.engine import Engine
from monai.engines import IterationEvents
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric, do_metric_reduction
from monai.utils import convert_to_numpy

from .metrics.segmentation import dice_and_hausdorff
from .transforms.spatial import spacing_of

__all__ = ["GradientClipping", "HausdorffDistance"]


class GradientClipping:
    """Shrink the gradient to a largest norm before each step of a :class:`monai.engines.SupervisedTrainer`.

    For a trainer without MONAI's ``amp``, which scales gradients.

    Args:
        max_norm: largest Euclidean norm of the gradient of all parameters together.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.max_norm)


class StructureHausdorff(CumulativeIterationMetric):
    """Distances of one volume, from one-hot ``(1, C, H, W, D)`` tensors; the reference carries the affine."""

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        prediction, reference = (convert_to_numpy(onehot[0].argmax(dim=0)) for onehot in (y_pred, y))
        scores = dice_and_hausdorff(prediction, reference, spacing_of(y))
        return torch.tensor([[score.hausdorff for score in scores.values()]])

    def aggregate(self) -> torch.Tensor:
        distances = self.get_buffer()
        if not distances.isfinite().any():  # whose mean MONAI takes for 0, a perfect one
            return torch.tensor(torch.nan)
        return do_metric_reduction(distances, "mean")[0]


class HausdorffDistance(IgniteMetricHandler):
    """3-D Hausdorff distance in mm of each structure, with the voxel size of the reference's affine.

    MONAI's handler of this name measures in voxels. A structure that only one of the two has is NaN and left out of
    the mean: :class:`monai.handlers.MetricsSaver` counts the others as ``notnans``.

    Args:
        output_transform: gives lists of predictions and references, one-hot ``(C, H, W, D)``, slices last.

    The details are ``(N, 3)``: RV, LVM and LV of each volume.
    """

    def __init__(self, output_transform: Callable = lambda x: x) -> None:
        super().__init__(metric_fn=StructureHausdorff(), output_transform=output_transform)
