"""How urgent a scan is, by how far its samples disagree or how many of its regions are expected to have failed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["scores", "urgencies"]


def scores(segmentation: Mapping[str, Any], detection: Mapping[str, Any]) -> dict[str, float]:
    """How urgent a scan is; higher is more urgent.

    ``sample_disagreement`` is 1 - the mean pairwise Dice of the samples over the structures, 0 for a structure that no
    sample found; it needs two samples or more, and orders the worklist where it exists. ``region_failure`` is the
    expected number of failing regions.

    Args:
        segmentation, detection: entries of a case's ``qc.json``.
    """
    agreement = [value or 0.0 for value in segmentation["pairwise_dice"].values()]
    result = {"region_failure": detection["expected_failing_regions"]}
    if segmentation["samples"] > 1:
        result["sample_disagreement"] = 1.0 - float(np.mean(agreement))
    return {**result, "urgency": result.get("sample_disagreement", result["region_failure"])}


def urgencies(scans: Sequence[Mapping[str, float]]) -> list[float]:
    """Urgencies of scans in one unit, from the `scores` of each.

    Where only some were sampled, by the expected number of failing regions. Scans without scores come last.
    """
    sampled = all("sample_disagreement" in scan for scan in scans if scan)
    return [scan.get("sample_disagreement" if sampled else "region_failure", -np.inf) for scan in scans]
