"""One case measured against the reference labels (paper, section IV)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from cardiac_qc_plugin.data.predictions import MAP_FILES, PROBABILITY_FILE, SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.calibration import RiskCoverage, voxel_risk_coverage
from cardiac_qc_plugin.metrics.clinical import structure_volumes
from cardiac_qc_plugin.metrics.detection import VolumeDetection
from cardiac_qc_plugin.metrics.plausibility import Plausibility, plausibility
from cardiac_qc_plugin.metrics.segmentation import StructureScore, dice_and_hausdorff
from cardiac_qc_plugin.transforms.failure_labels import failure_mask
from cardiac_qc_plugin.workflows.files import Volume, read_json, read_like
from cardiac_qc_plugin.workflows.operating_point import volume_detection
from cardiac_qc_plugin.workflows.references import References, patient_and_phase, read_labels, read_reference

__all__ = ["CRITERIA", "STRUCTURES", "Measurement", "measure_case", "read_detection", "read_map"]

STRUCTURES = ("LV", "RV", "LVM")  # the paper's column order
CRITERIA = ("paper", "released_code")


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was measured on one case; what a folder without maps or detection does not allow is left empty.

    Attributes:
        case: its name.
        patient: whose scan it is.
        phase: "ED", "ES" or "unknown".
        scores: Dice and Hausdorff distance by structure.
        volume_ml: volumes of the segmentation by structure.
        reference_volume_ml: volumes of the reference by structure.
        threshold: operating point that the detection was run with.
        detection: regions beside the failures in them, by failure criterion.
        coverage: risk-coverage curve by uncertainty map.
        scan_scores: scores of the scan as a whole, higher is more urgent; nan where undefined.
        sample_volume_ml: volumes of the segmentation's Monte Carlo samples by structure.
        plausibility: criteria that the segmentation violates.
        reference_plausibility: those that the reference violates.
    """

    case: str
    patient: str
    phase: str
    scores: dict[str, StructureScore]
    volume_ml: dict[str, float]
    reference_volume_ml: dict[str, float]
    threshold: float | None
    detection: dict[str, VolumeDetection]
    coverage: dict[str, RiskCoverage]
    scan_scores: dict[str, float]
    sample_volume_ml: dict[str, list[float]]
    plausibility: Plausibility
    reference_plausibility: Plausibility

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the structures that segmentation or reference has."""
        return float(np.nanmean([score.dice for score in self.scores.values()]))

    def row(self, criterion: str) -> dict[str, Any]:
        """The case's line in a table; detection by one failure criterion."""
        row = {"case": self.case, "patient": self.patient, "phase": self.phase, "mean_dice": self.mean_dice}
        for name in STRUCTURES:
            score = self.scores[name]
            row |= {
                f"dice_{name}": score.dice,
                f"hausdorff_mm_{name}": score.hausdorff,
                f"hausdorff_penalized_mm_{name}": score.hausdorff_penalized,
                f"missing_{name}": int(score.missing),
                f"volume_ml_{name}": self.volume_ml[name],
                f"reference_volume_ml_{name}": self.reference_volume_ml[name],
            }
        row |= {
            "implausible_slices": len(self.plausibility.implausible_slices),
            "violations": self.plausibility.count,
        }
        if criterion in self.detection:
            found = self.detection[criterion]
            row |= {
                "regions": found.probability.size,
                "regions_flagged": int((found.probability >= self.threshold).sum()),
                "regions_failing": int((found.failure_voxels > 0).sum()),
                "slices": found.slice_failing.size,
                "slices_flagged": int((found.slice_probability >= self.threshold).sum()),
                "slices_failing": int(found.slice_failing.sum()),
            }
        return row | {f"score_{name}": value for name, value in self.scan_scores.items()}


def measure_case(case: str, folder: Path, references: References, apex: str = "last") -> Measurement:
    """Measure one case: its segmentation, and the detection and the maps as far as the folder has them.

    Args:
        case: its name, by which the reference is found.
        folder: with ``segmentation.nii.gz``; maps, failure probability and ``qc.json`` may be missing.
        references: where to look for the reference.
        apex: end of the slice axis at which the apex lies, "last" or "first".

    Raises:
        ValueError: a file is missing, damaged or does not fit the others; the message names it.
    """
    reference_path = references.find(case, folder)
    patient, phase = patient_and_phase(case, reference_path)
    segmentation = read_labels(folder / SEGMENTATION_FILE)
    reference = read_reference(reference_path, segmentation)
    qc_path = folder / "qc.json"
    qc = read_json(qc_path) if qc_path.is_file() else {}
    sampled = qc.get("segmentation", {}).get("samples", 2) > 1  # else the b-map is 0 everywhere, and measures nothing
    files = {name: folder / file for name, file in MAP_FILES.items() if sampled or name != "bmap"}
    maps = {name: read_map(path, segmentation) for name, path in files.items() if path.is_file()}
    threshold, detection = None, {}
    if "detection" in qc and (folder / PROBABILITY_FILE).is_file():
        threshold = qc["detection"].get("threshold")
        detection = read_detection(qc_path, qc["detection"], segmentation, reference, apex)
    return Measurement(
        case=case,
        patient=patient,
        phase=phase,
        scores=dice_and_hausdorff(segmentation.data, reference, segmentation.spacing),
        volume_ml=structure_volumes(segmentation.data, segmentation.spacing),
        reference_volume_ml=structure_volumes(reference, segmentation.spacing),
        threshold=threshold,
        detection=detection,
        coverage={n: voxel_risk_coverage(segmentation.data, reference, values) for n, values in maps.items()},
        scan_scores=_scan_scores(qc, maps, segmentation.data),
        sample_volume_ml=qc.get("segmentation", {}).get("sample_volume_ml", {}),
        plausibility=plausibility(segmentation.data, segmentation.spacing),
        reference_plausibility=plausibility(reference, segmentation.spacing),
    )


def read_map(path: Path, segmentation: Volume) -> np.ndarray:
    """An uncertainty map, or the failure probability, of a segmentation.

    Raises:
        ValueError: as `read_like`, or if a voxel is not finite; the message names the file.
    """
    values = read_like(path, segmentation)
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise ValueError(f"{path}: {bad} voxel(s) not finite. Run this case again.")
    return values


def read_detection(
    qc_path: Path,
    settings: dict[str, Any],
    segmentation: Volume,
    reference: np.ndarray,
    apex: str,
    criteria: Sequence[str] = CRITERIA,
) -> dict[str, VolumeDetection]:
    """The detector's regions beside the failures of each criterion.

    Args:
        qc_path: the case's ``qc.json``; the failure probability lies beside it.
        settings: its entry ``detection``.
        segmentation: the automatic labels.
        reference: the reference labels, (H, W, D).
        apex: end of the slice axis at which the apex lies, "last" or "first".
        criteria: presets of the failure criterion.

    Raises:
        ValueError: the settings are not complete, or the probability does not fit; the message names the file.
    """
    missing = [key for key in ("threshold", "boxes", "region_size") if settings.get(key) is None]
    if missing or len(settings["boxes"]) != segmentation.data.shape[2]:
        raise ValueError(
            f"{qc_path}: 'detection' needs threshold, region_size and one of boxes for each of the "
            f"{segmentation.data.shape[2]} slices; missing: {missing or 'boxes'}. Run this case again."
        )
    painted = read_map(qc_path.with_name(PROBABILITY_FILE), segmentation)
    failures = {
        name: failure_mask(segmentation.data, reference, segmentation.spacing[:2], name, apex) for name in criteria
    }
    try:
        return {
            name: volume_detection(painted, mask, settings["boxes"], settings["region_size"])
            for name, mask in failures.items()
        }
    except ValueError as error:
        raise ValueError(f"{qc_path}: boxes or probabilities are wrong ({error})") from error


def _scan_scores(qc: dict[str, Any], maps: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """The scores in ``qc.json``, and each map's mean over the segmentation's box (all, if it is empty)."""
    scores = {name: np.nan if value is None else float(value) for name, value in qc.get("scores", {}).items()}
    box = ndimage.find_objects((labels > 0).astype(np.int8))
    return scores | {f"mean_{name}": float(values[box[0] if box else ...].mean()) for name, values in maps.items()}
