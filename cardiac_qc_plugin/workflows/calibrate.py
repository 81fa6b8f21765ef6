"""The operating point as a promise: a threshold from validation patients, by conformal risk control.

The unit is the patient, end-diastole and end-systole together. What a patient loses at a threshold is the share of its
failure voxels that lie in no flagged region, 0 if it has none. See docs/effort.md for what is promised, and when.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cardiac_qc_plugin.bundle import BundlePredictor
from cardiac_qc_plugin.checkpoints import calibration_file
from cardiac_qc_plugin.data.predictions import SEGMENTATION_FILE
from cardiac_qc_plugin.metrics.conformal import InfeasibleRisk, control_risk
from cardiac_qc_plugin.metrics.detection import VolumeDetection, sum_positive
from cardiac_qc_plugin.reports import CURVE_FILE
from cardiac_qc_plugin.reports.promise import calibration_text
from cardiac_qc_plugin.transforms.failure_labels import FailureCriterion, check_apex
from cardiac_qc_plugin.workflows.files import read_json, write_json, write_text
from cardiac_qc_plugin.workflows.measure import read_detection
from cardiac_qc_plugin.workflows.references import (
    Outcome,
    References,
    each_case,
    patient_and_phase,
    read_labels,
    read_reference,
)

__all__ = ["Calibration", "Promise", "calibrate", "promised_threshold", "read_calibration"]

MADE_BY = ("model", "map", "samples", "turns", "weights_sha256")  # what a promise depends on
# fixed beforehand, as the promise needs it; even in log-odds, where the detector's probabilities crowd at both ends
THRESHOLDS = (0.0, *(1 / (1 + np.exp(-np.linspace(-6, 8, 281)))).round(6).tolist(), 1.0)
WITHIN_BUDGET = 0.9  # share of patients that `regions_per_patient` is kept for
ASKED = (
    *(("catch", share) for share in (0.8, 0.9, 0.95)),
    *(("regions_per_patient", regions) for regions in (5, 20, 50)),
)
SPLITS = 1000
NOT_WRITTEN = "Not written, since not all of these patients could be read."


@dataclass(frozen=True)
class Promise:
    """A threshold, and what is promised of it; see docs/effort.md.

    Attributes:
        kind: "catch" (expected share of a patient's failure voxels in flagged regions) or "regions_per_patient"
            (flagged regions that `WITHIN_BUDGET` of the patients do not exceed).
        target: the share, or the number of regions.
        probability: of a patient within the budget; None for "catch".
        threshold: regions of at least this failure probability are flagged.
        n_patients: calibration patients.
        caught: share of the failure voxels that is caught of these, mean over them.
        regions_per_patient: flagged regions of these, mean over them.
        source: which patients they are.
        criterion: which errors are failures.
    """

    kind: Literal["catch", "regions_per_patient"]
    target: float
    probability: float | None
    threshold: float
    n_patients: int
    caught: float
    regions_per_patient: float
    source: str
    criterion: str


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a detector flags and catches of validation patients, at every threshold.

    Attributes:
        model: segmentation network.
        map: uncertainty map.
        samples: Monte Carlo samples T of a b-map, None for the e-map.
        weights_sha256: of the weights, by name of the bundle.
        criterion: which errors are failures.
        source: which patients these are.
        threshold: ascending, (K,).
        patients: names, (n,).
        failure_voxels: of each patient, inside and outside of the detector's grid, (n,).
        caught_voxels: those in flagged regions, (n, K).
        regions: flagged regions, (n, K).
        turns: quarter turns in which slices were seen.
    """

    model: str
    map: str
    samples: int | None
    weights_sha256: dict[str, str]
    criterion: str
    source: str
    threshold: np.ndarray
    patients: tuple[str, ...]
    failure_voxels: np.ndarray
    caught_voxels: np.ndarray
    regions: np.ndarray
    turns: int = 1

    @property
    def caught(self) -> np.ndarray:
        """Share of each patient's failure voxels in flagged regions, (n, K); 1 for a patient without any."""
        total = self.failure_voxels[:, None]
        return np.divide(self.caught_voxels, total, out=np.ones(self.caught_voxels.shape), where=total > 0)

    def of(self, patients: Sequence[int] | np.ndarray) -> "Calibration":
        """The same with some of the patients, by their index."""
        names = tuple(np.array(self.patients)[patients].tolist())
        own = {name: getattr(self, name)[patients] for name in ("failure_voxels", "caught_voxels", "regions")}
        return replace(self, patients=names, **own)

    def promise_catch(self, target: float) -> Promise:
        """The highest threshold of which can be promised that it catches a share `target` of a patient's failures.

        Raises:
            ValueError: if that cannot be promised from these patients; the message says what can.
        """
        if not 0 < target < 1:
            raise ValueError(f"The share of failures to catch is between 0 and 1, got {target}.")
        losses = 1 - self.caught[:, ::-1]  # the highest threshold is the least cautious
        try:
            index = control_risk(losses, 1 - target)
        except InfeasibleRisk as error:
            raise ValueError(
                f"A catch of {target:g} cannot be promised from {error.n} patient(s) ({self.source}): at most "
                f"{np.floor(1e4 * (1 - error.smallest)) / 1e4:g} can, with every region flagged (failures outside the "
                f"detector's crop are in none). Ask for less, or calibrate on more patients: {target:g} takes at least "
                f"{int(np.ceil(1 / (1 - target) - 1 - 1e-9))}."
            ) from error
        return self._promise("catch", target, None, self.threshold.size - 1 - index)

    def promise_budget(self, regions: float) -> Promise:
        """The lowest threshold that flags at most so many regions of a patient, with probability `WITHIN_BUDGET`.

        Raises:
            ValueError: if that cannot be promised from these patients; the message says from how many it can.
        """
        if not regions >= 0:
            raise ValueError(f"The regions per patient are a number of at least 0, got {regions}.")
        try:
            index = control_risk(self.regions > regions, 1 - WITHIN_BUDGET)
        except InfeasibleRisk as error:
            raise ValueError(
                f"{regions:g} regions per patient cannot be promised for {WITHIN_BUDGET:.0%} of the patients from "
                f"{error.n} calibration patient(s) ({self.source}): for {1 - error.smallest:.1%} at most. It takes at "
                f"least {round(1 / (1 - WITHIN_BUDGET)) - 1} patients, of whom few have more regions of probability 1."
            ) from error
        return self._promise("regions_per_patient", regions, WITHIN_BUDGET, index)

    def _promise(self, kind: str, target: float, probability: float | None, index: int) -> Promise:
        means = float(self.caught[:, index].mean()), float(self.regions[:, index].mean())
        threshold = float(self.threshold[index])
        return Promise(
            kind, float(target), probability, threshold, len(self.patients), *means, self.source, self.criterion
        )

    def operating_curve(self) -> dict[str, Any]:
        """What ``operating_curve.json`` holds: means over the patients at each threshold."""
        return {
            **{"model": self.model, "map": self.map, "patients": len(self.patients), "source": self.source},
            "threshold": self.threshold.tolist(),
            "caught": self.caught.mean(axis=0).round(6).tolist(),
            "regions_per_patient": self.regions.mean(axis=0).round(3).tolist(),
        }

    def write(self, path: Path) -> None:
        """Write as JSON, a line for each patient."""
        names = [field.name for field in fields(self) if field.name not in ("patients", *ARRAYS)]
        head = {name: getattr(self, name) for name in names} | {"threshold": self.threshold.tolist(), "patients": []}
        columns = (getattr(self, name).tolist() for name in ARRAYS[1:])
        lines = [
            json.dumps({"patient": patient, **dict(zip(ARRAYS[1:], row, strict=True))})
            for patient, *row in zip(self.patients, *columns, strict=True)
        ]
        write_text(path, json.dumps(head).removesuffix("]}") + "\n" + ",\n".join(lines) + "\n]}\n")


ARRAYS = ("threshold", "failure_voxels", "caught_voxels", "regions")


def read_calibration(path: Path) -> Calibration:
    """Read a file that `calibrate` wrote.

    Raises:
        ValueError: if it is missing, damaged or no such file; the message names it.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. Make it from validation patients: scripts/pipeline.py calibrate --help"
        )
    content = read_json(path)
    try:
        patients = content.pop("patients")
        columns = {name: np.array([patient[name] for patient in patients]) for name in ARRAYS[1:]}
        result = Calibration(
            **content | {"threshold": np.array(content["threshold"])},
            patients=tuple(patient["patient"] for patient in patients),
            **columns,
        )
        shape = len(result.patients), result.threshold.size
        fitting = result.caught_voxels.shape == result.regions.shape == shape and (np.diff(result.threshold) > 0).all()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a calibration file ({error!r}). Make it again with calibrate.") from error
    if not fitting:
        raise ValueError(f"{path}: not one number for each of {shape[1]} ascending thresholds. Make it again.")
    return result


def calibrate(
    predictions: str | Path,
    reference: str | Path,
    output: str | Path,
    source: str | None = None,
    criterion: str = "paper",
    apex: Literal["last", "first"] = "last",
    check: bool = False,
    test: str | Path | None = None,
) -> Outcome:
    """Write what a detector flags and catches of validation patients, from which thresholds are promised.

    Args:
        predictions: output folder of ``run`` on patients that neither network was trained on, all with the same
            phases, end-diastole and end-systole.
        reference: folder of reference labels, see `References`.
        output: the calibration file, JSON.
        source: which patients these are, in words.
        criterion: which errors are failures, a preset of `FailureCriterion`.
        apex: end of the slice axis at which the apex lies.
        check: measure how the promises are kept, in random splits of these patients.
        test: output folder of ``run`` on other patients, with references in the same folder, to measure it on.

    Returns:
        What can be promised, how it was kept, and the cases that failed. With failed cases there is no file.

    Raises:
        ValueError: an unknown setting, a folder without cases or label files, predictions of several networks,
            patients with different numbers of scans, or calibration patients among those of `test`.
        OSError: the output cannot be written.
    """
    FailureCriterion.preset(criterion)
    check_apex(apex)
    references, output = References(reference), Path(output)
    own, failures = read_patients(
        Path(predictions), references, source or f"patients of {predictions}", criterion, apex
    )
    written = not failures
    rows = split_coverage(own) if check else []
    if test is not None:
        other, problems = read_patients(Path(test), references, f"patients of {test}", criterion, apex)
        failures |= problems
        check_same(own, other, str(test))
        if both := [patient for patient in other.patients if patient in own.patients]:
            raise ValueError(
                f"{test}: patients that are in the calibration too, {len(both)} of {len(other.patients)}: "
                f"{', '.join(both[:10])}{', ...' if len(both) > 10 else ''}. A test on them tells nothing of other "
                "patients: leave them out of one of the two folders."
            )
        rows += [
            {"design": f"{len(own.patients)} / {len(other.patients)} of {test}"} | row for row in coverage(own, other)
        ]
    promises = [attempt(own, kind, target) for kind, target in ASKED]
    if written:
        own.write(output)
    text = calibration_text(own, f"Written: {output}" if written else NOT_WRITTEN, promises, rows, failures)
    return Outcome(text, failures)


def read_patients(
    folder: Path, references: References, source: str, criterion: str, apex: str
) -> tuple[Calibration, dict[str, str]]:
    """The curves of the patients of a folder, without the cases that failed.

    Raises:
        ValueError: see `calibrate`.
    """

    def read(name: str, own: Path) -> tuple[str, tuple, VolumeDetection]:
        path = references.find(name, own)
        segmentation = read_labels(own / SEGMENTATION_FILE)
        record = read_json(own / "qc.json")
        if missing := {"segmentation", "detection"} - record.keys():
            raise ValueError(f"{own / 'qc.json'}: no entry {' and '.join(sorted(missing))}. Run this case again.")
        if not all(record[stage].get("weights_sha256") for stage in ("segmentation", "detection")):
            raise ValueError(f"{own / 'qc.json'}: does not say which weights it was made by. Run this case again.")
        labels = read_reference(path, segmentation)
        found = read_detection(own / "qc.json", record["detection"], segmentation, labels, apex, [criterion])
        return patient_and_phase(name, path)[0], made_by(record), found[criterion]

    cases, failures = each_case(folder, read, f"read {folder.name}")
    if not cases:
        listed = "\n".join(f"- {case}: {message}" for case, message in failures.items())
        raise ValueError(f"{folder}: none of its {len(failures)} case(s) could be read:\n{listed}")
    first, (_, made, _) = next(iter(cases.items()))
    if other := [case for case, (_, own, _) in cases.items() if own != made]:
        raise ValueError(
            f"{folder}: {other[0]} was made by other weights, map, samples or turns than {first}. Run it again."
        )
    volumes: dict[str, list[VolumeDetection]] = {}
    for patient, _, volume in cases.values():
        volumes.setdefault(patient, []).append(volume)
    sizes = {patient: len(own) for patient, own in volumes.items()}
    if not failures and len(set(sizes.values())) > 1:
        few = min(sizes, key=sizes.get)
        raise ValueError(
            f"{folder}: {few} has {sizes[few]} scan(s), others have {max(sizes.values())}. A promise is for patients "
            "that are alike: give the same phases of each."
        )
    settings = dict(zip(MADE_BY, made, strict=True))
    return Calibration(
        **settings | {"weights_sha256": dict(settings["weights_sha256"])},
        criterion=criterion,
        source=source,
        threshold=np.array(THRESHOLDS),
        patients=tuple(volumes),
        failure_voxels=np.array([sum(v.n_failure_voxels for v in own) for own in volumes.values()]),
        caught_voxels=_at_thresholds(volumes, lambda volume: volume.failure_voxels),
        regions=_at_thresholds(volumes, lambda volume: np.ones(volume.probability.size, dtype=int)),
    ), failures


def made_by(record: Mapping[str, Any]) -> tuple:
    """What `MADE_BY` names, behind a case's ``qc.json``; no samples where they do not matter."""
    stages = record["segmentation"], record["detection"]
    map, weights = stages[1]["map"], tuple((stage["bundle"], stage["weights_sha256"]) for stage in stages)
    samples = stages[0]["samples"] if map == "bmap" else None
    return short_name(stages[0]["bundle"]), map, samples, stages[0].get("turns", 1), weights


def short_name(bundle: str) -> str:
    """A segmentation bundle's network: drn for cardiac_drn_segmentation."""
    return bundle.removeprefix("cardiac_").removesuffix("_segmentation")


def _at_thresholds(
    volumes: Mapping[str, Iterable[VolumeDetection]], weigh: Callable[[VolumeDetection], np.ndarray]
) -> np.ndarray:
    """Sum over each patient's regions at or above each threshold, (n, K)."""
    return np.array([sum(sum_positive(v.probability, weigh(v), THRESHOLDS) for v in own) for own in volumes.values()])


def check_same(first: Calibration, other: Calibration, name: str) -> None:
    """Refuse to use a calibration for what was made by other weights.

    Raises:
        ValueError: the message says in what they differ.
    """
    for key in MADE_BY:
        expected, found = getattr(first, key), getattr(other, key)
        if expected != found:
            raise ValueError(f"{name}: its {key} is {found}, but the calibration is for {expected}.")


def attempt(calibration: Calibration, kind: str, target: float) -> Promise | str:
    """A promise, or why it cannot be made."""
    try:
        return calibration.promise_catch(target) if kind == "catch" else calibration.promise_budget(target)
    except ValueError as error:
        return str(error)


def coverage(calibration: Calibration, test: Calibration) -> list[dict[str, Any]]:
    """How every promise of `ASKED` is kept on other patients, a row for each.

    ``kept`` is the mean share of a patient's failures that is caught, or the share of patients within the budget.
    """
    rows = []
    for kind, target in ASKED:
        promise = attempt(calibration, kind, target)
        row = {"kind": kind, "target": target, "promised": isinstance(promise, Promise)}
        if row["promised"]:
            index = int(np.searchsorted(test.threshold, promise.threshold))
            regions = test.regions[:, index]
            row |= {
                "kept": float((test.caught[:, index] if kind == "catch" else regions <= target).mean()),
                "threshold": promise.threshold,
                "regions_per_patient": float(regions.mean()),
                "regions_flagged": float(regions.sum() / test.regions[:, 0].sum()),
            }
        rows.append(row)
    return rows


def split_coverage(calibration: Calibration, splits: int = SPLITS) -> list[dict[str, Any]]:
    """How the promises are kept when a calibration is made on some of the patients and tested on the others.

    Random splits of 3 to 2, and each patient by itself left out once. Averaged over all splits this has to come out as
    promised, whoever the patients are: it shows that the rule is computed rightly, and how much a single test fold
    scatters, not that the next hospital's patients are exchangeable with these.
    """
    n = len(calibration.patients)
    if n < 3:
        raise ValueError(f"To check promises in splits takes 3 patients or more, got {n}.")
    generator, size = np.random.default_rng(0), round(0.6 * n)
    orders = {
        f"{size} / {n - size}, {splits} random splits": [
            np.split(generator.permutation(n), [size]) for _ in range(splits)
        ],
        f"{n - 1} / 1, each left out": [(np.delete(np.arange(n), left), [left]) for left in range(n)],
    }
    rows = []
    for design, pairs in orders.items():
        found = [coverage(calibration.of(np.sort(fit)), calibration.of(np.array(rest))) for fit, rest in pairs]
        for own in zip(*found, strict=True):
            made = [row for row in own if row["promised"]]
            row = {
                "design": design,
                **{key: own[0][key] for key in ("kind", "target")},
                "promised": len(made) / len(own),
            }
            if made:
                row |= {
                    key: float(np.mean([r[key] for r in made]))
                    for key in ("kept", "threshold", "regions_per_patient", "regions_flagged")
                }
                row["kept_sd"] = float(np.std([r["kept"] for r in made]))
            rows.append(row)
    return rows


def load_calibration(segmenter: BundlePredictor, detector: BundlePredictor, path: str | Path | None) -> Calibration:
    """The calibration of a detector: a file, or the one beside its weights, of scans seen in as many quarter turns.

    Raises:
        ValueError: if there is none, or it is for other weights, another map, or other samples or turns.
    """
    turns = segmenter.config.get("turns", 1)
    if path is None:
        path = calibration_file(detector.config.get_parsed_content("ckpt_path"), turns)
    result = read_calibration(Path(path))
    map = detector.config["map"]
    expected = {
        "model": short_name(segmenter.name),
        "map": map,
        "samples": segmenter.config["samples"] if map == "bmap" else None,
        "turns": turns,
        "weights_sha256": {bundle.name: bundle.weights_sha256 for bundle in (segmenter, detector)},
    }
    for key, value in expected.items():
        if getattr(result, key) != value:
            raise ValueError(
                f"{path}: made for the {key} {getattr(result, key)}, but this run has {value}. A promise holds for "
                "what it was calibrated with only: calibrate again with what you run."
            )
    return result


def promised_threshold(
    segmenter: BundlePredictor,
    detector: BundlePredictor,
    catch: float | None = None,
    regions_per_patient: float | None = None,
    path: str | Path | None = None,
) -> tuple[Calibration | None, Promise | None]:
    """The calibration that fits a detector, and the threshold that it promises.

    Args:
        segmenter: the segmentation bundle.
        detector: the failure bundle.
        catch: share of a patient's failure voxels to catch.
        regions_per_patient: regions that are not to be exceeded.
        path: calibration file, instead of the one beside the detector's weights.

    Returns:
        The calibration, None if there is none that fits and nobody asked for it; and the promise, None unless asked.

    Raises:
        ValueError: if both are asked for, the promise cannot be made, or the calibration does not fit.
    """
    if catch is not None and regions_per_patient is not None:
        raise ValueError("One threshold keeps one promise: give a share to catch, or regions per patient, not both.")
    asked = catch is not None or regions_per_patient is not None
    try:
        calibration = load_calibration(segmenter, detector, path)
    except ValueError:
        if asked or path is not None:
            raise
        return None, None
    if not asked:
        return calibration, None
    return calibration, (
        calibration.promise_budget(regions_per_patient) if catch is None else calibration.promise_catch(catch)
    )


def write_operating_curve(output: str | Path, curve: Mapping[str, Any] | None) -> None:
    """Write ``operating_curve.json``, what each threshold catches, or remove that of an earlier run."""
    path = Path(output) / CURVE_FILE
    if curve is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, curve)
