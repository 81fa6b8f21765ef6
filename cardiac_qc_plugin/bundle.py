"""A MONAI bundle as a function from files to maps, usable from Python and by the pipeline."""

import hashlib
import json
import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, SaveImage, SaveImaged, Transform

from .checkpoints import check_version, detector_file, load_weights
from .data.predictions import MAP_FILES

__all__ = [
    "DETECTOR",
    "BundlePredictor",
    "SegmentWithBundled",
    "device_setting",
    "find_bundle",
    "find_detectors",
    "find_device",
    "load_detector",
    "load_models",
    "load_segmenter",
]

BUNDLES = Path(__file__).parent.parent / "bundles"
NETWORKS = ("drn", "dn", "unet")
DETECTOR = "cardiac_segmentation_failure"


def find_bundle(name: str, root: str | Path | None = None) -> Path:
    """Folder of a bundle by its name, in ``root`` or in the repository's ``bundles``.

    Raises:
        ValueError: if there is no such bundle.
    """
    if root is None and not BUNDLES.is_dir():
        raise ValueError(
            f"{BUNDLES}: no such folder. Bundles come with the repository, not with the package: give their folder "
            "(bundle_dir)."
        )
    folder = Path(BUNDLES if root is None else root) / name
    if not (folder / "configs" / "inference.json").is_file():
        raise ValueError(f"{folder}: no MONAI bundle there (configs/inference.json is missing).")
    return folder


def root_cause(error: BaseException) -> BaseException:
    """What was raised: MONAI wraps an error in a RuntimeError for each level it passes."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def check_samples(map: str, samples: int) -> None:
    """Raise ValueError for a b-map of fewer than two samples: it would be 0 everywhere."""
    if map == "bmap" and samples < 2:
        raise ValueError(f"The b-map needs 2 samples or more, got {samples}. Without sampling, use the e-map.")


def sampling_settings(map: str, samples: int, turns: int) -> dict[str, Any]:
    """Entries of a segmentation bundle's config; turns only where they are asked for, since older bundles have none."""
    return {"map": map, "samples": samples} | ({} if turns == 1 else {"turns": turns})


def find_device(name: str) -> torch.device:
    """A torch device by its name.

    Raises:
        ValueError: if there is no such device, or torch sees none of its kind here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"There is no device '{name}': give auto, cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        why = f"torch {torch.__version__} sees {count} GPU(s)" if torch.version.cuda else "this torch is a CPU build"
        raise ValueError(f"There is no device '{name}' here: {why}. Give auto or cpu, or install a torch for your GPU.")
    return device


def device_setting(device: str | torch.device) -> dict[str, str]:
    """The entry of a bundle's config that says where it runs; none for ``"auto"``."""
    return {} if device == "auto" else {"device": f"$torch.device('{device}')"}


def one_at_a_time() -> Callable[[Callable[[], Any]], Any]:
    """A function that calls what it is given, for one thread at a time."""
    free = threading.Lock()

    def compute(work: Callable[[], Any]) -> Any:
        with free:
            return work()

    return compute


class BundlePredictor:
    """Runs the parts of a bundle's ``configs/inference.json`` on one case after another, without writing files.

    The bundle alone says how to preprocess, infer and postprocess; transforms that save files are left out. Threads may
    share it: the network works on one case at a time, while other cases are pre- and postprocessed.

    Args:
        folder: the bundle.
        device: ``"auto"`` for the bundle's own choice, or a torch device.
        overrides: entries of the config to replace, by id (``samples=20``).

    Attributes:
        compute: runs the network's part of a case: in the calling thread, one case at a time.
        config: the parsed configuration, a :class:`monai.bundle.ConfigParser`.
        version: version in the bundle's metadata.
        digest: digest of version, configuration, overrides and weights: equal digests give equal results.
        weights_sha256: digest of the weights.
        network: with its weights; what was made of them for the inferer does not follow a change.
        promise: what is promised of a detector's threshold, for the record; None for the bundle's operating point.

    Raises:
        ValueError: for an override that the config does not have, a bundle of another version, or weights that are
            missing or do not fit.
    """

    def __init__(self, folder: str | Path, device: str = "auto", **overrides: Any) -> None:
        folder = Path(folder)
        self.name = folder.name
        self.promise: dict[str, Any] | None = None
        self.config = ConfigParser()
        config_file = folder / "configs" / "inference.json"
        self.config.read_config(str(config_file))
        self.version = check_version(folder)
        unknown = [key for key in overrides if key not in self.config]
        if unknown:
            raise ValueError(f"{config_file} has no setting '{unknown[0]}'.")
        overrides = {"bundle_root": str(folder), **overrides}
        if device != "auto":
            # by its own name: the text may come from a request, and the entry is an expression
            overrides |= device_setting(find_device(device))
        self.config.update(overrides)
        self.config.parse()
        weights = Path(self._get("ckpt_path"))
        load_weights(self._get("network_def"), weights)
        self.weights_sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        places = ("bundle_root", "ckpt_path", "device")  # the weights have a digest of their own
        settings = json.dumps({k: v for k, v in overrides.items() if k not in places}, sort_keys=True)
        parts = [self.version, config_file.read_text(), settings, self.weights_sha256]
        if "threshold" in self.config:
            parts.append(str(self._get("threshold")))  # it may come from a file
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self.device = self._get("device")
        self.network = self._get("network").eval()
        self.preprocessing = self._get("preprocessing")
        self.inferer = self._get("inferer")
        self.prepared = self.inferer.prepare(self.network) if hasattr(self.inferer, "prepare") else self.network
        self.compute = one_at_a_time()
        steps = self._get("postprocessing").transforms
        self.postprocessing = Compose([step for step in steps if not isinstance(step, SaveImage | SaveImaged)])

    def _get(self, key: str) -> Any:
        try:
            return self.config.get_parsed_content(key)
        except RuntimeError as error:
            raise ValueError(f"bundle {self.name}, {key}: {root_cause(error)}") from error

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        """Predict one case.

        Args:
            case: what the bundle's preprocessing reads, ``{"image": path}`` at least.

        Returns:
            The dictionary after postprocessing: maps ``(1, H, W, D)`` on the scan's own grid, and ``"result"``; with
            ``"sample_areas"`` where the inferer has them, see
            :class:`~cardiac_qc_plugin.inferers.MCDropoutSliceInferer`.

        Raises:
            ValueError: if preprocessing refuses the case; the message is the transform's own.
        """
        try:
            data = self.preprocessing(case)
        except RuntimeError as error:
            raise ValueError(str(root_cause(error))) from error
        data |= self.compute(lambda: self._infer(data["image"]))
        with torch.no_grad():
            return self.postprocessing(data)

    def _infer(self, image: torch.Tensor) -> dict[str, Any]:
        """The network's part of a case."""
        result = {"pred": self.inferer(image[None].to(self.device), self.prepared)[0].cpu()}
        if hasattr(self.inferer, "sample_areas"):
            result["sample_areas"] = self.inferer.sample_areas
        return result


class SegmentWithBundled(Transform):
    """Segment a scan with another bundle, unless its segmentation and uncertainty map are there already.

    The bundle is loaded at the first scan that needs it.

    Args:
        folder: the segmentation bundle.
        map: ``"bmap"`` or ``"emap"``, the uncertainty map.
        samples: Monte Carlo samples T.
        device: see :class:`BundlePredictor`.
        turns: quarter turns in which slices are seen, 1 to 4.
        settings: others of the segmentation bundle, such as ``seed`` and ``amp``.

    Adds ``segmentation`` and ``uncertainty``, both ``(1, H, W, D)`` on the scan's own grid, to data whose ``image`` was
    read from a file.

    Raises:
        ValueError: if only one of the two is there; if neither is, and no bundle to make them; or for a b-map of fewer
            than two samples.
    """

    def __init__(
        self,
        folder: str | Path,
        map: str,
        samples: int,
        device: torch.device | str = "auto",
        turns: int = 1,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.map = map
        self.samples = samples
        self.turns = turns
        self.device = str(device)
        self.predictor: BundlePredictor | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        present = [key for key in ("segmentation", "uncertainty") if key in d]
        if len(present) == 2:
            return d
        path = d["image"].meta["filename_or_obj"]
        if present:
            raise ValueError(f"{path}: there is a {present[0]} only. Give segmentation and uncertainty, or neither.")
        if self.predictor is None:
            check_samples(self.map, self.samples)
            if not (Path(self.folder) / "configs" / "inference.json").is_file():
                raise ValueError(
                    f"{self.folder}: no bundle there to segment {path} with. Put it there, or name another folder "
                    "(segmentation_bundle); or give segmentations and maps (predictions_dir)."
                )
            samples = self.samples if self.map == "bmap" else 0  # the e-map needs none
            settings = self.settings | sampling_settings(self.map, samples, self.turns)
            self.predictor = BundlePredictor(self.folder, self.device, **settings)
        result = self.predictor({"image": path})
        return {**d, "segmentation": result["pred"], "uncertainty": result[self.map]}


def load_segmenter(
    model: str, map: str, samples: int, device: str = "auto", root: str | Path | None = None, turns: int = 1
) -> BundlePredictor:
    """The segmentation bundle of a network.

    Args:
        model: ``"dn"``, ``"drn"`` or ``"unet"``.
        map: ``"bmap"`` or ``"emap"``: what the segmentation has to go with.
        samples: Monte Carlo samples T.
        device: see :class:`BundlePredictor`.
        root: folder of the bundles.
        turns: quarter turns in which slices are seen, 1 to 4.

    Raises:
        ValueError: for an unknown network or map, a b-map of fewer than two samples, or a bundle that is missing or has
            no weights.
    """
    if model not in NETWORKS:
        raise ValueError(f"The model is dn, drn or unet, got '{model}'.")
    if map not in MAP_FILES:
        raise ValueError(f"The map is bmap or emap, got '{map}'.")
    check_samples(map, samples)
    folder = find_bundle(f"cardiac_{model}_segmentation", root)
    return BundlePredictor(folder, device, **sampling_settings(map, samples, turns))


def load_models(
    model: str,
    map: str,
    samples: int,
    device: str = "auto",
    root: str | Path | None = None,
    threshold: float | None = None,
    turns: int = 1,
) -> tuple[BundlePredictor, BundlePredictor]:
    """The segmentation bundle of a network, and the failure bundle with the detector for this network and map.

    Arguments as for :func:`load_segmenter`.

    Args:
        threshold: failure probability from which a region is flagged; None for the detector's operating point.

    Raises:
        ValueError: as :func:`load_segmenter`; or if there is no such detector.
    """
    return load_segmenter(model, map, samples, device, root, turns), load_detector(model, map, device, root, threshold)


def find_detectors(folder: Path) -> list[tuple[str, str]]:
    """Network and map of each detector whose weights are in the failure bundle, the bundle's default first."""
    detectors = [(network, map) for network in NETWORKS for map in MAP_FILES]
    return [detector for detector in detectors if (folder / "models" / detector_file(*detector)).is_file()]


def load_detector(
    model: str, map: str, device: str = "auto", root: str | Path | None = None, threshold: float | None = None
) -> BundlePredictor:
    """The failure bundle with the detector for a network and a map; arguments and errors as :func:`load_models`."""
    folder = find_bundle(DETECTOR, root)
    available = find_detectors(folder)
    if (model, map) not in available:
        raise ValueError(
            f"The failure bundle has no detector for the {model} and the {map}, but for "
            f"{', '.join(' '.join(pair) for pair in available) or 'none'}. Train one with the bundle's train.json: "
            f"--segmentation_model {model} --map {map}."
        )
    settings = {} if threshold is None else {"threshold": float(threshold)}
    if not 0 <= settings.get("threshold", 0) <= 1:
        raise ValueError(f"--threshold is a probability, between 0 and 1, got {threshold}.")
    return BundlePredictor(folder, device, map=map, segmentation_model=model, **settings)
