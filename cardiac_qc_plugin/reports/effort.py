"""Text and figure of effort against gain."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from cardiac_qc_plugin.reports.evaluation import NAMES, number, table

__all__ = ["draw_effort", "effort_text"]

STYLES = {  # by order and whether it is of the first map: readable without colors
    ("detector", True): {"color": "k", "linestyle": "-", "marker": "o"},
    ("detector", False): {"color": "0.5", "linestyle": "-", "marker": "s"},
    ("uncertainty", True): {"color": "k", "linestyle": "--", "marker": "o", "markerfacecolor": "w"},
    ("uncertainty", False): {"color": "0.5", "linestyle": "--", "marker": "s", "markerfacecolor": "w"},
    ("random", True): {"color": "k", "linestyle": ":"},
    ("oracle_dice", True): {"color": "k", "linestyle": "-.", "marker": "^", "markerfacecolor": "w"},
    ("oracle_failures", True): {"color": "0.5", "linestyle": "-.", "marker": "v", "markerfacecolor": "w"},
}
HEADER = ("order", "regions per patient", "Dice", "HD (mm)", "Dice gain", "HD gain", "failures caught", "slices")
SCOPES = {"patient": "So many regions of each patient", "cohort": "As many regions on average, over the cohort"}


def order_name(order: str, map: str) -> str:
    """An order of the regions in words."""
    return {
        "detector": f"detector, {NAMES[map]}",
        "uncertainty": f"mean {NAMES[map]}, no detector",
        "random": "random",
        "oracle_dice": "oracle, Dice gain",
        "oracle_failures": "oracle, failure voxels",
    }[order]


def draw_effort(rows: Sequence[Mapping[str, Any]], all_failures: Mapping[str, float]) -> Figure:
    """Dice coefficient and Hausdorff distance against the regions reviewed of each patient.

    Args:
        rows: as `cardiac_qc_plugin.workflows.effort` writes them to ``effort.csv``.
        all_failures: the two with all failures of the first map corrected, and no other voxel.
    """
    figure = Figure(figsize=(9.5, 4.2), dpi=150, layout="constrained")
    first = rows[0]["map"]
    panels = zip(
        figure.subplots(1, 2), ("dice", "hausdorff_mm"), ("mean Dice coefficient", "mean HD (mm)"), strict=True
    )
    for axes, key, label in panels:
        own = [row for row in rows if row["scope"] == "patient"]
        for map, order in dict.fromkeys((row["map"], row["order"]) for row in own):
            points = [row for row in own if (row["map"], row["order"]) == (map, order) and not row["all_regions"]]
            x, y = ([row[name] for row in points] for name in ("regions_per_patient", key))
            axes.plot(x, y, label=order_name(order, map), markersize=4, **STYLES[order, map == first])
            if f"{key}_sd" in points[0]:
                low, high = ([row[key] + sign * row[f"{key}_sd"] for row in points] for sign in (-1, 1))
                axes.fill_between(x, low, high, color="0.85")
        axes.axhline(all_failures[key], color="k", linewidth=0.8, label=f"all failures, {NAMES[first]}")
        axes.set(xlabel="regions reviewed per patient (ED and ES together)", ylabel=label, xlim=(0, None))
        axes.grid(color="0.9")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def effort_text(summary: Mapping[str, Any]) -> str:
    """``summary.md`` from the content of ``summary.json``.

    Args:
        summary: as `cardiac_qc_plugin.workflows.effort` writes it; numbers that do not exist are None.
    """
    parts = ["# Effort against gain"]
    for own in summary["sets"]:
        start, end = (
            next(row for row in summary["after"] if row["map"] == own["map"] and test(row))
            for test in (lambda row: not row["regions_per_patient"], lambda row: row["all_regions"])
        )
        parts.append(
            f"{NAMES[own['map']]}, {own['n_patients']} patient(s), {own['n_cases']} volume(s): `{own['predictions']}`. "
            f"Mean Dice {number(start['dice'], 3)}, mean HD {number(start['hausdorff_mm'], 1)} mm. With all failures "
            f"corrected and no other voxel {number(own['all_failures']['dice'], 3)} and "
            f"{number(own['all_failures']['hausdorff_mm'], 1)} mm; with all {end['regions_per_patient']:.0f} regions "
            f"of a patient reviewed {number(end['dice'], 3)} and {number(end['hausdorff_mm'], 1)} mm."
        )
    parts.append(
        "Gain: share of what the correction of all failures gains; it can be above 100 %, since a reviewed region also "
        "loses its tolerated errors. Failures caught: share of a patient's "
        "failure voxels that lie in reviewed regions, mean over the patients that have any. Slices: those that have to "
        "be opened, per patient. Each reviewed region takes the reference."
    )
    asked = sorted({row["regions_per_patient"] for row in summary["after"] if not row["all_regions"]} - {0})
    for scope, title in SCOPES.items():
        own = [row for row in summary["after"] if row["scope"] == scope]
        lines = [
            [order_name(order, map), f"{row['regions_per_patient']:.0f}", number(row["dice"], 3)]
            + [number(row["hausdorff_mm"], 1)]
            + [f"{number(row[key], 0, 100)} %" for key in ("dice_share", "hausdorff_share", "caught")]
            + [number(row["slices"], 1)]
            for map, order in dict.fromkeys((row["map"], row["order"]) for row in own)
            for row in own
            if (row["map"], row["order"]) == (map, order) and row["regions_per_patient"] in asked
        ]
        parts += [f"## {title}", table(HEADER, lines)]
    if summary["failed"]:
        parts += [f"## Failed: {len(summary['failed'])}"]
        parts += ["\n".join(f"- {case}: {message}" for case, message in summary["failed"].items())]
    return "\n\n".join(parts) + "\n"
