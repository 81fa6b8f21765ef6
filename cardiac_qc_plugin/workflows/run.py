"""From scans to flagged regions: segment, detect, report (see docs/architecture.md)."""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cardiac_qc_plugin import __version__
from cardiac_qc_plugin.bundle import BundlePredictor, load_detector, load_models, load_segmenter
from cardiac_qc_plugin.data.inputs import PHASE, Scan, heart_of
from cardiac_qc_plugin.data.predictions import MAP_FILES, PROBABILITY_FILE, REGIONS_FILE, SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.clinical import slice_levels, structure_volumes
from cardiac_qc_plugin.metrics.plausibility import plausibility
from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES
from cardiac_qc_plugin.reports import PAGE, write_case, write_report
from cardiac_qc_plugin.transforms.spatial import spacing_of

from .calibrate import promised_threshold
from .cine import Given, choose_phases, group_cines, plan_phases, table_row, write_cines
from .files import (
    MASKS,
    OutputError,
    Volume,
    check_folder,
    file_sha256,
    read_json,
    read_volume,
    write_csv,
    write_json,
    write_like,
    write_rows,
)
from .overlap import Overlap
from .table import TABLE, write_table_of_run
from .urgency import scores, urgencies

__all__ = ["CaseFailures", "load_predictors", "run"]

Predictors = tuple[BundlePredictor, BundlePredictor | None]  # that segment, and that find failures
MapFiles = dict[str, tuple[str, type]]  # entry of a bundle's result: file, and type of its voxels
SEGMENT_FILES: MapFiles = {
    "pred": (SEGMENTATION_FILE, np.uint8),
    "emap": (MAP_FILES["emap"], np.float32),
    "bmap": (MAP_FILES["bmap"], np.float32),
}
DETECT_FILES: MapFiles = {
    "pred": (PROBABILITY_FILE, np.float32),
    "regions": (REGIONS_FILE, np.uint16),
}
OF_ALL_CASES = ("worklist.csv", PAGE, TABLE)
OF_HEART = ("cine.json", "volumes.csv")
STAGES = {"segmentation": SEGMENT_FILES, "detection": DETECT_FILES}


class CaseFailures(RuntimeError):
    """Some cases could not be processed; the others were.

    Args:
        failures: (case, reason) of each.
        cases: content of ``qc.json`` of the others.
    """

    def __init__(self, failures: list[tuple[str, str]], cases: list[dict[str, Any]]) -> None:
        self.failures = failures
        self.cases = cases
        lines = "\n".join(f"  {case}: {reason}" for case, reason in failures)
        super().__init__(f"{len(failures)} case(s) could not be processed:\n{lines}")


def load_predictors(
    model: str,
    map: str,
    samples: int,
    sample_phases: str = "all",
    device: str = "auto",
    root: str | Path | None = None,
    threshold: float | None = None,
    catch: float | None = None,
    regions_per_patient: float | None = None,
    calibration: str | Path | None = None,
    turns: int = 1,
) -> tuple[Predictors, Predictors | None]:
    """The bundles of a run, and those for the phases that are not sampled.

    Arguments as for :func:`~cardiac_qc_plugin.bundle.load_models` and
    :func:`~cardiac_qc_plugin.workflows.calibrate.promised_threshold`.

    Args:
        sample_phases: phases of a cine that are sampled: ``"all"`` or ``"ed_es"``.

    Raises:
        ValueError: as these; for another `sample_phases`; or for a threshold beside a promise, which sets it.
    """
    if sample_phases not in ("all", "ed_es"):
        raise ValueError(f"--sample_phases is all or ed_es, got '{sample_phases}'.")
    models = load_models(model, map, samples, device, root, threshold, turns)
    _, promise = promised_threshold(*models, catch, regions_per_patient, calibration)
    if promise is not None:
        if threshold is not None:
            raise ValueError(
                "A promise sets the threshold: leave out --threshold, or --catch and --regions_per_patient."
            )
        models = models[0], load_detector(model, map, device, root, promise.threshold)
        models[1].promise = asdict(promise)
    if sample_phases == "all" or samples == 0:
        return models, None
    own = map == "emap"  # whose detector, and promise, are for all phases
    detector = models[1] if own else load_detector(model, "emap", device, root, threshold)
    return models, (load_segmenter(model, "emap", 0, device, root, turns), detector)


def digest(*parts: Any) -> str:
    """Digest of what a stage's result depends on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def write_maps(data: dict[str, Any], files: MapFiles, folder: Path, volume: Volume) -> None:
    """Write entries ``(1, H, W, D)`` of a bundle's result under their file names."""
    for key, (name, dtype) in files.items():
        write_like(folder / name, np.asarray(data[key])[0].astype(dtype), volume)


def segment(scan: Scan, folder: Path, image: Path, volume: Volume, bundle: BundlePredictor) -> dict[str, Any]:
    """Segmentation, e-map and b-map of a scan; returns their entry of ``qc.json``."""
    if scan.frame is not None:
        write_like(image, volume.data, volume)
    result = bundle({"image": str(image)})
    write_maps(result, SEGMENT_FILES, folder, volume)
    labels = np.asarray(result["pred"])[0]
    checked = plausibility(labels, volume.spacing)
    return {
        "map": bundle.config["map"],
        "samples": bundle.config["samples"],
        "turns": bundle.config.get("turns", 1),
        "seed": bundle.config["seed"],
        "precision": bundle.inferer.precision,
        **result["result"],
        "volume_ml": structure_volumes(labels, volume.spacing),
        "slice_level": slice_levels(labels),
        "sample_volume_ml": sample_volumes(result["sample_areas"], spacing_of(result["image"])),
        "plausibility": {"violations": checked.violations, "implausible_slices": checked.implausible_slices},
    }


def sample_volumes(areas: torch.Tensor, spacing: tuple[float, float, float]) -> dict[str, list[float]]:
    """Volume in ml of each structure in each sample, from the areas in pixels, (slices, samples, classes)."""
    volumes = areas.sum(dim=0).numpy() * np.prod(spacing) / 1000
    return {name: volumes[:, label].round(3).tolist() for label, name in CLASS_NAMES.items()}


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


class CaseRecord:
    """The ``qc.json`` of a case: what its files were made from.

    The entries and files of a stage and those after it are removed before the stage starts; its entry comes back when
    its files are complete. So an interrupted stage never counts as done, and no later stage reads what is out of date.

    What covers all cases goes too, with the detection of one, and what covers the heart with any of its phases: it
    describes what is there no more.

    Args:
        output: the run's output folder.
        case: name of the case, and of its folder in there.
    """

    def __init__(self, output: Path, case: str) -> None:
        self.output, self.folder, self.heart = output, output / case, heart_of(case)
        self.path = self.folder / "qc.json"
        self.qc: dict[str, Any] = {"stages": {}}
        if self.path.is_file():
            self.qc |= read_json(self.path)

    def done(self, name: str, digest: str) -> bool:
        """Whether a stage's files are there, made with this digest."""
        present = all((self.folder / file).is_file() for file, _ in STAGES[name].values())
        return present and self.qc["stages"].get(name, {}).get("digest") == digest

    def stage(
        self, name: str, digest: str, bundle: BundlePredictor, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The stage's entry, from the file where the stage was done with the same digest, else from ``work``."""
        if self.done(name, digest):
            return self.qc[name]
        self.invalidate(name)
        start = time.perf_counter()
        made_by = {"bundle": bundle.name, "bundle_version": bundle.version, "weights_sha256": bundle.weights_sha256}
        self.qc[name] = {**made_by, **work()}
        self.qc["versions"] = {"cardiac_qc_plugin": __version__, "monai": version("monai"), "torch": version("torch")}
        self.qc["stages"][name] = {"digest": digest, "seconds": round(time.perf_counter() - start, 3)}
        write_json(self.path, self.qc)
        return self.qc[name]

    def invalidate(self, name: str) -> None:
        """Forget a stage and those after it: their entries first, then their files."""
        later = list(STAGES)[list(STAGES).index(name) :]
        if "detection" in self.qc["stages"]:
            for file in OF_ALL_CASES:
                (self.output / file).unlink(missing_ok=True)
        for file in OF_HEART:
            (self.output / self.heart / file).unlink(missing_ok=True)
        for stage in later:
            self.qc["stages"].pop(stage, None)
            self.qc.pop(stage, None)
        for entry in ("scores", "promise"):
            self.qc.pop(entry, None)
        if self.path.is_file():
            write_json(self.path, self.qc)
        for stage in later:
            for file, _ in STAGES[stage].values():
                (self.folder / file).unlink(missing_ok=True)
        for name in MASKS:  # other DICOM files there are a user's
            (self.folder / f"{name}.dcm").unlink(missing_ok=True)
        (self.folder / PAGE).unlink(missing_ok=True)
        for part in self.folder.glob(".part-*"):  # of a process that was killed
            part.unlink(missing_ok=True)

    def complete(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Add what does not belong to a stage, and write if that changes the file."""
        self.qc |= entries
        if read_json(self.path) != self.qc:
            write_json(self.path, self.qc)
        return self.qc


def forget(output: Path, case: str, keep: Collection[str] = ()) -> None:
    """Remove what earlier runs made of an input: all its phases if it was a cine, but those to keep."""
    phases = [f"{case}/{folder.name}" for folder in (output / case).glob("phase*")]
    for name in (name for name in (case, *phases) if name not in keep and (output / name / "qc.json").is_file()):
        with suppress(ValueError):  # a damaged qc.json, which later commands name
            CaseRecord(output, name).invalidate("segmentation")


def run_case(scan: Scan, output: Path, predictors: Predictors, accepted: Predictors | None = None) -> dict[str, Any]:
    """The stages for one scan; one whose result is there is skipped. Returns the content of ``qc.json``.

    With ``accepted``, a result of these other predictors that is there will do.
    """
    try:
        volume = read_volume(scan.path, scan.frame)
    except ValueError:
        forget(output, scan.case)
        raise
    record = CaseRecord(output, scan.case)
    folder = record.folder
    image = scan.path if scan.frame is None else folder / "image.nii.gz"
    source = {
        "path": str(scan.path),
        "frame": scan.frame,
        "sha256": file_sha256(scan.path),
        "shape": list(volume.data.shape),
        "spacing_mm": list(volume.spacing),
    }
    basics = {"case": scan.case, "input": source}
    record.qc |= basics

    def digests(of: Predictors) -> dict[str, str]:
        key = digest(__version__, source["sha256"], scan.frame, of[0].digest)
        return {"segmentation": key} | ({} if of[1] is None else {"detection": digest(key, of[1].digest)})

    if accepted is not None and all(record.done(name, key) for name, key in digests(accepted).items()):
        predictors = accepted
    (segmenter, detector), keys = predictors, digests(predictors)
    segmentation = record.stage(
        "segmentation", keys["segmentation"], segmenter, lambda: segment(scan, folder, image, volume, segmenter)
    )
    if detector is None:
        return record.complete(basics)
    detection = record.stage("detection", keys["detection"], detector, lambda: detect(folder, image, volume, detector))
    qc = record.complete({**basics, "scores": scores(segmentation, detection), "promise": detector.promise})
    write_case(folder)
    return qc


def worklist_rows(cases: list[dict[str, Any]], failures: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows of the worklist, most urgent first; cases that could not be processed come before all others."""
    rows = [failed_row(case, message) for case, message in failures]
    rows += [worklist_row(qc) for qc in sorted(cases, key=lambda qc: -qc["scores"]["urgency"])]
    return [{"rank": rank, **row} for rank, row in enumerate(rows, start=1)]


def failed_row(case: str, message: str) -> dict[str, Any]:
    """What the worklist says of a case that could not be processed."""
    return {"case": case, "status": "failed", "message": message}


def worklist_row(qc: dict[str, Any]) -> dict[str, Any]:
    """What the worklist says of a case."""
    detection, agreement = qc["detection"], qc["segmentation"]["pairwise_dice"]
    checked = qc["segmentation"].get("plausibility", {})  # not in results of older versions
    return {
        "case": qc["case"],
        "status": "done",
        "urgency": round(qc["scores"]["urgency"], 4),
        "regions_flagged": len(detection["regions"]),
        "slices_flagged": len(detection["flagged_slices"]),
        "slices": qc["input"]["shape"][2],
        "slices_implausible": len(checked["implausible_slices"]) if checked else None,
        **{f"{name}_volume_ml": round(ml, 1) for name, ml in qc["segmentation"]["volume_ml"].items()},
        **{f"{name}_pairwise_dice": None if v is None else round(v, 4) for name, v in agreement.items()},
    }


def each_scan(
    scans: Sequence[Scan], output: Path, predictors: Predictors, accepted: Predictors | None = None
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Process scans, with progress; returns the finished cases, and (case, reason) of the others, in their order.

    Two scans are under way at a time, see :class:`~cardiac_qc_plugin.workflows.overlap.Overlap`.
    """
    cases, failures = [], []
    bundles = [bundle for bundle in predictors if bundle is not None]
    inferer = predictors[0].inferer
    with (
        tqdm(total=len(scans), unit="scan", bar_format="{l_bar}{bar}| {n:.1f}/{total} {elapsed}<{remaining}") as bar,
        Overlap(bundles) as overlap,
    ):

        def advance(share: float) -> None:
            done = len(cases) + len(failures)
            bar.update(max(done + share - bar.n, 0))

        before, inferer.progress = inferer.progress, advance
        try:
            for scan, wait in overlap.map(lambda scan: run_case(scan, output, predictors, accepted), scans):
                bar.set_description(scan.case)
                try:
                    cases.append(wait())
                except OutputError:  # no later case could be written either
                    raise
                except ValueError as error:
                    failures.append((scan.case, str(error)))
                except Exception as error:  # a case that breaks in an unforeseen way must not stop the cohort
                    while error.__cause__ is not None:  # MONAI says "applying transform ...", from what went wrong
                        error = error.__cause__
                    failures.append((scan.case, f"{type(error).__name__}: {error}"))
                advance(0.0)
        finally:
            inferer.progress = before
    return cases, failures


def preview_cines(
    scans: Sequence[Scan], output: Path, predictors: Predictors, preview: Predictors, given: Given
) -> tuple[list[dict[str, Any]], list[tuple[str, str]], dict[str, str]]:
    """All phases of cines by ``preview``, then their end-diastole and end-systole, and single scans, by ``predictors``.

    Returns:
        Finished cases, failures, and what the plan of each cine was made of.
    """
    phases = [scan for scan in scans if PHASE.fullmatch(scan.case)]
    cases, failures = each_scan(phases, output, preview, accepted=predictors)
    wanted = {scan.case for scan in scans} - {scan.case for scan in phases}
    plans = {}
    for cine in group_cines(cases, output, given):
        images = (qc["input"]["sha256"] for qc in cine.phases.values())
        plans[cine.name] = digest(preview[0].digest, cine.given, *images)
        try:
            chosen = plan_phases(cine, plans[cine.name])
        except ValueError:  # said again, and noted, where the cine is measured
            continue
        wanted |= {cine.phases[phase]["case"] for phase in chosen if phase is not None}
    again, broken = each_scan([scan for scan in scans if scan.case in wanted], output, predictors)
    finished = {qc["case"]: qc for qc in cases if qc["case"] not in dict(broken)} | {qc["case"]: qc for qc in again}
    return [finished[scan.case] for scan in scans if scan.case in finished], failures + broken, plans


def comparable(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases with urgencies in one unit."""
    values = urgencies([qc["scores"] for qc in cases])
    return [{**qc, "scores": {**qc["scores"], "urgency": value}} for qc, value in zip(cases, values, strict=True)]


def process(
    scans: Sequence[Scan],
    output: Path,
    predictors: Predictors,
    preview: Predictors | None = None,
    given: Given = (None, None),
) -> tuple[list[dict[str, Any]], list[tuple[str, str]], list[dict[str, Any]]]:
    """All that is written into the cases' own folders; arguments as for :func:`run`.

    Returns:
        Content of ``qc.json`` of the finished cases, (case, reason) of the others, and content of each ``cine.json``.
    """
    names = {scan.case for scan in scans}
    for own in {match[1] if (match := PHASE.fullmatch(name)) else name for name in names}:
        forget(output, own, keep=names)  # phases of an earlier cine of this name, or that there is one
    if preview is None:
        cases, failures = each_scan(scans, output, predictors)
        plans = {}
    else:
        cases, failures, plans = preview_cines(scans, output, predictors, preview, given)
    cines = group_cines(cases, output, given)
    chosen = {}
    for cine in cines:
        cine.notes += [f"{case}: {reason}" for case, reason in failures if case.rpartition("/phase")[0] == cine.name]
        try:
            chosen[cine.name] = plan_phases(cine, plans[cine.name]) if cine.name in plans else choose_phases(cine)
        except ValueError as error:
            chosen[cine.name] = None, None
            cine.notes.append(str(error))
            failures.append((cine.name, str(error)))
    return cases, failures, write_cines(cines, chosen)


def run(
    scans: list[Scan],
    output: str | Path,
    segmenter: BundlePredictor,
    detector: BundlePredictor | None,
    failures: Sequence[tuple[str, str]] = (),
    preview: Predictors | None = None,
    given: Given = (None, None),
    skipped: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Segment scans, detect failures in them, and write the worklist and the report.

    Files, on each scan's own grid: see docs/architecture.md. A case that is done with the same input and settings is
    skipped; a case that fails does not stop the others.

    Args:
        scans: what to process, see :func:`~cardiac_qc_plugin.data.inputs.find_scans`.
        output: folder to write to.
        segmenter: a segmentation bundle.
        detector: the failure bundle, for the segmenter's network and map; None to segment only, without worklist and
            report.
        failures: (case, reason) of what was to be processed, and could not even be read in.
        preview: bundles for the phases of cines other than end-diastole and end-systole: those with the e-map, say,
            which costs one pass instead of many. They segment all phases first, to find the two.
        given: phase numbers of end-diastole and end-systole of all cines, to be found where None.
        skipped: what was left out of the input and why, for the report.

    Returns:
        The content of each finished case's ``qc.json``, in the order of the scans.

    Raises:
        OSError: if the output folder cannot be written, or the disk is full.
        ValueError: if a given phase does not exist in any cine.
        CaseFailures: at the end, if any case failed.
    """
    output = Path(output)
    check_folder(output)
    phases = {int(match[2]) for scan in scans if (match := PHASE.fullmatch(scan.case))}
    for phase in given:
        if phase is not None and phases and phase not in phases:
            raise ValueError(f"No cine has a phase {phase}, but {min(phases)} to {max(phases)}. See --ed and --es.")
    output.mkdir(parents=True, exist_ok=True)
    for case, _ in failures:
        forget(output, case)
    cases, broken, records = process(scans, output, (segmenter, detector), preview, given)
    failures = sorted([*failures, *broken])  # by name, as a cohort's, whatever failed first
    write_rows(output / "indices.csv", [table_row(record) for record in records])
    if detector is not None:
        write_table_of_run(output, cases, failures, records)
        cases = comparable(cases)
        write_csv(output / "worklist.csv", lambda: worklist_rows(cases, failures), last="message")
        write_report(output, cases, failures, records, skipped)
    if failures:
        raise CaseFailures(failures, cases)
    return cases
