"""A heart's indices: as a sentence, and as the pages show them."""

from collections.abc import Mapping
from typing import Any

__all__ = ["INDICES", "describe_cine", "index_rows", "volume_curve"]

INDICES = {
    "lv_edv_ml": "LV EDV (ml)",
    "lv_esv_ml": "LV ESV (ml)",
    "lv_sv_ml": "LV SV (ml)",
    "lv_ef_percent": "LV EF (%)",
    "rv_edv_ml": "RV EDV (ml)",
    "rv_esv_ml": "RV ESV (ml)",
    "rv_sv_ml": "RV SV (ml)",
    "rv_ef_percent": "RV EF (%)",
    "lvm_mass_g": "LVM mass (g)",
}


def index_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The indices of a ``cine.json`` with their interval and their value by body surface area, None where unknown."""
    values, intervals = record["indices"], record["intervals"]
    return [
        {
            "label": label,
            "value": values[name],
            "interval": intervals.get(name),
            "by_area": values.get(f"{name}_per_m2"),
        }
        for name, label in INDICES.items()
        if name in values
    ]


def volume_curve(record: Mapping[str, Any], phase: int) -> dict[str, Any] | None:
    """What the chart of a ``cine.json`` shows on the page of one of its phases; None for fewer than three phases."""
    curve = record["curve"]
    if len(curve) < 3:
        return None
    timed = all("trigger_time_ms" in point for point in curve)
    x = {point["phase"]: point["trigger_time_ms" if timed else "phase"] for point in curve}
    marks = ((record["ed_phase"], "ED"), (record["es_phase"], "ES"))
    return {
        "axis": "time after the R wave (ms)" if timed else "phase",
        "x": list(x.values()),
        "volumes": {name: [point[f"{name}_ml"] for point in curve] for name in ("LV", "RV", "LVM")},
        "marks": [{"x": x[number], "label": label} for number, label in marks if number is not None],
        "jumps": [{"x": x[jump["phase"]], "structure": jump["structure"]} for jump in record["jumps"]],
        "here": x[phase],
    }


def describe_cine(record: Mapping[str, Any]) -> str:
    """The indices in a sentence: "LV EF 41 % (38 to 45), EDV 198 ml ...; slices flagged: 3 at ED (2 basal)"."""
    if not record["indices"]:
        return "end-diastole and end-systole are not known, so no indices"
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
        parts.append(f"{label} {text}" + (f" ({interval[0]:.0f} to {interval[1]:.0f})" if interval else ""))
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
