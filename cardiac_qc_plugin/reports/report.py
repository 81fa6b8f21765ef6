"""The cohort's report: one HTML page next to the case folders, without scripts, needing no network."""

import os
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

from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.reports import pictures
from cardiac_qc_plugin.workflows.files import write_text

__all__ = ["write_report"]

QC = Mapping[str, Any]


def write_report(
    output: Path, rows: Sequence[tuple[Path, QC]], failures: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write ``<output>/report.html``: worklist (most urgent first), flagged slices of each case, settings.

    The page shows the pictures that :func:`~cardiac_qc_plugin.reports.pictures.write_pictures` has drawn. Its
    links are relative: the folder can be moved or sent as a whole. It counts slices from 1.

    Args:
        output: the cohort's folder.
        rows: case folder and content of its ``qc.json``, for each case.
        failures: case and reason, for each case that could not be processed.

    Returns:
        The page.

    Raises:
        ValueError: if the detection has not run on a case, or a picture is missing.
    """
    environment = Environment(
        loader=PackageLoader("cardiac_qc_plugin", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    # an undefined urgency comes first: it must not look harmless
    ordered = sorted(rows, key=lambda row: (-_or_infinite(row[1]["scores"]["urgency"]), row[1]["case"]))
    page = environment.get_template("report.html").render(
        cases=[_case(output, folder, qc) for folder, qc in ordered],
        failures=failures,
        settings=Counter(_settings(qc) for _, qc in ordered).most_common(),
        classes=list(CLASS_NAMES.values()),
        contours=pictures.CONTOURS,
        flag_color=pictures.FLAG_COLOR,
        map_colors=[to_hex(color) for color in colormaps[pictures.MAP_COLORS](np.linspace(0, 1, 9))],
        map_top=pictures.MAP_TOP,
        today=date.today().isoformat(),
    )
    write_text(output / "report.html", page)
    return output / "report.html"


def _or_infinite(urgency: float | None) -> float:
    return float("inf") if urgency is None else urgency


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _case(output: Path, folder: Path, qc: QC) -> dict[str, Any]:
    """What the page shows of a case besides its ``qc.json``: flagged slices, their pictures."""
    slices = []
    for index, regions in pictures.regions_by_slice(qc).items():
        path = pictures.picture_path(folder, index)
        if not path.is_file():
            raise ValueError(f"{path}: no such picture. Run write_pictures on {folder} before the report.")
        slices.append(
            {
                "number": index + 1,
                "regions": len(regions),
                "probability": max(region["probability"] for region in regions),
                "link": quote(Path(os.path.relpath(path, output)).as_posix()),
            }
        )
    return {"qc": qc, "slices": slices, "n_regions": sum(item["regions"] for item in slices)}


def _settings(qc: QC) -> tuple[tuple[str, str], ...]:
    """What a case was made with; cases of one run share it."""
    segmentation, detection = qc["segmentation"], qc["detection"]

    def bundle(stage: QC) -> str:
        return f"{stage['bundle']} {stage['bundle_version']} (weights {stage['weights_sha256'][:12]})"

    return (
        ("Segmentation", bundle(segmentation)),
        ("Failure detection", bundle(detection)),
        ("Uncertainty map", pictures.MAPS[detection["map"]][0]),
        ("Monte Carlo samples", f"{segmentation['samples']} (seed {segmentation['seed']})"),
        ("Region", f"{detection['region_size']} × {detection['region_size']} pixels"),
        ("Flagged from probability", f"{detection['threshold']:g}"),
        ("Software", ", ".join(f"{name} {version}" for name, version in qc["versions"].items())),
    )
