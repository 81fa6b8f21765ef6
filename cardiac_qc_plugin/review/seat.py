"""The cases of a folder of predictions, their reviews, and what a finished review writes."""

import secrets
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from cardiac_qc_plugin.data.predictions import (
    CORRECTION_FILE,
    MAP_FILES,
    PROBABILITY_FILE,
    REGIONS_FILE,
    SEGMENTATION_FILE,
)
from cardiac_qc_plugin.metrics.clinical import structure_volumes
from cardiac_qc_plugin.reports.pictures import MAP_TOP, mirrored_axes
from cardiac_qc_plugin.review.journal import Journal
from cardiac_qc_plugin.review.state import PAUSE, Refused, ReviewState, find_regions, voxel_counts
from cardiac_qc_plugin.workflows.cine import named_indices, rounded
from cardiac_qc_plugin.workflows.correct import JOURNAL, accept_edits, write_correction
from cardiac_qc_plugin.workflows.files import (
    Volume,
    case_folders,
    check_folder,
    file_sha256,
    read_json,
    read_like,
    read_volume,
    write_json,
    write_like,
    write_rows,
)
from cardiac_qc_plugin.workflows.references import patient_and_phase, read_labels
from cardiac_qc_plugin.workflows.urgency import urgencies

__all__ = ["CaseReview", "NoSuchCase", "Seat", "TakenOver", "reviewer_name"]

AUDIT = "audit.json"
PARTS = {  # of an action, that the journal keeps
    "paint": ("slice", "label", "voxels", "shape"),
    "decide": ("regions", "decision"),
    "visit": ("region",),
    "finish": ("incomplete",),
}
WINDOW = 0.5, 99.8  # percentiles of the scan between which the page can set its contrast window


class NoSuchCase(LookupError):
    """No case has this name."""


class TakenOver(Refused):
    """The case is open in another window."""


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def reviewer_name(given: Any) -> str:
    """A reviewer's name as it is kept.

    Raises:
        Refused: there is none, or it is not UTF-8, as a byte of another encoding in a command: no answer could hold it.
    """
    if not isinstance(given, str) or not given.strip():
        raise Refused("Say who reviews.")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"The reviewer's name {ascii(given)} is not UTF-8. Give it in this encoding.") from error
    return given.strip()[:200]


def check_results(output: Path) -> None:
    """Refuse a case's output folder with results that a review would replace, but none made.

    Raises:
        ValueError: it has; the message names it.
    """
    if (output / JOURNAL).is_file() or not (output / SEGMENTATION_FILE).is_file():
        return
    try:
        of_review = "reviewer" in read_json(output / CORRECTION_FILE)
    except ValueError:
        of_review = (output / AUDIT).is_file()
    if not of_review:
        raise ValueError(
            f"{output} has a segmentation that no review made: write the review to another folder, or move this away."
        )


class CaseReview:
    """One case and its review, which goes on from its journal.

    Args:
        name: the case.
        folder: its folder in the predictions.
        output: its folder for what the review writes: ``review.jsonl`` while it goes on; when it is finished, see
            :meth:`write_segmentation` and :meth:`Seat.write_audit`.

    Raises:
        ValueError: a file is missing or damaged, does not fit the others, or is no longer the one whose review was
            begun; the message names it.
    """

    def __init__(self, name: str, folder: Path, output: Path) -> None:
        self.name, self.folder, self.output = name, folder, output
        self.sources = self._digests()
        self.segmentation = read_labels(folder / SEGMENTATION_FILE)
        flagged = self._read(REGIONS_FILE)
        self.state = ReviewState(self.segmentation.data, flagged, find_regions(flagged, self._read(PROBABILITY_FILE)))
        self.session: str | None = None
        self.journal = Journal(output / JOURNAL)
        if self.journal.events and self.journal.events[0].get("sources") != self.sources:
            raise ValueError(
                f"{self.journal.path}: this review was begun on other predictions of {name}. "
                "Review these in another output folder, or move the file away to begin again."
            )
        for line, event in enumerate(self.journal.events[1:], start=2):
            try:
                if event["action"] == "open":
                    reviewer_name(event["reviewer"])
                elif event["action"] != "close":
                    self.state.check(event)
                self.state.apply(event)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.journal.path}, line {line}: no action of a review ({error}).") from error

    def _read(self, name: str) -> np.ndarray:
        return read_like(self.folder / name, self.segmentation)

    def _digests(self) -> dict[str, str | None]:
        files = {name: self.folder / name for name in (SEGMENTATION_FILE, REGIONS_FILE)}
        return {name: file_sha256(path) if path.is_file() else None for name, path in files.items()}

    def is_current(self) -> bool:
        """Whether predictions and journal still are those that were read: both can change under the server."""
        return self.journal.is_current() and self._digests() == self.sources

    # what the page shows

    @property
    def qc(self) -> dict[str, Any]:
        return _read_qc(self.folder)

    def volume(self, name: str) -> bytes:
        """Voxels of a volume in the order of a NIfTI file: the first axis fastest.

        Args:
            name: ``image`` (uint16, the contrast window stretched to its range), ``uncertainty`` (uint8, 255 where
                the map reaches its display maximum), ``automatic`` (uint8 labels) or ``regions`` (uint16 numbers).
        """
        if name == "image":
            scan = self._scan().data
            low, high = np.percentile(scan, WINDOW)
            array = (np.clip((scan - low) / max(high - low, 1e-9), 0, 1) * 65535).astype("<u2")
        elif name == "uncertainty":
            array = (np.clip(self._uncertainty() / MAP_TOP, 0, 1) * 255).astype(np.uint8)
        else:
            array = self.state.automatic if name == "automatic" else self.state.flagged.astype("<u2")
        return array.tobytes(order="F")

    def _uncertainty(self) -> np.ndarray:
        return self._read(MAP_FILES[self.qc["detection"]["map"]])

    def _scan(self) -> Volume:
        """The scan that was segmented: a phase of a cine lies in the case's folder, else where ``qc.json`` says."""
        own, source = self.folder / "image.nii.gz", self.qc["input"]
        path = own if source["frame"] is not None else Path(source["path"])
        scan = read_volume(path)
        if path != own and file_sha256(path) != source["sha256"]:
            raise ValueError(f"{path}: not the scan that was segmented, it has changed since. Run the case again.")
        if scan.data.shape != self.segmentation.data.shape:
            raise ValueError(f"{path}: shape {scan.data.shape}, the segmentation {self.segmentation.data.shape}.")
        return scan

    def describe(self) -> dict[str, Any]:
        """What does not change while the case is reviewed."""
        self._scan(), self._uncertainty()  # what cannot be shown is told before the case opens
        return {
            "case": self.name,
            "shape": self.segmentation.data.shape,
            "spacing": self.segmentation.spacing,
            # as the pictures of the report have it
            "mirrored": mirrored_axes(self.segmentation.image),
            "map": self.qc["detection"]["map"],
        }

    def current(self) -> dict[str, Any]:
        """The state as the page shows it; labels of all flagged voxels, in the order of a NIfTI file, as digits."""
        state = self.state
        decisions, changed = state.decisions, state.changed
        return {
            "regions": [
                {**asdict(region), "decision": decisions.get(number), "changed": number in changed}
                for number, region in sorted(state.regions.items())
            ],
            "position": state.position,
            "labels": "".join(map(str, state.labels[state.voxels].tolist())),
            "can_undo": bool(state.done),
            "can_redo": bool(state.undone),
            "finished": state.finished,
            "seconds": round(state.seconds, 1),
            "volume_ml": {"before": self._volumes(state.automatic), "after": self._volumes(state.labels)},
        }

    def _volumes(self, labels: np.ndarray) -> dict[str, float]:
        return structure_volumes(labels, self.segmentation.spacing)

    # what the page does

    def open(self, reviewer: str, take_over: bool = False, previous: str | None = None) -> str:
        """Begin a session, and return its id; only the last one may act.

        Args:
            reviewer: who reviews, as given.
            take_over: end the session of another window.
            previous: id of the session that this window had before; that one is simply followed.

        Raises:
            TakenOver: another window has the case open.
            Refused: no reviewer is given, see :func:`reviewer_name`.
            ValueError: see :func:`check_results`.
        """
        reviewer = reviewer_name(reviewer)
        if self.session is not None and previous != self.session and not take_over:
            last = self.state.last.isoformat(timespec="seconds") if self.state.last else "just now"
            raise TakenOver(
                f"{self.name} is open in another window ({self.state.reviewer}, last active {last}). "
                "If you take it over, that window can no longer save."
            )
        if not self.journal.events:
            check_results(self.output)
            self.journal.append({"action": "begin", "time": now(), "sources": self.sources})
            self.withdraw()  # of a review whose journal was moved away
        self._record({"action": "open", "reviewer": reviewer, "take_over": bool(take_over)})
        self.session = secrets.token_urlsafe(12)
        return self.session

    def close(self, session: str) -> None:
        """End a session, if it still is the one."""
        if session == self.session:
            self._record({"action": "close"})
            self.session = None

    def act(self, session: str, action: dict[str, Any]) -> None:
        """Do an action, and save it before this returns; an id that was done already is not done again.

        Raises:
            TakenOver: another window has taken the case over, or it was closed or read anew.
            Refused: the action breaks a rule; nothing was done.
            OutputError: it could not be saved; nothing was done.
        """
        if self.session is None:
            raise TakenOver(f"{self.name} is not open any more: nothing more is saved from this window. Open it again.")
        if session != self.session:
            raise TakenOver(f"{self.name} was taken over by another window: nothing more is saved from this one.")
        if not isinstance(action.get("id"), str):
            raise Refused("Every action has an id, a string.")
        if action["id"] in self.state.applied:
            return
        self.state.check(action)
        event = {key: action[key] for key in ("id", "action", *PARTS.get(action["action"], ())) if key in action}
        if action["action"] == "finish":
            self.write_segmentation()
        self._record(event)
        if action["action"] == "reopen":
            self.withdraw()

    def _record(self, event: dict[str, Any]) -> None:
        event = {"time": now(), **event}
        self.journal.append(event)
        self.state.apply(event)

    def withdraw(self) -> None:
        """Remove the results of a review that is not finished any more; all of it is in the journal."""
        for name in (AUDIT, "audit.csv", CORRECTION_FILE, SEGMENTATION_FILE, "edited.nii.gz"):
            (self.output / name).unlink(missing_ok=True)

    def write_segmentation(self) -> None:
        """Write ``edited.nii.gz``, and what ``correct --edited`` makes of it: by the same rule, the same files."""
        edited = self.output / "edited.nii.gz"
        write_like(edited, self.state.labels, self.segmentation)
        labels, notes, sources = accept_edits(edited, self.folder, self.segmentation)
        notes["reviewer"] = self.state.reviewer
        write_correction(self.name, self.folder, self.output, self.segmentation, labels, notes, sources)

    def audit(self) -> dict[str, Any]:
        """Who did what, when, for how long, and what it changed."""
        state, decisions = self.state, self.state.decisions
        regions = [
            {
                **asdict(region),
                "decision": decisions.get(number, "not decided"),
                "seconds": round(state.region_seconds[number], 1),
                **voxel_counts(*(labels[state.flagged == number] for labels in (state.automatic, state.labels))),
            }
            for number, region in sorted(state.regions.items())
        ]
        return {
            "case": self.name,
            "reviewers": list(dict.fromkeys(row["reviewer"] for row in state.trail)),
            "started_utc": state.started,
            "finished_utc": state.finished,
            "seconds": round(state.seconds, 1),
            "seconds_rule": f"time between two signs of activity, unless longer than {PAUSE:g} s",
            **voxel_counts(state.automatic, state.labels),
            "regions": regions,
            "volume_ml": self.current()["volume_ml"],
            "actions": state.trail,
        }


class Seat:
    """All cases of a folder of predictions.

    Args:
        predictions: output folder of ``run``.
        output: where the reviews go, outside `predictions`.

    Raises:
        ValueError: there is no case with flagged regions, or the output and the predictions lie in each other.
        OSError: the output cannot be a folder.
    """

    def __init__(self, predictions: str | Path, output: str | Path) -> None:
        self.predictions, self.output = Path(predictions).resolve(), Path(output).resolve()
        check_folder(self.output)
        if self.output.is_relative_to(self.predictions) or self.predictions.is_relative_to(self.output):
            raise ValueError(f"{output} and {predictions} lie in each other: write the review somewhere else.")
        folders = {path.relative_to(self.predictions).as_posix(): path for path in case_folders(self.predictions)}
        if "." in folders:
            raise ValueError(f"{predictions} is the folder of one case: give the one above it.")
        if not any((path / REGIONS_FILE).is_file() for path in folders.values()):
            raise ValueError(
                f"{predictions}: none of its {len(folders)} case(s) has a {REGIONS_FILE}. Give the output of run: "
                "segment finds no regions, and what correct wrote is corrected already."
            )
        for name in folders:
            check_results(self.output / name)
        urgency = dict(zip(folders, urgencies([_scores(folder) for folder in folders.values()]), strict=True))
        self.folders = dict(sorted(folders.items(), key=lambda item: -urgency[item[0]]))
        self.reviews: dict[str, CaseReview] = {}

    def review(self, name: Any) -> CaseReview:
        """The review of a case, by the name that the list has; no other path is ever read.

        It stays in memory as long as the files are those that it came from.

        Raises:
            NoSuchCase: there is none.
            ValueError: its files are missing, damaged, or do not fit.
            OutputError: what a killed server left undone cannot be written.
        """
        if not isinstance(name, str) or name not in self.folders:
            raise NoSuchCase(name)
        if name not in self.reviews or not self.reviews[name].is_current():
            review = self.reviews[name] = CaseReview(name, self.folders[name], self.output / name)
            try:
                self._make_up(review)
            except BaseException:
                self.reviews.pop(name, None)  # the next request tries again
                raise
        return self.reviews[name]

    def _make_up(self, review: CaseReview) -> None:
        """Do what a killed server left undone, or others did to the results: the journals have the last word."""
        results = [review.output / name for name in (SEGMENTATION_FILE, CORRECTION_FILE)]
        if review.journal.events and not review.state.finished:
            review.withdraw()
        elif review.state.finished and not all(path.is_file() for path in results):
            review.write_segmentation()
        for one in (review, *self._finished_beside(review)):
            if one.state.finished and not self._is_audited(one):
                self.write_audit(one)

    def _is_audited(self, review: CaseReview) -> bool:
        """Whether the audit is of this finish, and its indices of what the other phase is now."""
        try:
            audit = read_json(review.output / AUDIT)
        except ValueError:
            return False
        return audit.get("finished_utc") == review.state.finished and audit.get("indices") == self.indices(review)

    def worklist(self) -> Iterator[dict[str, Any]]:
        """A line for each case, the most urgent first: flagged and decided regions, state, time."""
        for name, folder in self.folders.items():
            row = {"case": name}
            try:
                row |= self._begun(name) if (self.output / name / JOURNAL).is_file() else _not_begun(folder)
            except (ValueError, OSError) as error:
                row |= {"status": "broken", "message": str(error)}
            yield row

    def _begun(self, name: str) -> dict[str, Any]:
        review = self.review(name)
        state = review.state
        return {
            "status": "finished" if state.finished else "in progress",
            "regions": len(state.regions),
            "decided": len(state.decisions),
            "seconds": round(state.seconds, 1),
            "reviewer": state.reviewer,
            "is_open": review.session is not None,
        }

    def act(self, name: str, session: str, action: dict[str, Any]) -> dict[str, Any]:
        """Do an action on a case, and return its state; finishing also writes the audit trail and the indices."""
        review = self.review(name)
        review.act(session, action)
        if action["action"] not in ("finish", "reopen"):
            return review.current()
        indices = self.write_audit(review) if review.state.finished else None
        for other in self._finished_beside(review):  # whose indices this phase is part of
            self.write_audit(other)
        return {**review.current(), "indices": indices}

    def write_audit(self, review: CaseReview) -> dict[str, Any]:
        """Write ``audit.json`` and ``audit.csv`` of a finished case; returns its clinical indices."""
        audit = {**review.audit(), "indices": self.indices(review)}
        write_rows(review.output / "audit.csv", audit["actions"])
        write_json(review.output / AUDIT, audit)
        return audit["indices"]

    def indices(self, review: CaseReview) -> dict[str, Any]:
        """Clinical indices before and after, where the patient's other phase is among the cases; else none.

        Of the other phase the reviewed segmentation counts once its own review is finished.
        """
        try:
            phases = self._phases(review)
            both = {phase: self.review(name) for phase, name in (phases or {}).items()}
        except ValueError as error:  # the other phase is damaged; this one is none the worse
            return {"missing": str(error)}
        if phases is None:
            return {"missing": "the patient's other phase is not among the cases, or end-diastole is not known"}
        done = {phase: one is review or bool(one.state.finished) for phase, one in both.items()}
        before = {phase: one._volumes(one.state.automatic) for phase, one in both.items()}
        after = {phase: one._volumes(one.state.labels) if done[phase] else before[phase] for phase, one in both.items()}
        return {
            "cases": phases,
            "reviewed": done,
            "before": rounded(named_indices(before["ED"], before["ES"], None)),
            "after": rounded(named_indices(after["ED"], after["ES"], None)),
        }

    def _finished_beside(self, review: CaseReview) -> list[CaseReview]:
        """The patient's other phase, if its review is finished."""
        try:
            names = set((self._phases(review) or {}).values()) - {review.name}
            begun = [self.review(name) for name in names if (self.output / name / JOURNAL).is_file()]
        except ValueError:  # damaged
            return []
        return [other for other in begun if other.state.finished]

    def _phases(self, review: CaseReview) -> dict[str, str] | None:
        """Names of the end-diastolic and end-systolic case of a patient."""
        cine = review.folder.parent / "cine.json"
        if "/phase" in review.name and cine.is_file():
            found = _phases_of_cine(cine, review.name.rpartition("/")[0])
            known = len(found) == 2 and review.name in found.values() and set(found.values()) <= set(self.folders)
            return found if known else None
        patient, _ = patient_and_phase(review.name, Path(review.qc["input"]["path"]))
        found = {}
        for name in self.folders:
            if name.startswith(patient) and (path := _input_path(self.folders[name])):
                other, phase = patient_and_phase(name, path)
                found |= {phase: name} if other == patient else {}
        return {phase: found[phase] for phase in ("ED", "ES")} if {"ED", "ES"} <= set(found) else None


def _phases_of_cine(path: Path, heart: str) -> dict[str, str]:
    """Names of a heart's end-diastolic and end-systolic case, as far as its ``cine.json`` tells them."""
    record = read_json(path)
    try:
        numbers = {phase: record[f"{phase.lower()}_phase"] for phase in ("ED", "ES")}
        folders = (f"{heart}/{case.rpartition('/')[2]}" for case in record["cases"])  # wherever the run lies
        names = dict(zip((point["phase"] for point in record["curve"]), folders, strict=True))
        return {phase: names[number] for phase, number in numbers.items() if number in names}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the heart's phases are not in it. Run the heart again.") from error


def _not_begun(folder: Path) -> dict[str, Any]:
    """A case's line in the worklist before its review has begun."""
    regions = _read_qc(folder)["detection"]["regions"]
    return {"status": "open", "regions": len(regions), "decided": 0, "seconds": 0.0}


def _read_qc(folder: Path) -> dict[str, Any]:
    """A case's ``qc.json``, which has all that the review takes from it.

    Raises:
        ValueError: it is missing, damaged or incomplete; the message names it.
    """
    path = folder / "qc.json"
    qc = read_json(path)
    try:
        source, detection = qc["input"], qc["detection"]
        complete = isinstance(source["path"], str) and {"frame", "sha256"} <= set(source)
        complete &= isinstance(detection["regions"], list) and detection["map"] in MAP_FILES
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{path}: no scan or no failure detection in it. Give the output folder of 'run'.")
    return qc


def _input_path(folder: Path) -> Path | None:
    """The scan of a case, from ``qc.json``; None if that is damaged, which is said where the case is opened."""
    try:
        return Path(_read_qc(folder)["input"]["path"])
    except ValueError:
        return None


def _scores(folder: Path) -> dict[str, float]:
    """Scores of a case, from ``qc.json``; none if that is damaged, which is said where the case is opened."""
    try:
        scores = read_json(folder / "qc.json")["scores"].items()
        return {key: value for key, value in scores if isinstance(value, int | float)}
    except (ValueError, KeyError, AttributeError):
        return {}
