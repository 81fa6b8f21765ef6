"""What a review has come to: the labels, decisions and time that follow from its events."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from scipy import ndimage

from cardiac_qc_plugin.metrics.segmentation import CLASS_NAMES

__all__ = ["PAUSE", "Refused", "Region", "ReviewState", "find_regions"]

PAUSE = 60.0
"""Seconds; time between two signs of activity counts unless it is longer."""
DECISIONS = ("accepted", "corrected")
NAMED = 5  # voxels that a refusal names
NO_LABELS = np.empty(0, np.uint8)
NOWHERE = (np.empty(0, int),) * 3


class Refused(ValueError):
    """An action that the rules of the review do not allow; nothing of it was done."""


@dataclass(frozen=True)
class Region:
    """A flagged region; rows and columns from 0, stops excluded. Number 1 is the most probable failure."""

    id: int
    slice: int
    row0: int
    row1: int
    col0: int
    col1: int
    probability: float


def find_regions(flagged: np.ndarray, probability: np.ndarray) -> dict[int, Region]:
    """The regions of a map of region numbers, by number.

    Args:
        flagged: 0, or the number of a region, each in one slice; (H, W, D).
        probability: failure probability, constant in a region; same shape.
    """
    regions = {}
    for number, box in enumerate(ndimage.find_objects(flagged.astype(np.int32)), start=1):
        if box is not None:
            (row0, row1), (col0, col1), (z, _) = ((axis.start, axis.stop) for axis in box)
            value = float(probability[box][flagged[box] == number].max())
            regions[number] = Region(number, z, row0, row1, col0, col1, value)
    return regions


@dataclass(frozen=True, eq=False)
class Step:
    """What undo takes back and redo does again: labels at voxels of regions, decisions, and the region looked at."""

    regions: list[int]
    where: tuple[np.ndarray, ...]
    before: np.ndarray
    after: np.ndarray
    decided_before: dict[int, str]
    decided_after: dict[int, str]
    position_before: int | None
    position_after: int | None


class ReviewState:
    """The state of a case's review; it follows from the events alone.

    Actions on the labels are ``paint`` (voxels of one slice take a label) and ``decide`` (regions are accepted as
    correct, or corrected); ``undo`` and ``redo`` walk over both. A decision holds as long as it is true: painting in
    an accepted region opens it again.

    Args:
        automatic: automatic labels, uint8 (H, W, D).
        flagged: numbers of flagged regions, same shape.
        regions: these regions by number.
    """

    def __init__(self, automatic: np.ndarray, flagged: np.ndarray, regions: dict[int, Region]) -> None:
        self.automatic, self.flagged, self.regions = automatic, flagged, regions
        self.labels = automatic.copy()
        self.voxels = np.nonzero(flagged.T)[::-1]  # of all regions, the first axis fastest: the order of a NIfTI file
        self.decided: dict[int, str] = {}
        self.position = min(regions, default=None)
        self.done: list[Step] = []
        self.undone: list[Step] = []
        self.applied: set[str] = set()  # ids of actions: one that is sent again is not done again
        self.reviewer: str | None = None
        self.started: str | None = None
        self.finished: str | None = None
        self.seconds = 0.0
        self.region_seconds: Counter[int] = Counter()
        self.last: datetime | None = None  # sign of activity
        self.trail: list[dict[str, Any]] = []  # what was done, for the audit

    # what can be asked

    @property
    def changed(self) -> set[int]:
        """Numbers of the regions in which a label differs from the automatic one."""
        differs = self.labels[self.voxels] != self.automatic[self.voxels]
        return set(self.flagged[self.voxels][differs].tolist())

    @property
    def decisions(self) -> dict[int, str]:
        """Decisions that hold, by region: accepted ones have no change, corrected ones have."""
        changed = self.changed
        return {n: made for n, made in self.decided.items() if (made == "corrected") == (n in changed)}

    def next_open(self, after: int) -> int:
        """The next region without a decision in order of probability, from the start again at the end."""
        decisions = self.decisions
        left = [number for number in sorted(self.regions) if number not in decisions]
        return next((number for number in left if number > after), left[0] if left else after)

    # what can be done

    def check(self, event: dict[str, Any]) -> None:
        """Refuse what the rules do not allow.

        Raises:
            Refused: the message says what is wrong, and names voxels outside the flagged regions.
        """
        action = event.get("action")
        if action not in ("paint", "decide", "undo", "redo", "visit", "active", "finish", "reopen"):
            raise Refused(f"There is no action {action!r}.")
        if self.finished and action not in ("visit", "active", "reopen"):
            raise Refused("This case is finished; open it again to change it.")
        if action == "paint":
            self._check_paint(event)
        elif action == "decide":
            self._check_decision(event)
        elif action == "visit" and not self._is_region(event.get("region")):
            raise Refused(f"There is no flagged region {event.get('region')!r}.")
        elif action == "undo" and not self.done:
            raise Refused("There is nothing to undo.")
        elif action == "redo" and not self.undone:
            raise Refused("There is nothing to do again.")
        elif action == "reopen" and not self.finished:
            raise Refused("This case is not finished.")
        elif action == "finish" and type(event.get("incomplete", False)) is not bool:
            raise Refused(f"incomplete is true or false, got {event['incomplete']!r}.")
        elif action == "finish" and not event.get("incomplete"):
            if left := sorted(set(self.regions) - set(self.decisions)):
                raise Refused(f"Regions that are not decided yet: {', '.join(map(str, left))}.")

    def _check_paint(self, event: dict[str, Any]) -> None:
        height, width, depth = shape = self.automatic.shape
        if event.get("shape") != list(shape):
            raise Refused(f"The stroke is for a mask of shape {event.get('shape')}, this case has {list(shape)}.")
        if type(event.get("label")) is not int or event["label"] not in (0, *CLASS_NAMES):
            raise Refused(f"Unknown label {event.get('label')!r}: 0 is background, 1 RV, 2 LVM, 3 LV.")
        z = event.get("slice")
        if type(z) is not int or not 0 <= z < depth:
            raise Refused(f"There is no slice {z!r}: they go from 0 to {depth - 1}.")
        voxels = _pairs(event.get("voxels"))
        if (voxels < 0).any() or (voxels >= (height, width)).any():
            raise Refused(f"Voxels beyond the slice of {height} x {width}: {_listed(voxels, z)}.")
        outside = voxels[self.flagged[voxels[:, 0], voxels[:, 1], z] == 0]
        if len(outside):
            raise Refused(f"Voxels outside the flagged regions: {_listed(outside, z)}.")

    def _check_decision(self, event: dict[str, Any]) -> None:
        numbers, decision = event.get("regions"), event.get("decision")
        if decision not in DECISIONS:
            raise Refused(f"Unknown decision {decision!r}: choose one of {list(DECISIONS)}.")
        if not isinstance(numbers, list) or not numbers or not all(map(self._is_region, numbers)):
            raise Refused(f"There are no flagged regions {numbers!r}.")
        if decision == "accepted" and (edited := sorted(self.changed.intersection(numbers))):
            raise Refused(f"The regions {edited} were edited: undo that to accept them, or call them corrected.")
        if decision == "corrected" and (same := sorted(set(numbers) - self.changed)):
            raise Refused(f"Nothing was changed in the regions {same}: accept them as correct.")

    def _is_region(self, number: Any) -> bool:
        return type(number) is int and number in self.regions

    def apply(self, event: dict[str, Any]) -> None:
        """Do what an event says; it was checked when it was made."""
        self._clock(event)
        if "id" in event:
            self.applied.add(event["id"])
        getattr(self, f"_{event['action']}", lambda event: None)(event)

    def _clock(self, event: dict[str, Any]) -> None:
        now = datetime.fromisoformat(event["time"])
        if self.last is not None and event["action"] != "open" and not self.finished:
            gap = (now - self.last).total_seconds()
            if 0 < gap <= PAUSE:
                self.seconds += gap
                if self.position is not None:
                    self.region_seconds[self.position] += gap
        self.last = None if event["action"] == "close" else now

    def _open(self, event: dict[str, Any]) -> None:
        self.reviewer = event["reviewer"]
        self.started = self.started or event["time"]
        self._note(event)

    def _paint(self, event: dict[str, Any]) -> None:
        voxels = _pairs(event["voxels"])
        where = voxels[:, 0], voxels[:, 1], np.full(len(voxels), event["slice"])
        before, numbers = self.labels[where], np.unique(self.flagged[where]).tolist()
        self.labels[where] = event["label"]
        after = self.labels[where]
        self._did(Step(numbers, where, before, after, self.decided, self.decided, self.position, self.position))
        self._note(event, numbers, before, after)

    def _decide(self, event: dict[str, Any]) -> None:
        numbers, before, position = event["regions"], self.decided, self.position
        self.decided = before | dict.fromkeys(numbers, event["decision"])
        self.position = self.next_open(position if position in numbers else numbers[0])
        self._did(Step(numbers, NOWHERE, NO_LABELS, NO_LABELS, before, self.decided, position, self.position))
        self._note(event, numbers)

    def _did(self, step: "Step") -> None:
        self.done.append(step)
        self.undone.clear()

    def _undo(self, event: dict[str, Any]) -> None:
        step = self.done.pop()
        self.labels[step.where] = step.before
        self.decided, self.position = step.decided_before, step.position_before
        self.undone.append(step)
        self._note(event, step.regions, step.after, step.before)

    def _redo(self, event: dict[str, Any]) -> None:
        step = self.undone.pop()
        self.labels[step.where] = step.after
        self.decided, self.position = step.decided_after, step.position_after
        self.done.append(step)
        self._note(event, step.regions, step.before, step.after)

    def _visit(self, event: dict[str, Any]) -> None:
        self.position = event["region"]

    def _finish(self, event: dict[str, Any]) -> None:
        self.finished = event["time"]
        self._note(event)

    def _reopen(self, event: dict[str, Any]) -> None:
        self.finished = None
        self._note(event)

    def _note(self, event: dict[str, Any], numbers: Sequence[int] = (), before=NO_LABELS, after=NO_LABELS) -> None:
        """One line of the audit trail."""
        row = {"time_utc": event["time"], "reviewer": self.reviewer, "action": event["action"]}
        row |= {"slice": self.regions[numbers[0]].slice if numbers else None}
        row |= {"regions": " ".join(map(str, numbers)), "decision": event.get("decision")}
        self.trail.append(row | voxel_counts(before, after))


def voxel_counts(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
    """How many labels differ, and how many voxels each class gained and lost."""
    counts = {"voxels_changed": int((before != after).sum())}
    for label, name in CLASS_NAMES.items():
        counts[f"{name}_gained"] = int(((after == label) & (before != label)).sum())
        counts[f"{name}_lost"] = int(((before == label) & (after != label)).sum())
    return counts


def _pairs(voxels: Any) -> np.ndarray:
    """Row and column of voxels, integers (n, 2)."""
    try:
        pairs = np.asarray(voxels)
    except ValueError:
        pairs = np.empty(0)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind != "i" or not len(pairs):
        raise Refused("The voxels of a stroke are a list of [row, column], at least one.")
    return pairs


def _listed(voxels: np.ndarray, z: int) -> str:
    more = f" and {len(voxels) - NAMED} more" if len(voxels) > NAMED else ""
    return ", ".join(f"({row}, {col}, {z})" for row, col in voxels[:NAMED].tolist()) + more
