"""Effort against gain: how much better a cohort gets with the number of regions that are reviewed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from cardiac_qc_plugin.data.predictions import MAP_FILES, PROBABILITY_FILE, SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.effort import ReviewedVolume
from cardiac_qc_plugin.metrics.segmentation import dice_and_hausdorff
from cardiac_qc_plugin.reports.effort import draw_effort, effort_text
from cardiac_qc_plugin.transforms.correction import simulate_correction
from cardiac_qc_plugin.transforms.failure_labels import FailureCriterion, check_apex, failure_mask
from cardiac_qc_plugin.transforms.regions import region_grid
from cardiac_qc_plugin.workflows.files import check_output, read_json, write_file, write_rows
from cardiac_qc_plugin.workflows.measure import read_map
from cardiac_qc_plugin.workflows.references import (
    Outcome,
    References,
    each_case,
    patient_and_phase,
    read_labels,
    read_reference,
    write_summary,
)

__all__ = ["effort"]

REGIONS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100, 150)  # reviewed per patient; after them all regions
SUMMARY = (2, 5, 10)
SCOPES = ("patient", "cohort")


@dataclass(frozen=True, eq=False)
class Case:
    """One volume and what orders its regions.

    Attributes:
        patient: whose scan it is.
        volume: its scores while regions are reviewed.
        map: uncertainty map of the detector.
        scores: by name of an order, a score for each of the N regions, (N,); the highest is reviewed first.
        failure_voxels: in each region, (N,).
        n_failure_voxels: in the whole volume.
        all_failures: mean Dice and mean Hausdorff distance with all failure voxels corrected and no other.
    """

    patient: str
    volume: ReviewedVolume
    map: str
    scores: dict[str, np.ndarray]
    failure_voxels: np.ndarray
    n_failure_voxels: int
    all_failures: tuple[float, float]


def effort(
    predictions: str | Path,
    reference: str | Path,
    output: str | Path,
    compare: Sequence[str | Path] = (),
    seeds: int = 10,
    criterion: str = "paper",
    apex: Literal["last", "first"] = "last",
) -> Outcome:
    """Review regions one after another, each taking the reference, and measure what that gains.

    Written to `output`: ``effort.csv`` (every curve), ``effort.png``, ``effort.svg``, ``summary.json`` and
    ``summary.md``. Orders: the detector's failure probability; the mean of the uncertainty map, without a detector;
    random, mean over seeds; and two oracles that know the reference, by what a region alone adds to the mean Dice
    coefficient, and by its failure voxels. Scopes: so many regions of each patient, or so many times the number of
    patients over the cohort.

    Args:
        predictions: output folder of ``run``.
        reference: folder of reference labels, see `References`.
        output: where to write.
        compare: output folders of ``run`` with other maps on the same cases; of these the detector and the uncertainty
            only. A case that fails in one folder is left out of all.
        seeds: random orders.
        criterion: which errors are failures, a preset of `FailureCriterion`.
        apex: end of the slice axis at which the apex lies.

    Returns:
        The content of ``summary.md``, and the cases that failed.

    Raises:
        ValueError: an unknown setting, a folder without cases or label files, no measurable case, or folders with other
            cases than `predictions`.
        OSError: the output cannot be written.
    """
    if seeds < 1:
        raise ValueError(f"seeds is a number of random orders, 1 or more, got {seeds}.")
    FailureCriterion.preset(criterion)
    check_apex(apex)
    references, output = References(reference), Path(output)
    check_output(output, "effort", predictions, *compare, reference)
    folders = [predictions, *compare]
    read = [_read(Path(folder), references, criterion, apex) for folder in folders]
    in_all, failures = _paired(folders, read)
    rows, sets = [], []
    for number, (folder, (measured, _)) in enumerate(zip(folders, read, strict=True)):
        cases = [measured[name] for name in in_all]
        map = cases[0].map
        if same := [other["predictions"] for other in sets if other["map"] == map]:
            raise ValueError(f"{folder} has the {map}, as {same[0]} has. Give one folder for each map.")
        own = curves(cases, seeds if number == 0 else 0)
        rows += [{"map": map, **row} for row in own]
        sets.append(
            {
                "predictions": str(folder),
                "map": map,
                "n_cases": len(cases),
                "n_patients": len({case.patient for case in cases}),
                "all_failures": _of_all_failures(cases),
            }
        )
    settings = {"reference": str(reference), "criterion": criterion, "apex": apex, "seeds": seeds}
    summary = {
        "command": "effort",
        "settings": settings,
        "sets": sets,
        "after": [row for row in rows if row["regions_per_patient"] in (0, *SUMMARY) or row["all_regions"]],
        "failed": failures,
    }
    write_rows(output / "effort.csv", rows)
    figure = draw_effort(rows, sets[0]["all_failures"])
    for suffix in ("png", "svg"):
        write_file(output / f"effort.{suffix}", figure.savefig)
    return write_summary(output, summary, effort_text)


Read = tuple[dict[str, Case], dict[str, str]]  # cases by name, and why others failed


def _paired(folders: Sequence[str | Path], read: Sequence[Read]) -> tuple[list[str], dict[str, str]]:
    """Names of the cases that were read from every folder, and what failed: curves side by side are of the same cases.

    Raises:
        ValueError: if a folder has other cases, or none was read from all.
    """
    names = [measured.keys() | problems.keys() for measured, problems in read]
    for folder, own in zip(folders[1:], names[1:], strict=True):
        if unpaired := sorted(own ^ names[0]):
            raise ValueError(
                f"{folders[0]} and {folder} have different cases: {len(unpaired)} are in one of them only, "
                f"{unpaired[0]} say. Curves are drawn beside each other for the same cases: run both on these."
            )
    pairs = zip(folders, read, strict=True)
    failures = {f"{folder}: {case}": text for folder, (_, own) in pairs for case, text in own.items()}
    in_all = [name for name in read[0][0] if all(name in measured for measured, _ in read)]
    if not in_all:
        listed = "\n".join(f"- {case}: {message}" for case, message in failures.items())
        raise ValueError(f"No case could be measured in every folder:\n{listed}")
    return in_all, failures


def _read(folder: Path, references: References, criterion: str, apex: str) -> Read:
    cases, failures = each_case(
        folder, lambda name, own: read_case(name, own, references, criterion, apex), f"read {folder.name}"
    )
    if not cases:
        listed = "\n".join(f"- {case}: {message}" for case, message in failures.items())
        raise ValueError(f"{folder}: none of its {len(failures)} case(s) could be measured:\n{listed}")
    if len(maps := {case.map for case in cases.values()}) > 1:
        raise ValueError(f"{folder}: cases of the maps {' and '.join(sorted(maps))}. Give one folder for each map.")
    return cases, failures


def read_case(name: str, folder: Path, references: References, criterion: str, apex: str) -> Case:
    """The regions of one case beside its reference.

    Raises:
        ValueError: a file is missing, damaged or does not fit the others; the message names it.
    """
    path = references.find(name, folder)
    segmentation = read_labels(folder / SEGMENTATION_FILE)
    prediction, reference = segmentation.data, read_reference(path, segmentation)
    detection = read_json(folder / "qc.json").get("detection")
    if detection is None:
        raise ValueError(f"{folder / 'qc.json'}: its failures were not detected. Give the output folder of run.")
    if missing := [key for key in ("map", "boxes", "region_size") if key not in detection]:
        raise ValueError(f"{folder / 'qc.json'}: its detection lacks {', '.join(missing)}. Run this case again.")
    if len(detection["boxes"]) != prediction.shape[2]:
        raise ValueError(f"{folder / 'qc.json'}: not one of boxes for each of the {prediction.shape[2]} slices.")
    grid = region_grid(detection["boxes"], prediction.shape, detection["region_size"])
    volume = ReviewedVolume(prediction, reference, segmentation.spacing, grid)
    failures = failure_mask(prediction, reference, segmentation.spacing[:2], criterion, apex)
    in_regions = grid.counts(failures)
    corrected = simulate_correction(prediction, reference, failures=failures, rule="upper_bound")
    scores = dice_and_hausdorff(corrected, reference, segmentation.spacing).values()
    return Case(
        patient=patient_and_phase(name, path)[0],
        volume=volume,
        map=detection["map"],
        scores={
            "detector": grid.means(read_map(folder / PROBABILITY_FILE, segmentation)),
            "uncertainty": grid.means(read_map(folder / MAP_FILES[detection["map"]], segmentation)),
            "oracle_dice": volume.dice_gain,
            "oracle_failures": in_regions + volume.wrong / 1e6,  # of equally many failures, the more wrong region
        },
        failure_voxels=in_regions,
        n_failure_voxels=int(failures.sum()),
        all_failures=tuple(np.nanmean([(s.dice, s.hausdorff_penalized) for s in scores], axis=0)),
    )


def curves(cases: Sequence[Case], seeds: int) -> list[dict[str, Any]]:
    """Every curve of a folder's cases.

    Args:
        cases: all of one map.
        seeds: random orders; 0 for a folder that is compared, of which the detector and the uncertainty are measured.

    Returns:
        A row for each order, scope and number of regions: see docs/effort.md for the columns.
    """
    names = ["detector", "uncertainty", *(["oracle_dice", "oracle_failures"] if seeds else [])]
    measured = {
        name: [measure(cases, [case.scores[name] for case in cases])]
        for name in tqdm(names, desc="review", unit="order", disable=None)
    }
    if seeds:
        measured["random"] = [
            measure(cases, [generator.random(case.failure_voxels.size) for case in cases])
            for generator in map(np.random.default_rng, tqdm(range(seeds), desc="random", disable=None))
        ]
    return [
        row
        for name, repeats in measured.items()
        for scope in SCOPES
        for row in _rows(name, scope, [repeat[scope] for repeat in repeats], _of_all_failures(cases))
    ]


def _of_all_failures(cases: Sequence[Case]) -> dict[str, float]:
    """The scores with all failure voxels corrected, and no other: what the shares are shares of."""
    means = np.mean([case.all_failures for case in cases], axis=0)
    return {"dice": float(means[0]), "hausdorff_mm": float(means[1])}


def _rows(
    name: str, scope: str, repeats: Sequence[Mapping[str, np.ndarray]], all_failures: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The curve of one order and scope: means over the repeats, their spread, and shares of what can be gained."""
    columns = {key: np.mean([repeat[key] for repeat in repeats], axis=0) for key in repeats[0]}
    for key in ("dice", "hausdorff_mm"):
        curve, short = columns[key], key.removesuffix("_mm")
        columns[f"{short}_share"] = _share(curve - curve[0], all_failures[key] - curve[0])
        columns[f"{short}_share_of_all_regions"] = _share(curve - curve[0], curve[-1] - curve[0])
        if len(repeats) > 1:
            columns[f"{key}_sd"] = np.std([repeat[key] for repeat in repeats], axis=0, ddof=1)
    return [
        {"order": name, "scope": scope, "regions_per_patient": float(regions)}
        | {"all_regions": int(index == len(REGIONS))}
        | {key: float(values[index]) for key, values in columns.items()}
        for index, regions in enumerate([*REGIONS, columns["reviewed"][-1]])
    ]


def _share(part: np.ndarray, whole: float) -> np.ndarray:
    return part / whole if whole else np.full_like(part, np.nan)


def measure(cases: Sequence[Case], scores: Sequence[np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Cohort means after each number of `REGIONS`, and after all, for both scopes.

    Args:
        cases: the volumes.
        scores: of each case's regions, (N,); the highest is reviewed first, of equal ones the first.

    Returns:
        By scope: ``reviewed`` and ``slices`` (regions and slices seen, per patient), ``dice`` and ``hausdorff_mm``
        (mean over structures, then volumes), ``caught`` (share of a patient's failure voxels in reviewed regions, mean
        over the patients that have any); each (K,).
    """
    patients = np.unique([case.patient for case in cases], return_inverse=True)[1]
    n_patients = patients.max() + 1
    groups = {"patient": patients, "cohort": np.zeros_like(patients)}
    budgets = {"patient": 1, "cohort": n_patients}
    lengths = {scope: _prefixes(scores, groups[scope], budgets[scope]) for scope in SCOPES}
    found = [
        _along(case, np.argsort(-score, kind="stable"), [lengths[scope][number] for scope in SCOPES])
        for number, (case, score) in enumerate(zip(cases, scores, strict=True))
    ]
    total = np.bincount(patients, [case.n_failure_voxels for case in cases])
    failing = total > 0
    result = {}
    for index, scope in enumerate(SCOPES):
        values = {key: np.array([own[index][key] for own in found]) for key in found[0][index]}
        found_voxels = np.array([values["failure_voxels"][patients == own].sum(axis=0) for own in range(n_patients)])
        caught = found_voxels[failing] / total[failing, None]
        result[scope] = {
            "reviewed": values["reviewed"].sum(axis=0) / n_patients,
            "slices": values["slices"].sum(axis=0) / n_patients,
            "dice": values["dice"].mean(axis=0),
            "hausdorff_mm": values["hausdorff_mm"].mean(axis=0),
            "caught": caught.mean(axis=0) if failing.any() else np.full(len(REGIONS) + 1, np.nan),
        }
    return result


def _prefixes(scores: Sequence[np.ndarray], groups: np.ndarray, budget: int) -> np.ndarray:
    """How many of each case's regions are among the first k * budget of its group, (cases, K).

    What is reviewed of a case is always the start of the case's own order.
    """
    result = np.zeros((len(scores), len(REGIONS) + 1), dtype=int)
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        owner = np.repeat(members, [scores[member].size for member in members])
        owner = owner[np.argsort(-np.concatenate([scores[member] for member in members]), kind="stable")]
        for column, regions in enumerate([*REGIONS, owner.size]):
            reviewed = np.bincount(owner[: regions * budget], minlength=len(scores))
            result[members, column] = reviewed[members]
    return result


def _along(case: Case, order: np.ndarray, lengths: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Scores of one case after the first regions of its order, for several lists of numbers of regions."""
    counts, inverse = np.unique(np.concatenate(lengths), return_inverse=True)
    first = np.sort(np.unique(case.volume.grid.slices[order], return_index=True)[1])  # where each slice is opened
    values = {
        "reviewed": counts,
        "slices": np.searchsorted(first, counts),
        "dice": np.nanmean(case.volume.dice(order, counts), axis=1),
        "hausdorff_mm": np.nanmean(case.volume.hausdorff(order, counts), axis=1),
        "failure_voxels": np.concatenate([[0], case.failure_voxels[order].cumsum()])[counts],
    }
    places = np.split(inverse, np.cumsum([len(own) for own in lengths])[:-1])
    return [{key: value[place] for key, value in values.items()} for place in places]
