"""MONAI's Auto3DSeg over a datalist with our algorithm templates, and its ensemble as a stage of the pipeline."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from monai.apps.auto3dseg import AutoRunner, import_bundle_algo_history
from monai.transforms import AsDiscrete
from monai.utils.enums import AlgoKeys

from cardiac_qc_plugin import __version__
from cardiac_qc_plugin.auto3dseg import TEMPLATES, UncertaintyEnsemble
from cardiac_qc_plugin.auto3dseg.algo import template_parameters
from cardiac_qc_plugin.auto3dseg.ensemble import ensemble_maps
from cardiac_qc_plugin.auto3dseg.fold import split_settings
from cardiac_qc_plugin.bundle import find_bundle
from cardiac_qc_plugin.data import read_fold
from cardiac_qc_plugin.transforms import PairwiseDiced

from .files import file_sha256, read_json, write_json
from .run import digest

__all__ = ["EnsembleSegmenter", "auto3dseg", "check_datalist"]


def check_datalist(datalist: str | Path, root: str | Path) -> int:
    """Number of folds of a datalist, all of whose training items are there.

    Raises:
        ValueError: as `read_fold`; or if it has no folds, or misses one.
    """
    folds = {item.get("fold") for side in read_fold(datalist, root, -1) for item in side}
    if len(folds) < 2 or folds != set(range(len(folds))):
        listed = sorted(folds, key=str)
        raise ValueError(f"{datalist}: folds have to be 0, 1 and so on without gaps, two or more; got {listed}.")
    return len(folds)


def choose(algos: str | list[str] | None) -> list[str]:
    """Names of algorithm templates, all by default.

    Raises:
        ValueError: for a name that is none.
    """
    known = sorted(path.name for path in TEMPLATES.iterdir())
    names = algos.split(",") if isinstance(algos, str) else list(algos or known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"Unknown algorithm '{unknown[0]}': choose from {', '.join(known)}.")
    return names


def remember(output: Path, request: dict[str, Any]) -> None:
    """Refuse a folder that holds another request's results: AutoRunner would go on with its algorithms and settings."""
    file = output / "request.json"
    request = json.loads(json.dumps(request))  # as it is read back
    before = read_json(file) if file.is_file() else request
    changed = [key for key in request | before if request.get(key) != before.get(key)]
    if changed:
        raise ValueError(f"{output} was made with other {', '.join(changed)}. Choose another output folder.")
    write_json(file, request)


def auto3dseg(
    datalist: str | Path,
    root: str | Path,
    output: str | Path,
    algos: str | list[str] | None = None,
    num_fold: int | None = None,
    bundle_dir: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    ensemble: bool = False,
) -> dict[str, float]:
    """Run AutoRunner: data analysis, and training and scoring of each algorithm on each fold.

    What is done is skipped when it is run again with the same output.

    Args:
        datalist: MONAI datalist with folds; its items' paths are relative to ``root``.
        root: folder of the data.
        output: AutoRunner's work folder.
        algos: names of algorithm templates, all by default.
        num_fold: train the first folds only, so many; all by default.
        bundle_dir: folder of the bundles, instead of the repository's.
        settings: entries of the bundles' configs to replace.
        ensemble: whether an ensemble will be made of the folds.

    Returns:
        Mean Dice coefficient of each algorithm and fold (``bayesdn_0``) on the fold's scans.

    Raises:
        ValueError: for a datalist, fold, algorithm or setting that does not exist, or an output folder of another run.
        RuntimeError: if a training fails.
    """
    names, settings, folds = choose(algos), dict(settings or {}), check_datalist(datalist, root)
    num_fold = folds if num_fold is None else num_fold
    if not 1 <= num_fold <= folds:
        raise ValueError(f"{datalist} has {folds} folds, so num_fold is 1 to {folds}; got {num_fold}.")
    if ensemble and num_fold == 1:
        raise ValueError("An ensemble needs two folds or more: give another --num_fold, or no --input.")
    for name in names:
        split_settings(find_bundle(template_parameters(name)["bundle"], bundle_dir), settings)
    output = Path(output)
    source = {"datalist": str(datalist), "dataroot": str(Path(root).resolve()), "modality": "MRI", "num_fold": num_fold}
    source |= {"settings": settings} | ({"bundle_dir": str(bundle_dir)} if bundle_dir else {})
    remember(output, {**source, "datalist": file_sha256(Path(datalist)), "algos": sorted(names)})
    runner = AutoRunner(str(output), source, names, templates_path_or_url=str(TEMPLATES), ensemble=False)
    runner.run()
    return {algo[AlgoKeys.ID]: algo[AlgoKeys.SCORE] for algo in import_bundle_algo_history(str(output))}


class EnsembleSegmenter:
    """The ensemble of an Auto3DSeg run in the place of a segmentation bundle, see :func:`..run.run`.

    Labels are those of the mean of the members' probabilities, finished by the first member's postprocessing. The
    b-map shows the disagreement of the members, the e-map the entropy of their mean; the pairwise Dice coefficient is
    that between members.

    Args:
        work_dir: AutoRunner's work folder.
        settings: entries of the members' ``inference.json`` to replace.

    Raises:
        ValueError: if fewer than two folds have been trained.
    """

    name = "auto3dseg_ensemble"
    version = __version__

    def __init__(self, work_dir: str | Path, **settings: Any) -> None:
        history = import_bundle_algo_history(str(work_dir))
        ensemble = UncertaintyEnsemble(1 + max((int(algo[AlgoKeys.ID].split("_")[1]) for algo in history), default=0))
        ensemble.set_algos(history)
        ensemble.collect_algos()
        self.members = ensemble.inferers(**settings)
        predictors = [member.predictor for member in self.members.values()]
        own = predictors[0].config
        self.class_names = own["class_names"]
        self.config = {"map": "bmap", "samples": len(predictors), "turns": own.get("turns", 1), "seed": own["seed"]}
        self.inferer = SimpleNamespace(progress=lambda share: None)  # the pipeline puts its progress bar here
        self.weights_sha256 = digest(*(predictor.weights_sha256 for predictor in predictors))
        self.digest = digest(*(predictor.digest for predictor in predictors))

    @property
    def compute(self) -> Callable[[Callable[[], Any]], Any]:
        """What runs the members' networks, see :class:`..bundle.BundlePredictor`; the same for all."""
        return next(iter(self.members.values())).predictor.compute

    @compute.setter
    def compute(self, value: Callable[[Callable[[], Any]], Any]) -> None:
        for member in self.members.values():
            member.predictor.compute = value

    def __call__(self, case: dict[str, str]) -> dict[str, Any]:
        """Labels, maps ``(1, H, W, D)`` and ``"result"`` of a case, as :class:`..bundle.BundlePredictor` has them."""
        preds = []
        for member in self.members.values():
            preds.append(member.infer(case))
            self.inferer.progress(len(preds) / len(self.members))
        maps = ensemble_maps(preds)
        labels = torch.stack([AsDiscrete(argmax=True, to_onehot=len(pred))(pred) for pred in preds])
        areas = labels.sum(dim=(2, 3)).permute(2, 0, 1)  # a member stands for a sample
        votes = {**maps, "image": preds[0], "votes": labels.mean(dim=0), "sample_areas": areas}
        data = PairwiseDiced("votes", len(preds), self.class_names)(votes)
        data["result"]["members"] = list(self.members)
        first = next(iter(self.members.values()))
        self.inferer.precision = first.predictor.inferer.precision
        return first.labelling({**data, "pred": maps["probabilities"]})
