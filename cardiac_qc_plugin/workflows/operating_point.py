"""The threshold on a region's failure probability, chosen on validation patients."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cardiac_qc_plugin.metrics.detection import VolumeDetection, choose_threshold, operating_point
from cardiac_qc_plugin.transforms.regions import Box, crop_slice, read_regions, region_counts

from .files import write_json

__all__ = ["choose_operating_point", "volume_detection", "write_operating_point"]


def volume_detection(painted: np.ndarray, failures: np.ndarray, boxes: list[Box], region_size: int) -> VolumeDetection:
    """The detector's regions of one volume beside what is true in them.

    Args:
        painted: failure probability of each region on its pixels, (H, W, D).
        failures: nonzero at segmentation failures, (H, W, D).
        boxes: the detector's crop of each slice.
        region_size: edge of a region in pixels.
    """
    probability, counts, index, outside = [], [], [], []
    for z, box in enumerate(boxes):
        cells = read_regions(painted[..., z], box, region_size).ravel()
        inside = region_counts(crop_slice(failures[..., z], box), region_size).ravel()
        probability.append(cells)
        counts.append(inside)
        index.append(np.full(cells.size, z))
        outside.append(int(np.count_nonzero(failures[..., z]) - inside.sum()))
    return VolumeDetection(
        np.concatenate(probability), np.concatenate(counts), np.concatenate(index), np.array(outside)
    )


def choose_operating_point(volumes: Sequence[VolumeDetection], output: str | Path, beta: float = 2.0) -> float:
    """Choose the threshold with the largest F-beta over regions, and write it with its figures.

    Args:
        volumes: what the detector said of validation volumes.
        output: JSON file for the threshold and what it catches in these volumes.
        beta: weight of recall over precision; 2, since a missed failure costs more than a glance at a sound region.

    Returns:
        The threshold.
    """
    threshold = choose_threshold(volumes, beta=beta)
    figures = write_operating_point(volumes, threshold, output, beta=beta)
    logging.getLogger(__name__).info("Operating point %.3f on %d volumes: %s", threshold, len(volumes), figures)
    return threshold


def write_operating_point(
    volumes: Sequence[VolumeDetection], threshold: float, output: str | Path, **settings: float
) -> dict[str, float | None]:
    """Write what a threshold catches in volumes, as JSON, with the settings that it comes from; returns the figures."""
    figures = dataclasses.asdict(operating_point(volumes, threshold))
    finite = {key: None if isinstance(v, float) and np.isnan(v) else v for key, v in figures.items()}
    record = {"threshold": threshold, **settings, "n_volumes": len(volumes), "validation": finite}
    write_json(Path(output), record)
    return finite
