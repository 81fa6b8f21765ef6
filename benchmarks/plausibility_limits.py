"""What is normal, measured on ACDC's references: the numbers in `cardiac_qc_plugin.metrics.plausibility.LIMITS`.

    python benchmarks/plausibility_limits.py --data ACDC/training

Prints the percentile of concavity, of jumps and of the gap between RV and LVM, and 100 minus it of circularity, over
the slices of the reference segmentations of the training folds (1-3 of the bundles' ``acdc_folds.json``), and how many
references are plausible by these limits.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cardiac_qc_plugin.metrics import plausibility as p
from cardiac_qc_plugin.workflows.references import read_labels

FOLDS = Path(__file__).parents[1] / "bundles" / "cardiac_drn_segmentation" / "configs" / "acdc_folds.json"


def measure(labels: np.ndarray, spacing: tuple[float, float, float]) -> dict[str, list[float]]:
    """Every value that a limit is set for, in one volume."""
    values = {name: list(changes.values()) for name, changes in p.stack_changes(labels, spacing).items()}
    heart = np.flatnonzero((labels >= p.LVM).any(axis=(0, 1)))
    for z in range(labels.shape[2]):
        gaps = [pixels * spacing[0] * spacing[1] for name, pixels in p.enclosed(labels[..., z]) if name == "gap_RV_LVM"]
        values.setdefault("gap_RV_LVM", []).append(max(gaps, default=0))
    for z in range(heart[0] + 1, heart[-1]):
        for structure, mask in p._outlines(labels[..., z]).items():
            if np.count_nonzero(mask) >= p.SMALLEST:
                shape = p.shape_of(mask, spacing[:2])
                values.setdefault(f"concavity_{structure}", []).append(shape["concavity"])
                if structure != "RV":
                    values.setdefault(f"circularity_{structure}", []).append(shape["circularity"])
    return values


def main(data: Path, percentile: float) -> None:
    items = json.loads(FOLDS.read_text())["training"]
    volumes = [(item["fold"], read_labels(data / item["label"])) for item in items]
    pooled: dict[str, list[float]] = {}
    for fold, volume in volumes:
        if fold:
            for name, values in measure(volume.data, volume.spacing).items():
                pooled.setdefault(name, []).extend(values)
    for name, values in pooled.items():
        low = name.startswith("circularity")
        p.LIMITS[name] = round(float(np.percentile(values, 100 - percentile if low else percentile)), 3)
        print(f'    "{name}": {p.LIMITS[name]:g},  # {len(values)} slices, median {np.median(values):.3f}')
    for chosen in ("1-3", "0"):
        results = [p.plausibility(v.data, v.spacing) for fold, v in volumes if (fold == 0) == (chosen == "0")]
        print(f"folds {chosen}: {sum(not r.violations for r in results)} of {len(results)} references plausible")
        counts = {name: sum(len(r.violations.get(name, [])) for r in results) for name in p.CRITERIA}
        print(f"  slices by criterion: { ({name: count for name, count in counts.items() if count}) }")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="ACDC's training folder")
    parser.add_argument("--percentile", type=float, default=99.9)
    main(**vars(parser.parse_args()))
