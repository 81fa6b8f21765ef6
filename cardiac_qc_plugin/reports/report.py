"""The cohort's report: one HTML page that lists all cases, and links to the page of each."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cardiac_qc_plugin.data.predictions import MAP_NAMES
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.workflows.files import read_json, write_text

from .case_page import PAGE, case_settings, implausible, update_case
from .cine import INDICES, index_rows, volume_curve
from .pages import render

__all__ = ["write_report"]

CURVE_FILE = "operating_curve.json"
STRUCTURES = list(CLASS_NAMES.values())
COLUMNS = ["case", "phase", "urgency", "group", "regions", "slices", "total", "implausible", "why", "volumes", "dice"]


def write_report(
    output: Path,
    cases: Sequence[Mapping[str, Any]],
    failures: Sequence[tuple[str, str]] = (),
    cines: Sequence[Mapping[str, Any]] = (),
    skipped: Sequence[str] = (),
) -> Path:
    """Write ``<output>/report.html``, the most urgent case first, and bring each case's page up to date.

    A case's page is drawn if it is not there, see :func:`~cardiac_qc_plugin.reports.case_page.write_case`. Links are
    relative: the folder can be moved or sent as a whole, and each page alone. Pages count slices from 1.

    Args:
        output: the cohort's folder, in which each case has a folder of its name. Where it has ``operating_curve.json``,
            pages say what share of failures a threshold caught on validation patients.
        cases: content of ``qc.json`` of each case.
        failures: case and reason, for each case that could not be processed.
        cines: content of ``cine.json`` of each heart.
        skipped: what was left out of the input, and why.

    Returns:
        The cohort's page.

    Raises:
        ValueError: if a case's files cannot be drawn, or ``operating_curve.json`` is damaged; the message names the
            file.
    """
    ordered = sorted(cases, key=lambda qc: -qc["scores"]["urgency"])
    curve = read_curve(output / CURVE_FILE)
    phases = dict(_phases(cines))
    records = [
        update_case(
            output / qc["case"],
            _links(output, ordered, index, len(failures), _fitting(curve, qc)),
            _heart(output, qc["case"], *phases[qc["case"]]) if qc["case"] in phases else None,
        )
        for index, qc in enumerate(ordered)
    ]
    write_text(output / PAGE, cohort_page(output, ordered, records, failures, cines, skipped, curve))
    return output / PAGE


def cohort_page(
    output: Path,
    cases: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    failures: Sequence[tuple[str, str]],
    cines: Sequence[Mapping[str, Any]],
    skipped: Sequence[str],
    curve: Mapping[str, Any] | None,
) -> str:
    """The cohort's page.

    Args:
        cases: most urgent first.
        records: of each case, see :func:`~cardiac_qc_plugin.reports.case_page.read_record`.
        curve: content of ``operating_curve.json``.
        output, failures, cines, skipped: see :func:`write_report`.
    """
    groups = _operating_groups(cases, records, curve)
    numbers = {key: number for number, key in enumerate(groups)}
    names = {case: _phase_name(heart, index) for case, (heart, index) in _phases(cines)}
    rows = [
        _row(qc, record, names.get(qc["case"]), numbers[_group(qc)]) for qc, record in zip(cases, records, strict=True)
    ]
    hearts = [_heart_row(cine) for cine in cines]
    return render(
        "cohort.html",
        data={
            "columns": COLUMNS,
            "rows": rows,
            "failures": failures,
            "groups": list(groups.values()),
            "hearts": hearts,
            "structures": STRUCTURES,
        },
        groups=list(groups.values()),
        cases=cases,
        failures=failures,
        skipped=skipped,
        hearts=hearts,
        indices=INDICES,
        implausible=sum(1 for row in rows if row[COLUMNS.index("implausible")]),
        phased=len({row[COLUMNS.index("phase")] for row in rows}) > 1,
        settings=Counter(case_settings(qc) for qc in cases).most_common(),
        tables=[name for name in ("worklist.csv", "indices.csv") if (output / name).is_file()],
        today=date.today().isoformat(),
    )


def read_curve(path: Path) -> dict[str, Any] | None:
    """What a threshold is worth, from validation patients; None if the file is not there.

    Raises:
        ValueError: if it does not have what is needed; the message names the file.
    """
    if not path.is_file():
        return None
    curve = read_json(path)
    try:
        lists = [curve[name] for name in ("threshold", "caught", "regions_per_patient")]
        whole = len({len(values) for values in lists}) == 1 and lists[0] == sorted(lists[0]) and lists[0]
        if not whole or not {"model", "map", "patients", "source"} <= curve.keys():
            raise KeyError
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected model, map, patients, source, and threshold (ascending), caught and "
            "regions_per_patient of one length. Remove the file, or make it again."
        ) from error
    return curve


def _fitting(curve: Mapping[str, Any] | None, qc: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The curve, if it is that of a case's network and map."""
    if curve is None or curve["map"] != qc["detection"]["map"]:
        return None
    return curve if curve["model"] in qc["segmentation"]["bundle"].split("_") else None


def _phases(cines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, tuple[Mapping[str, Any], int]]]:
    """Cases that are a phase of a heart, with the heart and the number of the point in its curve."""
    for cine in cines:
        for index, case in enumerate(cine["cases"]):
            yield case, (cine, index)


def _phase_name(cine: Mapping[str, Any], index: int) -> str:
    """ED, ES, or another phase's number."""
    phase = cine["curve"][index]["phase"]
    return {cine["ed_phase"]: "ED", cine["es_phase"]: "ES"}.get(phase, f"phase {phase}")


def _link(output: Path, case: str, start: str) -> str:
    """Relative link from the folder of a case to a page."""
    return quote(Path(relpath(output / case / PAGE, output / start)).as_posix())


def _links(
    output: Path, ordered: Sequence[Mapping[str, Any]], index: int, failed: int, curve: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A case's place in the worklist, where those that failed come first."""
    here = ordered[index]["case"]
    before = ordered[index - 1]["case"] if index else None
    after = ordered[index + 1]["case"] if index + 1 < len(ordered) else None
    return {
        "case": here,
        "cohort": _link(output, "", here),
        "rank": failed + index + 1,
        "total": failed + len(ordered),
        "urgency": ordered[index]["scores"]["urgency"],
        "previous": before and _link(output, before, here),
        "next": after and _link(output, after, here),
        "effort": curve,
    }


def _heart(output: Path, case: str, cine: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What a case's page says of the heart that it is a phase of."""
    phases = [
        {"case": other, "label": _phase_name(cine, number), "link": _link(output, other, case)}
        for number, other in enumerate(cine["cases"])
    ]
    return {
        "name": cine["case"],
        "rows": index_rows(cine),
        "area": cine.get("body_surface_area_m2"),
        "phases": phases,
        "notes": cine["notes"],
        "curve": volume_curve(cine, cine["curve"][index]["phase"]),
    }


def _group(qc: Mapping[str, Any]) -> tuple[str, float]:
    """Cases whose probabilities are comparable: one detector, one operating point."""
    return qc["detection"]["map"], qc["detection"]["threshold"]


def _operating_groups(
    cases: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], curve: Mapping[str, Any] | None
) -> dict[tuple[str, float], dict[str, Any]]:
    """The sliders of the cohort's page, one for each map and operating point."""
    groups = {}
    for qc, record in zip(cases, records, strict=True):
        entry = {"map": MAP_NAMES[qc["detection"]["map"]], "grid": record["grid"], "operating": record["operating"]}
        groups.setdefault(_group(qc), {**entry, "effort": _fitting(curve, qc)})
    return groups


def _row(qc: Mapping[str, Any], record: Mapping[str, Any], phase: str | None, group: int) -> list[Any]:
    """A case's line of the worklist, in the order of `COLUMNS`."""
    segmentation = qc["segmentation"]
    checked = segmentation.get("plausibility", {})
    return [
        qc["case"],
        phase,
        round(qc["scores"]["urgency"], 4),
        group,
        record["regions"],
        record["slices"],
        qc["input"]["shape"][2],
        len(checked["implausible_slices"]) if checked else None,
        implausible(qc),
        [round(segmentation["volume_ml"][name], 1) for name in STRUCTURES],
        [_rounded(segmentation["pairwise_dice"].get(name), 3) for name in STRUCTURES],
    ]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _heart_row(cine: Mapping[str, Any]) -> dict[str, Any]:
    """A heart's line: its indices with their intervals, and what to look at."""
    flagged = cine["flagged_slices"]
    cases = {_phase_name(cine, index): case for index, case in enumerate(cine["cases"])}
    return {
        "case": cine["case"],
        "ed": cases.get("ED"),
        "es": cases.get("ES"),
        "values": [_rounded(cine["indices"].get(name), 1) for name in INDICES],
        "intervals": [cine["intervals"].get(name) for name in INDICES],
        "flagged": sum(map(len, flagged.values())) if flagged else None,
        "jumps": sorted({jump["phase"] for jump in cine["jumps"]}),
        "notes": cine["notes"],
    }
