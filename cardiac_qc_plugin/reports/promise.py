"""Promises in words: what can be promised, and how promises were kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .case_page import promised
from .evaluation import NAMES, number, table

__all__ = ["calibration_text", "promise_text"]


def promise_text(promise: Any) -> str:
    """A promise in words, for the terminal.

    Args:
        promise: a `cardiac_qc_plugin.workflows.calibrate.Promise`.
    """
    found = (
        f"regions of probability {promise.threshold:.4f} or more are flagged. In {promise.n_patients} patients "
        f"({promise.source}) that caught {100 * promise.caught:.1f} % of the failure voxels with "
        f"{promise.regions_per_patient:.1f} regions per patient."
    )
    return f"Promise: {promised(asdict(promise))}; {found}"


def calibration_text(
    calibration: Any,
    done: str,
    promises: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
) -> str:
    """What `cardiac_qc_plugin.workflows.calibrate.calibrate` prints.

    Args:
        calibration: the patients' curves.
        done: where they were written, or that they were not.
        promises: promises, or why they cannot be made.
        rows: how promises were kept on other patients.
        failures: messages by case.
    """
    without = int((calibration.failure_voxels == 0).sum())
    parts = [
        f"Calibration for the {calibration.model} and the {NAMES[calibration.map]} on {len(calibration.patients)} "
        f"patient(s) ({calibration.source}), {without} of them without a failure. {done}",
        *_made([promise for promise in promises if not isinstance(promise, str)]),
        *(promise for promise in promises if isinstance(promise, str)),
    ]
    if rows:
        lines = [
            [_asked(row), row["design"], number(float(row["promised"]), 0, 100)]
            + [number(row.get("kept"), 1, 100) + (f" ± {100 * row['kept_sd']:.1f}" if "kept_sd" in row else "")]
            + [number(row.get("regions_per_patient"), 1), number(row.get("regions_flagged"), 2, 100)]
            for row in rows
        ]
        header = ["promise", "calibration / test patients", "could be made (%)", "kept (%)", "regions per patient"]
        parts += ["## How promises are kept on the test patients", table([*header, "regions flagged (%)"], lines)]
    if failures:
        parts.append("\n".join(f"FAILED {case}: {message}" for case, message in failures.items()))
    return "\n\n".join(parts) + "\n"


def _made(promises: Sequence[Any]) -> list[str]:
    """What can be promised, and what that means for these patients."""
    lines = [
        [_asked({"kind": p.kind, "target": p.target}), f"{p.threshold:.4f}"]
        + [number(p.caught, 1, 100), number(p.regions_per_patient, 1)]
        for p in promises
    ]
    header = ["promise", "threshold", "failure voxels caught (%)", "regions per patient"]
    return [table(header, lines)] if lines else []


def _asked(row: Mapping[str, Any]) -> str:
    if row["kind"] == "catch":
        return f"catch {100 * row['target']:g} % of the failure voxels"
    return f"no more regions than {row['target']:g}"
