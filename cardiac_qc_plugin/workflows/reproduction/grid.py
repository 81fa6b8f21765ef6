"""The paper's grid of experiments as stages: which there are, what each needs, and in what order."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from cardiac_qc_plugin.bundle import DETECTOR, device_setting, find_bundle
from cardiac_qc_plugin.data.folds import hold_out, training_items
from cardiac_qc_plugin.data.inputs import Scan, find_scans
from cardiac_qc_plugin.data.predictions import MAP_FILES, SEGMENTATION_FILE
from cardiac_qc_plugin.reports.paper_tables import LOSSES, PAIRS, TABLE_V, Experiment

from ..files import read_json
from ..run import DETECT_FILES, digest
from .ablations import CLUSTERS, REGION_SIZES, SAMPLES, TOLERANCES, sweep_labels
from .stage_work import (
    correct_regions,
    detect_failures,
    evaluate_folds,
    inference_digest,
    pool_operating_point,
    segment_scans,
    take_digests,
    take_weights,
    train_network,
)
from .stages import Stage
from .training import config_files

__all__ = ["ABLATIONS", "LOSSES_OF", "Grid", "Settings"]

# section V-A; the networks in the order in which they are trained
LOSSES_OF = {model: tuple(loss for name, loss in PAIRS if name == model) for model in ("drn", "unet", "dn")}
ABLATIONS = ("samples", "region_size", "labels", "see_segmentation", "detector_maps", "ensemble", "snapshots")
NEVER = 1_000_000  # epochs
ALL = -1  # in the place of a fold: nothing is left out
MEMBERS = ("ensemble", "snapshots")  # where an uncertainty map comes from members, not from dropout


@dataclass(frozen=True)
class Detector:
    """How a detector is made.

    Attributes:
        maps: what it learns from, ``"in_sample"`` or ``"out_of_fold"``.
        settings: entries of its bundle's configuration to replace.
    """

    maps: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "_".join([self.maps, *(key if value is True else f"{key}{value}" for key, value in self.settings)])


def fold_name(fold: int | str) -> str:
    """Folder of a fold; "evaluation" is its own name."""
    return fold if isinstance(fold, str) else "all" if fold == ALL else f"fold{fold}"


def map_of(source: str) -> str:
    """The kind of uncertainty map: that of members is a b-map."""
    return "bmap" if source in MEMBERS else source


@dataclass(frozen=True)
class Settings:
    """What to reproduce, and from what; None stands for the bundles' own setting.

    Args:
        data: folder of the data set, which has the references as well.
        output: folder for everything that is written.
        folds: folds to leave out, each in turn; -1 for networks and detectors of all patients, as one would ship them.
        models: ``"drn"``, ``"unet"``, ``"dn"``.
        losses: of the paper's two for each model (`LOSSES_OF`), those to train with; all by default.
        maps: ``"bmap"``, ``"emap"``.
        regime: ``"short"``, or the name of another training configuration in the bundles, such as ``"paper"``.
        iterations: of the segmentation networks.
        detector_iterations: of the detectors.
        samples: Monte Carlo samples T for the b-map.
        detector_maps: what detectors are trained on: ``"in_sample"``, maps of the network's own training patients
            (the paper), ``"out_of_fold"``, maps of the same patients by the networks that did not see them, or
            ``"auto"``: out-of-fold if all folds are asked for, else in-sample.
        ablations: of `ABLATIONS`.
        members: networks of an ensemble, trained from different seeds.
        tracking: ``"mlflow"`` to track the trainings with it, by MONAI's own settings; or a file with others.
        trained: folder with weights that were trained elsewhere, laid out as the output of a reproduction
            (``drn_ce/fold0/segmentation/model.pt``); what it has is taken instead of trained.
        datalist: with folds; by default the bundles' ``acdc_folds.json``.
        device: ``"auto"`` or a torch device.
        bundle_dir: folder of the bundles; by default the repository's.

    Raises:
        ValueError: an unknown value, or a combination that cannot be; the message says which.
    """

    data: Path
    output: Path
    folds: tuple[int, ...] = (0, 1, 2, 3)
    models: tuple[str, ...] = tuple(LOSSES_OF)
    losses: tuple[str, ...] = tuple(LOSSES)
    maps: tuple[str, ...] = tuple(MAP_FILES)
    regime: str = "short"
    iterations: int | None = None
    detector_iterations: int | None = None
    samples: int | None = None
    detector_maps: str = "auto"
    ablations: tuple[str, ...] = ()
    members: int = 5
    tracking: str | None = None
    trained: Path | None = None
    datalist: Path | None = None
    device: str = "auto"
    bundle_dir: Path | None = None

    def __post_init__(self) -> None:
        choices = {
            "models": tuple(LOSSES_OF),
            "losses": tuple(LOSSES),
            "maps": tuple(MAP_FILES),
            "ablations": ABLATIONS,
            "folds": (*self.all_folds, ALL),
        }
        for name, allowed in choices.items():
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                raise ValueError(f"--{name} are of {', '.join(map(str, allowed))}, got '{unknown[0]}'.")
        if not self.combinations:
            raise ValueError(f"None of the models {', '.join(self.models)} has one of these losses in the paper.")
        if self.detector_maps not in ("auto", "in_sample", "out_of_fold"):
            raise ValueError(f"--detector_maps is auto, in_sample or out_of_fold, got '{self.detector_maps}'.")
        if not self.has_all_folds and (self.detector_maps == "out_of_fold" or "detector_maps" in self.ablations):
            listed = ",".join(map(str, self.all_folds))
            raise ValueError(f"Out-of-fold detector maps need the networks of all folds: give --folds {listed}.")
        for name in ("iterations", "detector_iterations", "samples"):
            smallest = 2 if name == "samples" and "bmap" in self.maps else 1
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise ValueError(f"--{name} is {smallest} or more, got {getattr(self, name)}.")
        for name in ("samples", *MEMBERS):
            measured = set(TABLE_V) & set(self.combinations) if name == "samples" else self.combinations
            if name in self.ablations and not (measured and "bmap" in self.maps):
                of = " of the DRN or the U-net with ce, or the DN with soft_dice" if name == "samples" else ""
                raise ValueError(f"--ablations {name} needs the bmap{of}: see --maps, --models, --losses.")
        if self.members < 2:
            raise ValueError(f"--members is 2 or more, got {self.members}.")
        for fold in self.tested:
            if not hold_out([item for item in self.items if item["fold"] != fold])[1]:
                raise ValueError(
                    f"{self.datalist_file}: fold {fold} leaves fewer than three patients to train a detector and to "
                    "choose its operating point. Take more patients, or fewer in a fold."
                )
        if self.trained and not any(self.trained.glob("**/model.pt")):
            raise ValueError(
                f"--trained {self.trained}: no such folder, or no model.pt in it. docs/reproduce.md lays it out."
            )

    @property
    def has_all_folds(self) -> bool:
        """Whether every fold of the datalist is asked for."""
        return set(self.folds) - {ALL} == set(self.all_folds)

    @property
    def tested(self) -> tuple[int, ...]:
        """The folds that are asked for and have patients to test on."""
        return tuple(fold for fold in self.folds if fold != ALL)

    @property
    def detector(self) -> Detector:
        """The detector of the grid."""
        auto = "out_of_fold" if self.has_all_folds else "in_sample"
        return Detector(auto if self.detector_maps == "auto" else self.detector_maps)

    @property
    def detectors(self) -> dict[tuple[str, Any], Detector]:
        """The detectors of the ablations, by what varies and its value."""
        maps, found = self.detector.maps, {}
        if "region_size" in self.ablations:
            found |= {("region_size", size): Detector(maps, (("region_size", size),)) for size in REGION_SIZES}
        if "see_segmentation" in self.ablations:
            found["see_segmentation", None] = Detector(maps, (("see_segmentation", True),))
        if "detector_maps" in self.ablations:
            other = "in_sample" if maps == "out_of_fold" else "out_of_fold"
            found["detector_maps", other] = Detector(other)
        return found

    @property
    def combinations(self) -> list[tuple[str, str]]:
        """Model and loss of each segmentation network."""
        return [(model, loss) for model in self.models for loss in LOSSES_OF[model] if loss in self.losses]

    @cached_property
    def items(self) -> list[dict[str, Any]]:
        """Items of the datalist; ValueError where one is no item to train on, or has no fold."""
        items = training_items(self.datalist_file)
        for number, item in enumerate(items, start=1):
            if item.get("fold") is None:
                raise ValueError(f"{self.datalist_file}: item {number} of 'training' has no fold. Give it one.")
        return items

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

    def default_samples(self, model: str) -> int:
        """Samples T of a network's b-map by its bundle."""
        return read_json(self.segmenter(model) / "configs" / "inference.json")["samples"]

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
        """A stage that trains by a bundle's ``train.json``, or takes what is trained.

        `own` are settings that are part of the digest.
        """
        regime = self.settings.regime
        if bundle.name == DETECTOR and not (bundle / "configs" / f"{regime}.json").is_file():
            regime = "short"  # of the networks only, such as "snapshots"; the networks' stages say if they lack it
        configs = config_files(bundle, regime)
        config = ConfigParser.load_config_files(configs)
        own = own | ({} if iterations in (None, config["iterations"]) else {"iterations": iterations})
        common = {"bundle_root": str(bundle), "data_list_file_path": str(self.settings.datalist_file)}
        common |= {"dataset_dir": str(self.settings.data)} | device_setting(self.settings.device)
        common["val_interval"] = NEVER  # the fold that is left out is measured by later stages
        texts = [Path(file).read_text() for file in configs]
        snapshots = [f"snapshot{number + 1}.pt" for number in range(config.get("snapshots", 0))]
        held_out = bundle.name == DETECTOR and own["fold"] != ALL
        outputs = ("model.pt", *(["model_operating_point.json"] if held_out else snapshots))
        info = {"kind": "train", "configs": configs, "iterations": iterations or config["iterations"], "own": own}
        info |= {"device": device_setting(self.settings.device), "regime": regime, "snapshots": snapshots}
        given = self.settings.trained and self.settings.trained / name
        if given and (given / "model.pt").is_file():
            return self.stage(
                name,
                settings={"bundle": bundle.name, **take_digests(given, outputs)},
                work=partial(take_weights, given),
                outputs=outputs,
                info=info | {"kind": "take"},
            )
        return self.stage(
            name,
            settings={"bundle": bundle.name, "configs": digest(*texts), "data": self.listing, **own},
            work=partial(train_network, configs, {**common, **paths, **own}, self.settings.tracking),
            outputs=outputs,
            needs=needs,
            info=info,
        )

    def network(self, model: str, loss: str, fold: int, seed: int = 0) -> Stage:
        """Training of a segmentation network; other seeds than 0 are further members of an ensemble."""
        name = f"{model}_{loss}/{fold_name(fold)}/segmentation" + (f"_seed{seed}" if seed else "")
        own = {"loss": loss, "fold": fold} | ({"seed": seed} if seed else {})
        return self.training(name, self.settings.segmenter(model), self.settings.iterations, own, ())

    def networks(self, model: str, loss: str, source: str, fold: int) -> tuple[list[Stage], list[Path]]:
        """The trainings behind a map, and their weights: one network's, or those of an ensemble's members.

        Raises:
            ValueError: if snapshots are asked of a regime that leaves none.
        """
        seeds = range(self.settings.members if source == "ensemble" else 1)
        stages = [self.network(model, loss, fold, seed) for seed in seeds]
        if source != "snapshots":
            return stages, [stage.folder / "model.pt" for stage in stages]
        info = stages[0].info
        if len(info["snapshots"]) < 2 or info["iterations"] % len(info["snapshots"]):
            raise ValueError(
                f"--ablations snapshots: '{info['regime']}' with {info['iterations']} iterations of {model} leaves no "
                "snapshots, or parts of different lengths. Choose --regime snapshots, or other --iterations."
            )
        return stages, [stages[0].folder / name for name in info["snapshots"]]

    def maps(self, model: str, loss: str, map: str, fold: int, part: str, samples: int | None = None) -> Stage:
        """Segmentation and map of the fold that was left out (``part`` "test") or of the others ("training").

        ``map`` is an uncertainty map, or one of `MEMBERS`. An e-map comes from one pass without dropout, so nothing is
        sampled for it. With another number of ``samples`` than the run has, the maps have a folder of their own.
        """
        default = self.settings.default_samples(model)
        if samples == (self.settings.samples or default):
            samples = None
        others = [other for other in self.settings.all_folds if other != fold]
        scans = self.settings.scans([fold] if part == "test" else others)
        folder = f"{model}_{loss}/{fold_name(fold)}/{map}/{part}" + ("" if samples is None else f"_{samples}_samples")
        networks, weights = self.networks(model, loss, map, fold)
        samples = {"emap": 0, "bmap": samples or self.settings.samples or default}.get(map, len(weights))
        own = {"map": map_of(map)} | ({} if map == "bmap" and samples == default else {"samples": samples})
        bundle = self.settings.segmenter(model)
        files = (SEGMENTATION_FILE, MAP_FILES[map_of(map)])
        return self.stage(
            folder,
            settings={"bundle": bundle.name, "configs": inference_digest(bundle), **own},
            work=partial(segment_scans, self.settings.device),
            outputs=tuple(f"{scan.case}/{file}" for scan in scans for file in files),
            needs=tuple(networks),
            info={"kind": "segment", "bundle": bundle, "scans": scans, "own": own, "weights": weights}
            | {"device": device_setting(self.settings.device)},
        )

    def detector(self, model: str, loss: str, map: str, fold: int, detector: Detector | None = None) -> Stage:
        """Training of a detector."""
        detector = detector or self.settings.detector
        others = [other for other in self.settings.all_folds if other != fold]
        if detector.maps == "in_sample":
            sources = (self.maps(model, loss, map, fold, "training"),)
        else:
            sources = tuple(self.maps(model, loss, map, other, "test") for other in others)
        own = {"map": map_of(map), "fold": fold, **dict(detector.settings)}
        name = f"{self.run_folder(model, loss, map, fold, detector)}/detector"
        folders = [str(source.folder) for source in sources]
        bundle, iterations = self.settings.bundle(DETECTOR), self.settings.detector_iterations
        return self.training(name, bundle, iterations, own, sources, predictions_dir=folders, segmentation_model=model)

    def detection(self, model: str, loss: str, map: str, fold: int, detector: Detector | None = None) -> Stage:
        """Flagged regions of the fold that was left out."""
        detector = detector or self.settings.detector
        maps = self.maps(model, loss, map, fold, "test")
        training = self.detector(model, loss, map, fold, detector)
        scans, bundle = maps.info["scans"], self.settings.bundle(DETECTOR)
        own = {"map": map_of(map), **dict(detector.settings)}
        return self.stage(
            f"{self.run_folder(model, loss, map, fold, detector)}/detected",
            settings={"bundle": bundle.name, "configs": inference_digest(bundle), **own},
            work=partial(detect_failures, maps, training, bundle, own, self.settings.device),
            outputs=tuple(f"{scan.case}/{file}" for scan in scans for file, _ in DETECT_FILES.values()),
            needs=(maps, training),
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
            outputs=tuple(f"{scan.case}/{SEGMENTATION_FILE}" for scan in scans),
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

    def run_folder(self, model: str, loss: str, map: str, fold: int | str, detector: Detector | None = None) -> str:
        """Folder of a detector and what comes after it."""
        return f"{model}_{loss}/{fold_name(fold)}/{map}/{(detector or self.settings.detector).name}"

    def by_fold(self) -> list[Stage]:
        """The stages of each fold up to the correction, in the order in which they are carried out."""
        runs = [(m, loss, map) for m, loss in self.settings.combinations for map in self.settings.maps]
        first, later = [], []
        for fold in self.settings.tested:
            for key in runs:
                first += [self.network(*key[:2], fold), self.maps(*key, fold, "test")]
            for key in runs:
                later += self.detected(key, fold) + [self.correction(*key, fold)]
            later += self.ablations(fold, runs)
            if self.settings.detector.maps == "in_sample":  # a fold is finished before the next one begins
                first, later = first + later, []
        shipped = [stage for key in runs for stage in self.shipped(key)] if ALL in self.settings.folds else []
        return list(dict.fromkeys(first + later + shipped))

    def shipped(self, key: tuple[str, str, str]) -> list[Stage]:
        """A network and a detector of all patients, and the operating point from the folds that were tested."""
        training = self.detector(*key, ALL)
        found = [self.network(*key[:2], ALL), *training.needs, training]
        detections = [self.detection(*key, fold) for fold in self.settings.tested]
        if detections:
            name = f"{self.run_folder(*key, ALL)}/operating_point"
            config = ConfigParser.load_config_files(training.info["configs"])
            rule = {name: config[name] for name in ("criterion", "beta", "region_size")}
            found.append(
                self.stage(
                    name,
                    settings={"data": self.listing, **rule},
                    work=partial(pool_operating_point, detections, self.settings.data, rule),
                    outputs=("operating_point.json",),
                    needs=tuple(detections),
                    info={"kind": "evaluate"},
                )
            )
        return found

    def detected(self, key: tuple[str, str, str], fold: int, detector: Detector | None = None) -> list[Stage]:
        """The stages from the maps that a detector learns from to its detection."""
        training = self.detector(*key, fold, detector)
        networks = [network for maps in training.needs for network in maps.needs]
        test = self.maps(*key, fold, "test")
        return [*networks, *training.needs, training, *test.needs, test, self.detection(*key, fold, detector)]

    def ablations(self, fold: int, runs: Sequence[tuple[str, str, str]]) -> list[Stage]:
        """The stages of a fold that the ablations need beyond these."""
        stages = []
        if "samples" in self.settings.ablations and "bmap" in self.settings.maps:
            pairs = [pair for pair in TABLE_V if pair in self.settings.combinations]
            stages += [self.maps(*pair, "bmap", fold, "test", samples) for pair in pairs for samples in SAMPLES]
        for detector in self.settings.detectors.values():
            for key in runs:
                stages += self.detected(key, fold, detector)
        for model, loss, map in runs:
            for source in self.members((model, loss, map)):
                stages += self.detected((model, loss, source), fold)
        return stages

    def over_folds(self, planned: bool = False) -> list[Experiment]:
        """What is measured over folds: those that are asked for, or all whose stages are done with these settings."""

        def over(stage_of: Callable[[int], Stage]) -> tuple[list[int], list[Stage]]:
            stages = {fold: stage_of(fold) for fold in (asked.tested if planned else asked.all_folds)}
            done = {fold: stage for fold, stage in stages.items() if planned or stage.done}
            return list(done), list(done.values())

        asked, experiments = self.settings, []
        for model, losses in LOSSES_OF.items():
            for loss in losses:
                if (model, loss) in asked.combinations or (not planned and self.may_have(model, loss)):
                    for map in asked.maps if planned else MAP_FILES:
                        experiments += self.measured((model, loss, map), over)
        return experiments

    def may_have(self, model: str, loss: str) -> bool:
        """Whether the output may have results of a network that is not asked for."""
        try:
            config_files(self.settings.segmenter(model), self.settings.regime)
        except ValueError:
            return False  # never trained by this regime
        return (self.settings.output / f"{model}_{loss}").is_dir()

    def measured(self, key: tuple[str, str, str], over: Callable) -> list[Experiment]:
        """Measurements of one network and map, over the folds and stages that `over` gives for a stage of a fold."""
        folds, after = over(lambda fold: self.correction(*key, fold))
        before = [self.detection(*key, fold) for fold in folds]
        stage = self.evaluation(self.run_folder(*key, "evaluation"), before, after) if folds else None
        return [Experiment("grid", *key, None, folds, stage), *self.ablated(key, over)]

    def members(self, key: tuple[str, str, str]) -> list[str]:
        """The ensembles that are asked for beside a run: once for each network, beside its b-map."""
        beside = key[:2] in self.settings.combinations and key[2] == "bmap"
        return [source for source in MEMBERS if beside and source in self.settings.ablations]

    def ablated(self, key: tuple[str, str, str], over: Callable) -> list[Experiment]:
        """Measurements of the ablations of one network and map."""
        model, loss, map = key
        result = []
        if "samples" in self.settings.ablations and map == "bmap" and (model, loss) in TABLE_V:
            for samples in SAMPLES:
                folds, stages = over(lambda fold, samples=samples: self.maps(*key, fold, "test", samples))
                name = f"{model}_{loss}/evaluation/{samples}_samples"
                stage = self.evaluation(name, stages) if folds else None
                result.append(Experiment("samples", *key, samples, folds, stage))
        for (kind, value), detector in self.settings.detectors.items():
            folds, stages = over(lambda fold, detector=detector: self.detection(*key, fold, detector))
            name = self.run_folder(*key, "evaluation", detector)
            stage = self.evaluation(name, stages) if folds else None
            result.append(Experiment(kind, *key, value, folds, stage))
        for source in self.members(key):
            own = (model, loss, source)
            folds, stages = over(lambda fold, own=own: self.detection(*own, fold))
            stage = self.evaluation(self.run_folder(*own, "evaluation"), stages) if folds else None
            result.append(Experiment("members", *key, source, folds, stage))
        if "labels" in self.settings.ablations:
            folds, stages = over(lambda fold: self.maps(*key, fold, "test"))
            stage = self.label_rules(key, stages) if folds else None
            result.append(Experiment("labels", *key, None, folds, stage))
        return result

    def label_rules(self, key: tuple[str, str, str], maps: list[Stage]) -> Stage:
        """How many errors count as failures, by tolerance and by cluster size; nothing is trained for it."""
        return self.stage(
            f"{key[0]}_{key[1]}/evaluation/{key[2]}/labels",
            settings={"data": self.listing, "tolerances": TOLERANCES, "clusters": CLUSTERS},
            work=partial(sweep_labels, maps, self.settings.data),
            outputs=("tolerance.csv", "cluster.csv"),
            needs=tuple(maps),
            info={"kind": "label"},
        )
