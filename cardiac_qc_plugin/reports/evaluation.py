"""Text and figures of an evaluation."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cardiac_qc_plugin.data.predictions import MAP_NAMES
from cardiac_qc_plugin.metrics.detection import RegionCurve, SlicePrecisionRecall
from cardiac_qc_plugin.metrics.plausibility import CRITERIA

from . import cine

__all__ = ["draw_coverage", "draw_regions", "draw_slices", "summary_text"]

NAMES = {**MAP_NAMES, **{f"mean_{map}": f"mean {name}" for map, name in MAP_NAMES.items()}}
METRICS = {
    "dice": ("Dice", 3),
    "hausdorff": ("HD (mm)", 1),
    "hausdorff_penalized": ("HD, missing = diagonal (mm)", 1),
}


def summary_text(summary: Mapping[str, Any]) -> str:
    """``summary.md`` from the content of ``summary.json``.

    Args:
        summary: as `cardiac_qc_plugin.workflows.evaluate` writes it; numbers that do not exist are None.
    """
    settings = summary["settings"]
    parts = [
        "# Evaluation",
        f"`{settings['predictions']}` against `{settings['reference']}`: {summary['n_cases']} case(s), "
        f"{summary['n_patients']} patient(s) with end-diastole (ED) and end-systole (ES). "
        "Mean ± standard deviation.",
        *_segmentation(summary["segmentation"], summary["mean_dice"]),
        *_clinical(summary["clinical"], "Clinical indices, automatic - reference"),
        *_intervals(summary["intervals"]),
        *_detection(summary["detection"]),
        *_coverage(summary["risk_coverage"]),
        *_scans(summary["scan_level"]),
        *_plausibility(summary["plausibility"]),
    ]
    if "comparison" in summary:
        parts += _comparison(summary["comparison"], settings["compare"])
    if summary["failed"]:
        failed = [f"- {case}: {message}" for case, message in summary["failed"].items()]
        parts += [f"## Failed: {len(failed)}", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _segmentation(phases: Mapping[str, Any], mean_dice: Mapping[str, Any]) -> list[str]:
    cells = [(phase, name, cell) for phase, own in phases.items() for name, cell in own.items()]
    missing = sum(cell["n_missing"] for *_, cell in cells)
    rows = [
        [METRICS[metric][0], *(spread(cell[metric], METRICS[metric][1]) for *_, cell in cells)]
        for metric in _shown(missing)
    ]
    rows.append(["n (Dice, HD)", *(f"{cell['dice']['n']}, {cell['hausdorff']['n']}" for *_, cell in cells)])
    rows.append(["n missing", *(str(cell["n_missing"]) for *_, cell in cells)])
    parts = ["## Segmentation", table(["", *(f"{name} {phase}" for phase, name, _ in cells)], rows)]
    if mean_dice["cells"]:
        parts.append(f"Mean of the {mean_dice['cells']} Dice means at ED and ES: {number(mean_dice['mean'], 3)}.")
    if missing:
        parts.append("Missing: only one of the two has the structure. Dice 0, and not part of the mean HD.")
    return parts


def _shown(missing: int) -> list[str]:
    """The metrics to print: with nothing missing, the penalized Hausdorff distance is the plain one."""
    return [metric for metric in METRICS if missing or metric != "hausdorff_penalized"]


def _clinical(indices: Mapping[str, Any], title: str) -> list[str]:
    labels = {name.rpartition("_")[0]: label for name, label in cine.INDICES.items()}  # without the unit
    rows = [
        [
            labels[key],
            number(entry["r"], 3),
            spread({"mean": entry["bias"], "sd": entry["sd"]}, 1),
            number(entry["mae"], 1),
            f"{entry['n']}",
        ]
        for key, entry in indices.items()
    ]
    return [f"## {title}", table(["", "r", "bias ± SD", "MAE", "n"], rows)] if rows else []


def _intervals(indices: Mapping[str, Any]) -> list[str]:
    rows = [
        [cine.INDICES[name], number(entry["coverage"], 1, 100), number(entry["mean_width"], 1), f"{entry['n']}"]
        for name, entry in indices.items()
    ]
    note = "How often the 95 % interval from the Monte Carlo samples has the reference's value in it."
    header = ["", "covered (%)", "mean width", "n"]
    return ["## Intervals of the clinical indices", note, table(header, rows)] if rows else []


def _detection(detection: Mapping[str, Any]) -> list[str]:
    if not detection:
        return []
    columns = list(detection["criteria"].values())
    precision = [column["slice_average_precision"] for column in columns]
    rows = [
        [
            "slices with failures, mean per volume (%)",
            *(number(c["slices_failing_percent"], 1) for c in columns),
        ],
        [
            "regions with failures, mean per volume (%)",
            *(number(c["regions_failing_percent"], 2) for c in columns),
        ],
        ["slice AP, mean over patients", *(spread(p["per_patient"], 3) for p in precision)],
        ["slice AP of the mean curve", *(number(p["mean_curve"], 3) for p in precision)],
        ["slice AP, all slices pooled", *(number(p["pooled"], 3) for p in precision)],
        [
            "patients without a failing slice, so no AP",
            *(str(p["per_patient"]["n_excluded"]) for p in precision),
        ],
    ]
    points = [column["operating_point"] for column in columns]
    at_threshold = [
        ("failure voxels found, mean per volume (%)", "voxel_sensitivity", 100, 1),
        ("false positive regions per volume", "false_positive_regions", 1, 1),
        ("regions flagged (%)", "regions_flagged", 100, 2),
        ("region precision (%)", "region_precision", 100, 1),
        ("region recall (%)", "region_recall", 100, 1),
        ("slices flagged (%)", "slices_flagged", 100, 1),
        ("slice precision (%)", "slice_precision", 100, 1),
        ("slice recall (%)", "slice_recall", 100, 1),
        ("failure voxels outside the detector's crop (%)", "failure_voxels_outside", 100, 1),
    ]
    rows += [
        [label, *(number(point[key], digits, scale) for point in points)] for label, key, scale, digits in at_threshold
    ]
    thresholds = ", ".join(f"{threshold:.3g}" for threshold in detection["thresholds"])
    return [
        "## Detection of failures",
        f"{detection['n_cases']} case(s); flagged means a probability of at least {thresholds}, "
        "chosen before this evaluation.",
        table(["criterion", *detection["criteria"]], rows),
    ]


def _coverage(maps: Mapping[str, Any]) -> list[str]:
    rows = [
        [f"{NAMES[name]} {phase}"]
        + [spread(entry[key], digits) for key, digits in (("area", 0), ("normalized_area", 3))]
        + [number(entry["best_normalized_area"]["mean"], 3), f"{entry['area']['n']}"]
        for name, phases in maps.items()
        for phase, entry in phases.items()
    ]
    header = ["", "area (voxels)", "normalized", "best possible", "n"]
    note = (
        "Area under the risk-coverage curve of the voxels around the heart. Divided by the number of wrong "
        "voxels it is 0.5 for a map without information."
    )
    return ["## Uncertainty and errors", note, table(header, rows)] if rows else []


def _scans(scores: Mapping[str, Any]) -> list[str]:
    rows = [
        [NAMES.get(name, name)]
        + [number(entry[key], digits) for key, digits in (("aurc", 4), ("oracle", 4), ("random", 4), ("pearson", 3))]
        + [f"{entry['n']}"]
        for name, entry in scores.items()
    ]
    header = ["score", "AURC", "oracle", "random order", "r with 1 - mean Dice", "n"]
    return ["## Scores of whole scans", table(header, rows)] if rows else []


def _comparison(comparison: Mapping[str, Any], other: str) -> list[str]:
    shown = _shown(sum(cell["n_excluded"] for cell in comparison["cells"]))
    rows = [
        [f"{METRICS[cell['metric']][0]} {cell['structure']} {cell['phase']}"]
        + [spread(cell[side], METRICS[cell["metric"]][1]) for side in ("before", "after")]
        + [number(cell["mean_difference"], 3)]
        + [p_value(cell[key]) for key in ("mann_whitney_p", "wilcoxon_p")]
        + [f"{cell['n']}", f"{cell['n_excluded']}"]
        for cell in comparison["cells"]
        if cell["metric"] in shown
    ]
    header = ["", "before", "after", "difference", "p (Mann-Whitney U)", "p (Wilcoxon)", "n", "not paired"]
    fell = f"The mean HD fell in {comparison['hausdorff_fell']} of {comparison['hausdorff_cells']} cells."
    return [
        f"## Before and after: `{other}`",
        f"{comparison['n_cases']} case(s). {fell}",
        table(header, rows),
        *_clinical(comparison["clinical"], "Clinical indices after, automatic - reference"),
        *_plausibility(comparison["plausibility"]),
    ]


def _plausibility(sides: Mapping[str, Any]) -> list[str]:
    """Implausible volumes and slices, and slices by criterion, of two sets of masks side by side."""
    results = list(sides.values())
    rows = [
        [label, *(f"{result[key]} of {result[total]}" for result in results)]
        for label, key, total in (
            ("implausible volumes", "implausible_cases", "n_cases"),
            ("implausible slices", "implausible_slices", "n_slices"),
        )
    ]
    rows += [
        [text, *(str(result["criteria"][name]) for result in results)]
        for name, text in CRITERIA.items()
        if any(result["criteria"][name] for result in results)
    ]
    note = "Anatomical plausibility: slices in which a criterion is violated. See docs/cine.md for the criteria."
    return [f"## Plausibility: {' and '.join(sides)}", note, table(["", *sides], rows)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for a terminal as well."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )


def number(value: float | None, digits: int, scale: float = 1) -> str:
    return "–" if value is None else f"{round(scale * value, digits) + 0.0:.{digits}f}"  # no -0


def spread(entry: Mapping[str, float | None], digits: int) -> str:
    """Mean ± standard deviation."""
    return f"{number(entry['mean'], digits)} ± {number(entry['sd'], digits)}"


def marks(row: Mapping[str, Any], star: str = "*") -> str:
    """A sign after a number for each test, the paper's first, that finds it significantly changed."""
    tests = ((star, "mann_whitney_p"), ("†", "wilcoxon_p"))
    return "".join(f" {sign}" for sign, key in tests if (p := row.get(key)) is not None and p <= 0.05)


def p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def draw_regions(curve: RegionCurve, point: RegionCurve) -> Figure:
    """Voxel sensitivity against false positive regions (Fig. 3a), the operating point marked."""
    figure, axes = _axes("false positive regions per volume", "failure voxels found (%)")
    axes.plot(curve.false_positives, 100 * curve.sensitivity, "k-")
    _mark(axes, point.false_positives, 100 * point.sensitivity)
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlim=(0, None), ylim=(0, 102))
    axes.xaxis.set_major_formatter("{x:g}")
    return figure


def draw_slices(curve: SlicePrecisionRecall, point: SlicePrecisionRecall, average_precision: float) -> Figure:
    """Precision against recall of slices with failures (Fig. 3b), the operating point marked."""
    figure, axes = _axes("recall of slices with failures (%)", "precision (%)")
    label = f"mean over volumes, AP {average_precision:.3f}"
    axes.plot(100 * curve.recall, 100 * curve.precision, "k-", label=label)
    _mark(axes, 100 * point.recall, 100 * point.precision)
    axes.set(xlim=(0, 102), ylim=(0, 102))
    return figure


def draw_coverage(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean number of wrong voxels against coverage, a panel for each phase (Fig. 4).

    Args:
        rows: map, phase, coverage in [0, 1] and risk of each point; coverage ascends.
    """
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    figure = Figure(figsize=(4 * len(phases), 3.6), dpi=150, layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        for name, style in (("emap", "k-"), ("bmap", "k--")):
            points = [(100 * r["coverage"], r["risk"]) for r in rows if (r["map"], r["phase"]) == (name, phase)]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=NAMES[name])
                errors = points[-1][1]
        axes.plot((0, 100), (0, errors), ":", color="0.5", label="no information")
        axes.set(xlabel="coverage (%)", title=phase, xlim=(0, 100), ylim=(0, None))
        axes.grid(color="0.9")
    figure.axes[0].set_ylabel("wrong voxels per volume")
    figure.axes[0].legend(frameon=False)
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.5, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color="0.9")
    return figure, axes


def _mark(axes: Axes, x: ArrayLike, y: ArrayLike) -> None:
    axes.plot(x, y, "o", color="k", markerfacecolor="w", clip_on=False, label="operating point")
    axes.legend(frameon=False, loc="lower right")
