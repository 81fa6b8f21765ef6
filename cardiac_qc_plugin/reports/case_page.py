"""A case's own page, ``<output>/<case>/report.html``: one file that can be sent alone, and needs no network.

It is drawn as soon as the case is done, when nothing is known of the cohort. The parts that the cohort knows (rank and
neighbors in the worklist, the heart's indices) come between markers of the finished page later, which is cheap.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.data.predictions import MAP_NAMES
from cardiac_qc_plugin.metrics.clinical import sample_interval
from cardiac_qc_plugin.metrics.plausibility import CRITERIA
from cardiac_qc_plugin.workflows.files import read_json, write_text

from .pages import made_with, render
from .pictures import GRID, draw_sheet

__all__ = ["PAGE", "case_settings", "implausible", "promised", "read_record", "update_case", "write_case"]

PAGE = "report.html"
RECORD = re.compile(r'<script type="application/json" id="record">(.*?)</script>', re.DOTALL)


def write_case(folder: Path) -> str:
    """Draw a case's page, unless the one that is there was made from the same results.

    Args:
        folder: the case's folder, with ``qc.json`` and the files of all stages. The image is read from where
            ``qc.json`` says that the input lies.

    Returns:
        The page as it is now.

    Raises:
        ValueError: if a file is missing or damaged, or the files differ in shape; the message names the file.
    """
    qc, path = read_json(folder / "qc.json"), folder / PAGE
    made_of = hashlib.sha256(f"{made_with()}{json.dumps(qc, sort_keys=True)}".encode()).hexdigest()
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    if read_record(page).get("made_of") != made_of:
        page = _draw(folder, qc, made_of)
        write_text(path, page)
    return page


def update_case(folder: Path, links: Mapping[str, Any], heart: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bring a case's page up to date with what the cohort knows of the case.

    Args:
        folder: see :func:`write_case`.
        links: of the template ``links.html``.
        heart: of the template ``heart.html``; None if the case belongs to no heart with two phases.

    Returns:
        The page's record, see :func:`read_record`.
    """
    page = write_case(folder)
    parts = {"links": render("links.html", **links)}
    parts["heart"] = render("heart.html", heart=heart, case=links["case"]) if heart else ""
    placed = page
    for name, html in parts.items():
        before, _, rest = placed.partition(f"<!--{name}-->")
        placed = f"{before}<!--{name}-->{html}<!--/{name}-->{rest.partition(f'<!--/{name}-->')[2]}"
    if placed != page:
        write_text(folder / PAGE, placed)
    return read_record(placed)


def read_record(page: str) -> dict[str, Any]:
    """What a case's page says of its regions: ``grid``, the thresholds of its slider; ``operating``, the number of
    the operating point among them; ``regions`` and ``slices``, how many are flagged at each; ``made_of``, a digest."""
    found = RECORD.search(page)
    return json.loads(found[1]) if found else {}


def _draw(folder: Path, qc: Mapping[str, Any], made_of: str) -> str:
    sheet, segmentation, detection = draw_sheet(folder, qc), qc["segmentation"], qc["detection"]
    record = {
        "made_of": made_of,
        "grid": sheet.grid,
        "operating": sheet.grid.index(detection["threshold"]),
        "regions": sheet.regions,
        "slices": sheet.flagged_slices,
    }
    levels = segmentation.get("slice_level")
    for z, shown in enumerate(sheet.slices):
        shown["level"] = levels[z] if levels else None
        shown["odd"] = [CRITERIA[name] for name, found in _violations(qc).items() if z in found]
        for region in shown["regions"]:
            region["line"] = _line_width(region["probability"], detection["threshold"])
    samples = segmentation.get("sample_volume_ml", {})
    intervals = {
        name: sample_interval(ml, samples[name], bounds=(0.0, inf))
        for name, ml in segmentation["volume_ml"].items()
        if len(samples.get(name, ())) > 1
    }
    return render(
        "case.html",
        qc=qc,
        source=_source(Path(qc["input"]["path"])),
        record=record,
        slices=sheet.slices,
        size=sheet.size,
        aspect=round(sheet.aspect, 4),
        grid=GRID,
        intervals=intervals,
        implausible=implausible(qc),
        plausible="plausibility" in segmentation and not _violations(qc),
        map_name=MAP_NAMES[detection["map"]],
        settings=case_settings(qc),
    )


def _source(path: Path) -> str:
    """What a user knows the image by: its file, or of one from DICOM the series, as the file is made by the import, and
    folders may name a patient."""
    if path.name == "image.nii.gz":
        for record in (path.parent / "dicom.json", path.parent.parent / "dicom.json"):
            if record.is_file():
                numbers = [str(number) for number in read_json(record).get("series_numbers", ()) if number >= 0]
                return f"DICOM series {', '.join(numbers)}" if numbers else "DICOM"
    return path.name


def _line_width(probability: float, threshold: float) -> float:
    """The more probable a failure, the wider the line; thin below the operating point."""
    return round(1.2 + 1.8 * max(probability - threshold, 0) / max(1 - threshold, 1e-6), 1)


def _violations(qc: Mapping[str, Any]) -> dict[str, list[int]]:
    return qc["segmentation"].get("plausibility", {}).get("violations", {})  # not in results of older versions


def implausible(qc: Mapping[str, Any]) -> str:
    """The criteria of plausibility that a case violates, and in which slices (from 1); empty if none."""
    return "; ".join(
        f"{CRITERIA[name]} (slice {', '.join(str(z + 1) for z in slices)})" for name, slices in _violations(qc).items()
    )


def case_settings(qc: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a case was made with; cases of one run share it."""
    segmentation, detection = qc["segmentation"], qc["detection"]
    return (
        ("Segmentation", _bundle(segmentation)),
        ("Failure detection", _bundle(detection)),
        ("Uncertainty map", MAP_NAMES[detection["map"]]),
        ("Monte Carlo samples", f"{segmentation['samples']} (seed {segmentation['seed']})"),
        *([("Quarter turns", str(turns))] if (turns := segmentation.get("turns", 1)) > 1 else []),
        ("Region", f"{detection['region_size']} × {detection['region_size']} pixels"),
        ("Operating point", f"flagged from probability {detection['threshold']:.3g}"),
        *([("Promise", promised(qc["promise"]))] if qc.get("promise") else []),
        ("Software", ", ".join(f"{name} {version}" for name, version in qc["versions"].items())),
    )


def promised(promise: Mapping[str, Any]) -> str:
    """What a threshold was chosen for, by ``promise`` of a case's ``qc.json``."""
    if promise["kind"] == "catch":
        return f"{100 * promise['target']:g} % of a patient's failure voxels are caught, on average"
    return f"no more regions than {promise['target']:g}, in {100 * promise['probability']:g} % of patients"


def _bundle(stage: Mapping[str, Any]) -> str:
    return f"{stage['bundle']} {stage['bundle_version']} (weights {stage['weights_sha256'][:12]})"
