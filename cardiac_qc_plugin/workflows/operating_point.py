"""The threshold on a region's failure probability, chosen on validation patients."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cardiac_qc_plugin.metrics.detection import VolumeDetection, choose_threshold, operating_point
from cardiac_qc_plugin.transforms.regions import Box, crop_box, crop_slice, read_regions, region_counts

from .files import write_json

__all__ = ["choose_operating_point", "volume_detection"]


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


def choose_operating_point(
    network: nn.Module,
    dataset: Iterable[dict],
    inferer: Callable[[torch.Tensor, nn.Module], torch.Tensor],
    device: torch.device,
    output: str | Path,
    beta: float = 2.0,
) -> float:
    """Choose the threshold with the largest F-beta over regions, and write it with its figures.

    Args:
        network: the detection network.
        dataset: validation volumes with ``image`` (3, H, W, D), see
            :class:`~cardiac_qc_plugin.inferers.FailureRegionInferer`, and ``label`` (1, H, W, D), 1 at failures.
        inferer: gives the painted probabilities.
        device: where the network is.
        output: JSON file for the threshold and what it catches in these volumes.
        beta: weight of recall over precision; 2, since a missed failure costs more than a glance at a sound region.

    Returns:
        The threshold.
    """
    volumes = []
    for item in dataset:
        stack = torch.as_tensor(item["image"])[None].to(device)
        painted = inferer(stack, network)[0, 0].cpu().numpy()
        labels = stack[0, 2].cpu().numpy()
        boxes = [crop_box(labels[..., z], inferer.region_size, inferer.min_size) for z in range(labels.shape[2])]
        failures = np.asarray(item["label"])[0]
        volumes.append(volume_detection(painted, failures, boxes, inferer.region_size))
    threshold = choose_threshold(volumes, beta=beta)
    figures = dataclasses.asdict(operating_point(volumes, threshold))
    finite = {key: None if isinstance(v, float) and np.isnan(v) else v for key, v in figures.items()}
    write_json(Path(output), {"threshold": threshold, "beta": beta, "n_volumes": len(volumes), "validation": finite})
    logging.getLogger(__name__).info("Operating point %.3f on %d volumes: %s", threshold, len(volumes), finite)
    return threshold
