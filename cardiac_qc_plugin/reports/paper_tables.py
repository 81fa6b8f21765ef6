"""The paper's Tables I, II, III and V with our numbers beside its own; what was not run stays empty."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.data.predictions import MAP_NAMES
from cardiac_qc_plugin.metrics.statistics import mean_sd
from cardiac_qc_plugin.workflows.files import read_json, read_rows

__all__ = [
    "CELLS",
    "GRID",
    "LOSSES",
    "PAIRS",
    "TABLE_V",
    "Experiment",
    "ablation_rows",
    "clinical_rows",
    "cluster_rows",
    "detection_rows",
    "overlap_rows",
    "sample_rows",
    "scan_rows",
]

NETWORKS = {"dn": "DN", "drn": "DRN", "unet": "U-net"}
LOSSES = {"ce": "CE", "brier": "Brier", "soft_dice": "soft-Dice"}
PAIRS = (
    ("dn", "brier"),
    ("dn", "soft_dice"),
    ("drn", "ce"),
    ("drn", "soft_dice"),
    ("unet", "ce"),
    ("unet", "soft_dice"),
)
TABLE_V = (("drn", "ce"), ("unet", "ce"), ("dn", "soft_dice"))
GRID = tuple((*pair, map) for pair in PAIRS for map in MAP_NAMES)
CELLS = tuple((phase, name) for phase in ("ED", "ES") for name in ("LV", "RV", "LVM"))
INDICES = {
    "lv_edv": "LVEDV_ml",
    "lv_ef": "LVEF_pct",
    "rv_edv": "RVEDV_ml",
    "rv_ef": "RVEF_pct",
    "lvm_mass": "LVMMass_g",
}


@dataclass(frozen=True)
class Experiment:
    """Something that was measured over folds, or was to be.

    Attributes:
        kind: ``"grid"``, or the name of an ablation.
        model: segmentation network.
        loss: what it was trained with.
        map: uncertainty map.
        value: what the ablation varies.
        folds: folds behind it.
        stage: where the measurement is, None if no fold was run.
    """

    kind: str
    model: str
    loss: str
    map: str
    value: int | str | None
    folds: list[int]
    stage: Any

    @property
    def run(self) -> tuple[str, str, str]:
        """Model, loss and map."""
        return self.model, self.loss, self.map

    @property
    def folder(self) -> Path | None:
        """Folder of the measurement, None if there is none."""
        return self.stage.folder if self.stage is not None and self.stage.done else None

    @property
    def summary(self) -> dict[str, Any]:
        """Content of ``summary.json``, empty if there is none."""
        return read_json(self.folder / "summary.json") if self.folder else {}


def paper(name: str) -> list[dict[str, str]]:
    """Rows of one of the paper's tables."""
    (source,) = [f for f in files("cardiac_qc_plugin.reports").joinpath("paper").iterdir() if f.name.startswith(name)]
    return list(csv.DictReader(source.read_text(encoding="utf-8").splitlines()))


def network_name(model: str, loss: str, map: str | None = None) -> str:
    """A network as the paper writes it; with Monte Carlo samples, ``+MC``."""
    return f"{NETWORKS[model]}-{LOSSES[loss]}" + ("+MC" if map == "bmap" else "")


def by_run(experiments: Iterable[Experiment], kind: str = "grid") -> dict[tuple, Experiment]:
    """Experiments of a kind by model, loss, map and value."""
    return {(*e.run, e.value): e for e in experiments if e.kind == kind and e.folder}


def rows_of_grid(experiments: Iterable[Experiment]) -> list[tuple[tuple[str, str, str], Any, dict[str, Any]]]:
    """Every combination of the paper, with its folds and summary; both are empty for what was not run."""
    known = by_run(experiments)
    found = [(run, known.get((*run, None))) for run in GRID]
    return [(run, e.folds if e else [], e.summary if e else {}) for run, e in found]


def common(run: tuple[str, str, str], folds: Sequence[int], corrected: bool) -> dict[str, Any]:
    """The columns that say what a row is about."""
    model, loss, map = run
    return {
        "model": network_name(model, loss, map),
        "corrected_with": MAP_NAMES[map] if corrected else "",
        "folds": listed(folds),
    }


def listed(folds: Iterable[int]) -> str:
    """Folds as text."""
    return " ".join(str(fold) for fold in folds)


def overlap_rows(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Table I: Dice and Hausdorff distance before and after correction, a row for each number.

    ``n_missing`` volumes lack the structure in one of the two masks: their Dice counts as 0, and they are not part of
    the Hausdorff distance.
    """
    published = {(r["metric"], r["model"], r["after_correction_with"]): r for r in paper("table1")}
    rows = []
    for metric, unit in (("dice", "dice"), ("hausdorff", "hausdorff_mm")):
        for run, folds, summary in rows_of_grid(experiments):
            for corrected in (False, True):
                row = common(run, folds, corrected)
                theirs = published[unit, row["model"], row["corrected_with"]]
                for phase, name in CELLS:
                    ours = after(summary, metric, phase, name) if corrected else before(summary, metric, phase, name)
                    cell = f"{name}_{phase}"
                    rows.append(
                        {"metric": unit, **row, "phase": phase, "structure": name, **ours}
                        | {"paper_mean": float(theirs[f"{cell}_mean"]), "paper_sd": float(theirs[f"{cell}_std"])}
                        | {"paper_significant": int(theirs[f"{cell}_significant"])}
                    )
    return rows


def before(summary: Mapping[str, Any], metric: str, phase: str, name: str) -> dict[str, Any]:
    """A cell of the segmentation alone."""
    cell = summary.get("segmentation", {}).get(phase, {}).get(name)
    return {**cell[metric], "n_missing": cell["n_missing"]} if cell else {"mean": None, "sd": None, "n": None}


def after(summary: Mapping[str, Any], metric: str, phase: str, name: str) -> dict[str, Any]:
    """A cell after correction, with both tests against the segmentation alone."""
    for cell in summary.get("comparison", {}).get("cells", []):
        if (cell["metric"], cell["phase"], cell["structure"]) == (metric, phase, name):
            tests = {key: cell[key] for key in ("mann_whitney_p", "wilcoxon_p", "n_excluded")}
            return {**cell["after"], **tests}
    return {"mean": None, "sd": None, "n": None}


def clinical_rows(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Table II: agreement of the clinical indices with the reference, a row for each index."""
    published = {(r["model"], r["after_correction_with"]): r for r in paper("table2")}
    rows = []
    for run, folds, summary in rows_of_grid(experiments):
        comparison = summary.get("comparison", {})
        for corrected in (False, True):
            row = common(run, folds, corrected)
            theirs = published[row["model"], row["corrected_with"]]
            for index, column in INDICES.items():
                ours = (comparison if corrected else summary).get("clinical", {}).get(index, {})
                tests = comparison.get("clinical_tests", {}).get(index, {}) if corrected else {}
                rows.append(
                    {**row, "index": column}
                    | {key: ours.get(key) for key in ("r", "bias", "sd", "mae", "n", "n_excluded")}
                    | {key: tests.get(key) for key in ("mann_whitney_p", "wilcoxon_p")}
                    | {f"paper_{key}": float(theirs[f"{column}_{their}"]) for key, their in PAPERS.items()}
                )
    return rows


PAPERS = {"r": "pearson", "bias": "bias", "sd": "std", "mae": "mae"}


def detection_rows(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Table III: slices with failures and their average precision, by both failure criteria.

    The paper's average precision is that of the mean curve, with the labels of its released code.
    """
    published = {r["model"]: r for r in paper("table3")}
    rows = []
    for run, folds, summary in rows_of_grid(experiments):
        theirs = published[network_name(*run[:2]).replace("soft-Dice", "SD")]
        short = run[2]
        for criterion in ("paper", "released_code"):
            found = summary.get("detection", {}).get("criteria", {}).get(criterion)
            row = {"model": network_name(*run[:2]), "map": MAP_NAMES[short], "criterion": criterion}
            rows.append(
                {**row, "folds": listed(folds)}
                | (detection(found) if found else dict.fromkeys(DETECTION))
                | {"paper_average_precision_pct": float(theirs[f"ap_{short}_pct"])}
                | {"paper_slices_failing_pct": float(theirs[f"slices_with_failure_{short}_pct"])}
            )
    return rows


DETECTION = (
    "ap_mean_curve_pct ap_patient_mean_pct ap_patient_sd_pct n_patients n_excluded slices_failing_pct "
    "regions_failing_pct regions_flagged_pct region_precision_pct region_recall_pct voxel_sensitivity_pct "
    "false_positive_regions"
).split()


def detection(found: Mapping[str, Any]) -> dict[str, Any]:
    """Our numbers of one row of Table III, and what the operating point gives."""
    precision, point = found["slice_average_precision"], found["operating_point"]
    patients = precision["per_patient"]

    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * value

    shares = ("regions_flagged", "region_precision", "region_recall", "voxel_sensitivity")
    values = [percent(precision["mean_curve"]), percent(patients["mean"]), percent(patients["sd"]), patients["n"]]
    values += [patients["n_excluded"], found["slices_failing_percent"], found["regions_failing_percent"]]
    values += [percent(point[name]) for name in shares] + [point["false_positive_regions"]]
    return dict(zip(DETECTION, values, strict=True))


VARIANTS = ("detector_maps", "see_segmentation", "members")


def ablation_rows(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """What the paper only names, each beside the grid's own: another detector, or an ensemble instead of dropout.

    Failures by the criterion ``paper``. ``aurc`` orders scans by 1 - the pairwise Dice coefficient of samples or
    members; ``aurc_oracle`` is that of the best order of these segmentations.
    """
    varied = [e for e in experiments if e.kind in VARIANTS and e.folder]
    rows = []
    for run in dict.fromkeys(experiment.run for experiment in varied):
        grid = [e for e in experiments if e.kind == "grid" and e.run == run and e.folder]
        for experiment in grid + [e for e in varied if e.run == run]:
            summary, kind = experiment.summary, experiment.kind
            variant = "" if kind == "grid" else kind if experiment.value is None else f"{kind}: {experiment.value}"
            order = summary["scan_level"].get("sample_disagreement", {})
            rows.append(
                {"model": network_name(*run[:2]), "map": MAP_NAMES[run[2]], "variant": variant}
                | {"folds": listed(experiment.folds), "mean_dice": summary["mean_dice"]["mean"]}
                | {"aurc": order.get("aurc"), "aurc_oracle": order.get("oracle")}
                | detection(summary["detection"]["criteria"]["paper"])
            )
    return rows


def sample_rows(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Table V: Dice and Hausdorff distance over all structures and phases, by number of Monte Carlo samples."""
    known = by_run(experiments, "samples")
    rows = []
    for theirs in paper("table5"):
        for pair in TABLE_V:
            name = network_name(*pair)
            experiment = known.get((*pair, "bmap", int(theirs["samples"])))
            spread = pooled(experiment.folder / "cases.csv", theirs["metric"]) if experiment else {}
            mean, sd = theirs[name].split("±")
            rows.append(
                {"metric": theirs["metric"], "samples": int(theirs["samples"]), "model": name}
                | {"folds": listed(experiment.folds) if experiment else ""}
                | {key: spread.get(key) for key in ("mean", "sd", "n")}
                | {"paper_mean": float(mean), "paper_sd": float(sd)}
            )
    return rows


def pooled(cases: Path, metric: str) -> dict[str, Any]:
    """Mean and standard deviation of a metric over the structures of all cases."""
    values = [float(row[f"{metric}_{name}"] or "nan") for row in read_rows(cases) for name in ("LV", "RV", "LVM")]
    return asdict(mean_sd(values))


def scan_rows(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """How well each score of a whole scan orders the scans by 1 - mean Dice: AURC and Pearson."""
    return [
        {"model": network_name(*run), "map": MAP_NAMES[run[2]], "folds": listed(folds), "score": score, **values}
        for run, folds, summary in rows_of_grid(experiments)
        for score, values in summary.get("scan_level", {}).items()
        if score != "urgency" and (run[2], score) != ("emap", "mean_bmap")  # one of the others; nothing sampled
    ]


def cluster_rows(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Share of slices and of errors that fail, by the smallest cluster that counts (V-B)."""
    return [
        {"model": network_name(model, loss, map), "folds": listed(experiment.folds), **row}
        for (model, loss, map, _), experiment in by_run(experiments, "labels").items()
        for row in read_rows(experiment.folder / "cluster.csv")
    ]
