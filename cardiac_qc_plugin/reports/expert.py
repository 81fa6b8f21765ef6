"""Text of the comparison of automatic, simulated and expert's corrections, beside the paper's Table IV."""

from collections.abc import Mapping, Sequence
from typing import Any

from cardiac_qc_plugin.reports.evaluation import marks, p_value, spread, table

__all__ = ["expert_text"]

METRICS = {"dice": ("Dice coefficient", 3, 2), "hausdorff": ("Hausdorff distance (mm)", 1, 1)}  # digits, the paper's
STAR = "\\*"  # not Markdown's
NAMES = {"auto": "auto", "simulated": "auto + simulation", "expert": "auto + expert"}


def expert_text(summary: Mapping[str, Any]) -> str:
    """``summary.md`` from the content of ``summary.json``.

    Args:
        summary: as `cardiac_qc_plugin.workflows.compare_expert` writes it; numbers that do not exist are None.
    """
    settings, changed = summary["settings"], summary["n_voxels_changed"]
    total = summary["n_cases"] + len(summary["not_edited"]) + len(summary["failed"])
    parts = [
        "# Automatic segmentation, simulated correction, expert's correction",
        f"{summary['n_cases']} of {total} cases of `{settings['predictions']}`, {summary['n_patients']} patient(s): "
        f"those that have a mask in `{settings['expert']}`. The expert changed {changed['expert']} voxels, the "
        f"simulation {changed['simulated']}; edited outside flagged regions and dropped: "
        f"{summary['n_voxels_dropped']}.",
        "Mean ± standard deviation. \\* p <= 0.05 against auto by Mann-Whitney U, as in the paper; † by Wilcoxon's "
        "signed-rank test, which is for paired data. Paper: Table IV, 50 patients, U-net with cross-entropy, e-maps.",
    ]
    for metric, (title, digits, theirs) in METRICS.items():
        rows = [row for row in summary["table4"] if row["metric"] == metric]
        cells = list(dict.fromkeys((row["structure"], row["phase"]) for row in rows))
        lines = []
        for scenario, name in NAMES.items():
            own = {(row["structure"], row["phase"]): row for row in rows if row["scenario"] == scenario}
            lines.append([name, *(spread(own[cell], digits) + marks(own[cell], STAR) for cell in cells)])
            lines.append([f"{name}, paper", *(_theirs(own[cell], digits, theirs) for cell in cells)])
        lines.append(["n", *(str(own[cell]["n"]) for cell in cells)])
        parts += [f"## {title}", table(["", *(f"{name} {phase}" for name, phase in cells)], lines)]
        parts += [_tests(rows, cells)]
    excluded = {m: sum(row["n_excluded"] for row in summary["table4"] if row["metric"] == m) for m in METRICS}
    if missing := excluded["hausdorff"] - excluded["dice"]:
        parts.append(
            f"{missing} times a structure is in only one of the two masks: Dice 0, and not part of the mean distance; "
            "in `table4.csv`, `hausdorff_penalized` has the diagonal of the scan instead."
        )
    if summary["failed"]:
        parts.append("\n".join(f"FAILED {case}: {message}" for case, message in summary["failed"].items()))
    return "\n\n".join(parts) + "\n"


def _theirs(row: Mapping[str, Any], digits: int, sd_digits: int) -> str:
    if row.get("paper_mean") is None:
        return "–"
    return f"{row['paper_mean']:.{digits}f} ± {row['paper_sd']:.{sd_digits}f}" + f" {STAR}" * row["paper_significant"]


def _tests(rows: Sequence[Mapping[str, Any]], cells: Sequence[tuple[str, str]]) -> str:
    """The p values of both tests."""
    lines = [
        [f"p, {NAMES[scenario]}, {title}"]
        + [
            p_value(row[key])
            for cell in cells
            for row in rows
            if row["scenario"] == scenario and (row["structure"], row["phase"]) == cell
        ]
        for scenario in ("simulated", "expert")
        for key, title in (("mann_whitney_p", "Mann-Whitney U"), ("wilcoxon_p", "Wilcoxon"))
    ]
    return table(["against auto", *(f"{name} {phase}" for name, phase in cells)], lines)
