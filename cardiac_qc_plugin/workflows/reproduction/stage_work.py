"""What the stages of a reproduction do, each by the workflow or bundle that does it for a user as well."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.bundle import BundlePredictor

from ..correct import correct
from ..evaluate import evaluate
from ..files import file_sha256
from ..measure import measure_case
from ..operating_point import choose_operating_point
from ..references import Outcome, References, each_case
from ..run import digest, run
from .stages import Budget, BudgetSpent, Stage
from .training import train

SCANS_AT_ONCE = 10  # between looks at the clock


def inference_digest(bundle: Path) -> str:
    """Digest of a bundle's inference configuration."""
    return digest((bundle / "configs" / "inference.json").read_text())


def resume_folder(stage: Stage) -> Path:
    """Where a training with the stage's present inputs leaves its checkpoint."""
    return stage.folder / f"resume_{stage.digest()[:12]}"


def train_network(
    configs: list[str], settings: dict[str, Any], tracking: str | None, stage: Stage, budget: Budget
) -> None:
    """Train into the stage's folder; checkpoints of other settings are removed."""
    resume = resume_folder(stage)
    for other in set(stage.folder.glob("resume_*")) - {resume}:
        shutil.rmtree(other)
    paths = {"ckpt_dir": str(stage.folder), "ckpt_path": str(stage.folder / "model.pt"), "resume_dir": str(resume)}
    train(configs, {**settings, **paths}, stage.folder, budget, tracking)


def take_digests(given: Path, outputs: Sequence[str]) -> dict[str, str]:
    """Digests of the files of a training that was done elsewhere.

    Raises:
        ValueError: if one is missing; the message names it.
    """
    if missing := next((name for name in outputs if not (given / name).is_file()), None):
        raise ValueError(f"{given / missing}: no such file, but it belongs to the model.pt beside it (--trained).")
    return {name: file_sha256(given / name) for name in outputs}


def take_weights(given: Path, stage: Stage, budget: Budget) -> None:
    """Copy the files of a training that was done elsewhere."""
    (stage.folder / "loss.csv").unlink(missing_ok=True)  # of a training that these files are not from
    for name in stage.outputs:
        shutil.copy2(given / name, stage.folder / name)


def segmenter(maps: Stage, device: str) -> BundlePredictor:
    """The network that a stage of maps segments with, or its ensemble."""
    info = maps.info
    own = info["own"] | {"ckpt_path": str(info["weights"][-1])}
    if len(info["weights"]) > 1:
        own["inferer"] = {
            "_target_": "cardiac_qc_plugin.inferers.EnsembleSliceInferer",
            "_desc_": digest(*(network.fingerprint() for network in maps.needs)),  # in the digest of each case
            "members": [str(path) for path in info["weights"]],
            "amp": "@amp",
        }
    return BundlePredictor(info["bundle"], device, **own)


def segment_scans(device: str, stage: Stage, budget: Budget) -> None:
    """Segment a stage's scans; those that are done with the same weights are skipped."""
    scans = stage.info["scans"]
    cases = {scan.case for scan in scans}
    for record in list(stage.folder.glob("*/qc.json")):
        if record.parent.name not in cases:
            shutil.rmtree(record.parent)  # of another datalist
    predictor = segmenter(stage, device)
    for start in range(0, len(scans), SCANS_AT_ONCE):
        if not budget.allows():
            raise BudgetSpent(f"{stage.folder}: {start} of {len(scans)} scans are segmented.")
        run(scans[start : start + SCANS_AT_ONCE], stage.folder, predictor, None)


def detect_failures(
    maps: Stage, detector: Stage, bundle: Path, own: dict[str, Any], device: str, stage: Stage, budget: Budget
) -> None:
    """Flag regions in a copy of the segmented scans; the copy shares their files where the file system can."""
    shutil.rmtree(stage.folder)
    shutil.copytree(maps.folder, stage.folder, copy_function=link_or_copy)
    own = {**own, "ckpt_path": str(detector.folder / "model.pt")}
    # all is segmented, so the segmenter only has to agree
    run(maps.info["scans"], stage.folder, segmenter(maps, device), BundlePredictor(bundle, device, **own))


def link_or_copy(source: str, target: str) -> None:
    """A hard link, or a copy; no stage writes into a file, all replace it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def correct_regions(detection: Stage, reference: Path, stage: Stage, budget: Budget) -> None:
    """Simulated correction, all voxels of a flagged region taking the reference (the paper's rule)."""
    shutil.rmtree(stage.folder)
    complete(correct(detection.folder, stage.folder, reference))


def evaluate_folds(
    before: Sequence[Stage], after: Sequence[Stage], reference: Path, stage: Stage, budget: Budget
) -> None:
    """Measure the folds together."""
    folders = [[each.folder for each in stages] for stages in (before, after)]
    complete(evaluate(folders[0], reference, stage.folder, folders[1] or None))


def pool_operating_point(
    detections: Sequence[Stage], reference: Path, rule: dict[str, Any], stage: Stage, budget: Budget
) -> None:
    """The threshold with the largest F-beta over the regions of all folds, each by its own detector."""
    references, volumes = References(reference), []
    for detection in detections:
        cases, failures = each_case(detection.folder, partial(measure_case, references=references), "operating point")
        complete(Outcome("", failures))
        volumes += [case.detection[rule["criterion"]] for case in cases.values()]
    choose_operating_point(volumes, stage.folder / "operating_point.json", rule["beta"], rule["region_size"])


def complete(outcome: Outcome) -> None:
    """Refuse what could not do all cases: a table over the others would look complete."""
    if outcome.failures:
        case, message = next(iter(outcome.failures.items()))
        raise ValueError(f"{len(outcome.failures)} case(s) failed, {case} first: {message}")
