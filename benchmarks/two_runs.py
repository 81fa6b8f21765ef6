"""What a setting changes: two runs over the same scans, compared scan by scan.

    python scripts/pipeline.py run --input SCANS --output heart
    cp -r bundles whole_bundles    # and in their inference.json "region": "whole"
    python scripts/pipeline.py run --input SCANS --bundle_dir whole_bundles --output whole
    python benchmarks/two_runs.py --predictions heart,whole --reference ACDC/training

Prints the mean Dice coefficient of each structure in both runs; by how much a structure's changes in a scan; how many
of the heart's voxels (those that one of the two takes for heart) have another label; over these the correlation of the
b-maps and their mean difference; the regions that are flagged in each, and how far they are the same (the Dice
coefficient of their voxels); and whether the scans come in the same order of urgency.
"""

import argparse
from pathlib import Path

import numpy as np
from disagreement import columns
from scipy.stats import spearmanr

from cardiac_qc_plugin.data.predictions import MAP_FILES, REGIONS_FILE, SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.segmentation import dice_and_hausdorff
from cardiac_qc_plugin.workflows.files import read_json, read_like
from cardiac_qc_plugin.workflows.measure import STRUCTURES
from cardiac_qc_plugin.workflows.references import References, read_labels, read_reference


def measure(runs: list[Path], references: References, case: str, folder: Path) -> dict[str, np.ndarray]:
    """What both runs make of one scan; entries for both are in the order of the runs."""
    volumes = [read_labels(run / case / SEGMENTATION_FILE) for run in runs]
    reference = read_reference(references.find(case, folder), volumes[0])
    scores = [dice_and_hausdorff(volume.data, reference, volume.spacing) for volume in volumes]
    first, second = (volume.data for volume in volumes)
    heart = (first > 0) | (second > 0)
    maps = [read_like(run / case / MAP_FILES["bmap"], volumes[0])[heart] for run in runs]
    qc = [read_json(run / case / "qc.json") for run in runs]
    flagged = [read_like(run / case / REGIONS_FILE, volumes[0]) > 0 for run in runs]
    return {
        "dice": np.array([[score[name].dice for name in STRUCTURES] for score in scores]),
        "voxels": np.array([(first != second).sum(), heart.sum()]),
        "correlation": np.corrcoef(*maps)[0, 1],
        "difference": np.abs(maps[0] - maps[1]).mean(),
        "mean": np.mean(maps),
        "regions": np.array([len(q["detection"]["regions"]) for q in qc]),
        "flagged": np.array([flagged[0].sum(), flagged[1].sum(), (flagged[0] & flagged[1]).sum()]),
        "urgency": np.array([q["scores"]["urgency"] for q in qc]),
    }


def main(runs: list[Path], reference: Path) -> None:
    column = columns(runs, reference, measure)
    print(f"{len(column['dice'])} scans\n{'Dice':28}" + "".join(f"{name:>9}" for name in (*STRUCTURES, "mean")))
    for run, dice in zip(runs, np.nanmean(column["dice"], axis=0), strict=True):
        print(f"{run!s:28}" + "".join(f"{value:9.4f}" for value in (*dice, dice.mean())))
    change = np.abs(np.diff(column["dice"], axis=1))
    print(f"change of a structure in a scan: mean {np.nanmean(change):.4f}, largest {np.nanmax(change):.4f}")
    other, heart = column["voxels"].sum(axis=0)
    print(f"voxels of the heart with another label: {other / heart:.2%}")
    correlation = column["correlation"]
    print(
        f"b-maps in the heart: correlation, mean {correlation.mean():.4f}, least {correlation.min():.4f}; "
        f"difference {column['difference'].mean():.4f}, where their mean is {column['mean'].mean():.4f}"
    )
    one, two, both = column["flagged"].sum(axis=0)
    print(
        "regions flagged: {} and {}".format(*column["regions"].sum(axis=0))
        + f"; voxels in both {2 * both / (one + two):.1%}"
    )
    print(f"order of the scans by urgency: Spearman {spearmanr(*column['urgency'].T).statistic:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", required=True, help="output folders of the two runs, separated by a comma")
    parser.add_argument("--reference", required=True, type=Path, help="folder of reference labels")
    a = parser.parse_args()
    runs = [Path(run) for run in a.predictions.split(",")]
    if len(runs) != 2:
        parser.error("--predictions takes two folders, separated by a comma")
    main(runs, a.reference)
