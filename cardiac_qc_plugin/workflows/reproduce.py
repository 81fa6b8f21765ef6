"""The paper's experiments from one command: training, detection, correction, tables, figures (sections V to VII)."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from cardiac_qc_plugin.bundle import BundlePredictor, find_bundle
from cardiac_qc_plugin.data.inputs import Scan, find_scans
from cardiac_qc_plugin.data.predictions import MAP_FILES
from cardiac_qc_plugin.reports.reproduction import Experiment, write_reproduction

from .ablations import CLUSTERS, REGION_SIZES, SAMPLES, TOLERANCES, sweep_labels
from .correct import correct
from .evaluate import evaluate
from .files import read_json
from .plan import describe
from .references import Outcome
from .run import DETECT_FILES, digest, run
from .stages import Budget, BudgetSpent, Progress, Stage, carry_out
from .training import config_files, read_losses, train

__all__ = ["ABLATIONS", "LOSSES", "Settings", "reproduce"]

LOSSES = {"drn": ("ce", "soft_dice"), "unet": ("ce", "soft_dice"), "dn": ("brier", "soft_dice")}  # section V-A
TABLE_V = (("drn", "ce"), ("unet", "ce"), ("dn", "soft_dice"))
ABLATIONS = ("samples", "region_size", "labels")
DETECTOR = "cardiac_segmentation_failure"
SCANS_AT_ONCE = 10  # between looks at the clock


@dataclass(frozen=True)
class Settings:
    """What to reproduce, and from what; None stands for the bundles' own setting.

    Args:
        data: folder of the data set, which has the references as well.
        output: folder for everything that is written.
        folds: folds to leave out, each in turn.
        models: ``"drn"``, ``"unet"``, ``"dn"``.
        losses: of the paper's two for each model (`LOSSES`), those to train with; all by default.
        maps: ``"bmap"``, ``"emap"``.
        regime: ``"short"``, or the name of another training configuration in the bundles, such as ``"paper"``.
        iterations: of the segmentation networks.
        detector_iterations: of the detectors.
        samples: Monte Carlo samples T for the b-map.
        detector_maps: what detectors are trained on: ``"in_sample"``, maps of the network's own training patients
            (the paper), or ``"out_of_fold"``, maps of the same patients by the networks that did not see them.
        ablations: of `ABLATIONS`.
        datalist: with folds; by default the bundles' ``acdc_folds.json``.
        device: ``"auto"`` or a torch device.
        bundle_dir: folder of the bundles; by default the repository's.

    Raises:
        ValueError: an unknown value, or a combination that cannot be; the message says which.
    """

    data: Path
    output: Path
    folds: tuple[int, ...] = (0, 1, 2, 3)
    models: tuple[str, ...] = tuple(LOSSES)
    losses: tuple[str, ...] = ("ce", "brier", "soft_dice")
    maps: tuple[str, ...] = tuple(MAP_FILES)
    regime: str = "short"
    iterations: int | None = None
    detector_iterations: int | None = None
    samples: int | None = None
    detector_maps: str = "in_sample"
    ablations: tuple[str, ...] = ()
    datalist: Path | None = None
    device: str = "auto"
    bundle_dir: Path | None = None

    def __post_init__(self) -> None:
        choices = {
            "models": tuple(LOSSES),
            "losses": ("ce", "brier", "soft_dice"),
            "maps": tuple(MAP_FILES),
            "ablations": ABLATIONS,
            "folds": self.all_folds,
        }
        for name, allowed in choices.items():
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                raise ValueError(f"--{name} are of {', '.join(map(str, allowed))}, got '{unknown[0]}'.")
        if not self.combinations:
            raise ValueError(f"None of the models {', '.join(self.models)} has one of these losses in the paper.")
        if self.detector_maps not in ("in_sample", "out_of_fold"):
            raise ValueError(f"--detector_maps is in_sample or out_of_fold, got '{self.detector_maps}'.")
        if self.detector_maps == "out_of_fold" and set(self.folds) != set(self.all_folds):
            listed = ",".join(map(str, self.all_folds))
            raise ValueError(f"--detector_maps out_of_fold needs the networks of all folds: give --folds {listed}.")

    @property
    def combinations(self) -> list[tuple[str, str]]:
        """Model and loss of each segmentation network."""
        return [(model, loss) for model in self.models for loss in LOSSES[model] if loss in self.losses]

    @cached_property
    def items(self) -> list[dict[str, Any]]:
        """Items of the datalist."""
        return read_json(self.datalist_file)["training"]

    @property
    def datalist_file(self) -> Path:
        """The datalist."""
        return self.datalist or self.bundle(DETECTOR) / "configs" / "acdc_folds.json"

    @property
    def all_folds(self) -> tuple[int, ...]:
        """Folds of the datalist."""
        return tuple(sorted({item["fold"] for item in self.items}))

    def bundle(self, name: str) -> Path:
        """Folder of a bundle."""
        return find_bundle(name, self.bundle_dir).resolve()

    def segmenter(self, model: str) -> Path:
        """Folder of a network's bundle."""
        return self.bundle(f"cardiac_{model}_segmentation")

    def scans(self, folds: Sequence[int]) -> list[Scan]:
        """Scans of some folds."""
        return [scan for fold in folds for scan in find_scans(self.datalist_file, self.data, fold)]

    def listing(self) -> str:
        """Digest of the datalist and of the sizes of its files.

        Raises:
            ValueError: if a file is missing; the message names it.
        """
        paths = [self.data / item[key] for item in self.items for key in ("image", "label")]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise ValueError(f"{missing}: no such file, but {self.datalist_file} lists it. Give the data set's --data.")
        return digest(json.dumps(self.items), *(path.stat().st_size for path in paths))


class Grid:
    """The stages of all runs, each made once: a network's stages are the same objects for all that need them.

    Args:
        settings: what to reproduce.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.listing = settings.listing()
        self.stages: dict[str, Stage] = {}

    def stage(self, name: str, **arguments: Any) -> Stage:
        """The stage of that name."""
        return self.stages.setdefault(name, Stage(self.settings.output, name, **arguments))

    def training(self, name: str, bundle: Path, iterations: int | None, own: dict, needs: tuple, **paths: Any) -> Stage:
        """A stage that trains by a bundle's ``train.json``; `own` are settings that are part of the digest."""
        configs = config_files(bundle, self.settings.regime)
        own = own | ({} if iterations is None else {"iterations": iterations})
        total = iterations or ConfigParser.load_config_files(configs)["iterations"]
        common = {"bundle_root": str(bundle), "data_list_file_path": str(self.settings.datalist_file)}
        common |= {"dataset_dir": str(self.settings.data)} | device_setting(self.settings.device)
        texts = [Path(file).read_text() for file in configs]
        return self.stage(
            name,
            settings={"bundle": bundle.name, "configs": digest(*texts), "data": self.listing, **own},
            work=partial(train_network, configs, {**common, **paths, **own}),
            outputs=("model.pt", "model_operating_point.json") if bundle.name == DETECTOR else ("model.pt",),
            needs=needs,
            info={"kind": "train", "configs": configs, "iterations": total, "own": own}
            | {"device": device_setting(self.settings.device), "regime": self.settings.regime},
        )

    def network(self, model: str, loss: str, fold: int) -> Stage:
        """Training of a segmentation network."""
        name = f"{model}_{loss}/fold{fold}/segmentation"
        own = {"loss": loss, "fold": fold}
        return self.training(name, self.settings.segmenter(model), self.settings.iterations, own, ())

    def maps(self, model: str, loss: str, map: str, fold: int, part: str, samples: int | None = None) -> Stage:
        """Segmentation and map of the fold that was left out (``part`` "test") or of the others ("training").

        An e-map comes from one pass without dropout, so nothing is sampled for it.
        """
        others = [other for other in self.settings.all_folds if other != fold]
        scans = self.settings.scans([fold] if part == "test" else others)
        folder = f"{model}_{loss}/fold{fold}/{map}/{part}" + ("" if samples is None else f"_{samples}_samples")
        samples = 0 if map == "emap" else samples or self.settings.samples
        own = {"map": map} | ({} if samples is None else {"samples": samples})
        bundle, network = self.settings.segmenter(model), self.network(model, loss, fold)
        files = ("segmentation.nii.gz", MAP_FILES[map])
        return self.stage(
            folder,
            settings={"bundle": inference_digest(bundle), **own},
            work=partial(segment_scans, scans, bundle, network, own, self.settings.device),
            outputs=tuple(f"{scan.case}/{file}" for scan in scans for file in files),
            needs=(network,),
            info={"kind": "segment", "bundle": bundle, "scans": scans, "own": own}
            | {"device": device_setting(self.settings.device)},
        )

    def detector(self, model: str, loss: str, map: str, fold: int, region_size: int | None = None) -> Stage:
        """Training of a detector."""
        others = [other for other in self.settings.all_folds if other != fold]
        if self.settings.detector_maps == "in_sample":
            sources = (self.maps(model, loss, map, fold, "training"),)
        else:
            sources = tuple(self.maps(model, loss, map, other, "test") for other in others)
        own = {"map": map, "fold": fold} | ({} if region_size is None else {"region_size": region_size})
        name = f"{self.run_folder(model, loss, map, fold, region_size)}/detector"
        folders = [str(source.folder) for source in sources]
        bundle, iterations = self.settings.bundle(DETECTOR), self.settings.detector_iterations
        return self.training(name, bundle, iterations, own, sources, predictions_dir=folders)

    def detection(self, model: str, loss: str, map: str, fold: int, region_size: int | None = None) -> Stage:
        """Flagged regions of the fold that was left out."""
        maps, detector = (
            self.maps(model, loss, map, fold, "test"),
            self.detector(model, loss, map, fold, region_size),
        )
        scans, bundle = maps.info["scans"], self.settings.bundle(DETECTOR)
        own = {"map": map} | ({} if region_size is None else {"region_size": region_size})
        return self.stage(
            f"{self.run_folder(model, loss, map, fold, region_size)}/detected",
            settings={"bundle": inference_digest(bundle), **own},
            work=partial(detect_failures, maps, detector, bundle, own, self.settings.device),
            outputs=tuple(f"{scan.case}/{file}" for scan in scans for file, _ in DETECT_FILES.values()),
            needs=(maps, detector),
            info={"kind": "detect"},
        )

    def correction(self, model: str, loss: str, map: str, fold: int) -> Stage:
        """Simulated correction of the flagged regions."""
        detection = self.detection(model, loss, map, fold)
        scans = self.settings.scans([fold])
        return self.stage(
            f"{self.run_folder(model, loss, map, fold)}/corrected",
            settings={"data": self.listing},
            work=partial(correct_regions, detection, self.settings.data),
            outputs=tuple(f"{scan.case}/segmentation.nii.gz" for scan in scans),
            needs=(detection,),
            info={"kind": "correct"},
        )

    def evaluation(self, name: str, before: Sequence[Stage], after: Sequence[Stage] = ()) -> Stage:
        """Measurement of all folds together, before and after correction."""
        return self.stage(
            name,
            settings={"data": self.listing},
            work=partial(evaluate_folds, before, after, self.settings.data),
            outputs=("summary.json", "cases.csv"),
            needs=(*before, *after),
            info={"kind": "evaluate"},
        )

    def run_folder(self, model: str, loss: str, map: str, fold: int | str, region_size: int | None = None) -> str:
        """Folder of a detector and what comes after it."""
        fold = f"fold{fold}" if isinstance(fold, int) else fold
        suffix = "" if region_size is None else f"_region{region_size}"
        return f"{model}_{loss}/{fold}/{map}/{self.settings.detector_maps}{suffix}"

    def by_fold(self) -> list[Stage]:
        """The stages of each fold up to the correction, in the order in which they are carried out."""
        runs = [(m, loss, map) for m, loss in self.settings.combinations for map in self.settings.maps]
        first, later = [], []
        for fold in self.settings.folds:
            for run_ in runs:
                first += [self.network(*run_[:2], fold), self.maps(*run_, fold, "test")]
            for run_ in runs:
                later += [*self.detector(*run_, fold).needs, self.detector(*run_, fold)]
                later += [self.detection(*run_, fold), self.correction(*run_, fold)]
            later += self.ablations(fold, runs)
            if self.settings.detector_maps == "in_sample":  # a fold is finished before the next one begins
                first, later = first + later, []
        return list(dict.fromkeys(first + later))

    def ablations(self, fold: int, runs: Sequence[tuple[str, str, str]]) -> list[Stage]:
        """The stages of a fold that the ablations need beyond these."""
        stages = []
        if "samples" in self.settings.ablations and "bmap" in self.settings.maps:
            pairs = [pair for pair in TABLE_V if pair in self.settings.combinations]
            stages += [self.maps(*pair, "bmap", fold, "test", samples) for pair in pairs for samples in SAMPLES]
        if "region_size" in self.settings.ablations:
            for run_ in runs:
                for size in REGION_SIZES:
                    stages += [self.detector(*run_, fold, size), self.detection(*run_, fold, size)]
        return stages

    def over_folds(self, planned: bool = False) -> list[Experiment]:
        """What is measured over the folds whose stages are done, or are planned."""

        def finished(stages: list[Stage]) -> tuple[list[int], list[Stage]]:
            pairs = [(f, s) for f, s in zip(self.settings.folds, stages, strict=True) if planned or s.done]
            return [fold for fold, _ in pairs], [stage for _, stage in pairs]

        experiments = []
        for model, loss in self.settings.combinations:
            for map in self.settings.maps:
                run_ = model, loss, map
                folds, after = finished([self.correction(*run_, fold) for fold in self.settings.folds])
                before = [self.detection(*run_, fold) for fold in folds]
                stage = self.evaluation(self.run_folder(*run_, "evaluation"), before, after) if folds else None
                experiments.append(Experiment("grid", *run_, None, folds, stage))
                experiments += self.ablated(run_, finished)
        return experiments

    def ablated(self, run_: tuple[str, str, str], finished: Any) -> list[Experiment]:
        """Measurements of the ablations of one network and map."""
        model, loss, map = run_
        result = []
        if "samples" in self.settings.ablations and map == "bmap" and (model, loss) in TABLE_V:
            for samples in SAMPLES:
                folds, stages = finished([self.maps(*run_, f, "test", samples) for f in self.settings.folds])
                name = f"{model}_{loss}/evaluation/{samples}_samples"
                result.append(
                    Experiment("samples", *run_, samples, folds, self.evaluation(name, stages) if folds else None)
                )
        if "region_size" in self.settings.ablations:
            for size in REGION_SIZES:
                folds, stages = finished([self.detection(*run_, f, size) for f in self.settings.folds])
                name = self.run_folder(*run_, "evaluation", size)
                stage = self.evaluation(name, stages) if folds else None
                result.append(Experiment("region_size", *run_, size, folds, stage))
        if "labels" in self.settings.ablations:
            folds, stages = finished([self.maps(*run_, f, "test") for f in self.settings.folds])
            stage = self.label_rules(run_, stages) if folds else None
            result.append(Experiment("labels", *run_, None, folds, stage))
        return result

    def label_rules(self, run_: tuple[str, str, str], maps: list[Stage]) -> Stage:
        """How many errors count as failures, by tolerance and by cluster size; nothing is trained for it."""
        return self.stage(
            f"{run_[0]}_{run_[1]}/evaluation/{run_[2]}/labels",
            settings={"data": self.listing, "tolerances": TOLERANCES, "clusters": CLUSTERS},
            work=partial(sweep_labels, maps, self.settings.data),
            outputs=("tolerance.csv", "cluster.csv"),
            needs=tuple(maps),
            info={"kind": "label"},
        )


def device_setting(device: str) -> dict[str, str]:
    """The entry of a bundle's configuration that says where it runs."""
    return {} if device == "auto" else {"device": f"$torch.device('{device}')"}


def inference_digest(bundle: Path) -> str:
    """Digest of a bundle's inference configuration."""
    return digest((bundle / "configs" / "inference.json").read_text())


def train_network(configs: list[str], settings: dict[str, Any], stage: Stage, budget: Budget) -> None:
    """Train into the stage's folder; checkpoints of other settings are removed."""
    resume = stage.folder / f"resume_{stage.digest()[:12]}"
    for other in set(stage.folder.glob("resume_*")) - {resume}:
        shutil.rmtree(other)
    paths = {"ckpt_dir": str(stage.folder), "resume_dir": str(resume)}
    train(configs, {**settings, **paths}, stage.folder, budget)


def segment_scans(
    scans: list[Scan], bundle: Path, network: Stage, own: dict[str, Any], device: str, stage: Stage, budget: Budget
) -> None:
    """Segment scans with a trained network; those that are done with it are skipped."""
    cases = {scan.case for scan in scans}
    for folder in [path for path in stage.folder.iterdir() if path.name not in cases]:
        shutil.rmtree(folder)  # of another datalist
    predictor = BundlePredictor(bundle, device, ckpt_path=str(network.folder / "model.pt"), **own)
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
    point = read_json(detector.folder / "model_operating_point.json")
    own = {**own, "ckpt_path": str(detector.folder / "model.pt"), "threshold": point["threshold"]}
    segment = maps.info["own"] | {"ckpt_path": str(maps.needs[0].folder / "model.pt")}
    segmenter = BundlePredictor(maps.info["bundle"], device, **segment)  # all is segmented, so it only has to agree
    run(maps.info["scans"], stage.folder, segmenter, BundlePredictor(bundle, device, **own))


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


def complete(outcome: Outcome) -> None:
    """Refuse what could not do all cases: a table over the others would look complete."""
    if outcome.failures:
        case, message = next(iter(outcome.failures.items()))
        raise ValueError(f"{len(outcome.failures)} case(s) failed, {case} first: {message}")


def reproduce(settings: Settings, budget_minutes: float | None = None, dry_run: bool = False) -> Outcome:
    """Carry out what is not done, within a budget, and write tables and figures of all that is.

    Written to the output: ``tables/``, ``figures/`` and ``results.md``, and a folder for each network, see
    docs/reproduce.md.

    Args:
        settings: what to reproduce.
        budget_minutes: stop when so many minutes are over; the same command goes on.
        dry_run: only say what would be done, and how long it would take; a few steps are measured for that.

    Returns:
        What was done, and the stages that failed.

    Raises:
        ValueError: see `Settings`.
        OSError: the output cannot be written.
    """
    budget = Budget(budget_minutes)
    grid = Grid(settings)
    if dry_run:
        stages = grid.by_fold() + [experiment.stage for experiment in grid.over_folds(planned=True)]
        return Outcome(describe(stages, settings.output), {})
    progress = carry_out(grid.by_fold(), budget)
    experiments = grid.over_folds()
    measured = carry_out([e.stage for e in experiments if e.stage], Budget())  # seconds each, and worth having
    write_reproduction(settings.output, experiments, training_budgets(grid))
    return finish(progress, measured, settings.output)


def training_budgets(grid: Grid) -> list[dict[str, Any]]:
    """Iterations and hours of every training of a segmentation network or detector, also of those not finished."""
    rows = []
    for stage in grid.stages.values():
        losses = read_losses(stage.folder / "loss.csv") if stage.info["kind"] == "train" else []
        if losses:
            iteration, loss, seconds = losses[-1]
            rows.append(
                {"training": stage.name, "regime": stage.info["regime"], "iterations": int(iteration)}
                | {"of": stage.info["iterations"], "finished": stage.done, "hours": seconds / 3600, "last_loss": loss}
            )
    return rows


def finish(progress: Progress, measured: Progress, output: Path) -> Outcome:
    """The summary for the terminal."""
    failures = progress.failures | measured.failures
    carried_out, skipped = progress.carried_out + measured.carried_out, progress.skipped + measured.skipped
    lines = [f"{len(carried_out)} stages carried out, {len(skipped)} were there already."]
    if progress.remaining:
        lines.append(f"{len(progress.remaining)} stages remain; run the same command again to go on with:")
        lines += [f"  {name}" for name in progress.remaining]
    lines += [f"FAILED {name}: {message}" for name, message in failures.items()]
    lines.append(f"Tables and figures of what is done: {output / 'results.md'}")
    return Outcome("\n".join(lines), failures)
