"""From the segmented phases of a cine to what a report says of the heart: volumes over time, EF, mass."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cardiac_qc_plugin.data.acdc import read_info
from cardiac_qc_plugin.data.inputs import PHASE
from cardiac_qc_plugin.metrics.clinical import (
    body_surface_area,
    find_ed_es,
    indices_of_volumes,
    sample_interval,
    volume_jumps,
)
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES

from .files import read_json, write_json, write_rows
from .references import patient_and_phase

__all__ = [
    "Cine",
    "choose_phases",
    "group_cines",
    "index_intervals",
    "named_indices",
    "plan_phases",
    "rounded",
    "table_row",
    "write_cines",
]

UNITS = {"edv": "ml", "esv": "ml", "sv": "ml", "ef": "percent", "mass": "g"}
STRUCTURES = tuple(CLASS_NAMES.values())
Given = tuple[int | None, int | None]


class Cine:
    """The phases of one heart, in order, or its end-diastole and end-systole alone.

    Args:
        name: of the cine, and of its folder below the output folder.
        phases: content of ``qc.json`` by phase number.
        given: phase numbers of end-diastole and end-systole, where they are known.
        output: the run's output folder.

    Attributes:
        volume_ml: volumes by phase and structure. Where end-diastole and end-systole were segmented once more with
            samples, these are the volumes before, for a curve that is made alike.
        source: ``dicom.json``'s content, for a cine from DICOM.
        notes: what was odd about the input, and why phases are missing.
    """

    def __init__(self, name: str, phases: Mapping[int, dict[str, Any]], given: Given, output: Path) -> None:
        self.name, self.phases = name, dict(sorted(phases.items()))
        self.volume_ml = {phase: qc["segmentation"]["volume_ml"] for phase, qc in self.phases.items()}
        self.given = given
        self.folder = output / name
        record = self.folder / "dicom.json"
        self.source = read_json(record) if record.is_file() else {}
        self.notes = list(self.source.get("notes", []))

    def volumes(self, structure: str) -> list[float]:
        return [volumes[structure] for volumes in self.volume_ml.values()]

    def find(self) -> Given:
        """Phase numbers of end-diastole and end-systole by the LV's volume; None where there is no telling."""
        if len(self.phases) < 3:
            return None, None
        try:
            indices = find_ed_es(self.volumes("LV"))
        except ValueError:
            return None, None
        return tuple(list(self.phases)[index] for index in indices)

    def subject(self) -> dict[str, float]:
        """Height in cm and weight in kg, from the DICOM files or ACDC's ``Info.cfg``."""
        info = acdc_info(next(iter(self.phases.values())))
        found = {key: info.get(name) for key, name in (("height_cm", "Height"), ("weight_kg", "Weight"))}
        try:
            found = {key: float(value) for key, value in found.items() if value}
        except ValueError:
            found = {}
        return {key: value for key, value in (found | self.source.get("subject", {})).items() if value > 0}


def acdc_info(qc: Mapping[str, Any]) -> dict[str, str]:
    """Entries of the ``Info.cfg`` beside a case's image, if there is one."""
    path = Path(qc["input"]["path"]).parent / "Info.cfg"
    try:
        return read_info(path)
    except ValueError:
        return {}


def group_cines(cases: Iterable[dict[str, Any]], output: Path, given: Given = (None, None)) -> list[Cine]:
    """The hearts behind the cases of a run: cines, and pairs of end-diastole and end-systole.

    Args:
        cases: content of each ``qc.json``. Phases of a cine are named ``<cine>/phaseNN``; pairs ``<patient>_ed`` and
            ``<patient>_es``, or ``<patient>_frameNN`` with ACDC's ``Info.cfg`` beside the images.
        output: the run's output folder.
        given: phases of end-diastole and end-systole of all cines, as numbered in their names. Those that are None
            are taken from ACDC's ``Info.cfg``, if there is one.
    """
    phases: dict[str, dict[int, dict]] = {}
    pairs: dict[str, dict[str, dict]] = {}
    for qc in cases:
        if match := PHASE.fullmatch(qc["case"]):
            phases.setdefault(match[1], {})[int(match[2])] = qc
        else:
            try:
                patient, phase = patient_and_phase(qc["case"], Path(qc["input"]["path"]))
            except ValueError:  # a damaged Info.cfg
                continue
            pairs.setdefault(patient, {})[phase] = qc
    cines = []
    for name, own in phases.items():
        info = acdc_info(next(iter(own.values())))
        frames = [int(info[phase]) - 1 if info else None for phase in ("ED", "ES")]
        known = tuple(frame if one is None else one for one, frame in zip(given, frames, strict=True))
        cines.append(Cine(name, own, known, output))
    # a cine beside its own end-diastole and end-systole is measured itself
    both = {name: own for name, own in pairs.items() if {"ED", "ES"} <= own.keys() and name not in phases}
    return cines + [Cine(name, {0: own["ED"], 1: own["ES"]}, (0, 1), output) for name, own in both.items()]


def choose_phases(cine: Cine) -> Given:
    """End-diastole and end-systole: given, else found.

    Raises:
        ValueError: if a given phase is not among the cine's, or the other one is found to be the same.
    """
    for phase in cine.given:
        if phase is not None and phase not in cine.phases:
            raise ValueError(
                f"{cine.name}: there is no phase {phase} among its {len(cine.phases)}, or it could not be processed. "
                "See --ed and --es."
            )
    ed, es = (one if one is not None else other for one, other in zip(cine.given, cine.find(), strict=True))
    if ed is not None and ed == es:  # volumes do not change: an EF of 0 %, and nothing odd about it
        raise ValueError(
            f"{cine.name}: phase {ed} would be both end-diastole and end-systole ({origin((ed, es), cine.given)}). "
            "Give both, --ed and --es."
        )
    return ed, es


def plan_phases(cine: Cine, made_of: str) -> Given:
    """End-diastole and end-systole of a cine that is segmented in two steps, kept in ``plan.json`` with the volumes
    that they were chosen by; a later run over the same images goes by this file.

    Raises:
        ValueError: as `choose_phases`; or if one of the two is not among the cine's phases any more.
    """
    path = cine.folder / "plan.json"
    plan = read_json(path) if path.is_file() else {}
    if plan.get("made_of") != made_of:
        volumes = {str(phase): volumes for phase, volumes in cine.volume_ml.items()}
        plan = {"made_of": made_of, "ed_es": choose_phases(cine), "volume_ml": volumes}
        write_json(path, plan)
    if lost := [phase for phase in plan["ed_es"] if phase is not None and phase not in cine.phases]:
        raise ValueError(f"{cine.name}: phase {lost[0]}, its end-diastole or end-systole, could not be processed.")
    cine.volume_ml = {phase: plan["volume_ml"].get(str(phase), own) for phase, own in cine.volume_ml.items()}
    return tuple(plan["ed_es"])


def write_cines(cines: Sequence[Cine], chosen: Mapping[str, Given]) -> list[dict[str, Any]]:
    """Write each cine's ``cine.json`` and ``volumes.csv``.

    Args:
        cines: see :func:`group_cines`.
        chosen: by name, the phases of end-diastole and end-systole.

    Returns:
        The content of each ``cine.json``.
    """
    records = []
    for cine in cines:
        record = measure_cine(cine, chosen[cine.name])
        write_json(cine.folder / "cine.json", record)
        if len(cine.phases) > 2:
            write_rows(cine.folder / "volumes.csv", record["curve"])
        records.append(record)
    return records


def measure_cine(cine: Cine, chosen: Given) -> dict[str, Any]:
    """The content of ``cine.json``."""
    times = cine.source.get("trigger_times_ms", [])
    curve = [
        {"phase": phase}
        | ({"trigger_time_ms": times[phase]} if phase < len(times) else {})
        | {f"{name}_ml": round(volumes[name], 2) for name in STRUCTURES}
        for phase, volumes in cine.volume_ml.items()
    ]
    subject = cine.subject()
    record = {
        "case": cine.name,
        "cases": [qc["case"] for qc in cine.phases.values()],
        "ed_phase": chosen[0],
        "es_phase": chosen[1],
        "ed_es": origin(chosen, cine.given),
        "found": dict(zip(("ed_phase", "es_phase"), cine.find(), strict=True)),
        "subject": subject,
        "notes": cine.notes,
        "jumps": find_jumps(cine),
        "curve": curve,
    }
    if None in chosen:
        return record | {"indices": {}, "intervals": {}, "flagged_slices": {}, "flagged_levels": {}}
    ed, es = (cine.phases[phase] for phase in chosen)
    area = body_surface_area(**subject) if len(subject) == 2 else None
    indices = named_indices(ed["segmentation"]["volume_ml"], es["segmentation"]["volume_ml"], area)
    flagged = {phase: qc["detection"]["flagged_slices"] for phase, qc in (("ed", ed), ("es", es)) if "detection" in qc}
    level = {phase: qc["segmentation"].get("slice_level") for phase, qc in (("ed", ed), ("es", es))}
    return record | {
        "body_surface_area_m2": None if area is None else round(area, 3),
        "indices": rounded(indices),
        "intervals": index_intervals(
            indices, *(phase["segmentation"].get("sample_volume_ml", {}) for phase in (ed, es)), area
        ),
        "flagged_slices": flagged,
        "flagged_levels": {
            phase: dict(Counter(level[phase][z] for z in slices)) for phase, slices in flagged.items() if level[phase]
        },
    }


def origin(chosen: Given, given: Given) -> str:
    """Where end-diastole and end-systole come from, in words."""
    ed, es = (
        "not known" if phase is None else "found from the LV volume" if known is None else "given"
        for phase, known in zip(chosen, given, strict=True)
    )
    return ed if ed == es else f"ED {ed}, ES {es}"


def named_indices(ed: Mapping[str, float], es: Mapping[str, float], area: float | None) -> dict[str, float]:
    """Indices with their units in their names; volumes and mass also by body surface area (m²) if that is known."""
    values = asdict(indices_of_volumes(ed, es))
    for side in ("lv", "rv"):
        values[f"{side}_sv"] = values[f"{side}_edv"] - values[f"{side}_esv"]
    order = [f"{side}_{index}" for side in ("lv", "rv") for index in ("edv", "esv", "sv", "ef")] + ["lvm_mass"]
    named = {f"{key}_{UNITS[key.split('_')[1]]}": values[key] for key in order}
    if area:
        named |= {f"{name}_per_m2": value / area for name, value in named.items() if not name.endswith("percent")}
    return named


def rounded(indices: Mapping[str, float]) -> dict[str, float | None]:
    """Indices as they are written; None for one that is not defined."""
    return {name: None if np.isnan(value) else round(value, 2) for name, value in indices.items()}


def index_intervals(
    indices: Mapping[str, float],
    ed: Mapping[str, Sequence[float]],
    es: Mapping[str, Sequence[float]],
    area: float | None = None,
) -> dict[str, list[float]]:
    """95 % intervals of the indices; none without two samples of both phases.

    Args:
        indices: see :func:`named_indices`.
        ed: volumes in ml of the Monte Carlo samples at end-diastole, by structure.
        es: the same at end-systole.
        area: body surface area, where the indices have those by area.
    """
    count = min((len(volumes) for phase in (ed, es) for volumes in phase.values()), default=0)
    if count < 2 or not (ed and es):
        return {}
    drawn = [
        named_indices(*({name: volumes[t] for name, volumes in phase.items()} for phase in (ed, es)), area)
        for t in range(count)
    ]
    ends = {
        name: sample_interval(value, [one[name] for one in drawn], bounds=possible(name))
        for name, value in indices.items()
    }
    return {name: [round(end, 2) for end in pair] for name, pair in ends.items() if np.isfinite(pair).all()}


def possible(index: str) -> tuple[float, float]:
    """Least and largest possible value of an index; with another end-systole than the heart's, blood may flow back."""
    if "_sv" in index or "_ef" in index:
        return -np.inf, 100.0 if "_ef" in index else np.inf
    return 0.0, np.inf


def find_jumps(cine: Cine) -> list[dict[str, Any]]:
    """Phases at which a structure's volume stands out from both neighbors."""
    if len(cine.phases) < 3:
        return []
    numbers = list(cine.phases)
    return [
        {"phase": numbers[index], "structure": name}
        for name in STRUCTURES
        for index in volume_jumps(cine.volumes(name))
    ]


def table_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A cine's line in ``indices.csv``."""
    row = {name: record[name] for name in ("case", "ed_phase", "es_phase")}
    for name, value in record["indices"].items():
        row[name] = value
        if name in record["intervals"]:
            row |= dict(zip((f"{name}_low", f"{name}_high"), record["intervals"][name], strict=True))
    for phase, slices in record["flagged_slices"].items():
        row[f"{phase}_slices_flagged"] = len(slices)
    return row | {"phases_with_jumps": len({jump["phase"] for jump in record["jumps"]})}
