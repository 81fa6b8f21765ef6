"""The cohort's report: one HTML page next to the case folders, without scripts, needing no network."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex

from cardiac_qc_plugin.metrics.plausibility import CRITERIA
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.workflows.files import write_text

from .cine import describe_cine
from .pictures import CONTOURS, FLAG_COLOR, MAP_COLORS, MAP_NAMES, MAP_TOP, regions_by_slice, write_pictures

__all__ = ["write_report"]


def write_report(
    output: Path,
    cases: Sequence[Mapping[str, Any]],
    failures: Sequence[tuple[str, str]] = (),
    cines: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write ``<output>/report.html``: worklist (most urgent first), flagged slices of each case, settings.

    Draws each case's pictures first, see :func:`~cardiac_qc_plugin.reports.pictures.write_pictures`. Links are
    relative: the folder can be moved or sent as a whole. The page counts slices from 1.

    Args:
        output: the cohort's folder, in which each case has a folder of its name.
        cases: content of ``qc.json`` of each case.
        failures: case and reason, for each case that could not be processed.
        cines: content of ``cine.json`` of each heart with end-diastole and end-systole.

    Returns:
        The page.

    Raises:
        ValueError: if a case's files cannot be drawn; the message names the file.
    """
    environment = Environment(
        loader=PackageLoader("cardiac_qc_plugin", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value, digits: "–" if value is None else f"{value:.{digits}f}"
    ordered = sorted(cases, key=lambda qc: -qc["scores"]["urgency"])
    page = environment.get_template("report.html").render(
        cases=[_with_slices(output, qc) for qc in ordered],
        failures=failures,
        cines=[_with_figure(output, cine) for cine in cines],
        settings=Counter(_settings(qc) for qc in ordered).most_common(),
        classes=list(CLASS_NAMES.values()),
        contours=CONTOURS,
        flag_color=FLAG_COLOR,
        map_colors=[to_hex(color) for color in colormaps[MAP_COLORS](np.linspace(0, 1, 9))],
        map_top=MAP_TOP,
        csv=(output / "worklist.csv").is_file(),
        today=date.today().isoformat(),
    )
    write_text(output / "report.html", page)
    return output / "report.html"


def _with_slices(output: Path, qc: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a case: its ``qc.json``, and its flagged slices with their pictures."""
    flagged, pictures = regions_by_slice(qc), write_pictures(output / qc["case"])
    slices = [
        {
            "number": index + 1,
            "regions": len(regions),
            "probability": max(region["probability"] for region in regions),
            "link": quote(path.relative_to(output).as_posix()),
        }
        for (index, regions), path in zip(flagged.items(), pictures, strict=True)
    ]
    violations = qc["segmentation"].get("plausibility", {}).get("violations", {})
    implausible = "; ".join(
        f"{CRITERIA[name]} (slice {', '.join(str(z + 1) for z in found)})" for name, found in violations.items()
    )
    return {"qc": qc, "slices": slices, "implausible": implausible}


def _with_figure(output: Path, cine: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a heart: a sentence, and the volumes over time where there are more than two phases."""
    figure = output / cine["case"] / "cine.png"
    link = quote(figure.relative_to(output).as_posix()) if figure.is_file() else None
    return {**cine, "text": describe_cine(cine), "link": link}


def _settings(qc: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a case was made with; cases of one run share it."""
    segmentation, detection = qc["segmentation"], qc["detection"]
    return (
        ("Segmentation", _bundle(segmentation)),
        ("Failure detection", _bundle(detection)),
        ("Uncertainty map", MAP_NAMES[detection["map"]]),
        ("Monte Carlo samples", f"{segmentation['samples']} (seed {segmentation['seed']})"),
        ("Region", f"{detection['region_size']} × {detection['region_size']} pixels"),
        ("Flagged from probability", f"{detection['threshold']:g}"),
        ("Software", ", ".join(f"{name} {version}" for name, version in qc["versions"].items())),
    )


def _bundle(stage: Mapping[str, Any]) -> str:
    return f"{stage['bundle']} {stage['bundle_version']} (weights {stage['weights_sha256'][:12]})"
