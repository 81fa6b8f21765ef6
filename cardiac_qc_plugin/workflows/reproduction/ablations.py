"""What the ablations vary (paper, V-B and VII), and the one that needs no network: the rules of failure labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cardiac_qc_plugin.data.predictions import SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.metrics.statistics import mean_sd
from cardiac_qc_plugin.transforms.failure_labels import FailureCriterion, failures_by_class

from ..files import write_rows
from ..references import References, each_case, read_labels, read_reference
from .stages import Budget, Stage

__all__ = ["CLUSTERS", "REGION_SIZES", "SAMPLES", "TOLERANCES", "sweep_labels"]

SAMPLES = (1, 3, 5, 7, 10, 20, 30, 60)  # Table V
REGION_SIZES = (4, 16)  # Fig. 7; 8 is the bundle's own
TOLERANCES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # Fig. 8, voxels
CLUSTERS = (1, 5, 10, 15, 20)  # V-B, voxels


def tolerance_shares(prediction: np.ndarray, reference: np.ndarray) -> list[dict[str, Any]]:
    """Share of a volume's errors that are failures, by tolerance, outside and inside the structures (Fig. 8).

    An error is counted for each structure that it is an error of. Errors that fail whatever their distance, above the
    base and below the apex, lie outside.

    Args:
        prediction: labels, (H, W, D).
        reference: labels, (H, W, D), not empty.

    Returns:
        A row for each tolerance and side; ``share`` is nan where the volume has no error on that side.
    """
    rows = []
    for tolerance in TOLERANCES:
        criterion = FailureCriterion(tolerance_outside=tolerance, tolerance_inside=tolerance)
        failures = failures_by_class(prediction, reference, criterion=criterion)
        for side in ("outside", "inside"):
            failing = errors = 0
            for label, mask in failures.items():
                target = reference == label
                place = target if side == "inside" else ~target
                failing += np.count_nonzero(mask & place)
                errors += np.count_nonzero(((prediction == label) ^ target) & place)
            rows.append({"tolerance": tolerance, "side": side, "share": failing / errors if errors else np.nan})
    return rows


def cluster_shares(prediction: np.ndarray, reference: np.ndarray) -> list[dict[str, Any]]:
    """Share of slices with a failure, and of errors that are failures, by the smallest cluster that counts (V-B)."""
    rows = []
    for size in CLUSTERS:
        masks = failures_by_class(prediction, reference, criterion=FailureCriterion(min_cluster=size))
        failing = np.logical_or.reduce(list(masks.values()))
        errors = sum(np.count_nonzero((prediction == label) ^ (reference == label)) for label in CLASS_NAMES)
        share = sum(map(np.count_nonzero, masks.values())) / errors if errors else np.nan
        rows.append({"min_cluster": size, "slices": failing.any(axis=(0, 1)).mean(), "share": share})
    return rows


def sweep_labels(maps: Sequence[Stage], reference: Path, stage: Stage, budget: Budget) -> None:
    """Write ``tolerance.csv`` and ``cluster.csv``: means over volumes.

    Args:
        maps: stages with the segmentations.
        reference: folder with the reference labels.
        stage: where to write.
        budget: not looked at; this takes seconds.

    Raises:
        ValueError: if a case cannot be measured; the message names it.
    """
    references = References(reference)

    def sweep(rules: Callable, case: str, folder: Path) -> list[dict[str, Any]]:
        segmentation = read_labels(folder / SEGMENTATION_FILE)
        return rules(segmentation.data, read_reference(references.find(case, folder), segmentation))

    for name, rules, values in (
        ("tolerance", tolerance_shares, ("share",)),
        ("cluster", cluster_shares, ("slices", "share")),
    ):
        rows = []
        for each in maps:
            cases, failures = each_case(each.folder, lambda case, folder, r=rules: sweep(r, case, folder), name)
            if failures:
                raise ValueError("; ".join(f"{case}: {message}" for case, message in failures.items()))
            rows += [row for own in cases.values() for row in own]
        write_rows(stage.folder / f"{name}.csv", means(rows, values))


def means(rows: list[dict[str, Any]], values: Sequence[str]) -> list[dict[str, Any]]:
    """Mean, standard deviation and number of volumes for rows that agree in all but the values."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple((k, v) for k, v in row.items() if k not in values), []).append(row)
    table = []
    for key, own in groups.items():
        spreads = {value: mean_sd([row[value] for row in own]) for value in values}
        table.append(dict(key) | {f"{v}_{k}": getattr(s, k) for v, s in spreads.items() for k in ("mean", "sd", "n")})
    return table
