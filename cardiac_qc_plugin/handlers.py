"""Metrics that the bundles' validation shows and saves, for ignite engines, where MONAI has none that fits."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from ignite.metrics import Metric
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric, do_metric_reduction
from monai.utils import convert_to_numpy

from .metrics.detection import VolumeDetection, region_average_precision
from .metrics.segmentation import dice_and_hausdorff
from .transforms.regions import crop_box
from .transforms.spatial import spacing_of
from .workflows.operating_point import volume_detection

__all__ = ["HausdorffDistance", "RegionAveragePrecision"]


class StructureHausdorff(CumulativeIterationMetric):
    """Distances of one volume, from one-hot ``(1, C, H, W, D)`` tensors; the reference carries the affine."""

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        prediction, reference = (convert_to_numpy(onehot[0].argmax(dim=0)) for onehot in (y_pred, y))
        scores = dice_and_hausdorff(prediction, reference, spacing_of(y))
        return torch.tensor([[score.hausdorff for score in scores.values()]])

    def aggregate(self) -> torch.Tensor:
        return do_metric_reduction(self.get_buffer(), "mean")[0]


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


class RegionAveragePrecision(Metric):
    """Average precision of a detector's regions; what it saw is kept to choose or to judge an operating point.

    Args:
        region_size: edge of a region in pixels.
        min_size: smallest edge of the detector's crop in pixels.
        output_transform: gives, for each volume, the painted failure probabilities ``(1, H, W, D)``, the detector's
            input ``(3, H, W, D)``, whose last channel is the automatic segmentation, and the failures
            ``(1, H, W, D)``.

    Attributes:
        volumes: a :class:`~cardiac_qc_plugin.metrics.VolumeDetection` for each; of all processes after ``compute``.

    The value is NaN where no region fails.
    """

    def __init__(self, region_size: int = 8, min_size: int = 80, output_transform: Callable = lambda x: x) -> None:
        self.region_size = region_size
        self.min_size = min_size
        self.volumes: list[VolumeDetection] = []
        super().__init__(output_transform, skip_unrolling=True)  # ignite would take single volumes for batches

    def reset(self) -> None:
        self.volumes = []

    def update(self, output: Iterable[Iterable[Any]]) -> None:
        for painted, inputs, failures in zip(*output, strict=True):
            labels = convert_to_numpy(inputs)[2]
            boxes = [crop_box(labels[..., z], self.region_size, self.min_size) for z in range(labels.shape[2])]
            probability, failing = convert_to_numpy(painted)[0], convert_to_numpy(failures)[0]
            self.volumes.append(volume_detection(probability, failing, boxes, self.region_size))

    def compute(self) -> float:
        if dist.is_available() and dist.is_initialized():
            gathered: list[list[VolumeDetection]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, self.volumes)
            self.volumes = [volume for volumes in gathered for volume in volumes]
        return region_average_precision(self.volumes)
