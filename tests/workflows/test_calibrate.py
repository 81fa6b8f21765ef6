"""Promises: calibration files against a brute force, and what run makes of them."""

import json
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from miniature_run import BOXES, SPACING, cells_inside, load, write_patients

from cardiac_qc_plugin.bundle import load_detector, load_models
from cardiac_qc_plugin.checkpoints import save_weights
from cardiac_qc_plugin.networks import DilatedCNN, FailureResNet
from cardiac_qc_plugin.transforms.failure_labels import failure_mask
from cardiac_qc_plugin.workflows.calibrate import (
    THRESHOLDS,
    Calibration,
    calibrate,
    coverage,
    made_by,
    promised_threshold,
    read_calibration,
    split_coverage,
)

ROOT = Path(__file__).parents[2]


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def name_weights(record):
    record["segmentation"] = {"bundle": "cardiac_dn_segmentation", "weights_sha256": "a", "samples": 10}
    record["detection"] |= {"bundle": "cardiac_segmentation_failure", "weights_sha256": "b"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrate")
    cases = write_patients(root, 3)
    for path in (root / "run").rglob("qc.json"):
        edit(path, name_weights)
    return root, cases


def test_the_curves_are_those_of_the_masks(cohort):
    root, cases = cohort
    outcome = calibrate(root / "run", root / "acdc", root / "file.json", source="three phantoms")
    assert not outcome.failures and "three phantoms" in outcome.text
    found = read_calibration(root / "file.json")
    assert (found.model, found.map, found.samples, found.criterion) == ("dn", "bmap", 10, "paper")
    assert found.weights_sha256 == {"cardiac_dn_segmentation": "a", "cardiac_segmentation_failure": "b"}
    for number, patient in enumerate(found.patients):
        failures, probability = [], []
        for case in (f"{patient}_frame01", f"{patient}_frame05"):
            failures.append(failure_mask(*cases[case], SPACING[:2]))
            probability.append(load(root / "run" / case / "failure_probability.nii.gz"))
        assert found.failure_voxels[number] == np.sum(failures) > 0
        places = [(rows, cols, z) for z, box in enumerate(BOXES) for _, _, rows, cols in cells_inside(box)]
        pairs = list(zip(probability, failures, strict=True))
        cells = [(p[place].max(), mask[place].sum()) for p, mask in pairs for place in places]
        for k in (*range(0, len(THRESHOLDS), 20), -1):  # 0 and 1 too, which some probabilities are
            counts = [count for value, count in cells if value >= THRESHOLDS[k]]
            assert (found.caught_voxels[number, k], found.regions[number, k]) == (sum(counts), len(counts))
    assert found.caught[:, 0].max() <= 1 and (np.diff(found.regions) <= 0).all()
    again = root / "again.json"
    found.write(again)
    assert again.read_text() == (root / "file.json").read_text()


def synthetic(n, seed=0, without=0):
    """Patients with 100 failure voxels each, the first `without` of them with none."""
    rng = np.random.default_rng(seed)
    score = np.sort(rng.random((n, 100)) ** 0.2, axis=1)
    voxels = (score[:, :, None] >= np.array(THRESHOLDS)).sum(axis=1)
    failing = np.arange(n) >= without
    return Calibration(
        "drn", "bmap", 10, {}, "paper", "numbers", np.array(THRESHOLDS), tuple(f"p{i}" for i in range(n)),
        100 * failing, voxels * failing[:, None], voxels // 2,
    )  # fmt: skip


def test_the_catch_is_the_highest_threshold_that_the_formula_allows():
    found = synthetic(25)
    promise = found.promise_catch(0.9)
    allowed = []
    for k, threshold in enumerate(THRESHOLDS):
        missed = [1 - caught / 100 for caught in found.caught_voxels[:, k]]
        if 25 / 26 * np.mean(missed) + 1 / 26 <= 0.1:
            allowed.append(threshold)
    assert promise.threshold == max(allowed) and promise.caught > 0.9
    assert promise.n_patients == 25 and promise.kind == "catch"


def test_the_budget_is_the_lowest_threshold_that_nine_in_ten_keep():
    found = synthetic(25)
    promise = found.promise_budget(20)
    over = (found.regions > 20).sum(axis=0)
    assert promise.threshold == min(t for t, n in zip(THRESHOLDS, over, strict=True) if (n + 1) / 26 <= 0.1)
    assert promise.probability == 0.9 and promise.regions_per_patient <= 20


def test_a_patient_without_failures_loses_nothing():
    assert (synthetic(10, without=3).caught[:3] == 1).all()
    lower = synthetic(25).promise_catch(0.9).threshold
    found = synthetic(25, without=10)
    promise = found.promise_catch(0.9)
    assert promise.threshold > lower
    k = THRESHOLDS.index(promise.threshold)
    assert promise.caught == pytest.approx((10 + found.caught_voxels[10:, k].sum() / 100) / 25)
    assert promise.regions_per_patient == pytest.approx(found.regions[:, k].sum() / 25)


@pytest.mark.parametrize(
    "n, ask, message",
    [
        (15, lambda c: c.promise_catch(0.95), r"0.95 .* from 15 patient\(s\) .*0.9375.* takes at least 19"),
        (8, lambda c: c.promise_catch(0.9), r"at most 0.8888 .* takes at least 9"),
        (8, lambda c: c.promise_budget(20), r"for 88.9% at most. It takes at least 9 patients"),
        (8, lambda c: c.promise_catch(90), "between 0 and 1"),
        (8, lambda c: c.promise_catch(1), "between 0 and 1"),
        (8, lambda c: c.promise_budget(-1), "at least 0"),
    ],
)
def test_what_cannot_be_promised(n, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(synthetic(n))


def test_coverage_is_that_of_the_other_patients():
    own, other = synthetic(25), synthetic(10, seed=1, without=2)
    rows = coverage(own, other)
    assert [row["promised"] for row in rows] == [True] * 6
    for row in rows:
        k = THRESHOLDS.index(row["threshold"])
        regions = other.regions[:, k]
        kept = [1, 1, *other.caught_voxels[2:, k] / 100] if row["kind"] == "catch" else regions <= row["target"]
        assert row["kept"] == pytest.approx(np.mean(kept))
        assert row["regions_per_patient"] == pytest.approx(regions.sum() / 10)
        assert row["regions_flagged"] == pytest.approx(regions.sum() / (10 * 50))  # all 50 at threshold 0


def test_splits_are_disjoint_random_and_repeatable():
    found = synthetic(25, seed=3)
    rows = split_coverage(found, splits=20)
    assert rows == split_coverage(found, splits=20)
    random, left_out = (
        next(r for r in rows if r["design"] == d) for d in ("15 / 10, 20 random splits", "24 / 1, each left out")
    )
    assert random["kept_sd"] > 0
    alone = [coverage(found.of(np.delete(np.arange(25), i)), found.of([i]))[0]["kept"] for i in range(25)]
    assert (left_out["kept"], left_out["kept_sd"]) == pytest.approx((np.mean(alone), np.std(alone)))


def test_coverage_over_splits_is_as_promised():
    rows = split_coverage(synthetic(25, seed=3), splits=200)
    catches = [row for row in rows if row["kind"] == "catch"]
    assert [row["promised"] for row in catches] == [1, 1, 0, 1, 1, 1]  # 15 patients are too few for 0.95
    for row in rows:
        target = row["target"] if row["kind"] == "catch" else 0.9
        if row["promised"]:
            assert row["kept"] >= target - 3 * row["kept_sd"] / np.sqrt(200) - 1e-9, row
            assert row["kept"] < 1 or row["kind"] != "catch"


def test_predictions_that_do_not_belong_together(cohort, tmp_path):
    root, _ = cohort
    shutil.copytree(root / "run", tmp_path / "run")
    record = tmp_path / "run" / "patient002_frame05" / "qc.json"
    edit(record, lambda qc: qc["detection"].update(weights_sha256="c"))
    with pytest.raises(ValueError, match="patient002_frame05 was made by other weights"):
        calibrate(tmp_path / "run", root / "acdc", tmp_path / "file.json")
    edit(record, lambda qc: qc["detection"].pop("weights_sha256"))
    outcome = calibrate(tmp_path / "run", root / "acdc", tmp_path / "file.json")
    assert "patient002_frame05" in outcome.failures and "which weights" in outcome.text
    edit(record, lambda qc: qc.pop("segmentation"))
    outcome = calibrate(tmp_path / "run", root / "acdc", tmp_path / "file.json")
    assert f"{record}: no entry segmentation" in outcome.failures["patient002_frame05"]
    shutil.rmtree(record.parent)
    with pytest.raises(ValueError, match="patient002 has 1 scan.*others have 2"):
        calibrate(tmp_path / "run", root / "acdc", tmp_path / "file.json")
    (tmp_path / "run" / "patient002_frame01" / "failure_probability.nii.gz").write_bytes(b"")
    outcome = calibrate(tmp_path / "run", root / "acdc", tmp_path / "file.json")
    assert list(outcome.failures) == ["patient002_frame01"] and "Not written" in outcome.text
    assert not (tmp_path / "file.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"patients": []}', None])
def test_files_that_are_no_calibration(tmp_path, text):
    if text is not None:
        (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="file.json"):
        read_calibration(tmp_path / "file.json")


@pytest.mark.parametrize("change", [lambda r: r["threshold"].pop(), lambda r: r["threshold"].reverse()])
def test_a_file_with_other_thresholds_than_numbers(tmp_path, change):
    synthetic(3).write(tmp_path / "file.json")
    edit(tmp_path / "file.json", change)
    with pytest.raises(ValueError, match="file.json: not one number for each of 28[23] ascending thresholds"):
        read_calibration(tmp_path / "file.json")


@pytest.fixture
def others(cohort, tmp_path):
    """The same patients under other names, and the references of all."""
    root, folder = cohort[0], tmp_path / "others"
    for kind in ("run", "acdc"):
        shutil.copytree(root / kind, folder / kind)
        for path in sorted(folder.rglob("*patient*"), reverse=True):
            path.rename(path.with_name(path.name.replace("patient", "other")))
    shutil.copytree(root / "acdc", folder / "acdc", dirs_exist_ok=True)
    return folder


def test_test_patients_that_fail_or_were_made_otherwise(cohort, tmp_path, others):
    root, _ = cohort
    arguments = (root / "run", others / "acdc", tmp_path / "file.json")
    (others / "run" / "other002_frame01" / "failure_probability.nii.gz").write_bytes(b"")
    outcome = calibrate(*arguments, test=others / "run")
    assert list(outcome.failures) == ["other002_frame01"] and (tmp_path / "file.json").exists()
    for path in (others / "run").rglob("qc.json"):
        edit(path, lambda record: record["detection"].update(weights_sha256="c"))
    with pytest.raises(ValueError, match="run: its weights_sha256 is .*, but the calibration is for"):
        calibrate(*arguments, test=others / "run")


def test_check_and_test_from_the_command_line(cohort, others, command):
    root, _ = cohort
    arguments = ["--reference", others / "acdc", "--output", root / "cli.json", "--check", "--test", others / "run"]
    result = command("calibrate", "--predictions", root / "run", *arguments)
    assert result.returncode == 0, result.stderr
    assert (root / "cli.json").is_file()
    assert "2 / 1, each left out" in result.stdout and f"3 / 3 of {others / 'run'}" in result.stdout


def test_calibration_patients_are_no_others(cohort, tmp_path):
    root, _ = cohort
    for case in ("patient002_frame01", "patient002_frame05"):
        shutil.copytree(root / "run" / case, tmp_path / "run" / case)
    with pytest.raises(ValueError, match="patients that are in the calibration too, 1 of 1: patient002"):
        calibrate(root / "run", root / "acdc", tmp_path / "file.json", test=tmp_path / "run")
    assert not (tmp_path / "file.json").exists()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The DN and the failure bundle with untrained weights, a scan, and a calibration made for them."""
    root = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    networks = {"cardiac_dn_segmentation": DilatedCNN(), "cardiac_segmentation_failure": FailureResNet()}
    for name, network in networks.items():
        shutil.copytree(ROOT / "bundles" / name, root / name, ignore=shutil.ignore_patterns("models"))
        save_weights(network, root / name / "models" / ("dn_bmap.pt" if "failure" in name else "model.pt"))
    (root / "cardiac_segmentation_failure/models/dn_bmap_operating_point.json").write_text('{"threshold": 0.5}')
    models = load_models("dn", "bmap", 2, "cpu", root)
    calibration = synthetic(25)
    weights = {model.name: model.weights_sha256 for model in models}
    object.__setattr__(calibration, "model", "dn")
    object.__setattr__(calibration, "samples", 2)
    object.__setattr__(calibration, "weights_sha256", weights)
    calibration.write(root / "cardiac_segmentation_failure" / "models" / "dn_bmap_calibration.json")
    return root, models, calibration


def test_another_operating_point_is_another_detector(bundles, tmp_path):
    root, models, _ = bundles
    shutil.copytree(root / "cardiac_segmentation_failure", tmp_path / "cardiac_segmentation_failure")
    first = load_detector("dn", "bmap", "cpu", tmp_path)
    point = tmp_path / "cardiac_segmentation_failure/models/dn_bmap_operating_point.json"
    point.write_text('{"threshold": 0.25}')
    second = load_detector("dn", "bmap", "cpu", tmp_path)
    assert first.digest == models[1].digest != second.digest  # cases are flagged anew
    assert second.config.get_parsed_content("threshold") == 0.25


@pytest.fixture
def run_command(command):
    """The command ``run`` on a scan of noise, with the bundles in a folder."""
    return partial(run_on_noise, command)


def run_on_noise(command, root, output, *options):
    image = nib.Nifti1Image(np.random.default_rng(0).random((64, 64, 2)).astype(np.float32), np.diag([1.5, 1.5, 8, 1]))
    nib.save(image, root / "scan.nii.gz")
    arguments = ("--output", output, "--model", "dn", "--samples", 2, "--bundle_dir", root)
    return command("run", "--input", root / "scan.nii.gz", *arguments, *options)


def test_run_flags_by_the_promise_and_records_it(bundles, tmp_path, run_command):
    root, _, calibration = bundles
    result = run_command(root, tmp_path, "--catch", 0.9)
    assert result.returncode == 0, result.stderr
    assert "Promise: 90 % of a patient's failure voxels" in result.stdout
    qc = json.loads((tmp_path / "scan" / "qc.json").read_text())
    assert qc["promise"]["threshold"] == qc["detection"]["threshold"] == calibration.promise_catch(0.9).threshold
    assert (qc["promise"]["kind"], qc["promise"]["target"], qc["promise"]["source"]) == ("catch", 0.9, "numbers")
    assert qc["promise"]["criterion"] == calibration.criterion
    curve = json.loads((tmp_path / "operating_curve.json").read_text())
    assert (curve["model"], curve["map"], curve["patients"], curve["source"]) == ("dn", "bmap", 25, "numbers")
    assert curve["threshold"] == calibration.threshold.tolist()
    np.testing.assert_allclose(curve["caught"], calibration.caught.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(curve["regions_per_patient"], calibration.regions.mean(axis=0), atol=1e-3)
    result = run_command(root, tmp_path)  # again, at the bundle's own operating point
    assert result.returncode == 0, result.stderr
    qc = json.loads((tmp_path / "scan" / "qc.json").read_text())
    assert qc["promise"] is None and qc["detection"]["threshold"] == 0.5


def test_promises_that_run_refuses(bundles, tmp_path, run_command):
    root, models, calibration = bundles
    with pytest.raises(ValueError, match="not both"):
        promised_threshold(*models, catch=0.9, regions_per_patient=5)
    assert promised_threshold(*models)[1] is None
    assert promised_threshold(*models, regions_per_patient=0)[1] == calibration.promise_budget(0)
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        promised_threshold(*models, catch=0)
    other = load_models("dn", "bmap", 3, "cpu", root)
    assert promised_threshold(*other) == (None, None)  # no curve, and no complaint: nobody asked
    with pytest.raises(ValueError, match="made for the samples 2, but this run has 3"):
        promised_threshold(*other, catch=0.9)
    turned = load_models("dn", "bmap", 2, "cpu", root, turns=4)
    with pytest.raises(ValueError, match=r"models/dn_bmap_turns4_calibration\.json: no such file"):
        promised_threshold(*turned, catch=0.9)
    beside = root / "cardiac_segmentation_failure" / "models" / "dn_bmap_turns4_calibration.json"
    calibration.write(beside)
    with pytest.raises(ValueError, match="turns4_calibration.json: made for the turns 1, but this run has 4"):
        promised_threshold(*turned, catch=0.9)
    edit(beside, lambda record: record.update(turns=4))
    assert promised_threshold(*turned, catch=0.9)[1] == promised_threshold(*models, catch=0.9)[1]
    path = tmp_path / "other.json"
    calibration.write(path)
    edit(path, lambda record: record["weights_sha256"].update(cardiac_segmentation_failure="0"))
    with pytest.raises(ValueError, match="other.json: made for the weights_sha256"):
        promised_threshold(*models, path=path)
    with pytest.raises(ValueError, match="none.json: no such file"):
        promised_threshold(*models, catch=0.9, path=tmp_path / "none.json")
    result = run_command(root, tmp_path / "out", "--catch", 0.9, "--threshold", 0.5)
    assert result.returncode == 1 and "leave out --threshold" in result.stderr
    assert not (tmp_path / "out" / "scan").exists()


def test_samples_matter_to_the_b_map_only():
    record = {"detection": {"bundle": "cardiac_segmentation_failure"}}
    name_weights(record)
    for name, samples in (("bmap", 10), ("emap", None)):
        record["detection"]["map"] = name
        assert made_by(record)[:4] == ("dn", name, samples, 1)


def test_a_check_that_cannot_be_done_writes_nothing(cohort, tmp_path):
    root, _ = cohort
    shutil.copytree(root / "run", tmp_path / "run")
    for folder in list((tmp_path / "run").glob("patient003_*")):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="3 patients or more, got 2"):
        calibrate(tmp_path / "run", root / "acdc", tmp_path / "file.json", check=True)
    assert not (tmp_path / "file.json").exists()
