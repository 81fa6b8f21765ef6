"""The cohort's result as one Parquet table: a row for each case, which of a cine is each phase."""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.data.inputs import PHASE

from .cine import STRUCTURES, named_indices, table_row
from .files import read_json, read_rows, write_file
from .references import Outcome, patient_and_phase

__all__ = ["case_row", "failed_case_row", "table", "with_heart", "write_table", "write_table_of_run"]

TABLE = "cases.parquet"
ROW_GROUP = 1000  # rows in memory at once
_ZERO = dict.fromkeys(STRUCTURES, 1.0)
INDICES = tuple(named_indices(_ZERO, _ZERO, 1.0))

TEXT, INTEGER, NUMBER = "string", "int64", "float64"
COLUMNS = {
    **dict.fromkeys(("case", "heart"), TEXT),
    "phase": INTEGER,
    **dict.fromkeys(("role", "status", "message", "input_path", "input_sha256"), TEXT),
    **dict.fromkeys(("rows", "columns", "slices"), INTEGER),
    **dict.fromkeys(("spacing_row_mm", "spacing_column_mm", "spacing_slice_mm"), NUMBER),
    "map": TEXT,
    **dict.fromkeys(("samples", "turns", "seed"), INTEGER),
    **dict.fromkeys((f"{name}_volume_ml" for name in STRUCTURES), NUMBER),
    **dict.fromkeys((f"{name}_pairwise_dice" for name in STRUCTURES), NUMBER),
    **dict.fromkeys(("regions_flagged", "slices_flagged", "slices_implausible"), INTEGER),
    **dict.fromkeys(("threshold", "region_failure", "sample_disagreement", "urgency"), NUMBER),
    **dict.fromkeys(("ed_phase", "es_phase"), INTEGER),
    **dict.fromkeys((f"{name}{end}" for name in INDICES for end in ("", "_low", "_high")), NUMBER),
    **dict.fromkeys(("ed_slices_flagged", "es_slices_flagged", "phases_with_jumps"), INTEGER),
    **dict.fromkeys(("segmentation_seconds", "detection_seconds"), NUMBER),
    **{
        f"{stage}_{entry}": TEXT
        for stage in ("segmentation", "detection")
        for entry in ("bundle", "weights_sha256", "digest")
    },
    **dict.fromkeys(("cardiac_qc_plugin_version", "monai_version", "torch_version"), TEXT),
}


def heart_of(case: str, path: Path) -> tuple[str | None, int | None, str | None]:
    """Name of the heart that a case shows, number of the phase of a cine, and ED or ES where the name tells."""
    if match := PHASE.fullmatch(case):
        return match[1], int(match[2]), None
    try:
        patient, role = patient_and_phase(case, path)
    except ValueError:  # a damaged Info.cfg
        return None, None, None
    return patient, None, role if role in ("ED", "ES") else None


def case_row(qc: Mapping[str, Any]) -> dict[str, Any]:
    """A case's row, from its ``qc.json``; `with_heart` adds what is known of the heart."""
    heart, phase, role = heart_of(qc["case"], Path(qc["input"]["path"]))
    source, segmentation, detection = qc["input"], qc["segmentation"], qc.get("detection", {})
    row = {"case": qc["case"], "heart": heart, "phase": phase, "role": role, "status": "done"}
    row |= {"input_path": source["path"], "input_sha256": source["sha256"]}
    row |= dict(zip(("rows", "columns", "slices"), source["shape"], strict=True))
    row |= dict(zip(("spacing_row_mm", "spacing_column_mm", "spacing_slice_mm"), source["spacing_mm"], strict=True))
    row |= {name: segmentation[name] for name in ("map", "samples", "seed")}
    row["turns"] = segmentation.get("turns", 1)
    row |= {f"{name}_volume_ml": ml for name, ml in segmentation["volume_ml"].items()}
    row |= {f"{name}_pairwise_dice": value for name, value in segmentation["pairwise_dice"].items()}
    if "plausibility" in segmentation:
        row["slices_implausible"] = len(segmentation["plausibility"]["implausible_slices"])
    if detection:
        row |= {"regions_flagged": len(detection["regions"]), "slices_flagged": len(detection["flagged_slices"])}
        row |= {"threshold": detection["threshold"], **qc.get("scores", {})}
    for stage, record in qc["stages"].items():
        made_by = qc[stage]
        row |= {f"{stage}_seconds": record["seconds"], f"{stage}_digest": record["digest"]}
        row |= {f"{stage}_bundle": f"{made_by['bundle']} {made_by['bundle_version']}"}
        row[f"{stage}_weights_sha256"] = made_by["weights_sha256"]
    return row | {f"{name}_version": number for name, number in qc["versions"].items()}


def failed_case_row(case: str, message: str, status: str = "failed") -> dict[str, Any]:
    """The row of a case that could not be processed."""
    return {"case": case, "status": status, "message": message}


def with_heart(row: dict[str, Any], indices: Mapping[str, Any] | None) -> dict[str, Any]:
    """A case's row with its heart's line of ``indices.csv``, if there is one."""
    if indices is None:
        return row
    row = row | {name: value for name, value in indices.items() if name != "case"}
    if row["phase"] is not None:
        roles = {indices["ed_phase"]: "ED", indices["es_phase"]: "ES"}
        row["role"] = roles.get(row["phase"])
    return row


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a Parquet file, some at a time.

    Raises:
        ValueError: if pyarrow is missing.
        OutputError: if the file cannot be written.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("A table needs pyarrow: pip install 'cardiac-qc-plugin[cluster]'") from error
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    rows = iter(rows)

    def write(temporary: Path) -> None:
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while group := list(islice(rows, ROW_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema))

    write_file(path, write)


def write_table_of_run(
    output: Path,
    cases: Sequence[Mapping[str, Any]],
    failures: Sequence[tuple[str, str]],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """``cases.parquet`` of a run, where pyarrow is installed; arguments as for the report."""
    if importlib.util.find_spec("pyarrow") is None:
        return
    hearts = {record["case"]: table_row(record) for record in records}
    rows = [case_row(qc) for qc in cases]
    rows = [with_heart(row, hearts.get(row["heart"])) for row in rows]
    write_table(output / TABLE, [failed_case_row(*failure) for failure in failures] + rows)


def table(predictions: str | Path) -> Outcome:
    """Write ``cases.parquet`` from the files of a run.

    A case whose record is damaged has a row that says so, and is among the failures; the others are in the table.

    Args:
        predictions: output folder of ``run``.

    Raises:
        ValueError: if there is no case in it, its worklist or ``quarantine.json`` is damaged, or pyarrow is missing.
    """
    folder, failures = Path(predictions), {}
    if not folder.is_dir() or not next(folder_records(folder), None):
        raise ValueError(f"{folder}: no qc.json in it. Give the output folder of 'run'.")
    write_table(folder / TABLE, folder_rows(folder, failures))
    lines = [f"{folder / TABLE}", *(f"  {case}: {reason}" for case, reason in failures.items())]
    return Outcome("\n".join(lines), failures)


def folder_rows(folder: Path, failures: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows from the records in a folder, one after another; failed cases from its worklist.

    Args:
        folder: output folder of ``run``.
        failures: gets case and reason of every record that cannot be read.

    Raises:
        ValueError: if the worklist is damaged or has no such columns, or ``quarantine.json`` is damaged.
    """
    worklist, record = folder / "worklist.csv", folder / "quarantine.json"
    quarantined = read_json(record) if record.is_file() else {}
    broken = set()
    for row in read_rows(worklist):
        if not {"case", "status", "message"} <= row.keys():  # a spreadsheet may put semicolons between them
            raise ValueError(f"{worklist}: no columns case, status and message. Remove it, or run again to write it.")
        if row["status"] != "done":
            status = "quarantined" if row["case"] in quarantined else "failed"
            broken.add(row["case"])
            yield failed_case_row(row["case"], row["message"], status)
    for path in folder_records(folder):
        case = path.parent.relative_to(folder).as_posix()
        if case in broken:  # what was done before it failed
            continue
        try:
            qc = read_json(path)
            if "segmentation" not in qc["stages"]:  # of an interrupted run
                continue
            row = case_row(qc)
            path = folder / (row["heart"] or "") / "cine.json"
            cine = read_json(path) if path.is_file() else None
            others = [] if cine is None else cine["cases"]
            if any(other in broken or not (folder / other / "qc.json").is_file() for other in others):
                cine = None  # of an earlier run, whose other phase is no longer there
            yield with_heart(row, None if cine is None else table_row(cine))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            other = f"{path}: not as 'run' writes it ({error!r}). Remove it, and run the case again."
            failures[case] = str(error) if str(path) in str(error) else other
            yield failed_case_row(case, failures[case])


def folder_records(folder: Path) -> Iterator[Path]:
    """Every ``qc.json`` below a folder, in order of names."""
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from folder_records(folder / entry.name)
        elif entry.name == "qc.json":
            yield folder / "qc.json"
