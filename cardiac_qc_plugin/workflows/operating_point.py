"""The threshold on a region's failure probability, chosen on validation patients."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from ignite.metrics import Metric
from monai.utils import convert_to_numpy

from cardiac_qc_plugin.metrics.detection import (
    VolumeDetection,
    choose_threshold,
    operating_point,
    region_average_precision,
)
from cardiac_qc_plugin.transforms.regions import MIN_SIZE, REGION_SIZE, Box, crop_boxes, region_grid

from .files import without_nan, write_json

__all__ = ["RegionAveragePrecision", "choose_operating_point", "volume_detection", "write_operating_point"]


def volume_detection(painted: np.ndarray, failures: np.ndarray, boxes: list[Box], region_size: int) -> VolumeDetection:
    """The detector's regions of one volume beside what is true in them.

    Args:
        painted: failure probability of each region on its pixels, (H, W, D).
        failures: nonzero at segmentation failures, (H, W, D).
        boxes: the detector's crop of each slice.
        region_size: edge of a region in pixels.
    """
    grid = region_grid(boxes, painted.shape, region_size)
    inside = grid.counts(failures)
    missed = np.count_nonzero(failures, axis=(0, 1)) - np.bincount(grid.slices, weights=inside).astype(int)
    return VolumeDetection(grid.read(painted), inside, grid.slices, missed)


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

    def __init__(
        self, region_size: int = REGION_SIZE, min_size: int = MIN_SIZE, output_transform: Callable = lambda x: x
    ) -> None:
        self.region_size = region_size
        self.min_size = min_size
        self.volumes: list[VolumeDetection] = []
        super().__init__(output_transform, skip_unrolling=True)  # ignite would take single volumes for batches

    def reset(self) -> None:
        self.volumes = []

    def update(self, output: Iterable[Iterable[Any]]) -> None:
        for painted, inputs, failures in zip(*output, strict=True):
            labels = convert_to_numpy(inputs)[2]
            boxes = crop_boxes(labels, self.region_size, self.min_size)
            probability, failing = convert_to_numpy(painted)[0], convert_to_numpy(failures)[0]
            self.volumes.append(volume_detection(probability, failing, boxes, self.region_size))

    def compute(self) -> float:
        if dist.is_available() and dist.is_initialized():
            gathered: list[list[VolumeDetection]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, self.volumes)
            self.volumes = [volume for volumes in gathered for volume in volumes]
        return region_average_precision(self.volumes)


def choose_operating_point(
    volumes: Sequence[VolumeDetection], output: str | Path, beta: float, region_size: int
) -> float:
    """Choose the threshold with the largest F-beta over regions, and write it with its figures.

    Warns of a detector whose order of the regions is no better than a random one: some trainings do not get going.

    Args:
        volumes: what the detector said of validation volumes.
        output: JSON file for the threshold and what it catches in these volumes.
        beta: weight of recall over precision; above 1 where a missed failure costs more than a look at a sound region.
        region_size: edge of a region in pixels, which is noted: :func:`~cardiac_qc_plugin.checkpoints.load_weights`
            refuses the weights beside it to a network of another.

    Returns:
        The threshold.

    Raises:
        ValueError: if no region fails. Then there is no file, as that of an earlier training is removed.
    """
    Path(output).unlink(missing_ok=True)
    threshold = choose_threshold(volumes, beta=beta)
    figures = write_operating_point(volumes, threshold, output, beta=beta, region_size=region_size)
    log = logging.getLogger(__name__)
    log.info("Operating point %.3f on %d volumes: %s", threshold, len(volumes), figures)
    precision, failing = region_average_precision(volumes), figures["regions_failing"]
    if precision <= failing:
        log.warning(
            "This detector has learned nothing: its regions' average precision on %d held-out volumes is %.3f, that of "
            "a random order %.3f. Train it again, with another seed or more iterations; do not use it.",
            len(volumes),
            precision,
            failing,
        )
    return threshold


def write_operating_point(
    volumes: Sequence[VolumeDetection], threshold: float, output: str | Path, **settings: float
) -> dict[str, float | None]:
    """Write what a threshold catches in volumes, as JSON, with the settings that it comes from; returns the figures."""
    figures = without_nan(dataclasses.asdict(operating_point(volumes, threshold)))
    record = {"threshold": threshold, **settings, "n_volumes": len(volumes), "validation": figures}
    write_json(Path(output), record)
    return figures
