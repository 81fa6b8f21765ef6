"""How far networks disagree about a scan, as the score that says which scan to look at first.

    python scripts/pipeline.py run --input SCANS --model drn --output drn      # the same for dn, unet
    python benchmarks/disagreement.py --predictions drn,unet,dn --reference ACDC/training

The networks have to be trained on other patients than these. Prints, for each run, how its own samples' disagreement
(`sample_disagreement` of `qc.json`) and the disagreement of the runs (1 - mean pairwise Dice of their segmentations)
order the scans by 1 - mean Dice, AURC and Pearson; then the same for the vote of the runs, three or more, in which the
first decides where all differ.
"""

import argparse
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cardiac_qc_plugin.data.predictions import SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.detection import aurc
from cardiac_qc_plugin.metrics.segmentation import dice_and_hausdorff
from cardiac_qc_plugin.metrics.statistics import pearson
from cardiac_qc_plugin.workflows.files import read_json
from cardiac_qc_plugin.workflows.references import References, each_case, read_labels, read_reference


def vote(labels: list[np.ndarray]) -> np.ndarray:
    """The label of most; the first one's where none has more votes than another."""
    counts = np.stack([sum(one == value for one in labels) for value in range(4)])
    first = np.take_along_axis(counts, labels[0][None].astype(int), axis=0)[0]
    return np.where(first == counts.max(axis=0), labels[0], counts.argmax(axis=0)).astype(np.uint8)


def mean_dice(labels: np.ndarray, other: np.ndarray, spacing: tuple[float, float, float]) -> float:
    """Over the structures that one of the two has."""
    return float(np.nanmean([score.dice for score in dice_and_hausdorff(labels, other, spacing).values()]))


def measure(runs: list[Path], references: References, case: str, folder: Path) -> dict[str, float]:
    """Risks (1 - mean Dice) and scores of one scan."""
    volumes = [read_labels(run / case / SEGMENTATION_FILE) for run in runs]
    spacing, labels = volumes[0].spacing, [volume.data for volume in volumes]
    reference = read_reference(references.find(case, folder), volumes[0])
    row = {"runs": 1 - float(np.mean([mean_dice(a, b, spacing) for a, b in combinations(labels, 2)]))}
    for run, own in zip(runs, labels, strict=True):
        row[f"risk {run}"] = 1 - mean_dice(own, reference, spacing)
        row[f"samples {run}"] = read_json(run / case / "qc.json")["scores"]["sample_disagreement"]
    row["all samples"] = float(np.mean([row[f"samples {run}"] for run in runs]))
    if len(runs) > 2:
        row["risk vote"] = 1 - mean_dice(vote(labels), reference, spacing)
    return row


def columns(runs: list[Path], reference: Path, measure: Callable[..., dict[str, Any]]) -> dict[str, np.ndarray]:
    """What ``measure(runs, references, case, folder)`` says of each scan of the first run, by entry."""
    references = References(reference)
    rows, failures = each_case(runs[0], lambda case, folder: measure(runs, references, case, folder), "scans")
    if failures:
        raise SystemExit("\n".join(f"{case}: {message}" for case, message in failures.items()))
    return {name: np.array([row[name] for row in rows.values()]) for name in next(iter(rows.values()))}


def main(runs: list[Path], reference: Path) -> None:
    column = columns(runs, reference, measure)
    print(f"{len(column['runs'])} scans\n{'segmentation':16} {'Dice':>7} {'score':20} {'AURC':>7} {'Pearson':>8}")
    for name in [*map(str, runs), "vote"][: len(runs) + (len(runs) > 2)]:
        risk = column[f"risk {name}"]
        scores = {"its samples": column.get(f"samples {name}"), "the runs": column["runs"]}
        scores |= {"all runs' samples": column["all samples"], "oracle": risk}
        for score, values in scores.items():
            if values is not None:
                figures = f"{aurc(values, risk):7.4f} {pearson(values, risk):8.3f}"
                print(f"{name:16} {1 - risk.mean():7.4f} {score:20} {figures}")
        print(f"{name:16} {1 - risk.mean():7.4f} {'random (expected)':20} {risk.mean():7.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", required=True, help="output folders of runs over the same scans, with commas")
    parser.add_argument("--reference", type=Path, required=True, help="folder with the reference labels")
    arguments = parser.parse_args()
    main([Path(run) for run in arguments.predictions.split(",")], arguments.reference)
