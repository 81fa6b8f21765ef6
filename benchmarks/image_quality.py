"""What worse images do to the segmentation, and whether its failures are still found.

    python benchmarks/image_quality.py degrade --datalist folds.json --root ACDC/training --fold 0 --output WORSE
    for kind in original noise bias blur contrast motion; do
        python scripts/pipeline.py run --input WORSE/$kind --output OUT/$kind
    done
    python benchmarks/image_quality.py measure --predictions OUT --reference ACDC/training

`degrade` writes the scans of a fold once as they are and once for each kind of degradation. `measure` prints, for each
folder of `OUT`: mean Dice; the share of regions that fail; the average precision of the detector's regions, beside
that of the uncertainty map's mean in a region; what the run's operating point flags and finds; how many of the failures
the threshold of `--catch 0.9` finds, which was calibrated on scans that are as ACDC has them, and with how many
regions of a patient; and how the worklist's score orders the scans by 1 - mean Dice (AURC, Pearson). The last line is
for the scans of all folders in one worklist.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from disagreement import mean_dice
from monai.transforms import AdjustContrast, GibbsNoise, RandBiasField, RandRicianNoise
from sklearn.metrics import average_precision_score

from cardiac_qc_plugin.checkpoints import calibration_file, detector_file
from cardiac_qc_plugin.data.inputs import find_scans
from cardiac_qc_plugin.data.predictions import SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.detection import aurc
from cardiac_qc_plugin.metrics.statistics import pearson
from cardiac_qc_plugin.workflows.calibrate import read_calibration, read_patients
from cardiac_qc_plugin.workflows.effort import read_case
from cardiac_qc_plugin.workflows.files import read_json, read_volume, write_like
from cardiac_qc_plugin.workflows.references import References, each_case, read_labels, read_reference

MOVED = 6.0  # mm between two positions
CATCH = 0.9


def noise(scan: np.ndarray, spacing: tuple[float, ...], seed: int) -> np.ndarray:
    """Rician noise of 6 % of the brightest intensity: a weak signal."""
    return RandRicianNoise(prob=1, std=0.06, sample_std=False).set_random_state(seed)(scan[None])[0]


def bias(scan: np.ndarray, spacing: tuple[float, ...], seed: int) -> np.ndarray:
    """Intensities that change smoothly, over the middle of the field of view by a factor of 3 to 24: a coil's place."""
    return RandBiasField(degree=3, coeff_range=(-0.8, 0.8), prob=1).set_random_state(seed)(scan[None])[0]


def blur(scan: np.ndarray, spacing: tuple[float, ...], seed: int) -> np.ndarray:
    """The middle third of each slice's k-space alone: a third of the resolution, and ringing."""
    return np.stack([GibbsNoise(alpha=0.75)(scan[None, ..., z])[0] for z in range(scan.shape[2])], axis=-1)


def contrast(scan: np.ndarray, spacing: tuple[float, ...], seed: int) -> np.ndarray:
    """Gamma of 2: the blood is as bright as it was, the myocardium darker."""
    return AdjustContrast(2.0)(scan[None])[0]


def motion(scan: np.ndarray, spacing: tuple[float, ...], seed: int) -> np.ndarray:
    """Every other line of k-space from a body that moved, in a third of the slices: a breath-hold that failed."""
    result, shift = scan.copy(), round(MOVED / spacing[0])
    for z in np.random.default_rng(seed).permutation(scan.shape[2])[: scan.shape[2] // 3]:
        lines, moved = np.fft.fft2(scan[..., z]), np.fft.fft2(np.roll(scan[..., z], shift, axis=0))
        late = np.fft.fftfreq(len(lines), 1 / len(lines)).round() % 2 == 1
        lines[late] = moved[late]
        result[..., z] = np.abs(np.fft.ifft2(lines))
    return result


KINDS = {function.__name__: function for function in (noise, bias, blur, contrast, motion)}


def degrade(datalist: Path, root: Path, fold: int, output: Path) -> None:
    for number, scan in enumerate(find_scans(datalist, root, fold)):
        volume = read_volume(scan.path)
        top = float(np.percentile(volume.data, 99.9))
        scaled = np.clip(volume.data.astype(np.float32) / top, 0, 1)
        for kind, function in {"original": lambda scan, *_: scan, **KINDS}.items():
            worse = np.asarray(function(scaled, volume.spacing, number))
            folder = output / kind / scan.path.parent.name
            write_like(folder / scan.path.name, np.clip(1000 * worse, 0, 4000).round().astype(np.int16), volume)
            shutil.copy(scan.path.parent / "Info.cfg", folder)


def read_run(folder: Path, references: References) -> list[dict]:
    """What is measured of each scan."""

    def read(case: str, own: Path) -> dict:
        segmentation, qc = read_labels(own / SEGMENTATION_FILE), read_json(own / "qc.json")
        reference = read_reference(references.find(case, own), segmentation)
        return {
            "regions": read_case(case, own, references, "paper", "last"),
            "risk": 1 - mean_dice(segmentation.data, reference, segmentation.spacing),
            "urgency": qc["scores"]["urgency"],
            "threshold": qc["detection"]["threshold"],
        }

    rows, failures = each_case(folder, read, folder.name)
    if failures:
        raise SystemExit("\n".join(f"{case}: {message}" for case, message in failures.items()))
    return list(rows.values())


def describe(rows: list[dict]) -> list[str]:
    """Figures of some scans: those of a folder, or all."""
    cases = [row["regions"] for row in rows]
    failing = np.concatenate([case.failure_voxels for case in cases]) > 0
    every = {name: np.concatenate([case.scores[name] for case in cases]) for name in ("detector", "uncertainty")}
    flagged = np.concatenate([row["regions"].scores["detector"] >= row["threshold"] for row in rows])
    found = [
        case.failure_voxels[case.scores["detector"] >= row["threshold"]].sum() / case.n_failure_voxels
        for case, row in zip(cases, rows, strict=True)
        if case.n_failure_voxels
    ]
    risk, urgency = (np.array([row[name] for row in rows]) for name in ("risk", "urgency"))
    return [
        f"{1 - risk.mean():.3f}",
        f"{failing.mean():.1%}",
        *(f"{average_precision_score(failing, scores):.1%}" for scores in every.values()),
        *(f"{share:.1%}" for share in (flagged.mean(), failing[flagged].mean(), np.mean(found))),
        f"{aurc(urgency, risk):.3f}",
        f"{pearson(urgency, risk):.2f}",
    ]


def promised(folder: Path, references: References, models: Path) -> list[str]:
    """Mean share of a patient's failures that the promised threshold catches, and regions of a patient."""
    own, _ = read_patients(folder, references, folder.name, "paper", "last")
    calibration = read_calibration(calibration_file(models / detector_file(own.model, own.map), own.turns))
    index = int(np.searchsorted(own.threshold, calibration.promise_catch(CATCH).threshold))
    caught, regions = own.caught[:, index], own.regions[:, index]
    return [f"{caught.mean():.1%} ± {caught.std(ddof=1):.1%}", f"{regions.mean():.0f}"]


def measure(predictions: Path, reference: Path, models: Path) -> None:
    references = References(reference)
    folders = [predictions / kind for kind in ("original", *KINDS) if (predictions / kind).is_dir()]
    columns = ["scans", "n", "Dice", "failing", "AP", "AP of map", "flagged", "of them failing", "found", "AURC", "r"]
    print(" | ".join([*columns, f"caught by --catch {CATCH}", "regions"]))
    rows = {folder.name: read_run(folder, references) for folder in folders}
    for folder in folders:
        own = rows[folder.name]
        print(" | ".join([folder.name, str(len(own)), *describe(own), *promised(folder, references, models)]))
    together = [row for own in rows.values() for row in own]
    print(" | ".join(["all", str(len(together)), *describe(together)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("degrade")
    first.add_argument("--datalist", type=Path, required=True, help="MONAI datalist with folds")
    first.add_argument("--root", type=Path, required=True, help="folder that its paths are relative to")
    first.add_argument("--fold", type=int, default=0, help="fold whose scans are taken")
    first.add_argument("--output", type=Path, required=True)
    second = commands.add_parser("measure")
    second.add_argument("--predictions", type=Path, required=True, help="folder of the runs, one for each kind")
    second.add_argument("--reference", type=Path, required=True, help="folder of reference labels")
    beside = Path(__file__).parent.parent / "bundles" / "cardiac_segmentation_failure" / "models"
    second.add_argument("--models", type=Path, default=beside, help="folder of the detectors and their calibrations")
    a = parser.parse_args()
    if a.command == "degrade":
        degrade(a.datalist, a.root, a.fold, a.output)
    else:
        measure(a.predictions, a.reference, a.models)
