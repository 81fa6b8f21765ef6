"""The run command on phantoms, with small untrained networks: its files, its memory, and what it says of bad input."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from monai.transforms import LoadImage
from tiny_bundles import write_bundles

from cardiac_qc_plugin.bundle import BundlePredictor, SegmentWithBundled, load_segmenter
from cardiac_qc_plugin.checkpoints import save_weights
from cardiac_qc_plugin.data import scan_items
from cardiac_qc_plugin.data.inputs import find_scans
from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_acdc_like, write_phantom
from cardiac_qc_plugin.inferers import MCDropoutSliceInferer
from cardiac_qc_plugin.networks import DilatedResNet22
from cardiac_qc_plugin.workflows import files
from cardiac_qc_plugin.workflows import run as run_module
from cardiac_qc_plugin.workflows.run import CaseFailures, run
from cardiac_qc_plugin.workflows.table import folder_rows
from cardiac_qc_plugin.workflows.urgency import scores, urgencies

ROOT = Path(__file__).parents[2]
FILES = ("segmentation", "entropy", "bayesian", "failure_probability", "failure_regions")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Copies of the DN and the failure bundle with untrained weights."""
    return write_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def predictors(bundles):
    segmenter = BundlePredictor(bundles / "cardiac_dn_segmentation", "cpu", samples=2, amp=False)
    detector = BundlePredictor(bundles / "cardiac_segmentation_failure", "cpu", segmentation_model="dn", amp=False)
    return segmenter, detector


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """One oblique phantom scan of odd size."""
    root = tmp_path_factory.mktemp("scan")
    phantom = ShortAxisPhantom(seed=3, shape=(97, 85), n_slices=3, spacing=(1.6, 1.7, 20.0))
    image = phantom.frame(0.0)[0]
    angle = np.deg2rad(30)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.array(phantom.spacing)
    affine[:3, 3] = (-10.0, 20.0, 5.0)
    nib.save(nib.Nifti1Image(image.astype(np.int16), affine), root / "oblique.nii.gz")
    return root / "oblique.nii.gz"


def check_files(folder, source):
    """All five volumes lie on the scan's own grid, and hold what their names say."""
    original = nib.load(source)
    volumes = {}
    for name in FILES:
        image = nib.load(folder / f"{name}.nii.gz")
        assert image.shape == original.shape[:3]
        np.testing.assert_array_equal(image.affine, original.affine)
        for code in ("sform_code", "qform_code"):
            assert image.header[code] == original.header[code]
        np.testing.assert_allclose(image.header.get_zooms(), original.header.get_zooms()[:3])
        volumes[name] = np.asarray(image.dataobj)
    assert volumes["segmentation"].dtype == np.uint8 and volumes["segmentation"].max() <= 3
    for name in ("entropy", "bayesian", "failure_probability"):
        assert volumes[name].min() >= 0 and volumes[name].max() <= 1 and volumes[name].max() > 0
    return volumes


def test_files_of_a_case(scan, predictors, tmp_path):
    (qc,) = run(find_scans(scan), tmp_path, *predictors)
    volumes = check_files(tmp_path / "oblique", scan)
    assert qc == json.loads((tmp_path / "oblique" / "qc.json").read_text())
    voxel = 1.6 * 1.7 * 20 / 1000
    for label, name in ((1, "RV"), (2, "LVM"), (3, "LV")):
        expected = (volumes["segmentation"] == label).sum() * voxel
        assert qc["segmentation"]["volume_ml"][name] == pytest.approx(expected, rel=1e-5)
    regions = {region["id"]: region for region in qc["detection"]["regions"]}
    assert set(np.unique(volumes["failure_regions"])) - {0} == set(regions)
    for number, region in regions.items():
        inside = volumes["failure_regions"] == number
        np.testing.assert_allclose(volumes["failure_probability"][inside], region["probability"], rtol=1e-6)
        assert region["probability"] >= qc["detection"]["threshold"]
    row = pd.read_csv(tmp_path / "worklist.csv").iloc[0]
    assert row["case"] == "oblique" and row["regions_flagged"] == len(regions)
    assert (tmp_path / "report.html").is_file() and (tmp_path / "oblique" / "report.html").is_file()


def test_a_b_map_of_one_sample_is_refused(bundles):
    """Before hours of segmentation, which no detector could learn from."""
    with pytest.raises(ValueError, match="The b-map needs 2 samples or more, got 1"):
        load_segmenter("dn", "bmap", 1, "cpu", bundles)


def test_a_segmentation_bundle_of_before_turns(scan, bundles, tmp_path):
    """It serves as long as none are asked for, also the failure bundle, whose config has the setting."""
    folder = Path(shutil.copytree(bundles, tmp_path / "bundles")) / "cardiac_dn_segmentation"
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    for place in (config, config["displayable_configs"], config["inferer"]):
        del place["turns"]
    path.write_text(json.dumps(config))
    load_segmenter("dn", "emap", 0, "cpu", folder.parent)
    image = {"image": LoadImage()(scan)}
    assert set(SegmentWithBundled(folder, "emap", 0, "cpu", turns=1)(image)) == {"image", "segmentation", "uncertainty"}
    with pytest.raises(ValueError, match="has no setting 'turns'"):
        SegmentWithBundled(folder, "emap", 0, "cpu", turns=4)(image)


def test_a_second_run_skips_and_a_setting_redoes(scan, bundles, predictors, tmp_path):
    run(find_scans(scan), tmp_path, *predictors)
    maps = tmp_path / "oblique" / "bayesian.nii.gz"
    first = maps.stat().st_mtime_ns
    run(find_scans(scan), tmp_path, *predictors)
    assert maps.stat().st_mtime_ns == first
    detector = BundlePredictor(
        bundles / "cardiac_segmentation_failure", "cpu", segmentation_model="dn", amp=False, threshold=0.01
    )
    (qc,) = run(find_scans(scan), tmp_path, predictors[0], detector)
    assert maps.stat().st_mtime_ns == first  # the segmentation still holds
    assert qc["detection"]["threshold"] == 0.01
    summaries = [tmp_path / name for name in ("worklist.csv", "report.html", "cases.parquet")]
    there = [path.exists() for path in summaries]
    run(find_scans(scan), tmp_path, predictors[0], None)
    assert there[:2] == [True, True] == [path.exists() for path in summaries][:2]  # of these very segmentations
    other = BundlePredictor(bundles / "cardiac_dn_segmentation", "cpu", samples=3, amp=False)
    (qc,) = run(find_scans(scan), tmp_path, other, None)
    assert "detection" not in qc and "scores" not in qc and not any(path.exists() for path in summaries)
    assert not (tmp_path / "oblique" / "failure_regions.nii.gz").exists()  # they belonged to another segmentation
    run(find_scans(scan), tmp_path, *predictors)
    maps.unlink()
    run(find_scans(scan), tmp_path, *predictors)
    assert maps.is_file()


def test_an_interrupted_stage_does_not_count_as_done(scan, bundles, predictors, tmp_path, monkeypatch):
    run(find_scans(scan), tmp_path, *predictors)
    other = BundlePredictor(bundles / "cardiac_dn_segmentation", "cpu", samples=3, amp=False)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("cardiac_qc_plugin.workflows.run.write_maps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(find_scans(scan), tmp_path, other, predictors[1])
    monkeypatch.undo()
    maps = tmp_path / "oblique" / "bayesian.nii.gz"
    assert not maps.exists()
    (qc,) = run(find_scans(scan), tmp_path, *predictors)
    assert qc["segmentation"]["samples"] == 2 and maps.is_file()
    assert qc["segmentation"]["precision"] == "fp32"  # as the fixture's bundles ask for


def test_a_case_whose_detection_failed_is_in_the_table_once(scan, predictors, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no heart")

    monkeypatch.setattr("cardiac_qc_plugin.workflows.run.detect", fail)
    with pytest.raises(CaseFailures, match="no heart"):
        run(find_scans(scan), tmp_path, *predictors)
    assert [(row["case"], row["status"]) for row in folder_rows(tmp_path, {})] == [("oblique", "failed")]
    (tmp_path / "worklist.csv").unlink()  # as if the run had been stopped there
    (row,) = folder_rows(tmp_path, {})
    assert (row["case"], row["slices"], row["map"]) == ("oblique", 3, "bmap") and "regions_flagged" not in row


def test_a_damaged_record_keeps_no_other_case_out_of_the_table(predictors, tmp_path):
    """Cut short, or without what is needed; of a case, or of a heart. Each is named, with exit code 1."""
    write_acdc_like(tmp_path / "in", 2, shape=(48, 56), n_slices=2)
    output = tmp_path / "out"
    run(find_scans(tmp_path / "in"), output, *predictors)
    (output / "patient001_frame01" / "qc.json").write_text('{"case": "patient0')
    (output / "patient001_frame11" / "qc.json").write_text('{"stages": {"segmentation": {}}}')
    (output / "patient002" / "cine.json").write_text("{}")
    (output / "rest").mkdir()
    (output / "rest" / "qc.json").write_text('{"stages": {}}')  # of an interrupted run: no row, as before
    shutil.copytree(output / "patient002_frame01", output / "sound")
    qc = json.loads((output / "sound" / "qc.json").read_text())
    (output / "sound" / "qc.json").write_text(json.dumps(qc | {"case": "sound"}))
    command = [sys.executable, "scripts/pipeline.py", "table", "--predictions", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    files = {"patient001_frame01": "patient001_frame01/qc.json", "patient001_frame11": "patient001_frame11/qc.json"}
    files |= dict.fromkeys(("patient002_frame01", "patient002_frame11"), "patient002/cine.json")
    found = pd.read_parquet(output / "cases.parquet").set_index("case")
    assert dict(found["status"]) == dict.fromkeys(files, "failed") | {"sound": "done"}
    for case, file in files.items():
        assert found["message"][case].startswith(f"{output / file}: ") and "emove it" in found["message"][case]
        assert f"  {case}: {found['message'][case]}" in done.stdout.splitlines()


def test_the_table_has_no_index_of_a_phase_that_failed_since(predictors, tmp_path):
    """Run again with a damaged end-systole; also if indices lie there that an older version did not remove."""
    write_acdc_like(tmp_path / "in", 1, shape=(48, 56), n_slices=2)
    output = tmp_path / "out"
    run(find_scans(tmp_path / "in"), output, *predictors)
    assert all(row["lv_edv_ml"] is not None for row in folder_rows(output, {}))
    next((tmp_path / "in").rglob("patient001_frame11.nii.gz")).write_bytes(b"no image")
    indices = (output / "patient001" / "cine.json").read_text()
    with pytest.raises(CaseFailures, match="patient001_frame11"):
        run(find_scans(tmp_path / "in"), output, *predictors)
    assert not (output / "patient001" / "cine.json").exists()
    (output / "patient001" / "cine.json").write_text(indices)
    rows = {row["case"]: row for row in folder_rows(output, {})}
    assert rows["patient001_frame11"]["status"] == "failed"
    assert rows["patient001_frame01"]["status"] == "done" and rows["patient001_frame01"].get("lv_edv_ml") is None


def test_a_worklist_that_a_spreadsheet_saved_is_named(tmp_path):
    (tmp_path / "worklist.csv").write_text("rank;case;status;message\n1;heart;failed;no heart\n")
    with pytest.raises(ValueError, match="worklist.csv: no columns case, status and message"):
        list(folder_rows(tmp_path, {}))


def test_a_bundle_may_be_moved_but_not_change(bundles, predictors, tmp_path):
    """What is done counts as done, wherever weights lie and on whichever device."""
    folder = tmp_path / "cardiac_dn_segmentation"
    shutil.copytree(bundles / "cardiac_dn_segmentation", folder)
    (folder / "models" / "model.pt").rename(tmp_path / "mine.pt")
    moved = BundlePredictor(folder, samples=2, amp=False, ckpt_path=str(tmp_path / "mine.pt"))
    assert moved.digest == predictors[0].digest
    metadata = folder / "configs" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"version": "99.0.0"}))  # its results may differ
    newer = BundlePredictor(folder, samples=2, amp=False, ckpt_path=str(tmp_path / "mine.pt"))
    assert newer.digest != moved.digest


def test_results_of_a_scan_that_broke_meanwhile_are_removed(predictors, tmp_path):
    source = tmp_path / "scan.nii.gz"
    save(source, stack())
    run(find_scans(source), tmp_path / "out", *predictors)
    source.write_text("no image")
    with pytest.raises(CaseFailures):
        run(find_scans(source), tmp_path / "out", *predictors)
    for name in ("segmentation.nii.gz", "report.html"):
        assert not (tmp_path / "out" / "scan" / name).exists()


@pytest.mark.parametrize("found_by", ["run", "import"])
def test_results_of_a_cine_that_broke_meanwhile_are_removed(predictors, tmp_path, found_by):
    """Of all its phases, whose names a damaged file does not tell any more, and of the heart."""
    source, output = tmp_path / "scan.nii.gz", tmp_path / "out"
    nib.save(nib.Nifti1Image(np.stack([stack()] * 3, axis=-1), np.diag([2.5, 2.5, 20, 1])), source)
    run(find_scans(source), output, *predictors)
    assert len(list(output.rglob("segmentation.nii.gz"))) == 3 and (output / "scan" / "cine.json").is_file()
    source.write_text("no image")
    with pytest.raises(CaseFailures):
        if found_by == "run":
            run(find_scans(source), output, *predictors)
        else:
            run([], output, *predictors, failures=[("scan", "its pixels cannot be read")])
    left = {path.name for path in (output / "scan").rglob("*") if path.is_file()}
    assert left == {"qc.json", "image.nii.gz"}
    assert [(row["case"], row["status"]) for row in folder_rows(output, {})] == [("scan", "failed")]


@pytest.mark.parametrize("phases", [2, 1])
def test_phases_of_an_earlier_longer_cine_are_removed(predictors, tmp_path, phases):
    """Of one with fewer phases now, or of a file that is no cine any more; and the other way round."""
    source, output = tmp_path / "scan.nii.gz", tmp_path / "out"
    volume = np.stack([stack()] * 3, axis=-1)

    def done(array):
        nib.save(nib.Nifti1Image(array, np.diag([2.5, 2.5, 20, 1])), source)
        run(find_scans(source), output, *predictors)
        return [row["case"] for row in folder_rows(output, {})]

    assert len(done(volume)) == 3
    left = ["scan/phase00", "scan/phase01"] if phases == 2 else ["scan"]
    assert done(volume[..., :2] if phases == 2 else volume[..., 0]) == left
    assert len(done(volume)) == len(list(output.rglob("segmentation.nii.gz"))) == 3


def test_a_structure_that_no_sample_found_is_urgent():
    detection = {"expected_failing_regions": 3.0}
    found = scores({"samples": 10, "pairwise_dice": {"RV": 0.9, "LVM": 0.9, "LV": 0.9}}, detection)
    lost = scores({"samples": 10, "pairwise_dice": {"RV": None, "LVM": 0.95, "LV": 0.95}}, detection)
    assert found["urgency"] == pytest.approx(0.1) and lost["urgency"] > 0.3
    assert scores({"samples": 0, "pairwise_dice": {}}, detection)["urgency"] == 3.0
    assert scores({"samples": 1, "pairwise_dice": {"LV": None}}, detection) == {"region_failure": 3.0, "urgency": 3.0}


def test_urgencies_have_one_unit():
    sampled = [{"sample_disagreement": 0.7, "region_failure": 3.0}, {"sample_disagreement": 0.1, "region_failure": 9.0}]
    assert urgencies([*sampled, {}]) == [0.7, 0.1, -np.inf]  # one that failed changes no other's
    assert urgencies([*sampled, {"region_failure": 5.0}, {}]) == [3.0, 9.0, 5.0, -np.inf]


def test_what_was_made_of_a_segmentation_goes_with_it(scan, predictors, tmp_path):
    run(find_scans(scan), tmp_path, *predictors)
    made = tmp_path / "oblique" / "segmentation.dcm"
    made.touch()
    run(find_scans(scan), tmp_path, *predictors)
    assert made.exists()
    qc = json.loads((tmp_path / "oblique" / "qc.json").read_text())
    qc["stages"]["detection"]["digest"] = "of another threshold"
    (tmp_path / "oblique" / "qc.json").write_text(json.dumps(qc))
    run(find_scans(scan), tmp_path, *predictors)
    assert not made.exists()


def test_images_beside_a_scan_stay(scan, predictors, tmp_path):
    """As dcm2niix leaves them, with results in the same folder."""
    (tmp_path / "oblique").mkdir()
    (tmp_path / "oblique" / "IM0001.dcm").touch()
    run(find_scans(scan), tmp_path, *predictors)
    assert (tmp_path / "oblique" / "IM0001.dcm").exists()


def test_same_seed_same_maps(scan, predictors, tmp_path):
    for name in ("a", "b"):
        run(find_scans(scan), tmp_path / name, *predictors)
    first, second = (files.read_volume(tmp_path / n / "oblique" / "bayesian.nii.gz").data for n in ("a", "b"))
    np.testing.assert_array_equal(first, second)


def test_cine_gives_one_folder_per_phase(predictors, tmp_path):
    phantom = ShortAxisPhantom(seed=1, shape=(64, 72), n_slices=2, spacing=(2.5, 2.5, 20.0))
    paths = write_phantom(tmp_path / "in", "cine", phantom, cine_frames=2, with_labels=False)
    cases = run(find_scans(paths["4d"]), tmp_path / "out", *predictors)
    assert [qc["case"] for qc in cases] == ["cine_4d/phase00", "cine_4d/phase01"]
    cine = np.asarray(nib.load(paths["4d"]).dataobj)
    for frame in range(2):
        folder = tmp_path / "out" / "cine_4d" / f"phase{frame:02d}"
        np.testing.assert_array_equal(np.asarray(nib.load(folder / "image.nii.gz").dataobj), cine[..., frame])
        check_files(folder, paths["4d"])


def test_emap_pairs_with_the_deterministic_segmentation(scan, bundles, tmp_path):
    results = []
    for samples in (0, 3):
        segmenter = BundlePredictor(bundles / "cardiac_dn_segmentation", "cpu", samples=samples, map="emap", amp=False)
        detector = BundlePredictor(
            bundles / "cardiac_segmentation_failure", "cpu", map="emap", segmentation_model="dn", amp=False
        )
        run(find_scans(scan), tmp_path / str(samples), segmenter, detector)
        results.append(files.read_volume(tmp_path / str(samples) / "oblique" / "segmentation.nii.gz").data)
    np.testing.assert_array_equal(*results)


def save(path, array, zooms=(1.5, 1.5, 8.0)):
    image = nib.Nifti1Image(array, np.diag([*zooms[:3], 1.0]) if len(zooms) >= 3 else np.eye(4))
    image.header.set_zooms(zooms[: array.ndim])
    nib.save(image, path)


def stack(seed=0, shape=(64, 64, 2)):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def write_truncated(path):
    save(path, stack())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_zero_spacing(path):
    save(path, stack())
    with gzip.open(path, "rb") as stream:
        raw = bytearray(stream.read())
    raw[80:84] = np.float32(0).tobytes()  # pixdim[1] of the NIfTI-1 header
    with gzip.open(path, "wb") as stream:
        stream.write(raw)


def write_nan(path):
    image = stack()
    image[3, 4, 1] = np.nan
    save(path, image)


def write_inf(path):
    image = stack()
    image[3, 4, 1] = np.inf
    save(path, image)


def write_colours(path):
    nib.save(nib.Nifti1Image(np.zeros((64, 64, 2), [(c, "u1") for c in "RGB"]), np.diag([1.5, 1.5, 8, 1])), path)


BROKEN = {
    "colours": (write_colours, "its voxels are colours"),
    "complex": (lambda path: save(path, stack().astype(np.complex64)), "its voxels are complex numbers"),
    "turned": (lambda path: save(path, stack(), (8.0, 1.5, 1.5)), "8 x 1.5 x 1.5 mm, so the slices do not lie on"),
    "text": (lambda path: path.write_text("no image"), "not a NIfTI image"),
    "truncated": (write_truncated, "truncated"),
    "flat": (lambda path: save(path, stack(shape=(64, 64)), (1.5, 1.5)), "3-D"),
    "nan": (write_nan, "NaN or infinite"),
    "inf": (write_inf, "NaN or infinite"),
    "constant": (lambda path: save(path, np.full((64, 64, 2), 7, np.int16)), "98 % of the voxels are 7"),
    "labels": (lambda path: save(path, (stack() > 0.5).astype(np.uint8)), "its voxels have 2 different values"),
    "unit_spacing": (lambda path: save(path, stack(), (1.0, 1.0, 1.0)), "1 x 1 x 1 mm"),
    "zero_spacing": (write_zero_spacing, "not positive"),
}


def test_broken_scans_are_named_and_the_others_finished(predictors, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (write, _) in BROKEN.items():
        write(folder / f"{name}.nii.gz")
    save(folder / "sound.nii.gz", stack())
    with pytest.raises(CaseFailures) as caught:
        run(find_scans(folder)[::-1], tmp_path / "out", *predictors)
    reasons = dict(caught.value.failures)
    assert list(reasons) == sorted(BROKEN)
    for name, (_, message) in BROKEN.items():
        assert message in reasons[name] and f"{name}.nii.gz" in reasons[name], reasons[name]
    check_files(tmp_path / "out" / "sound", folder / "sound.nii.gz")
    worklist = pd.read_csv(tmp_path / "out" / "worklist.csv", keep_default_na=False)
    assert list(worklist[worklist["status"] == "failed"]["case"]) == sorted(BROKEN)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in BROKEN)


def test_checkpoint_of_another_network(bundles, tmp_path):
    copy = shutil.copytree(bundles / "cardiac_dn_segmentation", tmp_path / "cardiac_dn_segmentation")
    save_weights(DilatedResNet22(), copy / "models" / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt.*another network than DilatedCNN"):
        BundlePredictor(copy, "cpu")
    (copy / "models" / "model.pt").unlink()
    with pytest.raises(ValueError, match="no such file"):
        BundlePredictor(copy, "cpu")


def test_unknown_setting(bundles):
    with pytest.raises(ValueError, match="no setting 'sample'"):
        BundlePredictor(bundles / "cardiac_dn_segmentation", "cpu", sample=3)


def test_output_that_cannot_be_written(scan, predictors, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(find_scans(scan), tmp_path / "file" / "out", *predictors)


def test_full_disk_stops_and_leaves_no_half_file(scan, predictors, tmp_path, monkeypatch):
    original = nib.Nifti1Image.to_filename

    def full(image, path, **kwargs):
        if "bayesian" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(image, path, **kwargs)

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full)
    with pytest.raises(OSError, match=r"cannot write .*bayesian\.nii\.gz: No space left"):
        run(find_scans(scan), tmp_path, *predictors)
    left = sorted(path.name for path in (tmp_path / "oblique").iterdir())
    assert left == ["entropy.nii.gz", "segmentation.nii.gz"]
    monkeypatch.undo()
    run(find_scans(scan), tmp_path, *predictors)
    check_files(tmp_path / "oblique", scan)


def test_command_line(bundles, tmp_path, command):
    """Run, correct and evaluate on an ACDC folder; a broken scan makes the exit code non-zero."""
    write_acdc_like(tmp_path / "acdc", 1)
    settings = ("--model", "dn", "--samples", 2, "--device", "cpu", "--bundle_dir", bundles)
    done = command("run", "--input", tmp_path / "acdc", "--output", tmp_path / "out", *settings)
    assert done.returncode == 0, done.stderr
    assert "2 scan(s)" in done.stdout and "report.html" in done.stdout
    for folder, extra in (("corrected", ()), ("evaluation", ("--compare", tmp_path / "corrected"))):
        name = "correct" if folder == "corrected" else "evaluate"
        arguments = ("--predictions", tmp_path / "out", "--reference", tmp_path / "acdc")
        done = command(name, *arguments, "--output", tmp_path / folder, *extra)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "evaluation" / "summary.md").is_file()
    (tmp_path / "acdc" / "broken.nii.gz").write_text("no image")
    line = (ROOT / "scripts" / "pipeline.py", "run", "--input", tmp_path / "acdc", "--output", tmp_path / "out")
    done = subprocess.run(list(map(str, (sys.executable, *line, *settings))), capture_output=True, text=True)
    assert done.returncode == 1
    assert "broken.nii.gz: not a NIfTI image" in done.stderr and "Traceback" not in done.stderr
    assert "2 scan(s)" in done.stdout  # the sound ones
    again = find_scans(tmp_path)
    assert {scan.case for scan in again} == {"patient001_frame01", "patient001_frame11", "broken"}
    for settings_, message in (
        (("--model", "unet"), "no MONAI bundle there"),
        (("--model", "dn", "--samples", 1), "2 samples or more"),
        (("--model", "dn", "--device", "gpu"), "device"),
        (("--model", "dn", "--turns", 5), "turns is 1 to 4, got 5"),
    ):
        arguments = ("--input", tmp_path / "acdc", "--output", tmp_path / "out", "--bundle_dir", bundles)
        failed = command("run", *arguments, *settings_)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr
    for turns in (1, 4):
        done = command("run", tmp_path / "acdc/patient001", tmp_path / f"turns{turns}", *settings, "--turns", turns)
        assert done.returncode == 0, done.stderr
    maps = [
        nib.load(tmp_path / f"turns{turns}" / "patient001_frame01" / "entropy.nii.gz").get_fdata() for turns in (1, 4)
    ]
    assert not np.allclose(*maps)
    qc = json.loads((tmp_path / "turns4" / "patient001_frame01" / "qc.json").read_text())
    assert qc["segmentation"]["turns"] == 4
    pages = ["".join(p.read_text() for p in (tmp_path / f"turns{turns}").rglob("*.html")) for turns in (1, 4)]
    assert ["Quarter turns" in page for page in pages] == [False, True]
    done = command("run", "--input", tmp_path / "nothing", "--output", tmp_path / "out", *settings)
    assert done.returncode == 1 and "no such file or folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("run", "--input", "in", "--output", "out", "--sample", 3),
            "run has no option --sample: did you mean --samples?",
        ),
        (("run", "-i", "in", "--output=out", "-x", 3), "run has no option --x: see run --help."),
        (("run", "--input", "scans", "--output"), "--output has no value. See run --help."),
        (("run", "-i", "scans", "-o", "--device", "cpu"), "--output has no value. See run --help."),
        (("run", "--input", "scans", "--nooutput"), "run has no option --nooutput: did you mean --output?"),
        (("review", "out", "reviewed", "--port", 70000), "port is a number from 0 to 65535, got 70000."),
        (("correct", "--predictions", "--reference", "in", "--output", "c"), "--predictions has no value."),
        (("auto3dseg", "--datalist", "f", "--root", "r", "--output", "--algos", "x"), "--output has no value."),
        (("evaluate", "out", "in", "--output="), "--output is empty."),
        (("evaluate", "out", "", "scores"), "--reference is empty. A variable of the shell that is not set?"),
        (("reproduce", "in", "out", "--dry_run", "maybe"), "--dry_run is true or false, got 'maybe'."),
        (("segment", "in", "out", "--samples", "abc"), "--samples is a whole number, got 'abc'."),
        (("run", "in", "out", "--samples=2.5"), "--samples is a whole number, got '2.5'."),
        (("run", "in", "out", "--series", "5,x"), "--series is a whole number, or several with commas between, got '"),
        (("run", "in", "out", "--ed", 3, "--es", 3), "--ed and --es are both 3: "),
        (("table", "nothing"), "nothing: no qc.json in it. Give the output folder of 'run'."),
        (("table", "a_file"), "a_file: no qc.json in it. Give the output folder of 'run'."),
        (("run", "in", "out", "--threshold", "high"), "--threshold is a number, got 'high'."),
        (("run", "scans", "out", "--threshold", 1.5), "--threshold is a probability, between 0 and 1, got 1.5."),
        (("run", "scans", "a_file"), "cannot write to a_file: a_file is no folder. Give another output folder."),
        (("segment", "scans", "a_file/b"), "cannot write to a_file/b: "),
        (("correct", "out", "a_file", "--reference", "in"), "cannot write to a_file: a_file is no folder."),
        (("evaluate", "out", "in", "a_file"), "cannot write to a_file: a_file is no folder."),
        (("effort", "out", "in", "a_file"), "cannot write to a_file: a_file is no folder."),
        (("compare_expert", "out", "in", "in", "a_file"), "cannot write to a_file: a_file is no folder."),
        (("review", "out", "a_file"), "a_file is no folder. Give another output folder."),
        (
            ("correct", "out", "--reference", "in", "--output", "c", "--apex", "top"),
            "apex is 'last' or 'first', got 'top'.",
        ),
        (("evaluate", "out", "in", "in"), "in is an input of this command: write to another folder."),
        (("evaluate", "out", "in", "out/case"), "out/case is an input of this command: write to another folder."),
        (("effort", "out", "in", "out"), "out is an input of this command: write to another folder."),
        (("evaluate", "out", "in", "results"), "results has the results of effort: write to"),
        (
            ("compare_expert", "out", "in", "in", "results"),
            "results has the results of effort: write to",
        ),
        (("compare_expert", "out", "in", "in", "out"), "out is an input of this command: write to another folder."),
        (("effort", "out", "in", "effort"), "qc.json: no such file. Give the output folder of run."),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_done(arguments, message, tmp_path, command):
    for folder in ("in", "out/case", "scans", "results"):
        (tmp_path / folder).mkdir(parents=True)
    save(tmp_path / "scans" / "case.nii.gz", stack())
    for path in ("in/case_gt.nii.gz", "out/case/segmentation.nii.gz"):
        save(tmp_path / path, np.ones((64, 64, 2), np.uint8))
    (tmp_path / "a_file").write_text("")
    (tmp_path / "results" / "summary.json").write_text('{"command": "effort"}')
    before = sorted(tmp_path.rglob("*"))
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "c") == before


def test_scans_of_a_bundles_folder(tmp_path):
    """Labels and cines are left out; a folder's name is no pattern, and a linked folder is looked into."""
    folder = tmp_path / "a [1]"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for path in (
        folder / "below/a.nii.gz",
        folder / "a_gt.nii.gz",
        folder / "a_4d.nii.gz",
        folder / "c.NII",
        tmp_path / "elsewhere/b.nii.gz",
    ):
        path.touch()
    expected = [{"image": str(folder / name)} for name in ("below/a.nii.gz", "c.NII", "link/b.nii.gz")]
    assert scan_items(folder, tmp_path / "out") == expected
    (folder / "results").mkdir()
    (folder / "results" / "a_segmentation.nii.gz").touch()  # of an earlier run
    assert scan_items(folder, folder / "results") == expected
    assert len(scan_items(folder, tmp_path)) == 4  # not below: nothing is left out
    for same in (folder, folder / "below" / ".."):
        with pytest.raises(ValueError, match="would be taken for scans by the next run. Give another --output_dir"):
            scan_items(folder, same)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.nii.gz").touch()
    (folder / "twice").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert scan_items(folder, folder / "results") == expected
    (folder / "other").mkdir()
    (folder / "other" / "a.nii.gz").touch()
    with pytest.raises(ValueError, match=r"below/a.nii.gz and .*other/a.nii.gz have one name"):
        scan_items(folder, folder / "results")
    with pytest.raises(ValueError, match="nowhere: no scan"):
        scan_items(tmp_path / "nowhere", tmp_path / "out")


def test_results_of_an_earlier_bundle_run_are_no_scans(tmp_path, caplog):
    """Nor the pipeline's; what only sounds like a result stays."""
    scans = ["a.nii.gz", "a_segmentation.nii.gz", "eval/entropy_of_b.nii.gz", "p_segmentation/p.nii"]
    results = [f"eval/a/a_{name}.nii.gz" for name in ("segmentation", "bayesian", "entropy")]
    results += [f"failures/a/a_failure_{name}.nii.gz" for name in ("probability", "regions")]
    results += [f"out/a/{name}.nii.gz" for name in FILES] + ["failures/a/a_segmentation.nii.gz"]
    for name in (*scans, *results):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    caplog.set_level("INFO")
    assert [item["image"] for item in scan_items(tmp_path, tmp_path / "new")] == [
        str(tmp_path / name) for name in scans
    ]
    line = f"{tmp_path}: results of earlier runs in 3 folder(s) are left out, {tmp_path / 'eval/a'} first."
    assert [record.getMessage() for record in caplog.records] == [line]
    assert [scan.path for scan in find_scans(tmp_path)] == [tmp_path / name for name in scans]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, caplog):
    """And the others are searched; root may read all, so the refusal is played."""
    for name in ("a/one.nii.gz", "locked/two.nii.gz", "z/three.nii.gz"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = [Path(item["image"]).name for item in scan_items(tmp_path, tmp_path / "out")]
    assert found == ["one.nii.gz", "three.nii.gz"]
    (message,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert message.startswith(f"{tmp_path / 'locked'}: this folder cannot be read (Permission denied)")


def test_help_lists_options_only(command):
    done = command("run", "--help")
    assert done.returncode == 0 and "--samples" in done.stderr + done.stdout
    assert "GROUP" not in done.stderr + done.stdout


def test_cases_of_another_input_are_named(bundles, tmp_path, command):
    settings = ("--model", "dn", "--samples", 2, "--device", "cpu", "--bundle_dir", bundles)
    for name in ("first", "second"):
        save(tmp_path / f"{name}.nii.gz", stack())
        done = command("run", tmp_path / f"{name}.nii.gz", tmp_path / "out", *settings)
        assert done.returncode == 0, done.stderr
        assert ("1 case(s) of another input: first." in done.stdout) == (name == "second")


def test_a_failure_within_a_transform_says_what_failed(predictors, tmp_path, monkeypatch):
    def fail(*_):
        try:
            raise OverflowError("too large")
        except OverflowError as error:
            raise RuntimeError("applying transform <object at 0x7f>") from error

    monkeypatch.setattr(run_module, "segment", fail)
    save(tmp_path / "scan.nii.gz", stack())
    with pytest.raises(CaseFailures) as caught:
        run(find_scans(tmp_path / "scan.nii.gz"), tmp_path / "out", *predictors)
    assert caught.value.failures == [("scan", "OverflowError: too large")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fold", 1), "scans: --fold: for a datalist or manifest only"),
        (("--root", "/nowhere", "--fold", 1), "scans: --root, --fold: for a datalist or manifest only"),
        (("--series", 3), "scans: --series and --name_by are for DICOM"),
        (("--name_by", "folder"), "scans: --series and --name_by are for DICOM"),
        (("--ed", 4), "scans: --ed and --es are for cines"),
        (("--workers", 3, "--address", "foo:1"), "--address, --workers: for --engine ray only"),
        (("--retries", 1), "--retries: for --engine ray only"),
    ],
)
def test_options_that_do_not_apply_are_refused_before_anything_is_done(options, message, tmp_path, command):
    (tmp_path / "scans").mkdir()
    save(tmp_path / "scans" / "scan.nii.gz", stack())
    done = command("run", "--input", tmp_path / "scans", "--output", tmp_path / "out", *options)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_line_datalist(tmp_path, command):
    write_acdc_like(tmp_path / "acdc", 8, shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0))
    done = command("datalist", "--root", tmp_path / "acdc", "--output", tmp_path / "folds.json", "--folds", 2)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "folds.json").read_text())["training"]) == 16
    scans = find_scans(tmp_path / "folds.json", root=tmp_path / "acdc")
    assert len(scans) == 16 and all(scan.path.is_file() for scan in scans)


@pytest.fixture
def three_scans(tmp_path):
    """Three phantom scans of unequal size, so that the second is ready before the first."""
    for seed, side in enumerate((128, 64, 96)):
        phantom = ShortAxisPhantom(seed=seed, shape=(side, side), n_slices=2, spacing=(1.4, 1.4, 30.0))
        write_phantom(tmp_path / "scans", f"heart{seed}", phantom, phases={"ed": 0.0}, with_labels=False)
    return find_scans(tmp_path / "scans")


def test_scans_under_way_together_give_what_each_gives_alone(three_scans, predictors, tmp_path, monkeypatch):
    busy, infer = threading.Lock(), MCDropoutSliceInferer.__call__

    def by_itself(*args, **kwargs):
        assert busy.acquire(blocking=False), "two scans in the network at once"
        try:
            return infer(*args, **kwargs)
        finally:
            busy.release()

    monkeypatch.setattr(MCDropoutSliceInferer, "__call__", by_itself)
    together = run(three_scans, tmp_path / "together", *predictors)
    predictors[0]({"image": str(three_scans[0].path)})  # nothing of the run is left in it
    assert [qc["case"] for qc in together] == [scan.case for scan in three_scans]
    for scan, qc in zip(three_scans, together, strict=True):
        (alone,) = run([scan], tmp_path / "alone", *predictors)
        for entry in ("segmentation", "detection", "scores"):
            assert alone[entry] == qc[entry]
        for name in FILES:
            a, b = (nib.load(tmp_path / way / scan.case / f"{name}.nii.gz") for way in ("alone", "together"))
            np.testing.assert_array_equal(a.dataobj, b.dataobj)


def test_an_error_of_the_disk_stops_the_scan_under_way(three_scans, predictors, tmp_path, monkeypatch):
    def full(*args):
        raise files.OutputError(28, "No space left on device")

    monkeypatch.setattr("cardiac_qc_plugin.workflows.run.write_maps", full)
    before = threading.active_count()
    with pytest.raises(files.OutputError, match="No space left"):
        run(three_scans, tmp_path / "out", *predictors)
    assert threading.active_count() == before  # nothing goes on in the background
    assert not (tmp_path / "out" / three_scans[2].case).exists()
