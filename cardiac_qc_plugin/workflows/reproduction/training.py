"""One training by a bundle's ``train.json``: resumed, watched, and stopped at a deadline."""

import importlib.util
import math
import time
from pathlib import Path
from typing import Any, TextIO

from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.handlers import TensorBoardStatsHandler, from_engine

from cardiac_qc_plugin.bundle import root_cause
from cardiac_qc_plugin.checkpoints import CHECKPOINT

from ..files import write_text
from .stages import Budget, BudgetSpent

__all__ = ["LossCurve", "config_files", "read_losses", "train"]

get_loss = from_engine(["loss"], first=True)


def config_files(bundle: Path, regime: str) -> list[str]:
    """The training configuration of a bundle: ``train.json``, and on top of it the regime's own file.

    Args:
        bundle: folder of the bundle.
        regime: ``"short"`` for ``train.json`` alone, or the name of another file in ``configs``, such as ``"paper"``.

    Raises:
        ValueError: if there is no such file.
    """
    names = ["train.json"] if regime == "short" else ["train.json", f"{regime}.json"]
    files = [bundle / "configs" / name for name in names]
    if not files[-1].is_file():
        raise ValueError(f"{files[-1]}: no such file, so {bundle.name} has no regime '{regime}'.")
    return [str(file) for file in files]


class LossCurve:
    """The loss of every iteration as CSV (``iteration,loss,seconds``), there to be read while the training runs.

    ``seconds`` is the time spent in training so far, all its parts together. When a training is resumed, the rows after
    its checkpoint go: these iterations are done again.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream: TextIO | None = None
        self.start = 0.0

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.open)  # a checkpoint has been loaded by then
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)

    def open(self, engine: Engine) -> None:
        """Before the first epoch: keep the rows up to the engine's iteration."""
        if self.stream is not None:
            return
        rows = [row for row in read_losses(self.path) if row[0] <= engine.state.iteration]
        lines = [f"{iteration:.0f},{loss:.6g},{seconds:.2f}\n" for iteration, loss, seconds in rows]
        write_text(self.path, "iteration,loss,seconds\n" + "".join(lines))
        self.stream = open(self.path, "a", buffering=1, encoding="utf-8")
        self.start = time.perf_counter() - (rows[-1][2] if rows else 0.0)

    def write(self, engine: Engine) -> None:
        """Add a row."""
        seconds = time.perf_counter() - self.start
        self.stream.write(f"{engine.state.iteration},{float(get_loss(engine.state.output)):.6g},{seconds:.2f}\n")

    def close(self) -> None:
        """Close the file."""
        if self.stream is not None:
            self.stream.close()


def read_losses(path: Path) -> list[tuple[float, float, float]]:
    """Iteration, loss and seconds of each complete row; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.is_file() else []
    rows = [line.split(",") for line in lines if line.endswith("\n") and line.count(",") == 2]
    return [(float(a), float(b), float(c)) for a, b, c in rows]


def stop_at(budget: Budget, engine: Engine) -> None:
    """End a training after an epoch, if the next one would not fit into the budget."""
    if engine.state.epoch < engine.state.max_epochs and not budget.allows(engine.state.times["EPOCH_COMPLETED"]):
        engine.terminate()


def train(
    configs: list[str], settings: dict[str, Any], folder: Path, budget: Budget, tracking: str | None = None
) -> None:
    """Train to the end, or until the budget is spent; an earlier training with the same ``resume_dir`` goes on.

    Written to `folder`: ``loss.csv``, and TensorBoard's files where ``tensorboard`` is installed. The weights and
    checkpoints go where the bundle puts them.

    Args:
        configs: see `config_files`.
        settings: entries of the configuration to replace.
        folder: for the loss curve.
        budget: at least one epoch is trained.
        tracking: see :class:`monai.bundle.ConfigWorkflow`; ``"mlflow"`` writes to ``mlruns.db`` in the folder.

    Raises:
        BudgetSpent: if it stopped early; its checkpoint is kept.
        ValueError: if the configuration or the data refuse; the message is theirs.
    """
    curve = LossCurve(folder / "loss.csv")
    try:
        settings = settings | ({"tracking": tracking, "output_dir": str(folder)} if tracking else {})
        workflow = ConfigWorkflow(config_file=configs, workflow_type="train", logging_file=False, **settings)
        workflow.initialize()
        trainer = workflow.parser.get_parsed_content("train#trainer")
        curve.attach(trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: stop_at(budget, engine))
        if importlib.util.find_spec("tensorboard"):
            board = TensorBoardStatsHandler(
                log_dir=str(folder / "tensorboard"), output_transform=get_loss, epoch_log=False, tag_name="train_loss"
            )
            board.attach(trainer)
        for number in range(len(workflow.parser["run"])):  # what goes before, the training, what is made of it
            workflow.run_id = f"run#{number}"
            workflow.run()
            if 0 < trainer.state.epoch < trainer.state.max_epochs:
                raise BudgetSpent(f"{folder}: stopped after {trainer.state.iteration} iterations.")
        workflow.finalize()
    except RuntimeError as error:
        cause = root_cause(error)
        raise cause if isinstance(cause, ValueError | BudgetSpent) else error from None
    finally:
        curve.close()


def checkpoint_iteration(curve: Path, resume: Path) -> int:
    """About where a stopped training goes on: the last iteration on its loss curve, 0 without a checkpoint."""
    rows = read_losses(curve) if (resume / CHECKPOINT).is_file() else []
    return math.floor(rows[-1][0]) if rows else 0
