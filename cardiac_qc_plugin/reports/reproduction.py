"""Tables, figures and the page of a reproduction: our numbers beside the paper's."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.workflows.files import write_rows, write_text

from .evaluation import marks
from .paper_figures import FIGURES, draw
from .paper_tables import (
    CELLS,
    INDICES,
    Experiment,
    ablation_rows,
    clinical_rows,
    cluster_rows,
    detection_rows,
    overlap_rows,
    sample_rows,
    scan_rows,
)

__all__ = ["Experiment", "write_reproduction"]

Row = dict[str, Any]
UNITS = {"dice": ("Dice coefficient", 3), "hausdorff_mm": ("Hausdorff distance (mm)", 1)}


def write_reproduction(output: Path, experiments: Sequence[Experiment], trainings: Sequence[Row]) -> None:
    """Write ``tables/*.csv``, ``figures/*`` and ``results.md``.

    Args:
        output: where to write.
        experiments: what was measured, or was to be.
        trainings: a row for each training: its name, iterations, and so on.
    """
    tables = {
        "table1": overlap_rows(experiments),
        "table2": clinical_rows(experiments),
        "table3": detection_rows(experiments),
        "table5": sample_rows(experiments),
        "scans": scan_rows(experiments),
        "clusters": cluster_rows(experiments),
        "ablations": ablation_rows(experiments),
        "trainings": list(trainings),
    }
    for name, rows in tables.items():
        write_rows(output / "tables" / f"{name}.csv", rows)
    shown = draw(output / "figures", experiments)
    write_text(output / "results.md", page(tables, shown))


def page(tables: dict[str, list[Row]], shown: dict[str, bool]) -> str:
    """The page in Markdown."""
    parts = [
        "# Results beside the paper's",
        "Mean ± standard deviation (ours with n - 1) over the volumes of the folds named in each row, "
        "each measured by the networks that did not see it. What was not run is left out; `tables/` has the paper's "
        "figures for it as well. They are "
        "over four folds of another split. \\* p <= 0.05 by the two-sided Mann-Whitney U test (the paper's), † by the "
        "Wilcoxon signed-rank test, both against the segmentation alone.",
        "## Trainings",
        trainings_text(tables["trainings"]),
    ]
    for metric, (title, digits) in UNITS.items():
        rows = [row for row in tables["table1"] if row["metric"] == metric]
        parts += [f"## Table I: {title}", overlap_text(rows, digits)]
    parts += ["## Table II: clinical indices, ρ; bias ± sd; mean absolute error", clinical_text(tables["table2"])]
    parts += ["## Table III: detection of slices with failures", detection_text(tables["table3"])]
    parts += ["## Table V: number of Monte Carlo samples", samples_text(tables["table5"])]
    parts += ["## Which scan first", scans_text(tables["scans"]), "## Figures"]
    for name, (_, caption) in FIGURES.items():
        picture = f"![{caption.partition('.')[0]}](figures/{name}.png)\n\n" if shown[name] else "Not run. "
        parts.append(picture + caption)
    parts += ["## Other detectors and ensembles", ablations_text(tables["ablations"])]
    parts += ["## Smallest cluster that counts as a failure", clusters_text(tables["clusters"])]
    return "\n\n".join(parts) + "\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left; what to say where it has no rows."""
    rows = list(rows)
    if not rows:
        return "Not run."
    lines = [list(header), ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int) -> str:
    """A number; empty for one that does not exist."""
    return "" if value is None or value != value else f"{value:.{digits}f}"


def spread(mean: float | None, sd: float | None, digits: int, sd_digits: int | None = None) -> str:
    """Mean ± standard deviation, with as many digits unless the paper has fewer; empty where there is no mean."""
    return f"{number(mean, digits)} ± {number(sd, sd_digits or digits) or '–'}" if number(mean, digits) else ""


def run_groups(rows: Sequence[Row], *keys: str) -> list[list[Row]]:
    """Rows that agree in some columns, in order, without the groups of which nothing was run."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [group for group in groups.values() if any(row["folds"] for row in group)]


def run_name(row: Row) -> str:
    """The network of a row, and the map that its regions were corrected by."""
    return row["model"] + (f", corrected by {row['corrected_with']}" if row["corrected_with"] else "")


def overlap_text(rows: Sequence[Row], digits: int) -> str:
    """Table I for one metric: a line of ours above each of the paper's."""
    lines = []
    for cells in run_groups(rows, "model", "corrected_with"):
        first, name = cells[0], run_name(cells[0])
        counts = sorted({cell["n"] for cell in cells if cell["n"] is not None})
        missing = sum(cell.get("n_missing") or cell.get("n_excluded") or 0 for cell in cells)
        count = "" if not counts else "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        ours = [spread(cell["mean"], cell["sd"], digits) + marks(cell) for cell in cells]
        lines.append([f"{name}, ours", *ours, first["folds"], count, str(missing) if counts else ""])
        paper = [spread(c["paper_mean"], c["paper_sd"], digits, min(digits, 2)) for c in cells]
        paper = [text + " *" * c["paper_significant"] for text, c in zip(paper, cells, strict=True)]
        lines.append([f"{name}, paper", *paper, "all", "", ""])
    header = ["", *(f"{name} {phase}" for phase, name in CELLS), "folds", "n", "missing or not paired"]
    return markdown(header, lines)


def clinical_text(rows: Sequence[Row]) -> str:
    """Table II: a line of ours above each of the paper's."""
    lines = []
    for cells in run_groups(rows, "model", "corrected_with"):
        first, name = cells[0], run_name(cells[0])
        for who, prefix in (("ours", ""), ("paper", "paper_")):
            texts = [
                f"{number(c[prefix + 'r'], 3) or '–'}; {spread(c[prefix + 'bias'], c[prefix + 'sd'], 1)}; "
                f"{number(c[prefix + 'mae'], 1)}" + (marks(c) if who == "ours" else "")
                if number(c[prefix + "bias"], 1)
                else ""
                for c in cells
            ]
            tail = [first["folds"], str(first["n"] or "")] if who == "ours" else ["all", "100"]
            lines.append([f"{name}, {who}", *texts, *tail])
    return markdown(["", *INDICES.values(), "folds", "patients"], lines)


def detection_text(rows: Sequence[Row]) -> str:
    """Table III: both criteria, and what the operating point gives."""
    lines = [
        [
            f"{row['model']}, {row['map']}",
            f"`{row['criterion']}`",
            row["folds"],
            number(row["ap_mean_curve_pct"], 1),
            spread(row["ap_patient_mean_pct"], row["ap_patient_sd_pct"], 1),
            number(row["paper_average_precision_pct"], 1),
            number(row["slices_failing_pct"], 1),
            number(row["paper_slices_failing_pct"], 1),
            number(row["regions_failing_pct"], 2),
            number(row["regions_flagged_pct"], 2),
            number(row["region_precision_pct"], 1),
            number(row["region_recall_pct"], 1),
        ]
        for row in rows
        if row["folds"]
    ]
    header = ["", "failure by", "folds", "slice AP, mean curve (%)", "slice AP, patients (%)", "paper's AP (%)"]
    header += ["slices failing (%)", "paper's (%)", "regions failing (%)", "flagged (%)", "precision (%)", "recall (%)"]
    note = (
        "The paper's numbers were made with labels like `released_code` and the mean curve. Its regions fail in 1.5 to "
        "3 % of the cases. Patients without a failing slice have no average precision; the CSV counts them."
    )
    return f"{markdown(header, lines)}\n\n{note}"


def samples_text(rows: Sequence[Row]) -> str:
    """Table V: over all structures and phases."""
    lines = []
    for cells in run_groups(rows, "metric", "samples"):
        digits = 3 if cells[0]["metric"] == "dice" else 2
        line = [UNITS[cells[0]["metric"]][0], str(cells[0]["samples"])]
        for cell in cells:
            line.append(spread(cell["mean"], cell["sd"], digits))
            line.append(spread(cell["paper_mean"], cell["paper_sd"], digits, 2))
        lines.append([*line, "; ".join(dict.fromkeys(cell["folds"] for cell in cells if cell["folds"]))])
    names = [name for name in dict.fromkeys(row["model"] for row in rows) for name in (f"{name}, ours", "paper")]
    return markdown(["", "T", *names, "folds"], lines)


def scans_text(rows: Sequence[Row]) -> str:
    """Scan-level scores."""
    lines = [
        [f"{row['model']}, {row['map']}", row["score"].replace("_", " "), row["folds"]]
        + [number(row[key], 4) for key in ("aurc", "oracle", "random")]
        + [number(row["pearson"], 3), str(row["n"])]
        for row in rows
    ]
    note = (
        "How well a score of the whole scan orders the scans by 1 - mean Dice. AURC: area under the risk-coverage "
        "curve, lower is better; oracle and random order beside it. r: Pearson's correlation."
    )
    header = ["", "score", "folds", "AURC", "oracle", "random", "r", "n"]
    return f"{note}\n\n{markdown(header, lines)}"


def ablations_text(rows: Sequence[Row]) -> str:
    """Other detectors, and ensembles instead of dropout."""
    lines = [
        [f"{row['model']}, {row['map']}", row["variant"].replace("_", " ") or "as in Table III", row["folds"]]
        + [number(row["mean_dice"], 3), *(number(row[key], 4) for key in ("aurc", "aurc_oracle"))]
        + [number(row[f"{key}_pct"], 1) for key in ("ap_mean_curve", "regions_flagged")]
        + [number(row[f"{key}_pct"], 1) for key in ("region_precision", "region_recall", "voxel_sensitivity")]
        for row in rows
    ]
    note = (
        "Detector maps: out-of-fold maps come from the networks that did not see the patient, in-sample maps from the "
        "network that did. See segmentation: its label numbers are the detector's third channel. Members: networks "
        "of other seeds (ensemble), or one network at the end of each learning-rate cycle (snapshots); their mean is "
        "the segmentation, their standard deviation the b-map. Criterion `paper`. The AURC is that of the order by the "
        "disagreement of samples or members; a better segmentation has a lower one in any order, so compare it with "
        "the oracle's."
    )
    header = ["", "variant", "folds", "mean Dice", "AURC of scans", "oracle", "slice AP, mean curve (%)", "flagged (%)"]
    header += ["region precision (%)", "region recall (%)", "failure voxels found (%)"]
    return f"{note}\n\n{markdown(header, lines)}"


def trainings_text(rows: Sequence[Row]) -> str:
    """What each training took."""
    lines = []
    for row in rows:
        budget = [f"{row['iterations']} of {row['of']}", number(row["hours"], 2), "yes" if row["finished"] else "no"]
        elsewhere = row["iterations"] is None
        lines.append([row["training"], row["regime"], *(["", "", ""] if elsewhere else budget)])
    return markdown(["", "regime", "iterations", "hours", "finished"], lines) if lines else "None."


def clusters_text(rows: Sequence[Row]) -> str:
    """Failures by the smallest cluster that counts."""
    lines = [
        [row["model"], row["min_cluster"], row["folds"]]
        + [number(100 * float(row[f"{key}_mean"] or "nan"), 1) for key in ("slices", "share")]
        for row in rows
    ]
    note = (
        "The paper tried these sizes, and gives no figures. Criterion `paper`, except for the size; means over volumes."
    )
    header = ["", "voxels", "folds", "slices failing (%)", "failures among all errors (%)"]
    return f"{note}\n\n{markdown(header, lines)}"
