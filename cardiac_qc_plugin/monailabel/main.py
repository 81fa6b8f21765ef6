"""MONAI Label app: segmentation of short-axis cine MRI that says where it failed, and learns from corrections."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelException
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.utils.others.generic import name_to_device

from cardiac_qc_plugin import __version__
from cardiac_qc_plugin.bundle import BUNDLES, DETECTOR, find_detectors, root_cause
from cardiac_qc_plugin.monailabel.tasks import OPERATING_POINT, CardiacQC, FineTuning, MostSuspicious, QCScoring

logger = logging.getLogger(__name__)


def copy_bundles(target: Path) -> None:
    """Copy the package's bundles that have weights, unless they are there: fine-tuning changes the copies."""
    for source in sorted(BUNDLES.iterdir()):
        if not (source / "models" / "model.pt").is_file():
            logger.warning("%s has no weights (models/model.pt) and is not offered. Train it first.", source)
        elif not (target / source.name).exists():
            temporary = target / f".part-{source.name}"
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("resume_*", "eval"))
            temporary.rename(target / source.name)


def check_request(value: Any, name: str = "request") -> None:
    """Refuse what a request must not hold: MONAI would run text that begins like an expression of a configuration.

    Numbers of samples and turns are whole, or the text of one; 2.5 would be taken as 2. A threshold and a share to
    catch are numbers, if they are given.

    Raises:
        HTTPException: 422, with the entry.
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            check_request(entry, str(key))
    elif isinstance(value, list):
        for entry in value:
            check_request(entry, name)
    elif isinstance(value, str) and value.lstrip()[:1] in tuple("$@%"):
        raise HTTPException(422, f"{name}: a value must not begin with '{value.lstrip()[0]}'.")
    elif name == "device":
        try:
            torch.device(name_to_device(value))
        except (RuntimeError, TypeError) as error:
            raise HTTPException(422, f"There is no device '{value}'.") from error
    elif name in ("samples", "turns"):
        try:
            whole = int(value) == float(value)
        except (TypeError, ValueError, OverflowError):
            whole = False
        if not whole:
            raise HTTPException(422, f"{name} is a whole number, got {value!r}.")
    elif name in ("threshold", "catch") and value is not None and (name, value) != ("catch", OPERATING_POINT):
        try:
            float(value)
        except (TypeError, ValueError) as error:
            raise HTTPException(422, f"{name} is a number between 0 and 1, got {value!r}.") from error


class CardiacQCApp(MONAILabelApp):
    """See docs/monailabel.md for the settings (``--conf``)."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        if "work" not in conf and not os.path.isdir(studies):
            raise ValueError(f"{studies} is no folder: say where results and bundles go, --conf work FOLDER.")
        self.work = Path(conf.get("work", Path(studies) / "cardiac_qc"))
        self.bundles = self.work / "bundles"
        self.bundles.mkdir(parents=True, exist_ok=True)
        copy_bundles(self.bundles)
        description = "Segmentation of cardiac cine MRI with detection of local segmentation failures"
        super().__init__(app_dir, studies, conf, "Cardiac QC", description, __version__)

    def init_infers(self) -> dict[str, Any]:
        folders = [path.parents[1] for path in sorted(self.bundles.glob("*_segmentation/configs/inference.json"))]
        tasks = {folder.name: BundleInferTask(str(folder), self.conf) for folder in folders}
        tasks = {name: task for name, task in tasks.items() if task.valid}  # those with weights
        detectors = find_detectors(self.bundles / DETECTOR)
        pairs = [(network, map) for network, map in detectors if f"cardiac_{network}_segmentation" in tasks]
        if pairs:
            networks, maps = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
            first = tasks[f"cardiac_{networks[0]}_segmentation"]
            results = self.work / "results"
            qc = CardiacQC(first, networks, maps, self.bundles, results, self.datastore())
            tasks = {"cardiac_qc": qc, **tasks}  # 3D Slicer runs the first by itself
        return tasks

    def init_trainers(self) -> dict[str, Any]:
        tasks = [task for task in self._infers.values() if isinstance(task, BundleInferTask)]
        return {Path(task.bundle_path).name: FineTuning(task.bundle_path, self.conf) for task in tasks}

    def init_strategies(self) -> dict[str, Any]:
        return {"qc": MostSuspicious(), "random": Random(), "first": First()}

    def init_scoring_methods(self) -> dict[str, Any]:
        return {"qc": QCScoring(self.batch_infer)} if "cardiac_qc" in self._infers else {}

    def infer(self, request: dict[str, Any], datastore=None) -> dict[str, Any]:
        """As MONAI Label's, with one line as the answer for what cannot be done."""
        check_request(request)
        image = request["image"]
        if isinstance(image, str) and not os.path.exists(image) and image not in self.datastore().list_images():
            raise HTTPException(404, f"No image '{image}' in the datastore.")
        try:
            return super().infer({**request, "image_id": image}, datastore)
        except MONAILabelException as error:
            raise HTTPException(404, error.msg) from error
        except Exception as error:  # whatever breaks, the client gets one line, and the server goes on
            foreseen, cause = isinstance(error, ValueError), root_cause(error)
            reason = str(error) if foreseen else f"{type(cause).__name__}: {cause}".splitlines()[0]
            logger.error("%s, %s: %s", request["model"], image, reason, exc_info=not foreseen)
            raise HTTPException(422, reason) from error

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """As MONAI Label's."""
        check_request(request)
        return super().train(request)

    def batch_infer(self, request: dict[str, Any], datastore=None) -> dict[str, Any]:
        """As MONAI Label's, but an image that cannot be processed does not stop the others."""

        def infer(request: dict[str, Any], datastore) -> dict[str, Any]:
            try:
                return self.infer(request, datastore)
            except HTTPException as error:
                return {"error": error.detail}

        return self._batch_infer(request, datastore or self.datastore(), infer)
