"""Weights as files: what is shipped, and what is read back; and what an interrupted training goes on from."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.utils import set_determinism
from torch import nn

from . import __version__

__all__ = [
    "CHECKPOINT",
    "EpochCheckpoint",
    "SnapshotSaver",
    "calibration_file",
    "check_version",
    "detector_file",
    "epoch_length",
    "files_beside",
    "load_weights",
    "read_threshold",
    "remove_checkpoint",
    "save_weights",
    "sees_segmentation",
]

LONGEST_EPOCH = 250  # iterations
CHECKPOINT = "checkpoint.pt"  # of an interrupted training


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, that gets its own at the end; what a killed process left there is overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write a network's weights as a bare state dict in fp16 (integers as they are), under a temporary name first.

    Batch normalization's statistics and all other values stay far inside fp16's range; loading converts back to fp32.
    An operating point beside them is removed if it is of a detector of other regions. One of the same regions stays: a
    training that goes on from the weights that were there, without held-out cases, can choose no other.
    """
    path = Path(path)
    state = {
        key: (value.detach().cpu().half() if value.is_floating_point() else value.cpu()).contiguous()
        for key, value in network.state_dict().items()
    }
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} has values beyond fp16's range, or NaN: not saved to {path}.")
    with _replacing(path) as temporary:
        torch.save(state, temporary)
        size = getattr(network, "region_size", None)
        if _trained_region_size(path, size) != size:
            operating_point_file(path).unlink()


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load a state dict, bare or under ``"model"``, into a network.

    Raises:
        ValueError: if the file is missing, is no state dict, or belongs to another network, or to a detector of other
            regions (by the operating point beside it: the weights fit all); the message says how it differs.
    """
    state = _read_state(path)
    found = {key: value.shape for key, value in state.items()}
    expected = {key: value.shape for key, value in network.state_dict().items()}
    wrong = sorted(key for key in expected | found if expected.get(key) != found.get(key))
    if wrong:
        raise ValueError(
            f"{path}: these weights belong to another network than {type(network).__name__}: {len(wrong)} of "
            f"{len(expected | found)} entries differ, '{wrong[0]}' first. "
            "Check network_def against the bundle they came from."
        )
    size = getattr(network, "region_size", None)
    trained = _trained_region_size(path, size)
    if trained is None and size is not None:
        raise ValueError(f"{operating_point_file(path)}: not the operating point of a detector.")
    if trained != size:
        raise ValueError(
            f"{path}: trained for regions of {trained} pixels, by {operating_point_file(path).name}, and used for "
            f"{size}. Give region_size {trained}."
        )
    network.load_state_dict(state)
    return network


def _read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, bare or under ``"model"``; errors as of `load_weights`."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file. Train the bundle, or fetch the weights that it ships.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        return {key: value.detach() for key, value in state.items()}
    except Exception as error:
        raise ValueError(f"{path}: not a file of weights ({error}).") from error


def sees_segmentation(path: str | Path) -> bool:
    """Whether saved weights are of a detector that sees the segmentation: its input has 3 channels, not 2.

    Raises:
        ValueError: if the file is missing, or holds no weights of a convolutional network.
    """
    kernels = (value for value in _read_state(path).values() if value.ndim == 4)
    if (first := next(kernels, None)) is None:
        raise ValueError(f"{path}: not the weights of a convolutional network.")
    return first.shape[1] == 3


def _trained_region_size(weights: str | Path, size: int | None) -> int | None:
    """Region size that a detector's operating point tells, ``size`` if it or the file says none; None if damaged."""
    point = operating_point_file(weights)
    if size is None or not point.is_file():
        return size
    try:
        return json.loads(point.read_text()).get("region_size", size)
    except (ValueError, AttributeError):
        return None


def operating_point_file(weights: str | Path) -> Path:
    """A detector's operating point, beside its weights."""
    return Path(f"{os.path.splitext(weights)[0]}_operating_point.json")


def calibration_file(weights: str | Path, turns: int = 1) -> Path:
    """A detector's calibration, beside its weights: one for each number of quarter turns in which scans are seen."""
    return Path(f"{os.path.splitext(weights)[0]}{f'_turns{turns}' if turns > 1 else ''}_calibration.json")


def files_beside(weights: str | Path) -> list[Path]:
    """What belongs to a detector's weights, whether it is there or not: operating point and calibrations."""
    return [operating_point_file(weights), *(calibration_file(weights, turns) for turns in range(1, 5))]


def detector_file(network: str, map: str) -> str:
    """Name of the file of a detector's weights; of the bundle's default it is the one that MONAI's tools look for."""
    return "model.pt" if (network, map) == ("drn", "bmap") else f"{network}_{map}.pt"


def epoch_length(iterations: int, snapshots: int = 0) -> int:
    """Iterations of an epoch, after each of which there is a checkpoint: the most that divide the training evenly.

    Args:
        iterations: of the training.
        snapshots: number of equal parts that leave weights; epochs divide these.

    Raises:
        ValueError: if there are none, or if only a few would do, so that most of the time went into checkpoints.
    """
    if iterations < 1:
        raise ValueError(f"iterations has to be 1 or more, got {iterations}.")
    part = iterations // max(snapshots, 1)
    length = max((n for n in range(1, min(LONGEST_EPOCH, part) + 1) if part % n == 0), default=0)
    if length < min(part, 20):
        raise ValueError(
            f"{iterations} iterations cannot be divided into epochs of 20 to {LONGEST_EPOCH}: take other ones, such "
            f"as {max(snapshots, 1) * -(-part // LONGEST_EPOCH) * LONGEST_EPOCH}, or give epoch_length."
        )
    return length


def read_threshold(weights: str | Path) -> float:
    """A detector's operating point: the threshold in ``<weights>_operating_point.json``, which its training writes.

    Raises:
        ValueError: if there is no such file, or no threshold in it.
    """
    path = operating_point_file(weights)
    try:
        return float(json.loads(path.read_text())["threshold"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no operating point of the weights beside it ({error}). Their training writes one; or give a "
            "threshold."
        ) from error


def check_version(bundle_root: str | Path) -> str:
    """Refuse a bundle that was made for another version of this package, by what its metadata require.

    Returns:
        The bundle's own version.

    Raises:
        ValueError: if the major or minor version differs; the message says which one is needed. Or if the metadata
            cannot be read.
    """
    path = Path(bundle_root) / "configs" / "metadata.json"
    try:
        metadata = json.loads(path.read_text())
        own, required = metadata["version"], metadata["required_packages_version"].get("cardiac-qc-plugin")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the metadata of a bundle ({error!r}). Take the bundle anew.") from error
    if required is not None and required.split(".")[:2] != __version__.split(".")[:2]:
        raise ValueError(
            f"{path}: the bundle needs cardiac-qc-plugin {required}, and {__version__} is installed. Install that "
            "version, or take the bundle that came with yours."
        )
    return own


class EpochCheckpoint:
    """Save a training after each epoch, and make each epoch's random numbers depend on nothing before it.

    A training that is resumed from such a checkpoint ends with the weights of one that was never interrupted, bit for
    bit where the device computes deterministically. A checkpoint replaces the one before it only when it is complete.

    Args:
        folder: where ``checkpoint.pt`` goes; made at the first checkpoint.
        state: objects with a ``state_dict``, by the name that MONAI's ``CheckpointLoader`` will look for; the network
            is ``"model"``.
        seed: epoch n draws its random numbers from ``seed`` + n, and from another one in each further process.
    """

    def __init__(self, folder: str | Path, state: Mapping[str, Any], seed: int) -> None:
        self.folder = folder
        self.state = state
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.reseed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def reseed(self, engine: Engine) -> None:
        """Seed all generators for the epoch that starts; no process repeats another's numbers."""
        set_determinism(self.seed + engine.state.epoch + 100_003 * idist.get_rank())

    def save(self, engine: Engine) -> None:
        """Write the checkpoint, in the first process; end a training that has diverged, in all of them.

        Raises:
            ValueError: if the entry ``"model"`` has values that are not finite.
        """
        if not all(value.isfinite().all() for value in self.state["model"].state_dict().values()):
            raise ValueError(
                f"The training diverged in epoch {engine.state.epoch}: weights are not finite. Remove {self.folder}, "
                "which is of the epoch before, and train with a lower learning_rate, or with max_grad_norm 1 where the "
                "bundle has that setting."
            )
        if idist.get_rank() > 0:
            return
        state = {name: entry.state_dict() for name, entry in self.state.items()}
        with _replacing(Path(self.folder) / CHECKPOINT) as temporary:
            torch.save(state, temporary)


def remove_checkpoint(folder: str | Path) -> None:
    """Remove what `EpochCheckpoint` wrote, at the end of a training; other files there, and so the folder, stay."""
    for name in (CHECKPOINT, f"{CHECKPOINT}.part"):  # the latter of a process that was killed
        (Path(folder) / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(folder).rmdir()


class SnapshotSaver:
    """Save a network's weights at the end of each of several equal parts of a training: a snapshot ensemble.

    With a learning rate that restarts as often, a part ends where the rate is lowest (Huang et al., ICLR 2017).

    Args:
        network: the network.
        folder: where ``snapshot1.pt``, ``snapshot2.pt``, ... go, see :func:`save_weights`.
        count: number of parts; the training's epochs are a multiple of it.
    """

    def __init__(self, network: nn.Module, folder: str | Path, count: int) -> None:
        self.network = network
        self.folder = folder
        self.count = count

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def save(self, engine: Engine) -> None:
        """Write a snapshot at the end of a part, in the first process."""
        number, rest = divmod(engine.state.epoch * self.count, engine.state.max_epochs)
        if rest == 0 and idist.get_rank() == 0:
            save_weights(self.network, Path(self.folder) / f"snapshot{number}.pt")
