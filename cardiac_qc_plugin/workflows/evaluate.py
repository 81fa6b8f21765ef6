"""Evaluation of predictions against reference labels: tables, curves and figures (paper, section VI)."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, astuple, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from monai.utils import ensure_tuple
from sklearn.metrics import auc

from cardiac_qc_plugin.data.predictions import CORRECTION_FILE, MAP_FILES, SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.clinical import ClinicalIndices, agreement, indices_of_volumes
from cardiac_qc_plugin.metrics.detection import (
    THRESHOLDS,
    RegionCurve,
    SlicePrecisionRecall,
    VolumeDetection,
    aurc,
    failing_slice_percentage,
    operating_point,
    patient_average_precision,
    pooled_average_precision,
    region_curve,
    slice_precision_recall,
)
from cardiac_qc_plugin.metrics.plausibility import CRITERIA as PLAUSIBILITY_CRITERIA
from cardiac_qc_plugin.metrics.plausibility import Plausibility
from cardiac_qc_plugin.metrics.segmentation import summarize
from cardiac_qc_plugin.metrics.statistics import (
    mann_whitney_u,
    mean_sd,
    paired_values,
    pearson,
    wilcoxon_signed_rank,
)
from cardiac_qc_plugin.reports.evaluation import draw_coverage, draw_regions, draw_slices, summary_text
from cardiac_qc_plugin.transforms.failure_labels import check_apex
from cardiac_qc_plugin.workflows.cine import index_intervals, named_indices
from cardiac_qc_plugin.workflows.correct import check_corrected_from
from cardiac_qc_plugin.workflows.files import check_output, write_file, write_rows
from cardiac_qc_plugin.workflows.measure import CRITERIA, STRUCTURES, Measurement, measure_case
from cardiac_qc_plugin.workflows.references import Outcome, References, each_case, told_by_volumes, write_summary

__all__ = ["evaluate"]

PHASES = ("ED", "ES", "unknown")
CURVES = ("regions", "slices", "risk_coverage")
# thresholds of curves that are drawn: many regions' probabilities are above the last of the released code's below 1
DRAWN = np.union1d(THRESHOLDS, 1 - np.geomspace(1e-6, 0.025, 24))
SOMETIMES = ("comparison.csv", "patients.csv", *(f"curves/{name}.csv" for name in CURVES))
SOMETIMES += tuple(f"figures/{name}.png" for name in CURVES)
Cases = Mapping[str, Measurement]
Patients = Mapping[str, tuple[ClinicalIndices, ClinicalIndices]]


def evaluate(
    predictions: str | Path | Sequence[str | Path],
    reference: str | Path,
    output: str | Path,
    compare: str | Path | Sequence[str | Path] | None = None,
    criterion: Literal["paper", "released_code"] = "paper",
    apex: Literal["last", "first"] = "last",
) -> Outcome:
    """Measure predictions against reference labels.

    Written to `output`: ``cases.csv``, ``summary.json``, ``summary.md``; ``patients.csv`` where both phases
    of a patient are known; ``curves/*.csv`` and ``figures/*.png`` where the predictions have detections and
    maps; ``comparison.csv`` with `compare`. Nothing is chosen on these cases: the operating point is the one
    that the detection was run with.

    Args:
        predictions: output folder of ``run``, or of ``correct`` (then of the segmentations only); or several such
            folders, the folds of a cross-validation, whose cases are measured together.
        reference: folder with the reference labels, see `References`.
        output: where to write.
        compare: a second folder (or folders) with the same cases, for instance the corrected ones: before and after.
        criterion: what a failure is in ``cases.csv`` and the figures; summary and curves have both presets.
        apex: end of the slice axis at which the apex lies.

    Returns:
        The content of ``summary.md``, and the cases that failed.

    Raises:
        ValueError: an unknown setting, a folder without cases or label files, or no measurable case.
        OSError: the output cannot be written.
    """
    check_apex(apex)
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is one of {CRITERIA}, got {criterion!r}.")
    output, measure = Path(output), partial(measure_case, references=References(reference), apex=apex)
    folders, others = (ensure_tuple(given) if given else () for given in (predictions, compare))
    check_output(output, "evaluate", *folders, *others, reference)
    cases, failures = _measure(folders, measure)
    patients = measure_patients(cases)
    summary = {
        "command": "evaluate",
        "settings": {"predictions": _listed(folders), "reference": str(reference), "criterion": criterion}
        | {"apex": apex, "compare": _listed(others) or None},
        **summarize_cases(cases.values(), patients),
    }
    if others:
        after, problems = _measure(others, measure)
        stale = _corrected_from_another(folders, others, cases.keys() & after.keys())
        after = {case: one for case, one in after.items() if case not in stale}
        problems |= stale
        unpaired = (cases.keys() ^ after.keys()) - failures.keys() - problems.keys()
        problems |= dict.fromkeys(sorted(unpaired), "in one of the two folders only, so not compared.")
        failures |= {f"{case} (compare)": problem for case, problem in problems.items()}
        summary["comparison"] = compare_cases(cases, after)
    summary["failed"] = failures
    for name in SOMETIMES:
        (output / name).unlink(missing_ok=True)  # of an earlier evaluation, maybe of other predictions
    if others:
        write_rows(output / "comparison.csv", _comparison_rows(summary["comparison"]["cells"]))
    write_rows(output / "cases.csv", [case.row(criterion) for case in cases.values()])
    write_rows(output / "patients.csv", _patient_rows(patients))
    write_curves(output, cases.values(), criterion)
    return write_summary(output, summary, summary_text)


def _measure(roots: Sequence[str | Path], measure: partial) -> tuple[dict[str, Measurement], dict[str, str]]:
    cases, failures = {}, {}
    for root in roots:
        own, problems = each_case(Path(root), measure, f"evaluate {Path(root).name}")
        if twice := (own | problems).keys() & (cases | failures).keys():
            raise ValueError(f"{root}: the case {min(twice)} is in another of the folders {_listed(roots)} as well.")
        volumes = {name: (case.phase, case.reference_volume_ml["LV"]) for name, case in own.items()}
        told = told_by_volumes(volumes, problems)
        own = {name: replace(case, phase=told.get(name, case.phase)) for name, case in own.items()}
        cases, failures = cases | own, failures | problems
    if not cases:
        listed = "\n".join(f"- {case}: {message}" for case, message in failures.items())
        raise ValueError(f"{_listed(roots)}: none of its {len(failures)} case(s) could be measured:\n{listed}")
    return cases, failures


def _corrected_from_another(
    before: Sequence[str | Path], after: Sequence[str | Path], cases: Set[str]
) -> dict[str, str]:
    """Why cases are not compared: their correction was made from another segmentation than that of `before`."""
    problems = {}
    for case in sorted(cases):
        first, second = (next(f for root in roots if (f := Path(root) / case).is_dir()) for roots in (before, after))
        record = second / CORRECTION_FILE
        if not record.is_file() or (first / CORRECTION_FILE).is_file():  # two runs, or two corrections
            continue
        try:
            check_corrected_from(record, first / SEGMENTATION_FILE)
        except ValueError as error:
            problems[case] = str(error)
    return problems


def _listed(roots: Sequence[str | Path]) -> str:
    return ", ".join(map(str, roots))


def measure_patients(cases: Cases) -> dict[str, tuple[ClinicalIndices, ClinicalIndices]]:
    """Clinical indices, automatic and reference, of the patients with both phases."""
    return {
        patient: (
            indices_of_volumes(ed.volume_ml, es.volume_ml),
            indices_of_volumes(ed.reference_volume_ml, es.reference_volume_ml),
        )
        for patient, (ed, es) in _pairs(cases.values()).items()
    }


def _pairs(cases: Iterable[Measurement]) -> dict[str, tuple[Measurement, Measurement]]:
    """End-diastole and end-systole of the patients that have both."""
    phases: dict[str, dict[str, Measurement]] = {}
    for case in cases:
        phases.setdefault(case.patient, {})[case.phase] = case
    return {patient: (own["ED"], own["ES"]) for patient, own in phases.items() if {"ED", "ES"} <= own.keys()}


def summarize_cases(cases: Iterable[Measurement], patients: Patients) -> dict[str, Any]:
    """Every table of the summary, without a comparison."""
    cases = list(cases)
    segmentation = summarize_segmentation(cases)
    six = [
        segmentation[phase][name]["dice"]["mean"]
        for phase in ("ED", "ES")
        if phase in segmentation
        for name in STRUCTURES
    ]
    return {
        "n_cases": len(cases),
        "n_patients": len(patients),
        "segmentation": segmentation,
        "mean_dice": {"mean": float(np.mean(six)) if six else np.nan, "cells": len(six)},
        "clinical": summarize_clinical(patients),
        "intervals": summarize_intervals(cases),
        "detection": summarize_detection([case for case in cases if case.detection]),
        "risk_coverage": summarize_coverage(cases),
        "scan_level": summarize_scans(cases),
        "plausibility": {
            "segmentations": summarize_plausibility([case.plausibility for case in cases]),
            "references": summarize_plausibility([case.reference_plausibility for case in cases]),
        },
    }


def summarize_segmentation(cases: Sequence[Measurement]) -> dict[str, dict[str, Any]]:
    """Dice and Hausdorff distance by phase and structure (Table I)."""
    return {
        phase: {name: asdict(summarize(case.scores[name] for case in own)) for name in STRUCTURES}
        for phase, own in _by_phase(cases).items()
    }


def summarize_clinical(patients: Patients) -> dict[str, dict[str, float]]:
    """Agreement of every clinical index with the reference (Table II)."""
    if not patients:
        return {}
    automatic, reference = (np.array([astuple(pair[side]) for pair in patients.values()]) for side in (0, 1))
    return {
        field.name: asdict(agreement(automatic[:, i], reference[:, i]))
        for i, field in enumerate(fields(ClinicalIndices))
    }


def summarize_intervals(cases: Iterable[Measurement]) -> dict[str, dict[str, float]]:
    """How often the 95 % interval of an index, from the samples, has the reference's value in it; its mean width."""
    inside: dict[str, list[tuple[bool, float]]] = {}
    for ed, es in _pairs(cases).values():
        automatic = named_indices(ed.volume_ml, es.volume_ml, None)
        reference = named_indices(ed.reference_volume_ml, es.reference_volume_ml, None)
        for name, (low, high) in index_intervals(automatic, ed.sample_volume_ml, es.sample_volume_ml).items():
            inside.setdefault(name, []).append((low <= reference[name] <= high, high - low))
    return {
        name: {"coverage": float(covered), "mean_width": float(width), "n": len(inside[name])}
        for name, (covered, width) in ((name, np.mean(pairs, axis=0)) for name, pairs in inside.items())
    }


def summarize_detection(cases: Sequence[Measurement]) -> dict[str, Any]:
    """Detection of failures by criterion, over all thresholds and at the operating point (Table III)."""
    if not cases:
        return {}
    thresholds = sorted({case.threshold for case in cases})
    return {
        "n_cases": len(cases),
        "thresholds": thresholds,
        "criteria": {criterion: _detection_by(criterion, cases) for criterion in CRITERIA},
    }


def _detection_by(criterion: str, cases: Sequence[Measurement]) -> dict[str, Any]:
    volumes = [case.detection[criterion] for case in cases]
    by_patient = patient_average_precision(volumes, [case.patient for case in cases])
    at_threshold = asdict(operating_point(_flagged(criterion, cases), threshold=1))
    del at_threshold["threshold"]
    return {
        "slices_failing_percent": failing_slice_percentage(volumes),
        "regions_failing_percent": 100 * float(np.mean([np.mean(v.failure_voxels > 0) for v in volumes])),
        "operating_point": at_threshold,
        "slice_average_precision": {
            "per_patient": asdict(by_patient.spread) | {"n_excluded": by_patient.n_excluded},
            "mean_curve": slice_precision_recall(volumes).average_precision,
            "pooled": pooled_average_precision(volumes),
        },
    }


def _flagged(criterion: str, cases: Iterable[Measurement]) -> list[VolumeDetection]:
    """Regions with probability 1 if flagged, else 0: folds of a cross-validation have a threshold each."""
    pairs = [(case.detection[criterion], case.threshold) for case in cases]
    return [replace(volume, probability=volume.probability >= threshold) for volume, threshold in pairs]


def summarize_coverage(cases: Sequence[Measurement]) -> dict[str, dict[str, Any]]:
    """Area under the voxels' risk-coverage curves by map and phase (Fig. 4).

    The area is the mean number of wrong voxels over coverages from 0 to 1. Divided by their number at full
    coverage it is 0.5 for a map without information; the best that a map can do, to refer all wrong voxels
    first, is half of their share of the voxels.
    """
    result: dict[str, dict[str, Any]] = {}
    for name in MAP_FILES:
        for phase, own in _by_phase(case for case in cases if name in case.coverage).items():
            curves = [case.coverage[name] for case in own]
            area = np.array([auc(curve.coverage, curve.risk) for curve in curves])
            errors, voxels = np.array([(curve.n_errors, curve.n_voxels) for curve in curves], dtype=float).T
            share = np.where(errors > 0, errors, np.nan)
            result.setdefault(name, {})[phase] = {
                "area": asdict(mean_sd(area)),
                "normalized_area": asdict(mean_sd(area / share)),
                "best_normalized_area": asdict(mean_sd(share / voxels / 2)),
                "errors": asdict(mean_sd(errors)),
                "errors_outside": asdict(mean_sd([curve.n_errors_outside for curve in curves])),
            }
    return result


def summarize_scans(cases: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    """How well each scan-level score puts the bad scans last; risk is 1 - mean Dice."""
    result = {}
    for name in dict.fromkeys(name for case in cases for name in case.scan_scores):
        scores = [case.scan_scores.get(name, np.nan) for case in cases]
        score, risk, n_excluded = paired_values(scores, [1 - case.mean_dice for case in cases])
        if score.size:
            result[name] = {
                "aurc": aurc(score, risk),
                "oracle": aurc(risk, risk),
                "random": float(risk.mean()),
            }
            result[name] |= {"pearson": pearson(score, risk), "n": score.size, "n_excluded": n_excluded}
    return result


def summarize_plausibility(results: Sequence[Plausibility]) -> dict[str, Any]:
    """Volumes and slices that violate any criterion, and slices that violate each."""
    return {
        "n_cases": len(results),
        "n_slices": sum(result.n_slices for result in results),
        "implausible_cases": sum(result.count > 0 for result in results),
        "implausible_slices": sum(len(result.implausible_slices) for result in results),
        "violations": sum(result.count for result in results),
        "criteria": {name: sum(len(r.violations.get(name, [])) for r in results) for name in PLAUSIBILITY_CRITERIA},
    }


def compare_cases(before: Cases, after: Cases) -> dict[str, Any]:
    """Before and after, paired, in the cases that are in both: differences and tests of every cell."""
    both = [case for case in before if case in after]
    cells = [
        {"metric": metric, "phase": phase, "structure": name}
        | compare_paired(*([getattr(side[case.case].scores[name], metric) for case in own] for side in (before, after)))
        for metric in ("dice", "hausdorff", "hausdorff_penalized")
        for phase, own in _by_phase(before[case] for case in both).items()
        for name in STRUCTURES
    ]
    hausdorff = [cell for cell in cells if cell["metric"] == "hausdorff"]
    patients, earlier = (measure_patients({case: side[case] for case in both}) for side in (after, before))
    return {
        "n_cases": len(both),
        "cells": cells,
        "hausdorff_fell": sum(cell["mean_difference"] < 0 for cell in hausdorff),
        "hausdorff_cells": len(hausdorff),
        "clinical": summarize_clinical(patients),
        "clinical_tests": _clinical_tests(earlier, patients),
        "plausibility": {
            name: summarize_plausibility([side[case].plausibility for case in both])
            for name, side in (("before", before), ("after", after))
        },
    }


def _clinical_tests(before: Patients, after: Patients) -> dict[str, dict[str, Any]]:
    """Whether the correction changed the automatic indices."""
    own = [(before[patient][0], after[patient][0]) for patient in after]
    names = [field.name for field in fields(ClinicalIndices)] if own else []
    return {name: compare_paired(*([getattr(pair[side], name) for pair in own] for side in (0, 1))) for name in names}


def compare_paired(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Mean and spread of paired values before and after, nan left out on both sides, and both tests."""
    first, second, n_excluded = paired_values(before, after)
    return {
        "before": asdict(mean_sd(first)),
        "after": asdict(mean_sd(second)),
        "mean_difference": mean_sd(second - first).mean,
        "mann_whitney_p": mann_whitney_u(first, second).p_value,
        "wilcoxon_p": wilcoxon_signed_rank(first, second).p_value,
        "n": first.size,
        "n_excluded": n_excluded,
    }


def _by_phase(cases: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """The cases of each phase that has any."""
    cases = list(cases)
    groups = {phase: [case for case in cases if case.phase == phase] for phase in PHASES}
    return {phase: own for phase, own in groups.items() if own}


def write_curves(output: Path, cases: Iterable[Measurement], criterion: str) -> None:
    """Curves of all cases together as tables and pictures; none where there is no detection or no map."""
    cases = list(cases)
    detected = [case for case in cases if case.detection]
    if detected:
        volumes = {name: [case.detection[name] for case in detected] for name in CRITERIA}
        regions = {name: region_curve(own, DRAWN) for name, own in volumes.items()}
        slices = {name: slice_precision_recall(own, DRAWN) for name, own in volumes.items()}
        write_rows(output / "curves/regions.csv", _threshold_rows(regions, "sensitivity", "false_positives"))
        write_rows(output / "curves/slices.csv", _threshold_rows(slices, "precision", "recall"))
        flagged = _flagged(criterion, detected)
        figure = draw_regions(regions[criterion], region_curve(flagged, [1]))
        write_file(output / "figures/regions.png", figure.savefig)
        precision = slice_precision_recall(volumes[criterion]).average_precision  # as in the summary
        figure = draw_slices(slices[criterion], slice_precision_recall(flagged, [1]), precision)
        write_file(output / "figures/slices.png", figure.savefig)
    if curves := _mean_coverage(cases):
        write_rows(output / "curves/risk_coverage.csv", curves)
        write_file(output / "figures/risk_coverage.png", draw_coverage(curves).savefig)


def _threshold_rows(curves: Mapping[str, RegionCurve | SlicePrecisionRecall], *columns: str) -> list[dict[str, Any]]:
    return [
        {"criterion": name, "threshold": threshold} | {column: getattr(curve, column)[i] for column in columns}
        for name, curve in curves.items()
        for i, threshold in enumerate(curve.thresholds)
    ]


def _mean_coverage(cases: Iterable[Measurement]) -> list[dict[str, Any]]:
    """Mean number of wrong voxels at each coverage, by map and phase."""
    cases, rows = list(cases), []
    for name in MAP_FILES:
        for phase, own in _by_phase(case for case in cases if name in case.coverage).items():
            risk = np.mean([case.coverage[name].risk for case in own], axis=0)
            rows += [
                {"map": name, "phase": phase, "coverage": coverage, "risk": value, "n_cases": len(own)}
                for coverage, value in zip(own[0].coverage[name].coverage, risk, strict=True)
            ]
    return rows


def _patient_rows(patients: Patients) -> list[dict[str, Any]]:
    return [
        {"patient": patient}
        | {
            f"{side}_{name}": value
            for side, indices in (("automatic", automatic), ("reference", reference))
            for name, value in asdict(indices).items()
        }
        for patient, (automatic, reference) in patients.items()
    ]


def _comparison_rows(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for cell in cells:
        before, after = cell["before"], cell["after"]
        spread = {"before_mean": before["mean"], "before_sd": before["sd"]}
        spread |= {"after_mean": after["mean"], "after_sd": after["sd"]}
        rows.append({key: value for key, value in cell.items() if key not in ("before", "after")} | spread)
    return rows
