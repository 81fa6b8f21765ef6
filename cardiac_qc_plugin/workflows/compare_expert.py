"""Automatic segmentations, their simulated correction and an expert's, side by side (paper, V-C and Table IV)."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from cardiac_qc_plugin.data.predictions import CORRECTION_FILE, SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.clinical import structure_volumes
from cardiac_qc_plugin.metrics.segmentation import StructureScore, dice_and_hausdorff
from cardiac_qc_plugin.metrics.statistics import mean_sd
from cardiac_qc_plugin.reports.expert import expert_text
from cardiac_qc_plugin.reports.paper_tables import paper
from cardiac_qc_plugin.transforms.correction import check_on_outside, simulate_correction
from cardiac_qc_plugin.workflows.correct import accept_edits, check_corrected_from, read_flagged
from cardiac_qc_plugin.workflows.evaluate import PHASES, compare_paired
from cardiac_qc_plugin.workflows.files import check_output, read_json, write_rows
from cardiac_qc_plugin.workflows.measure import STRUCTURES
from cardiac_qc_plugin.workflows.references import (
    MissingLabels,
    Outcome,
    References,
    each_case,
    patient_and_phase,
    read_labels,
    read_reference,
    told_by_volumes,
    write_summary,
)

__all__ = ["compare_expert"]

SCENARIOS = {"auto": "auto-only", "simulated": "auto+simulation", "expert": "auto+expert"}  # ours: the paper's
CORRECTED = ("simulated", "expert")
METRICS = {"dice": "dice", "hausdorff": "hausdorff_mm", "hausdorff_penalized": None}


def compare_expert(
    predictions: str | Path,
    expert: str | Path,
    reference: str | Path,
    output: str | Path,
    on_outside: Literal["error", "drop"] = "error",
) -> Outcome:
    """Measure three versions of the cases that an expert edited; the others are left out.

    Written to `output`: ``table4.csv``, ``cases.csv``, ``summary.json``, ``summary.md``.

    Args:
        predictions: output folder of ``run``.
        expert: the expert's masks, see `References`: edited masks, or what ``correct --edited`` made of them.
        reference: folder of reference labels.
        output: where to write.
        on_outside: edits outside flagged regions are an error of the case, or dropped and counted (drop).

    Returns:
        The content of ``summary.md``, and the cases that failed.

    Raises:
        ValueError: an unknown setting, a folder without cases or label files, or no case that could be measured.
        OSError: the output cannot be written.
    """
    check_on_outside(on_outside)
    masks, references, output = References(expert), References(reference), Path(output)
    check_output(output, "compare_expert", predictions, expert, reference)

    missing: list[MissingLabels] = []
    labelled: list[str] = []  # cases that were not edited, but have a reference

    def measure(case: str, folder: Path) -> dict[str, Any] | None:
        try:
            mask = masks.find(case, folder)
        except MissingLabels as error:
            missing.append(error)
            with suppress(ValueError):
                references.find(case, folder)
                labelled.append(case)
            return None
        return measure_case(case, folder, mask, references.find(case, folder), on_outside)

    found, failures = each_case(Path(predictions), measure, "compare")
    cases = {case: own for case, own in found.items() if own is not None}
    if not cases:
        # names that were looked for are alike for all cases: those of one will do
        listed = "\n".join([*(f"- {case}: {message}" for case, message in failures.items()), *map(str, missing[:1])])
        raise ValueError(
            f"{expert}: masks of none of the {len(found) + len(failures)} cases of {predictions} could be measured.\n"
            f"{listed}".rstrip()
        )
    volumes = {case: (own["phase"], own["reference_lv_ml"]) for case, own in cases.items()}
    for case, phase in told_by_volumes(volumes, [*failures, *labelled]).items():
        cases[case]["phase"] = phase
    rows = table_rows(list(cases.values()))
    settings = {"predictions": str(predictions), "expert": str(expert), "reference": str(reference)}
    summary = {
        "command": "compare_expert",
        "settings": settings | {"on_outside": on_outside},
        "n_cases": len(cases),
        "n_patients": len({own["patient"] for own in cases.values()}),
        "not_edited": [case for case, own in found.items() if own is None],
        "n_voxels_changed": {name: sum(own[f"{name}_changed"] for own in cases.values()) for name in CORRECTED},
        "n_voxels_dropped": sum(own["dropped"] for own in cases.values()),
        "table4": rows,
        "failed": failures,
    }
    write_rows(output / "table4.csv", rows)
    write_rows(output / "cases.csv", [case_row(case, own) for case, own in cases.items()])
    return write_summary(output, summary, expert_text)


def measure_case(case: str, folder: Path, mask: Path, reference: Path, on_outside: str) -> dict[str, Any]:
    """Scores of the three versions of one case.

    Raises:
        ValueError: a file is missing, damaged or does not fit, the mask was edited from another segmentation, or
            outside flagged regions; the message names the file.
    """
    patient, phase = patient_and_phase(case, reference)
    segmentation = read_labels(folder / SEGMENTATION_FILE)
    labels = read_reference(reference, segmentation)
    flagged, _ = read_flagged(folder, segmentation)
    check_record(mask.with_name(CORRECTION_FILE), folder / SEGMENTATION_FILE)
    edited, notes, _ = accept_edits(mask, folder, segmentation, on_outside)
    simulated = simulate_correction(segmentation.data, labels, flagged)
    versions = {"auto": segmentation.data, "simulated": simulated, "expert": edited}
    return {
        "patient": patient,
        "phase": phase,
        "scores": {name: dice_and_hausdorff(own, labels, segmentation.spacing) for name, own in versions.items()},
        "reference_lv_ml": structure_volumes(labels, segmentation.spacing)["LV"],
        "dropped": notes["edits"]["n_outside"],
        **{f"{name}_changed": int((versions[name] != segmentation.data).sum()) for name in CORRECTED},
    }


def check_record(path: Path, segmentation: Path) -> None:
    """Refuse a mask whose ``correction.json`` says that it is no expert's, or of another segmentation."""
    if not path.is_file():
        return
    record = read_json(path)
    if record.get("kind", "expert") != "expert":
        raise ValueError(f"{path}: a {record['kind']} correction. Give the folder of the expert's masks.")
    check_corrected_from(path, segmentation)


def table_rows(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Table IV (a) and (b): a row for each metric, scenario, phase and structure, tested against the segmentation."""
    published = {(row["metric"], row["scenario"]): row for row in paper("table4")}
    phases = [phase for phase in PHASES if any(own["phase"] == phase for own in cases)]
    rows = []
    for metric, theirs in METRICS.items():
        for scenario, name_in_paper in SCENARIOS.items():
            for phase in phases:
                own = [case["scores"] for case in cases if case["phase"] == phase]
                for name in STRUCTURES:
                    auto, values = ([getattr(s[side][name], metric) for s in own] for side in ("auto", scenario))
                    row = {"metric": metric, "scenario": scenario, "phase": phase, "structure": name}
                    row |= _cell(values) if scenario == "auto" else _tested(auto, values)
                    if theirs and phase != "unknown":
                        row |= _paper_cell(published[theirs, name_in_paper][f"{name}_{phase}"])
                    rows.append(row)
    return rows


def _cell(values: list[float]) -> dict[str, Any]:
    spread = mean_sd(values)
    return {**asdict(spread), "n_excluded": len(values) - spread.n}


def _tested(auto: list[float], values: list[float]) -> dict[str, Any]:
    pair = compare_paired(auto, values)
    return {**_cell(values), **{key: pair[key] for key in ("mean_difference", "mann_whitney_p", "wilcoxon_p")}}


def _paper_cell(text: str) -> dict[str, Any]:
    mean, sd = text.removesuffix("*").split("±")
    return {"paper_mean": float(mean), "paper_sd": float(sd), "paper_significant": int(text.endswith("*"))}


def case_row(case: str, own: dict[str, Any]) -> dict[str, Any]:
    """One case's line in ``cases.csv``."""
    scores: dict[str, dict[str, StructureScore]] = own["scores"]
    row = {"case": case, **{key: own[key] for key in ("patient", "phase", "dropped")}}
    row |= {f"{name}_changed": own[f"{name}_changed"] for name in CORRECTED}
    return row | {
        f"{label}_{name}_{scenario}": getattr(scores[scenario][name], metric)
        for metric, label in (("dice", "dice"), ("hausdorff", "hausdorff_mm"))
        for name in STRUCTURES
        for scenario in SCENARIOS
    }
