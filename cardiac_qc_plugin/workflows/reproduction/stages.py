"""Stages of a long computation: one whose result is there, made from the same inputs, is not carried out again."""

import gc
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cardiac_qc_plugin import __version__

from ..files import OutputError, file_sha256, read_json, write_json

__all__ = ["Budget", "BudgetSpent", "Progress", "Stage", "carry_out"]


class BudgetSpent(RuntimeError):
    """The time that was given is over; what was done so far is kept."""


class Budget:
    """Wall-clock time that may be spent.

    Args:
        minutes: from now on; None for no limit.

    Raises:
        ValueError: if it is not positive.
    """

    def __init__(self, minutes: float | None = None) -> None:
        if minutes is not None and not minutes > 0:
            raise ValueError(f"--budget_minutes has to be positive, got {minutes}.")
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left."""
        return time.monotonic() + seconds < self.end

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()


@dataclass(eq=False)
class Stage:
    """One step, and how to tell whether it is done.

    It is done if its record is there with the digest of its present inputs, and its files are those of the record. The
    inputs are the settings, the version of the package, and the digests and files of the stages before it; so nothing
    is used that was made from something else, and a folder may be moved.

    Attributes:
        root: folder of all stages.
        name: folder of this stage's files under it; its record is ``stages/<name>.json``.
        settings: what the result depends on apart from `needs`; JSON.
        work: carries it out; raises `BudgetSpent` where it stops early and will go on next time.
        outputs: the files that later stages read, relative to the stage's folder.
        needs: the stages before it.
        info: what else to tell of it, in a plan or a table; no part of the digest.
    """

    root: Path
    name: str
    settings: dict[str, Any]
    work: Callable[["Stage", Budget], None]
    outputs: tuple[str, ...]
    needs: tuple["Stage", ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    _fingerprint: str | None = field(default=None, init=False)

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.root / self.name

    @property
    def record(self) -> Path:
        """The file that says what its files were made from."""
        return self.root / "stages" / f"{self.name}.json"

    def digest(self) -> str:
        """Digest of its inputs; the stages before it have to be done."""
        inputs = [__version__, self.name, self.settings, [need.fingerprint() for need in self.needs]]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str | None:
        """Digest of its inputs and files together, None while it is not done."""
        if self._fingerprint is None and all(need.fingerprint() for need in self.needs) and self.record.is_file():
            record = read_json(self.record)
            if record.get("digest") == self.digest() and record.get("outputs") == self.hashes():
                self._fingerprint = hashlib.sha256(json.dumps(record["outputs"]).encode()).hexdigest()
                self._fingerprint += record["digest"]
        return self._fingerprint

    @property
    def done(self) -> bool:
        """Whether its result is there, made from its present inputs."""
        return self.fingerprint() is not None

    @property
    def ready(self) -> bool:
        """Whether the stages before it are done."""
        return all(need.done for need in self.needs)

    def hashes(self) -> dict[str, str | None]:
        """SHA-256 of each output, None for one that is missing."""
        files = {name: self.folder / name for name in self.outputs}
        return {name: file_sha256(path) if path.is_file() else None for name, path in files.items()}

    def run(self, budget: Budget) -> None:
        """Carry it out, and record it.

        Raises:
            BudgetSpent: if it stopped early.
            ValueError: if it ended without one of its files.
        """
        self._remove_damaged()
        self.record.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        try:
            self.work(self, budget)
        finally:
            gc.collect()  # a trainer refers to itself, and holds its data and its network's memory
        outputs = self.hashes()
        missing = [name for name, value in outputs.items() if value is None]
        if missing:
            raise ValueError(f"{self.folder / missing[0]} was not written.")
        record = {"digest": self.digest(), "settings": self.settings, "outputs": outputs, "version": __version__}
        write_json(self.record, record | {"seconds": round(time.perf_counter() - start, 1)})

    def _remove_damaged(self) -> None:
        """Remove files that are not those of the record: the work takes what it finds for its own."""
        recorded = read_json(self.record).get("outputs", {}) if self.record.is_file() else {}
        for name, value in self.hashes().items():
            if recorded.get(name, value) != value:
                (self.folder / name).unlink(missing_ok=True)


@dataclass
class Progress:
    """What became of stages: their names, and what went wrong by name."""

    carried_out: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def carry_out(stages: Iterable[Stage], budget: Budget) -> Progress:
    """Carry out the stages that are not done, in order, until the budget is spent.

    A stage that fails does not stop those that do not need it.

    Raises:
        OSError: the output cannot be written; no later stage could be either.
    """
    progress = Progress()
    for stage in stages:
        if stage.done:
            progress.skipped.append(stage.name)
        elif not stage.ready or not budget.allows():
            progress.remaining.append(stage.name)
        else:
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            try:
                stage.run(budget)
                progress.carried_out.append(stage.name)
            except BudgetSpent:
                progress.remaining.append(stage.name)
            except OutputError:
                raise
            except (ValueError, RuntimeError) as error:
                progress.failures[stage.name] = str(error)
    return progress
