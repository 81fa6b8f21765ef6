"""A cine's volumes over the heart cycle, as a figure and as a sentence."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

__all__ = ["describe_cine", "draw_volumes"]

COLORS = {"LV": "#009E73", "RV": "#0072B2", "LVM": "#B8860B"}


def draw_volumes(record: Mapping[str, Any]) -> Figure:
    """Volumes of LV, RV and LVM by phase, with end-diastole, end-systole and jumps marked.

    Args:
        record: content of ``cine.json``.
    """
    curve = record["curve"]
    timed = all("trigger_time_ms" in point for point in curve)
    axis = {point["phase"]: point["trigger_time_ms" if timed else "phase"] for point in curve}
    figure = Figure(figsize=(6, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, color in COLORS.items():
        axes.plot(axis.values(), [point[f"{name}_ml"] for point in curve], "o-", color=color, label=name, markersize=3)
    for phase, label in ((record["ed_phase"], "ED"), (record["es_phase"], "ES")):
        if phase is not None:
            axes.axvline(axis[phase], color="0.6", linewidth=1, zorder=0)
            axes.annotate(label, (axis[phase], 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    by_phase = {point["phase"]: point for point in curve}
    jumps = [(axis[jump["phase"]], by_phase[jump["phase"]][f"{jump['structure']}_ml"]) for jump in record["jumps"]]
    if jumps:
        axes.plot(*zip(*jumps, strict=True), "o", color="#D55E00", fillstyle="none", markersize=10, label="jump")
    axes.set(xlabel="time after the R wave (ms)" if timed else "phase", ylabel="volume (ml)", ylim=(0, None))
    axes.grid(color="0.9")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.04))
    return figure


def describe_cine(record: Mapping[str, Any]) -> str:
    """The indices in a sentence: "LV EF 41 % (38-45), EDV 198 ml ...; slices flagged: 3 at ED (2 basal, 1 apical)"."""
    if not record["indices"]:
        return "no LV found, so no indices"
    parts = []
    for key, label, unit in (
        ("lv_ef_percent", "LV EF", "%"),
        ("lv_edv_ml", "EDV", "ml"),
        ("lv_esv_ml", "ESV", "ml"),
        ("rv_ef_percent", "RV EF", "%"),
        ("lvm_mass_g", "LVM", "g"),
    ):
        value, interval = record["indices"][key], record["intervals"].get(key)
        text = "not defined" if value is None else f"{value:.0f} {unit}"
        parts.append(f"{label} {text}" + (f" ({interval[0]:.0f}-{interval[1]:.0f})" if interval else ""))
    text = ", ".join(parts)
    if record["flagged_slices"]:
        counts = []
        for phase, slices in record["flagged_slices"].items():
            levels = ", ".join(f"{n} {level}" for level, n in record["flagged_levels"].get(phase, {}).items())
            counts.append(f"{len(slices)} at {phase.upper()}" + (f" ({levels})" if levels else ""))
        text += "; slices flagged: " + ", ".join(counts)
    if record["jumps"]:
        text += "; volume jumps at phase " + ", ".join(str(p) for p in sorted({j["phase"] for j in record["jumps"]}))
    return text
