"""The paper's Figures 3, 4, 7 and 8 from our runs, readable in black and white."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cardiac_qc_plugin.data.predictions import MAP_NAMES
from cardiac_qc_plugin.transforms.regions import REGION_SIZE
from cardiac_qc_plugin.workflows.files import read_rows, write_file, write_rows

from .paper_tables import PAIRS, Experiment, by_run, listed, network_name

__all__ = ["FIGURES", "draw"]

STYLES = {"dn": ":", "drn": "-", "unet": "--"}
SHADES = {"soft_dice": "0.55"}  # the other loss of each network is black
WIDTHS = {4: 0.8, None: 1.4, 16: 2.4}


def curve(experiment: Experiment, name: str, **wanted: str) -> list[dict[str, str]]:
    """Rows of one of an evaluation's curves."""
    rows = read_rows(experiment.folder / name)
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def plot(axes: Axes, rows: Sequence[dict[str, Any]], x: str, y: str, **style: Any) -> None:
    """A line through the rows."""
    points = [(float(row[x]), float(row[y])) for row in rows if row[x] and row[y]]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def style(model: str, loss: str) -> dict[str, str]:
    """Line style by network, shade by loss."""
    return {"linestyle": STYLES[model], "color": SHADES.get(loss, "k")}


def panels(rows: int, columns: int, titles: Sequence[str], x: str, y: str) -> tuple[Figure, list[Axes]]:
    """A figure of panels with one pair of labels."""
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), dpi=150, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each, title in zip(axes, titles, strict=True):
        each.set(title=title, xlabel=x, ylabel=y)
        each.grid(color="0.9")
    return figure, axes


def finish(axes: Sequence[Axes]) -> None:
    """A legend where there is something to name; an empty panel says so."""
    for each in axes:
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, fontsize="small")
        else:
            each.text(0.5, 0.5, "not run", transform=each.transAxes, ha="center", color="0.4")


def detection(experiments: Sequence[Experiment], name: str, x: str, y: str, labels: tuple[str, str]) -> tuple:
    """A panel for each map, a line for each network; and the rows behind them."""
    figure, axes = panels(1, 2, list(MAP_NAMES.values()), *labels)
    known, table = by_run(experiments), []
    for each, short in zip(axes, MAP_NAMES, strict=True):
        for pair in PAIRS:
            experiment = known.get((*pair, short, None))
            rows = curve(experiment, name, criterion="paper") if experiment else []
            plot(each, rows, x, y, label=network_name(*pair), **style(*pair))
            table += [
                {"model": network_name(*pair), "map": MAP_NAMES[short], "folds": listed(experiment.folds), **row}
                for row in rows
            ]
    finish(axes)
    return figure, axes, table


def figure3a(experiments: Sequence[Experiment]) -> tuple[Figure, list[dict[str, Any]]]:
    """Voxel sensitivity against false positive regions."""
    labels = ("false positive regions per volume", "share of failure voxels found")
    figure, axes, table = detection(experiments, "curves/regions.csv", "false_positives", "sensitivity", labels)
    for each in axes:
        each.set_xscale("symlog", linthresh=1)
        each.set(xlim=(0, None), ylim=(0, 1.02))
    return figure, table


def figure3b(experiments: Sequence[Experiment]) -> tuple[Figure, list[dict[str, Any]]]:
    """Precision against recall of slices."""
    labels = ("recall of slices with failures", "precision")
    figure, axes, table = detection(experiments, "curves/slices.csv", "recall", "precision", labels)
    for each in axes:
        each.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return figure, table


def figure4(experiments: Sequence[Experiment]) -> tuple[Figure, list[dict[str, Any]]]:
    """Risk against coverage of voxels: a row of panels for each phase, a column for each group of losses."""
    groups = {
        "CE or Brier": [p for p in PAIRS if p[1] != "soft_dice"],
        "soft-Dice": [p for p in PAIRS if p[1] == "soft_dice"],
    }
    titles = [f"{phase}, {group}" for phase in ("ED", "ES") for group in groups]
    figure, axes = panels(2, 2, titles, "coverage", "wrong voxels per volume")
    known, table = by_run(experiments), []
    for number, each in enumerate(axes):
        phase, pairs = ("ED", "ES")[number // 2], list(groups.values())[number % 2]
        for pair in pairs:
            for short, color in (("emap", "k"), ("bmap", "0.55")):
                experiment = known.get((*pair, short, None))
                rows = curve(experiment, "curves/risk_coverage.csv", map=short, phase=phase) if experiment else []
                label = f"{network_name(*pair)}, {MAP_NAMES[short]}"
                plot(each, rows, "coverage", "risk", label=label, color=color, linestyle=STYLES[pair[0]])
                table += [{"model": network_name(*pair), "folds": listed(experiment.folds), **row} for row in rows]
        each.set(xlim=(0, 1), ylim=(0, None))
    finish(axes)
    return figure, table


def figure7(experiments: Sequence[Experiment]) -> tuple[Figure, list[dict[str, Any]]]:
    """Detection by region size: above sensitivity, below precision and recall; a column for each map."""
    titles = [f"{name}, {what}" for what in ("voxels", "slices") for name in MAP_NAMES.values()]
    figure, axes = panels(2, 2, titles, "false positive regions per volume", "share of failure voxels found")
    sizes, table = by_run(experiments) | by_run(experiments, "region_size"), []
    varied = {run[:3] for run in sizes if run[3] is not None}
    for number, each in enumerate(axes):
        slices, short = number // 2, list(MAP_NAMES)[number % 2]
        name, x, y = (("regions", "false_positives", "sensitivity"), ("slices", "recall", "precision"))[slices]
        for (model, loss, map, size), experiment in sorted(
            sizes.items(), key=lambda item: (*item[0][:3], item[0][3] or REGION_SIZE)
        ):
            if map != short or (model, loss, map) not in varied:
                continue
            rows, width = curve(experiment, f"curves/{name}.csv", criterion="paper"), size or REGION_SIZE
            label = f"{network_name(model, loss)}, {width} x {width}"
            plot(each, rows, x, y, label=label, linewidth=WIDTHS[size], **style(model, loss))
            first = {"model": network_name(model, loss), "map": MAP_NAMES[short], "region_size": width}
            table += [{**first, "curve": name, "folds": listed(experiment.folds), **row} for row in rows]
        if slices:
            each.set(xlabel="recall of slices with failures", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
        else:
            each.set_xscale("symlog", linthresh=1)
            each.set(xlim=(0, None), ylim=(0, 1.02))
    finish(axes)
    return figure, table


def figure8(experiments: Sequence[Experiment]) -> tuple[Figure, list[dict[str, Any]]]:
    """Share of the errors that are failures by tolerance: outside, and inside the structures."""
    figure, axes = panels(1, 2, ["outside", "inside"], "tolerance (voxels)", "share of failures among all errors")
    table = []
    for (model, loss, map, _), experiment in by_run(experiments, "labels").items():
        rows = curve(experiment, "tolerance.csv")
        first = {"model": network_name(model, loss, map), "folds": listed(experiment.folds)}
        table += [{**first, **row} for row in rows]
        for each, side, chosen in zip(axes, ("outside", "inside"), (3, 2), strict=True):
            own = [row for row in rows if row["side"] == side]
            label, width = network_name(model, loss, map), 1.4 if map == "emap" else 0.7
            plot(each, own, "tolerance", "share_mean", label=label, linewidth=width, **style(model, loss))
            each.axvline(chosen, color="0.8", linewidth=3, zorder=0)
            each.set(ylim=(0, 1.02))
    finish(axes)
    return figure, table


FIGURES: dict[str, tuple[Callable, str]] = {
    "figure3a": (
        figure3a,
        "Figure 3a. Sensitivity for failure voxels against the number of false positive regions, mean over volumes. "
        "Line style: network; black: cross-entropy or Brier, grey: soft-Dice. Labels by the criterion `paper`; the CSV "
        "has the curves of the criterion `paper`, each evaluation's folder those of `released_code` as well.",
    ),
    "figure3b": (
        figure3b,
        "Figure 3b. Precision against recall of slices with failures, mean over volumes; lines as in Figure 3a.",
    ),
    "figure4": (
        figure4,
        "Figure 4. Wrong voxels that are left when the most uncertain voxels around the heart are referred, mean over "
        "volumes. Line style: network; black: e-map, grey: b-map.",
    ),
    "figure7": (
        figure7,
        "Figure 7. Detection with regions of 4, 8 and 16 voxels: the wider the line, the larger the region. Above: "
        "failure voxels; below: slices.",
    ),
    "figure8": (
        figure8,
        "Figure 8. Share of the errors that are failures by tolerance, mean over volumes; the bar marks the "
        "tolerance of all other results. Lines as in Figure 3a; thin: mean of samples. The paper shows networks "
        "trained with soft-Dice.",
    ),
}
"""Function and caption of each figure."""


def draw(folder: Path, experiments: Sequence[Experiment]) -> dict[str, bool]:
    """Write every figure that has a line as PNG and SVG, and the numbers behind it as CSV.

    Args:
        folder: where to write.
        experiments: what was measured.

    Returns:
        Whether each figure has anything to show.
    """
    shown = {}
    for name, (function, _) in FIGURES.items():
        figure, table = function(experiments)
        shown[name] = bool(table)
        for suffix in ("png", "svg"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
            if table:
                write_file(folder / f"{name}.{suffix}", figure.savefig)
        write_rows(folder / f"{name}.csv", table)
    return shown
