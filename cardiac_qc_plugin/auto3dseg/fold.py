"""One fold of an Auto3DSeg algorithm: a bundle in a folder of its own, trained on all folds of a datalist but one."""

import json
import shutil
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.transforms import AsDiscreted, Compose, SaveImage
from monai.utils import ensure_tuple

from cardiac_qc_plugin.bundle import BundlePredictor, root_cause
from cardiac_qc_plugin.checkpoints import load_weights
from cardiac_qc_plugin.workflows.files import read_json, write_text

__all__ = ["Fold", "FoldInferer", "split_settings", "train", "validate", "validation_metrics"]

NOT_COPIED = shutil.ignore_patterns("models", "eval", "mlruns*", "__pycache__")  # of a bundle: what its runs wrote
DATALIST = {"data_list_file_path": "$@bundle_root + '/configs/datalist.json'"}  # in the copy of the bundle
ENSEMBLE = {"rank", "image_save_func", *signature(SaveImage).parameters}  # AutoRunner's, handed on to each member
DATA = ("fold", "dataset_dir", "data_list_file_path")  # what the bundle is trained on, as its train.json calls it


def split_settings(bundle: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by the config of the bundle that has them, ``"train"`` and ``"inference"``; a setting may be in both.

    Raises:
        ValueError: for a setting that neither config has.
    """
    result = {}
    for name in ("train", "inference"):
        config = ConfigParser(read_json(bundle / "configs" / f"{name}.json"))
        result[name] = {key: value for key, value in settings.items() if key in config}
    unknown = [key for key in settings if not any(key in known for known in result.values())]
    if unknown:
        raise ValueError(f"{bundle.name} has no setting '{unknown[0]}' in configs/train.json or inference.json.")
    return result


class Fold:
    """A folder that Auto3DSeg generated: ``configs``, ``scripts``, and a copy of the bundle, which gets the weights.

    It holds all that its training needs but the scans, so it may be moved.

    Args:
        folder: the folder, ``bayesdn_0`` say.

    Attributes:
        parameters: content of ``configs/hyper_parameters.yaml``.
        bundle: folder of the bundle.

    Raises:
        ValueError: if the folder is none of these templates'.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "configs" / "hyper_parameters.yaml"
        if not self.file.is_file():
            raise ValueError(f"{self.file}: no such file. Give a folder that Auto3DSeg generated, bayesdn_0 say.")
        self.parameters = yaml.safe_load(self.file.read_text())
        if "settings" not in self.parameters:
            raise ValueError(f"{self.file} is not from this package's algorithm templates, or not filled in.")
        self.bundle = self.folder / self.parameters["bundle"]

    @classmethod
    def of_config(cls, config_file: str | list[str]) -> "Fold":
        """The fold of a config file as Auto3DSeg's scripts get it: a file of ``configs``, or a list of them."""
        return cls(Path(ensure_tuple(config_file)[0]).resolve().parent.parent)

    def update(self, **changes: Any) -> None:
        """Record other settings, or another place of the data."""
        data = {key: value for key, value in changes.items() if key in DATA}
        settings = {**self.parameters["settings"], **{k: v for k, v in changes.items() if k not in DATA}}
        split_settings(self.bundle, settings)
        self.parameters |= {**data, "settings": settings}
        write_text(self.file, yaml.safe_dump(self.parameters, sort_keys=False))

    def overrides(self, config: str) -> dict[str, Any]:
        """What replaces entries of the bundle's ``"train"`` or ``"inference"`` config."""
        data = {key: self.parameters[key] for key in DATA} if config == "train" else {}
        return {**data, **split_settings(self.bundle, self.parameters["settings"])[config]}

    def training(self) -> ConfigWorkflow:
        """The bundle's training on this fold."""
        file = self.bundle / "configs" / "train.json"
        return ConfigWorkflow(str(file), workflow_type="train", bundle_root=str(self.bundle), **self.overrides("train"))

    @property
    def progress(self) -> Path:
        """File of the score, where :meth:`monai.apps.auto3dseg.BundleAlgo.get_score` looks for it."""
        return self.folder / "progress.yaml"

    def score(self) -> dict[str, Any]:
        """What :func:`validate` wrote.

        Raises:
            ValueError: if the fold has not been trained.
        """
        if not self.progress.is_file():
            raise ValueError(f"{self.progress}: no such file. Train the fold first: its training has not ended.")
        return yaml.safe_load(self.progress.read_text())[-1]


def train(config_file: str | list[str], **settings: Any) -> dict[str, Any]:
    """Train a fold's bundle, and score the weights.

    Args:
        config_file: the fold's ``configs/hyper_parameters.yaml``.
        settings: entries of the bundle's configs to replace; they are recorded there, so that inference has them too.

    Returns:
        The score, see :func:`validate`.
    """
    fold = Fold.of_config(config_file)
    if settings:
        fold.update(**settings)
    fold.progress.unlink(missing_ok=True)
    workflow = fold.training()
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return validate(config_file)


def validate(config_file: str | list[str]) -> dict[str, Any]:
    """Score a fold's weights, as they are in the file, by its bundle's ``validate#evaluator``.

    Returns:
        What is written to ``progress.yaml``: ``best_avg_dice_score``, the mean over the fold's scans, and all
        ``metrics``, by their names in the bundle.
    """
    fold = Fold.of_config(config_file)
    metrics, key = validation_metrics(fold.training())
    score = {"best_avg_dice_score": metrics[key], "fold": fold.parameters["fold"], "metrics": metrics}
    write_text(fold.progress, yaml.safe_dump([score], sort_keys=False))
    return score


def validation_metrics(training: ConfigWorkflow) -> tuple[dict[str, float], str]:
    """Metrics of the weights that a training wrote by its ``validate#evaluator``, and which of them is the key one."""
    parser = training.parser
    load_weights(parser.get_parsed_content("network_def"), parser.get_parsed_content("ckpt_path"))
    evaluator = parser.get_parsed_content("validate#evaluator")
    evaluator.run()
    metrics = {name: float(value) for name, value in evaluator.state.metrics.items()}
    return metrics, evaluator.state.key_metric_name


class FoldInferer:
    """Predicts class probabilities with a fold's weights; Auto3DSeg's ``InferClass``.

    Args:
        config_file: the fold's ``configs/hyper_parameters.yaml``.
        override: entries of the bundle's ``inference.json`` to replace, ``samples=0`` say; how an ensemble saves its
            result is not a member's concern.

    Attributes:
        predictor: the bundle, with its postprocessing up to the labels.
        labelling: the rest of its postprocessing, from probabilities to labels.
    """

    def __init__(self, config_file: str | list[str], **override: Any) -> None:
        fold = Fold.of_config(config_file)
        own = {key: value for key, value in override.items() if key not in ENSEMBLE}
        self.predictor = BundlePredictor(fold.bundle, **{**fold.overrides("inference"), **own})
        steps = self.predictor.postprocessing.transforms
        labels = next(index for index, step in enumerate(steps) if isinstance(step, AsDiscreted))
        self.predictor.postprocessing, self.labelling = Compose(steps[:labels]), Compose(steps[labels:])

    def infer(self, image_file: str | dict[str, str]) -> torch.Tensor:
        """Probabilities ``(C, H, W, D)``, background first, on the image's own grid.

        Args:
            image_file: the file, or ``{"image": file}``.
        """
        case = image_file if isinstance(image_file, dict) else {"image": str(image_file)}
        return self.predictor(case)["pred"]


def command_line(run: Callable[..., dict[str, Any]]) -> None:
    """Make a function the ``run`` command of a script; an error is one line, and a non-zero exit code."""
    import fire

    try:
        fire.Fire({"run": lambda config_file, **settings: json.dumps(run(config_file, **settings))})
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {root_cause(error)}", file=sys.stderr)
        sys.exit(1)
