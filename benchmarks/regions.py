"""How well a detector orders regions, beside the mean of the uncertainty map in a region, which needs no detector.

    python scripts/pipeline.py run --input SCANS --output OUT
    python benchmarks/regions.py --predictions OUT --reference ACDC/training [--flagged 0.03,0.05,0.084]

Prints the average precision of regions, all scans together, and, where so large a share of them is flagged, the share
of these that fail and the share of a scan's failure voxels in them (mean over scans with failures). Failures are those
of the criterion `paper`.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

from cardiac_qc_plugin.workflows.effort import read_case
from cardiac_qc_plugin.workflows.references import References, each_case


def main(predictions: Path, reference: Path, shares: list[float]) -> None:
    references = References(reference)
    rows, failures = each_case(
        predictions, lambda case, folder: read_case(case, folder, references, "paper", "last"), "scans"
    )
    if failures:
        raise SystemExit("\n".join(f"{case}: {message}" for case, message in failures.items()))
    cases = list(rows.values())
    failing = np.concatenate([case.failure_voxels for case in cases]) > 0
    print(f"{len(cases)} scans, {failing.size} regions, of which {failing.mean():.2%} fail")
    for name in ("detector", "uncertainty"):
        scores = [case.scores[name] for case in cases]
        every = np.concatenate(scores)
        print(f"{name}: average precision {average_precision_score(failing, every):.4f}")
        for share in shares:
            threshold = np.quantile(every, 1 - share)
            found = [
                case.failure_voxels[score >= threshold].sum() / case.n_failure_voxels
                for case, score in zip(cases, scores, strict=True)
                if case.n_failure_voxels
            ]
            flagged = every >= threshold
            precision = failing[flagged].mean()
            print(f"  {flagged.mean():6.2%} flagged: {precision:.1%} of them fail, {np.mean(found):.1%} found")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path, required=True, help="output folder of run")
    parser.add_argument("--reference", type=Path, required=True, help="folder with the reference labels")
    parser.add_argument("--flagged", default="0.03,0.05,0.084", help="shares of the regions, with commas")
    arguments = parser.parse_args()
    main(arguments.predictions, arguments.reference, [float(share) for share in arguments.flagged.split(",")])
