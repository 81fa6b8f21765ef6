"""From scans to flagged regions: segment, detect, report (see docs/architecture.md)."""

import csv
import hashlib
import io
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cardiac_qc_plugin import __version__
from cardiac_qc_plugin.bundle import BundlePredictor
from cardiac_qc_plugin.data.inputs import Scan
from cardiac_qc_plugin.data.predictions import MAP_FILES
from cardiac_qc_plugin.metrics.clinical import structure_volumes

from .files import Volume, file_sha256, read_json, read_volume, write_json, write_like, write_text

__all__ = ["CaseFailures", "run"]

# entry of a bundle's result: file, and type of its voxels
SEGMENT_FILES = {
    "pred": ("segmentation.nii.gz", np.uint8),
    "emap": (MAP_FILES["emap"], np.float32),
    "bmap": (MAP_FILES["bmap"], np.float32),
}
DETECT_FILES = {
    "pred": ("failure_probability.nii.gz", np.float32),
    "regions": ("failure_regions.nii.gz", np.uint16),
}


class CaseFailures(RuntimeError):
    """Some cases could not be processed; the others were.

    Args:
        failures: (case, reason) of each.
    """

    def __init__(self, failures: list[tuple[str, str]]) -> None:
        self.failures = failures
        lines = "\n".join(f"  {case}: {reason}" for case, reason in failures)
        super().__init__(f"{len(failures)} case(s) could not be processed:\n{lines}")


def digest(*parts: Any) -> str:
    """Digest of what a stage's result depends on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def write_maps(data: dict[str, Any], files: dict[str, tuple[str, type]], folder: Path, volume: Volume) -> None:
    """Write entries ``(1, H, W, D)`` of a bundle's result under their file names."""
    for key, (name, dtype) in files.items():
        write_like(folder / name, np.asarray(data[key])[0].astype(dtype), volume)


def segment(scan: Scan, folder: Path, image: Path, volume: Volume, bundle: BundlePredictor) -> dict[str, Any]:
    """Segmentation, e-map and b-map of a scan; returns their entry of ``qc.json``."""
    if scan.frame is not None:
        write_like(image, volume.data, volume)
    result = bundle({"image": str(image)})
    write_maps(result, SEGMENT_FILES, folder, volume)
    return {
        "map": bundle.config["map"],
        "samples": bundle.config["samples"],
        "seed": bundle.config["seed"],
        **result["result"],
        "volume_ml": structure_volumes(np.asarray(result["pred"])[0], volume.spacing),
    }


def detect(folder: Path, image: Path, volume: Volume, bundle: BundlePredictor) -> dict[str, Any]:
    """Failure probability and flagged regions of a segmented scan; returns their entry of ``qc.json``."""
    uncertainty = MAP_FILES[bundle.config["map"]]
    case = {
        "image": image,
        "segmentation": folder / SEGMENT_FILES["pred"][0],
        "uncertainty": folder / uncertainty,
    }
    result = bundle({key: str(path) for key, path in case.items()})
    write_maps(result, DETECT_FILES, folder, volume)
    return {"map": bundle.config["map"], **result["result"]}


def scores(segmentation: dict[str, Any], detection: dict[str, Any]) -> dict[str, float]:
    """How urgent a scan is; higher is more urgent.

    ``sample_disagreement`` is 1 - the mean pairwise Dice of the samples over the structures found, 1 if none was found;
    it needs two samples or more, and orders the worklist where it exists. ``region_failure`` is the expected number
    of failing regions.
    """
    agreement = [value for value in segmentation["pairwise_dice"].values() if value is not None]
    result = {"region_failure": detection["expected_failing_regions"]}
    if segmentation["samples"] > 1:
        result["sample_disagreement"] = 1.0 - float(np.mean(agreement)) if agreement else 1.0
    return {**result, "urgency": result.get("sample_disagreement", result["region_failure"])}


def is_done(qc: dict[str, Any], stage: str, expected: str, folder: Path, files: dict[str, tuple[str, type]]) -> bool:
    """Whether a stage's files are there, made from the same input with the same settings."""
    same = qc.get("stages", {}).get(stage, {}).get("digest") == expected
    return same and all((folder / name).is_file() for name, _ in files.values())


def run_case(scan: Scan, output: Path, segmenter: BundlePredictor, detector: BundlePredictor) -> dict[str, Any]:
    """All stages for one scan; a stage whose result is there is skipped. Returns the content of ``qc.json``."""
    folder = output / scan.case
    volume = read_volume(scan.path, scan.frame)
    image = scan.path if scan.frame is None else folder / "image.nii.gz"
    record = folder / "qc.json"
    qc: dict[str, Any] = read_json(record) if record.is_file() else {}
    sha256 = file_sha256(scan.path)
    qc["case"] = scan.case
    qc["input"] = {
        "path": str(scan.path),
        "frame": scan.frame,
        "sha256": sha256,
        "shape": list(volume.data.shape),
        "spacing_mm": list(volume.spacing),
    }
    segment_digest = digest(__version__, sha256, scan.frame, segmenter.digest)
    stages: list[tuple[str, str, str, dict[str, tuple[str, type]], BundlePredictor, Callable[[], dict[str, Any]]]] = [
        ("segment", "segmentation", segment_digest, SEGMENT_FILES, segmenter,
         lambda: segment(scan, folder, image, volume, segmenter)),
        ("detect", "detection", digest(segment_digest, detector.digest), DETECT_FILES, detector,
         lambda: detect(folder, image, volume, detector)),
    ]  # fmt: skip
    done = True
    for stage, section, expected, files, bundle, work in stages:
        if is_done(qc, stage, expected, folder, files):
            continue
        done = False
        start = time.perf_counter()
        provenance = {
            "bundle": bundle.name,
            "bundle_version": bundle.version,
            "weights_sha256": bundle.weights_sha256,
        }
        qc[section] = {**provenance, **work()}
        qc.setdefault("stages", {})[stage] = {
            "digest": expected,
            "seconds": round(time.perf_counter() - start, 3),
        }
    if not done:
        qc["scores"] = scores(qc["segmentation"], qc["detection"])
        qc["versions"] = {
            "cardiac_qc_plugin": __version__,
            "monai": version("monai"),
            "torch": version("torch"),
        }
        write_json(record, qc)
    return qc


def worklist_rows(cases: list[dict[str, Any]], failures: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of the worklist, most urgent first; cases that could not be processed come before all others."""
    rows: list[dict[str, Any]] = [
        {"rank": 0, "case": case, "status": "failed", "message": message} for case, message in failures
    ]
    for qc in sorted(cases, key=lambda qc: -qc["scores"]["urgency"]):
        detection, agreement = qc["detection"], qc["segmentation"]["pairwise_dice"]
        rows.append(
            {
                "rank": 0,
                "case": qc["case"],
                "status": "done",
                "urgency": round(qc["scores"]["urgency"], 4),
                "regions_flagged": len(detection["regions"]),
                "slices_flagged": len(detection["flagged_slices"]),
                "slices": qc["input"]["shape"][2],
                **{f"{name}_volume_ml": round(ml, 1) for name, ml in qc["segmentation"]["volume_ml"].items()},
                **{f"{name}_pairwise_dice": None if v is None else round(v, 4) for name, v in agreement.items()},
            }
        )
    return [{**row, "rank": rank} for rank, row in enumerate(rows, start=1)]


def write_worklist(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, with the columns of all of them."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "message")) + ["message"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, stream.getvalue())


def run(
    scans: list[Scan], output: str | Path, segmenter: BundlePredictor, detector: BundlePredictor
) -> list[dict[str, Any]]:
    """Segment scans, detect failures in them, and write the worklist and the report.

    Files, on each scan's own grid: see docs/architecture.md. A case that is done with the same input and settings is
    skipped; a case that fails does not stop the others.

    Args:
        scans: what to process, see :func:`~cardiac_qc_plugin.data.inputs.find_scans`.
        output: folder to write to.
        segmenter: a segmentation bundle.
        detector: the failure bundle, for the segmenter's network and map.

    Returns:
        The content of each finished case's ``qc.json``, in the order of the scans.

    Raises:
        OSError: if the output folder cannot be written, or the disk is full: no later case could be written either.
        CaseFailures: at the end, if any case failed.
    """
    from cardiac_qc_plugin.reports import write_report

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    cases, failures = [], []
    with tqdm(total=len(scans), unit="scan", bar_format="{l_bar}{bar}| {n:.1f}/{total} {elapsed}<{remaining}") as bar:
        for index, scan in enumerate(scans):
            bar.set_description(scan.case)

            def advance(share: float, index: int = index) -> None:
                bar.update(index + share - bar.n)

            segmenter.inferer.progress = advance
            try:
                cases.append(run_case(scan, output, segmenter, detector))
            except (ValueError, RuntimeError) as error:
                failures.append((scan.case, str(error)))
            advance(1.0)
    write_worklist(output / "worklist.csv", worklist_rows(cases, failures))
    write_report(output, cases, failures)
    if failures:
        raise CaseFailures(failures)
    return cases
