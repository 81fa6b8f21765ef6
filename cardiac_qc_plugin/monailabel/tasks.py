"""What the app adds to MONAI Label: quality control of a scan, scoring and choice of scans by it, fine-tuning."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.others.generic import device_list, name_to_device

from cardiac_qc_plugin.bundle import BundlePredictor
from cardiac_qc_plugin.data.inputs import Scan
from cardiac_qc_plugin.workflows.run import DETECT_FILES, SEGMENT_FILES, load_predictors, run_case
from cardiac_qc_plugin.workflows.urgency import urgencies

__all__ = ["CardiacQC", "FineTuning", "MostSuspicious", "QCScoring"]

TAGS = {"emap": SEGMENT_FILES["emap"], "bmap": SEGMENT_FILES["bmap"], "failure": DETECT_FILES["regions"]}
INFO = "cardiac_qc"  # entry of an image's info in the datastore
OPERATING_POINT = "operating point"
CATCH = [OPERATING_POINT, "0.8", "0.9", "0.95"]  # what a client may choose from; a request may have any other share


def chosen(value: Any) -> Any:
    """A request's value; of an option that lists what a client may choose, the first."""
    return value[0] if isinstance(value, list) else value


class CardiacQC(InferTask):
    """Segment a scan, and find where the segmentation failed.

    The answer is the mask (uint8: 1 RV, 2 LVM, 3 LV), and a dictionary of flagged slices and regions, scores and
    volumes. For a scan of the datastore, the e-map, the b-map and the numbered failure regions become labels under
    the tags ``emap``, ``bmap`` and ``failure``, and the scores part of the image's info. Results are kept, and used
    again while scan, settings and weights stay the same.

    Args:
        segmentation: infer task of a segmentation bundle, for its options and labels.
        networks: segmentation networks to choose from, the default first.
        maps: uncertainty maps to choose from, the default first.
        bundles: folder of the bundles.
        results: folder for the results, see docs/architecture.md.
        datastore: where labels go.
    """

    def __init__(
        self,
        segmentation: BundleInferTask,
        networks: list[str],
        maps: list[str],
        bundles: Path,
        results: Path,
        datastore: Datastore,
    ) -> None:
        choice = {"segmentation_model": networks, "map": maps, "catch": CATCH, "device": device_list()}
        description = "Segmentation, uncertainty maps, and the regions in which the segmentation probably failed"
        options = {**segmentation.displayable_configs, **choice}
        super().__init__(InferType.SEGMENTATION, segmentation.labels, 3, description, options)
        self.bundles = bundles
        self.results = results
        self.datastore = datastore

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        options = {name: chosen(value) for name, value in {**self.config(), **request}.items()}
        catch = options["catch"]
        models, _ = load_predictors(
            options["segmentation_model"],
            options["map"],
            int(options["samples"]),
            device=name_to_device(options["device"]),
            root=self.bundles,
            threshold=options.get("threshold"),
            catch=None if catch in (None, OPERATING_POINT) else float(catch),
            turns=int(options.get("turns", 1)),
        )
        image_id = request.get("image_id")
        if image_id not in self.datastore.list_images():  # a file that came with the request
            with tempfile.TemporaryDirectory() as folder:
                return self.answer(Scan("scan", Path(request["image"])), Path(folder), *models)
        self.results.mkdir(parents=True, exist_ok=True)
        with FileLock(self.results / f"{image_id}.lock"):  # scoring is a process of its own
            mask, report = self.answer(Scan(image_id, Path(request["image"])), self.results, *models)
            for tag, (file, _) in TAGS.items():
                self.datastore.save_label(image_id, str(self.results / image_id / file), tag, {"model": "cardiac_qc"})
        summary = {key: report[key] for key in ("scores", "flagged_slices", "volume_ml")}
        self.datastore.update_image_info(image_id, {INFO: summary})
        return mask, report

    def answer(
        self, scan: Scan, output: Path, segmenter: BundlePredictor, detector: BundlePredictor
    ) -> tuple[str, dict[str, Any]]:
        """Path of a copy of the mask, which the server removes when it is sent, and what goes with it as JSON."""
        qc = run_case(scan, output, (segmenter, detector))
        segmentation, detection = qc["segmentation"], qc["detection"]
        report = {
            "label_names": self.labels,
            "flagged_slices": detection["flagged_slices"],
            "regions": detection["regions"],
            "scores": qc["scores"],
            "promise": qc["promise"],
            "volume_ml": segmentation["volume_ml"],
            "pairwise_dice": segmentation["pairwise_dice"],
            **{key: segmentation[key] for key in ("bundle", "weights_sha256", "samples", "turns", "seed")},
            **{key: detection[key] for key in ("map", "threshold", "region_size", "n_regions")},
        }
        with tempfile.NamedTemporaryFile(suffix=".nii.gz", delete=False) as copy:
            shutil.copy(output / scan.case / SEGMENT_FILES["pred"][0], copy.name)
        return copy.name, report


class QCScoring(ScoringMethod):
    """Run :class:`CardiacQC` on every scan without a final label; a scan that cannot be processed gets the reason.

    Args:
        batch_infer: the app's.
    """

    def __init__(self, batch_infer: Callable[[dict[str, Any], Datastore], dict[str, Any]]) -> None:
        super().__init__("Urgency of a scan: 1 - mean pairwise Dice of its Monte Carlo samples")
        self.batch_infer = batch_infer

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        settings = {"images": "unlabeled", "multi_gpu": False, "max_workers": 1, **request, "model": "cardiac_qc"}
        answers = self.batch_infer(settings, datastore)
        failed = {image_id: answer["error"] for image_id, answer in answers.items() if "error" in answer}
        for image_id, reason in failed.items():
            datastore.update_image_info(image_id, {INFO: {"error": reason}})
        return {"scored": len(answers) - len(failed), "failed": failed}


class MostSuspicious(Strategy):
    """The scan without a final label whose urgency is highest; scans without a score come last."""

    def __init__(self) -> None:
        super().__init__("The most suspicious scan first")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, str] | None:
        datastore.refresh()  # scores are written by another process
        images = sorted(datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels")))

        urgency = urgencies([datastore.get_image_info(image).get(INFO, {}).get("scores", {}) for image in images])
        return {"id": images[int(np.argmax(urgency))]} if images else None


class FineTuning(BundleTrainTask):
    """Train a segmentation bundle on, on the datastore's final labels.

    Args:
        path: the bundle.
        conf: the app's; ``epoch_length`` (batches in an epoch) and ``learning_rate`` replace the bundle's, which are
            meant for a training from scratch.
    """

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        overrides["epoch_length"] = int(self.conf.get("epoch_length", 50))
        overrides["learning_rate"] = float(self.conf.get("learning_rate", 1e-4))
        return overrides
