"""Correction of flagged regions: simulated with reference labels, or an expert's edits (paper, V-C)."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cardiac_qc_plugin import __version__
from cardiac_qc_plugin.data.predictions import CORRECTION_FILE, REGIONS_FILE, SEGMENTATION_FILE
from cardiac_qc_plugin.transforms.correction import (
    Rule,
    apply_edits,
    check_on_outside,
    check_rule,
    simulate_correction,
)
from cardiac_qc_plugin.transforms.failure_labels import FailureCriterion, check_apex, failure_mask
from cardiac_qc_plugin.workflows.files import (
    Volume,
    check_folder,
    file_sha256,
    read_json,
    read_like,
    write_json,
    write_like,
)
from cardiac_qc_plugin.workflows.references import (
    Outcome,
    References,
    as_stored,
    each_case,
    read_labels,
    read_reference,
)

__all__ = ["accept_edits", "check_corrected_from", "correct", "write_correction"]

JOURNAL = "review.jsonl"  # of a review, begun or finished
Method = Callable[[str, Path, Volume], tuple[np.ndarray, dict[str, Any], dict[str, Path]]]
"""From a case's name, folder and segmentation to its corrected labels, what to note, and the files used."""


def correct(
    predictions: str | Path,
    output: str | Path,
    reference: str | Path | None = None,
    edited: str | Path | None = None,
    rule: Rule = "paper",
    criterion: str | None = None,
    on_outside: Literal["error", "drop"] = "error",
    apex: Literal["last", "first"] = "last",
) -> Outcome:
    """Write ``<output>/<case>/segmentation.nii.gz``, corrected, and ``correction.json`` of every case.

    Args:
        predictions: output folder of ``run``.
        output: where to write, outside `predictions`.
        reference: folder of reference labels, for simulated correction.
        edited: folder of the masks that an expert edited; exactly one of `reference` and `edited`.
        rule: simulated correction: which voxels take the reference, see `simulate_correction`.
        criterion: simulated correction: preset that says what a failure is, for the rules "released_code" and
            "upper_bound"; by default "released_code" for the first and "paper" for the second.
        on_outside: expert's edits outside flagged regions: an error, or dropped and counted.
        apex: end of the slice axis at which the apex lies.

    Returns:
        How many voxels changed, and the cases that failed.

    Raises:
        ValueError: an unknown or contradictory setting, or a folder without cases or label files.
        OSError: the output cannot be written.
    """
    predictions, output = Path(predictions), Path(output)
    check_folder(output)
    if (reference is None) == (edited is None):
        raise ValueError("Give one of reference (simulated correction) and edited (an expert's masks).")
    for name, source in (("predictions", predictions), ("reference", reference), ("edited masks", edited)):
        if source is not None and _overlap(output, Path(source)):
            raise ValueError(f"{output} and the {name} {source} lie in each other: write the corrections elsewhere.")
    if edited is not None:
        if (rule, criterion) != ("paper", None):
            raise ValueError("rule and criterion belong to simulated correction; leave them out with edited masks.")
        method = _expert(References(edited), on_outside)
    else:
        method = _simulated(References(reference), rule, criterion, apex)
    output.mkdir(parents=True, exist_ok=True)

    def correct_case(case: str, folder: Path) -> dict[str, Any]:
        corrected, record = (output / case / name for name in (SEGMENTATION_FILE, CORRECTION_FILE))
        if edited is None and record.is_file() and read_json(record).get("kind") != "simulated":
            raise ValueError(
                f"{record}: an expert's correction, which a simulated one must not replace. Write elsewhere."
            )
        if (output / case / JOURNAL).is_file():
            raise ValueError(f"{output / case}: a review, which a correction must not replace. Write elsewhere.")
        if corrected.is_file() and not record.is_file():
            raise ValueError(f"{corrected}: no correction made it, and one must not replace it. Write elsewhere.")
        for path in (corrected, record):
            path.unlink(missing_ok=True)  # of an earlier correction
        segmentation = read_labels(folder / SEGMENTATION_FILE)
        labels, notes, sources = method(case, folder, segmentation)
        return write_correction(case, folder, output / case, segmentation, labels, notes, sources)

    records, failures = each_case(predictions, correct_case, "correct")
    return Outcome(_summary(list(records.values()), failures, output), failures)


def _overlap(first: Path, second: Path) -> bool:
    """Whether one of two folders lies in the other, or is it."""
    first, second = first.resolve(), second.resolve()
    return first.is_relative_to(second) or second.is_relative_to(first)


def _simulated(references: References, rule: Rule, criterion: str | None, apex: str) -> Method:
    check_rule(rule)
    check_apex(apex)
    if rule == "paper" and criterion is not None:
        raise ValueError("The rule 'paper' corrects all of a flagged region, failures or not: give no criterion.")
    if rule != "paper":
        criterion = criterion or ("released_code" if rule == "released_code" else "paper")
        FailureCriterion.preset(criterion)

    def simulate(case: str, folder: Path, segmentation: Volume) -> tuple:
        sources = {"reference": references.find(case, folder)}
        reference = read_reference(sources["reference"], segmentation)
        notes = {"kind": "simulated", "rule": rule, "criterion": criterion, "apex": apex}
        flagged = failures = None
        if rule != "paper":
            failures = failure_mask(segmentation.data, reference, segmentation.spacing[:2], criterion, apex)
            notes["n_failure_voxels"] = int(failures.sum())
        if rule != "upper_bound":
            flagged, sources["failure_regions"] = read_flagged(folder, segmentation)
            notes["n_regions_flagged"] = _n_regions(flagged)
        return simulate_correction(segmentation.data, reference, flagged, failures, rule), notes, sources

    return simulate


def _expert(masks: References, on_outside: str) -> Method:
    check_on_outside(on_outside)
    return lambda case, folder, segmentation: accept_edits(masks.find(case, folder), folder, segmentation, on_outside)


def accept_edits(
    edited: Path, folder: Path, segmentation: Volume, on_outside: Literal["error", "drop"] = "error"
) -> tuple[np.ndarray, dict[str, Any], dict[str, Path]]:
    """An expert's edited mask, as far as it changes flagged regions only.

    Args:
        edited: file of the edited mask.
        folder: the case's folder, with its flagged regions.
        segmentation: the automatic labels, (H, W, D).
        on_outside: edits outside flagged regions: an error, or dropped and counted.

    Returns:
        The corrected labels, uint8 (H, W, D), what to note in ``correction.json``, and the files used.

    Raises:
        ValueError: a file is missing or damaged, lies on another grid, or edits outside with "error".
    """
    flagged, regions = read_flagged(folder, segmentation)
    edits = as_stored(edited, read_labels(edited), segmentation).data
    try:
        labels, report = apply_edits(segmentation.data, edits, flagged, on_outside)
    except ValueError as error:
        raise ValueError(f"{edited}: {error}") from error
    notes = {"kind": "expert", "on_outside": on_outside, "n_regions_flagged": _n_regions(flagged)}
    return labels, {**notes, "edits": asdict(report)}, {"edited": edited, "failure_regions": regions}


def write_correction(
    case: str,
    folder: Path,
    output: Path,
    segmentation: Volume,
    labels: np.ndarray,
    notes: dict[str, Any],
    sources: dict[str, Path],
) -> dict[str, Any]:
    """Write ``segmentation.nii.gz`` and ``correction.json`` of a corrected case.

    Args:
        case: its name.
        folder: its folder in the predictions.
        output: where to write.
        segmentation: the automatic labels, (H, W, D).
        labels: the corrected ones, uint8 (H, W, D).
        notes: what to note of how they were made.
        sources: files that they were made from, by what they are.

    Returns:
        The content of ``correction.json``.
    """
    changed = labels != segmentation.data
    record = {
        "case": case,
        **notes,
        "n_voxels_changed": int(changed.sum()),
        "slices_changed": np.flatnonzero(changed.any(axis=(0, 1))).tolist(),
        "sources": {
            name: {"path": str(path.resolve()), "sha256": file_sha256(path)}
            for name, path in {"segmentation": folder / SEGMENTATION_FILE, **sources}.items()
        },
        "versions": {"cardiac_qc_plugin": __version__},
    }
    write_json(output / CORRECTION_FILE, record)  # first: a segmentation without it would be someone else's
    write_like(output / SEGMENTATION_FILE, labels, segmentation)
    return record


def read_flagged(folder: Path, segmentation: Volume) -> tuple[np.ndarray, Path]:
    """The map of flagged regions of a case, (H, W, D), and its file."""
    path = folder / REGIONS_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file, its failures were not detected. Give the output folder of run.")
    return read_like(path, segmentation), path


def _n_regions(flagged: np.ndarray) -> int:
    return int(np.unique(flagged[flagged != 0]).size)


def _summary(records: list[dict[str, Any]], failures: dict[str, str], output: Path) -> str:
    voxels = sum(record["n_voxels_changed"] for record in records)
    touched = sum(record["n_voxels_changed"] > 0 for record in records)
    lines = [f"Corrected {len(records)} case(s): {voxels} voxel(s) changed, in {touched} case(s). Result: {output}"]
    if regions := [record["n_regions_flagged"] for record in records if "n_regions_flagged" in record]:
        lines.append(f"Flagged regions: {sum(regions)}.")
    if dropped := sum(record["edits"]["n_outside"] for record in records if "edits" in record):
        lines.append(f"Edited voxels outside the flagged regions, dropped: {dropped}.")
    lines += [f"FAILED {case}: {message}" for case, message in failures.items()]
    return "\n".join(lines) + "\n"


def check_corrected_from(path: Path, segmentation: Path) -> None:
    """Refuse a correction whose record, the ``correction.json`` at `path`, is of another segmentation.

    Raises:
        ValueError: if it is; the message names both files.
    """
    used = read_json(path).get("sources", {}).get("segmentation", {}).get("sha256")
    if used is not None and used != file_sha256(segmentation):
        raise ValueError(
            f"{path}: made from another segmentation than {segmentation}. Give the run that was corrected."
        )
