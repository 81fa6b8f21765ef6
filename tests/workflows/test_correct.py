import gzip
import hashlib
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from miniature_run import SHAPE, SPACING, hausdorff, heart, load, save, write_patients

from cardiac_qc_plugin.data.inputs import find_scans
from cardiac_qc_plugin.transforms.failure_labels import failure_mask
from cardiac_qc_plugin.workflows.correct import correct
from cardiac_qc_plugin.workflows.files import case_folders, read_volume
from cardiac_qc_plugin.workflows.references import (
    MissingLabels,
    References,
    patient_and_phase,
    read_labels,
    read_reference,
)

CASE = "patient001_frame01"


@pytest.fixture
def run(tmp_path):
    cases = write_patients(tmp_path, 1)
    return tmp_path, cases


def flagged(root, case):
    return load(root / "run" / case / "failure_regions.nii.gz") > 0


def test_labels_that_a_tool_saved_as_floats_with_acdcs_header(tmp_path):
    """nibabel keeps the header's uint8, and so has to store floats with a scale: 1.00000002 for 1."""
    image = nib.Nifti1Image(heart(1).astype(np.uint8), np.diag([*SPACING, 1]))
    nib.save(nib.Nifti1Image(heart(1).astype(float), image.affine, image.header), tmp_path / "mask.nii.gz")
    assert not np.isin(nib.load(tmp_path / "mask.nii.gz").get_fdata(), range(4)).all()
    np.testing.assert_array_equal(read_labels(tmp_path / "mask.nii.gz").data, heart(1))


def test_paper_rule_takes_the_reference_in_flagged_regions_only(run):
    root, cases = run
    outcome = correct(root / "run", root / "out", reference=root / "acdc")
    assert not outcome.failures
    n_changed = 0
    for case, (prediction, reference) in cases.items():
        corrected, regions = load(root / "out" / case / "segmentation.nii.gz"), flagged(root, case)
        assert corrected.dtype == np.uint8
        np.testing.assert_array_equal(corrected[regions], reference[regions])
        np.testing.assert_array_equal(corrected[~regions], prediction[~regions])
        record = json.loads((root / "out" / case / "correction.json").read_text())
        changed = corrected != prediction
        assert 0 < record["n_voxels_changed"] == changed.sum()
        assert record["slices_changed"] == sorted(set(np.nonzero(changed)[2].tolist()))
        ids = load(root / "run" / case / "failure_regions.nii.gz")
        assert record["n_regions_flagged"] == len(set(ids.ravel().tolist()) - {0})
        assert (record["kind"], record["rule"], record["criterion"]) == ("simulated", "paper", None)
        for source, path in (
            ("segmentation", root / "run" / case / "segmentation.nii.gz"),
            ("failure_regions", root / "run" / case / "failure_regions.nii.gz"),
            ("reference", root / "acdc" / "patient001" / f"{case}_gt.nii.gz"),
        ):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert record["sources"][source] == {"path": str(path), "sha256": digest}
        n_changed += record["n_voxels_changed"]
    assert f"Corrected 2 case(s): {n_changed} voxel(s) changed, in 2 case(s)" in outcome.text
    assert not list((root / "out").rglob(".part*"))


def test_the_scan_grid_and_header_codes_stay(run):
    root, _ = run
    correct(root / "run", root / "out", reference=root / "acdc")
    before, after = (nib.load(root / side / CASE / "segmentation.nii.gz") for side in ("run", "out"))
    assert after.header.get_zooms() == before.header.get_zooms() == SPACING
    np.testing.assert_array_equal(after.affine, before.affine)
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == (2, 0)


@pytest.mark.parametrize("apex", ["last", "first"])
@pytest.mark.parametrize(
    "rule, criterion, expected",
    [
        ("released_code", None, "released_code"),
        ("released_code", "paper", "paper"),
        ("upper_bound", None, "paper"),
        ("upper_bound", "released_code", "released_code"),
    ],
)
def test_rules_with_a_failure_criterion(run, rule, criterion, expected, apex):
    root, cases = run
    correct(root / "run", root / "out", reference=root / "acdc", rule=rule, criterion=criterion, apex=apex)
    for case, (prediction, reference) in cases.items():
        replaced = failure_mask(prediction, reference, SPACING[:2], expected, apex)
        if rule == "released_code":
            replaced &= flagged(root, case)
        corrected = load(root / "out" / case / "segmentation.nii.gz")
        np.testing.assert_array_equal(corrected, np.where(replaced, reference, prediction))
        record = json.loads((root / "out" / case / "correction.json").read_text())
        assert (record["rule"], record["criterion"]) == (rule, expected)


def test_upper_bound_never_raises_the_hausdorff_distance_here(run):
    root, cases = run
    for path in (root / "run").rglob("failure_regions.nii.gz"):
        path.unlink()  # the upper bound needs no detection
    outcome = correct(root / "run", root / "out", reference=root / "acdc", rule="upper_bound")
    assert not outcome.failures
    fell = 0
    for case, (prediction, reference) in cases.items():
        corrected = load(root / "out" / case / "segmentation.nii.gz")
        for label in (1, 2, 3):
            before = hausdorff(prediction == label, reference == label)
            after = hausdorff(corrected == label, reference == label)
            assert after <= before
            fell += after < before
    assert fell >= 4


def write_edits(root, cases, outside):
    """An expert changed one voxel in a flagged region, and so many outside."""
    for case, (prediction, _) in cases.items():
        edited, regions = prediction.copy(), flagged(root, case)
        for voxel in [np.argwhere(regions)[0], *np.argwhere(~regions)[:outside]]:
            edited[tuple(voxel)] = (edited[tuple(voxel)] + 1) % 4
        save(root / "edited" / case / "segmentation.nii.gz", edited)


def test_expert_edits(run):
    root, cases = run
    write_edits(root, cases, outside=0)
    outcome = correct(root / "run", root / "out", edited=root / "edited")
    assert not outcome.failures
    edited = load(root / "edited" / CASE / "segmentation.nii.gz")
    np.testing.assert_array_equal(load(root / "out" / CASE / "segmentation.nii.gz"), edited)
    record = json.loads((root / "out" / CASE / "correction.json").read_text())
    assert (record["kind"], record["n_voxels_changed"], record["edits"]["n_outside"]) == ("expert", 1, 0)


def test_expert_edits_with_turned_axes_are_turned_back(run):
    """An editor may store the mask with other axes, and says so in the affine."""
    root, cases = run
    write_edits(root, cases, outside=0)
    for path in (root / "edited").rglob("*.nii.gz"):
        image = nib.Nifti1Image(load(path), np.diag([-1.5, -1.5, 8.0, 1.0]))
        nib.save(image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]])), path)
    assert not correct(root / "run", root / "out", edited=root / "edited").failures
    for case, (prediction, _) in cases.items():
        changed = np.argwhere(load(root / "out" / case / "segmentation.nii.gz") != prediction)
        np.testing.assert_array_equal(changed, np.argwhere(flagged(root, case))[:1])


def test_expert_edits_with_other_voxels_are_refused(run):
    root, cases = run
    write_edits(root, cases, outside=0)
    for path in (root / "edited").rglob("*.nii.gz"):
        nib.save(nib.Nifti1Image(load(path), np.diag([-3.0, -3.0, 4.0, 1.0])), path)
    outcome = correct(root / "run", root / "out", edited=root / "edited")
    assert outcome.failures.keys() == cases.keys() and "voxel size 3 x 3 x 4 mm" in outcome.failures[CASE]


def test_a_correction_does_not_replace_a_review(run):
    """Neither a simulated one nor masks made elsewhere; what the review wrote stays."""
    root, cases = run
    write_edits(root, cases, outside=0)
    (root / "out" / CASE).mkdir(parents=True)
    (root / "out" / CASE / "review.jsonl").touch()
    (root / "out" / CASE / "segmentation.nii.gz").write_bytes(b"finished")
    for source in ({"edited": root / "edited"}, {"reference": root / "acdc"}):
        outcome = correct(root / "run", root / "out", **source)
        assert "a review, which a correction must not replace" in outcome.failures[CASE]
        assert (root / "out" / CASE / "segmentation.nii.gz").read_bytes() == b"finished"


def test_a_correction_replaces_no_segmentation_that_none_made(run, tmp_path):
    """Of another run, or an expert's masks: they stay, also where the case fails for another reason."""
    root, cases = run
    shutil.copytree(root / "run", tmp_path / "other")
    before = {path: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()}
    (root / "acdc" / CASE.split("_")[0] / f"{CASE}_gt.nii.gz").unlink()
    outcome = correct(root / "run", tmp_path / "other", root / "acdc")
    assert outcome.failures.keys() == cases.keys()
    assert all("no correction made it" in message for message in outcome.failures.values())
    assert before == {path: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()}


def test_a_kill_while_a_correction_is_written_does_not_bar_the_next(run, monkeypatch):
    root, _ = run
    for name in ("write_json", "write_like"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"cardiac_qc_plugin.workflows.correct.{name}", _interrupt)
            correct(root / "run", root / "out", root / "acdc")
        assert not correct(root / "run", root / "out", root / "acdc").failures


def _interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_simulated_correction_does_not_replace_an_experts(run):
    root, cases = run
    write_edits(root, cases, outside=0)
    correct(root / "run", root / "out", edited=root / "edited")
    before = {path: path.read_bytes() for path in (root / "out").rglob("*") if path.is_file()}
    outcome = correct(root / "run", root / "out", reference=root / "acdc")
    assert all("correction.json: an expert's correction" in message for message in outcome.failures.values())
    assert len(outcome.failures) == len(cases)
    assert {path: path.read_bytes() for path in (root / "out").rglob("*") if path.is_file()} == before


def test_edits_outside_flagged_regions_are_refused_or_dropped(run):
    root, cases = run
    write_edits(root, cases, outside=3)
    outcome = correct(root / "run", root / "out", edited=root / "edited")
    assert set(outcome.failures) == set(cases)
    path = root / "edited" / CASE / "segmentation.nii.gz"
    assert outcome.failures[CASE].startswith(f"{path}: 3 voxel(s) edited outside")
    assert f"FAILED {CASE}: {path}" in outcome.text

    outcome = correct(root / "run", root / "out", edited=root / "edited", on_outside="drop")
    assert not outcome.failures and "dropped: 6" in outcome.text
    changed = load(root / "out" / CASE / "segmentation.nii.gz") != cases[CASE][0]
    assert changed.sum() == 1 and flagged(root, CASE)[changed].all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "Give one of"),
        ({"reference": "acdc", "edited": "acdc"}, "Give one of"),
        ({"reference": "acdc", "rule": "magic"}, "'magic'"),
        ({"reference": "acdc", "rule": "upper_bound", "criterion": "strict"}, "'strict'"),
        ({"reference": "acdc", "criterion": "paper"}, "give no criterion"),
        ({"reference": "acdc", "apex": "top"}, "'top'"),
        ({"edited": "acdc", "rule": "upper_bound"}, "belong to simulated correction"),
        ({"edited": "acdc", "criterion": "paper"}, "belong to simulated correction"),
        ({"edited": "acdc", "on_outside": "ignore"}, "'ignore'"),
        ({"reference": "nowhere"}, "nowhere: no such folder"),
        ({"reference": "acdc", "output": "run/corrected"}, "write the corrections elsewhere"),
        ({"reference": "acdc", "output": "empty/../run/corrected"}, "the predictions .* lie in each other"),
        ({"reference": "acdc", "output": "."}, "the predictions .* lie in each other"),
        ({"reference": "acdc", "output": "acdc/corrected"}, "the reference .* lie in each other"),
        ({"edited": "acdc", "output": "acdc"}, "the edited masks .* lie in each other"),
        ({"reference": "acdc", "predictions": "empty"}, "no segmentation.nii.gz"),
    ],
)
def test_settings_that_do_not_work(run, settings, message):
    root, _ = run
    (root / "empty").mkdir()
    paths = {"predictions": "run", "output": "out"} | settings
    for key in ("predictions", "output", "reference", "edited"):
        if key in paths:
            paths[key] = root / paths[key]
    with pytest.raises(ValueError, match=message):
        correct(**paths)
    assert not list((root / "out").rglob("*.nii.gz"))


def broken_reference(root, kind):
    """Spoil the reference of CASE; returns its path."""
    folder = root / "acdc" / "patient001"
    path = folder / f"{CASE}_gt.nii.gz"
    if kind == "shape":
        save(path, np.ones((*SHAPE[:2], 3), np.uint8))
    elif kind == "spacing":
        save(path, heart(1), (1.25, 1.25, 8.0))
    elif kind == "labels":
        save(path, heart(1) * 2)
    elif kind == "fraction":
        save(path, heart(1) * np.float32(0.5))
    elif kind == "exchanged":
        save(path, np.uint8([0, 3, 2, 1])[heart(1)])
    elif kind == "empty":
        save(path, np.zeros(SHAPE, np.uint8))
    elif kind == "missing":
        path.unlink()
        (folder / f"{CASE}.nii.gz").unlink()
    elif kind == "the scan only":
        path.unlink()
        return folder / f"{CASE}.nii.gz"
    elif kind == "ambiguous":
        shutil.copy(path, root / "acdc" / f"{CASE}_seg.nii.gz")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "no image":
        path.write_bytes(gzip.compress(b"no image"))
    return path


BROKEN = {
    "shape": r"shape \(96, 96, 3\), but the prediction has \(96, 96, 4\)",
    "spacing": "voxel size 1.25 x 1.25 x 8 mm, but the prediction has 1.5 x 1.5 x 8 mm",
    "labels": r"the label map has the values \[4, 6\]",
    "fraction": r"the label map has the values \[0.5, 1.5\]",
    "exchanged": "label 1 lies in the myocardium and label 3 does not, so RV and LV are exchanged",
    "empty": "no label at all",
    "missing": "no label file for .*_gt.nii.gz, .*_seg.nii.gz, .*/segmentation.nii.gz",
    "the scan only": r"the label map has the values \[50, 100, 150\].* its labels .*_gt.nii.gz are missing",
    "ambiguous": "2 label files for .*_gt.nii.gz, .*_seg.nii.gz",
    "truncated": "damaged",
    "no image": "not a NIfTI image",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_reference_has_its_message_and_stops_no_other_case(run, kind):
    root, cases = run
    path = broken_reference(root, kind)
    outcome = correct(root / "run", root / "out", reference=root / "acdc")
    assert set(outcome.failures) == {CASE}
    message = outcome.failures[CASE]
    named = root / "acdc" if kind in ("missing", "ambiguous") else path
    assert message.startswith(f"{named}: ")
    assert re.search(BROKEN[kind], message), message
    assert not (root / "out" / CASE).exists()
    other = "patient001_frame05"
    regions = flagged(root, other)
    corrected = load(root / "out" / other / "segmentation.nii.gz")
    np.testing.assert_array_equal(corrected[regions], cases[other][1][regions])


def test_a_case_without_usable_regions_is_reported(run):
    root, _ = run
    path = root / "run" / CASE / "failure_regions.nii.gz"
    correct(root / "run", root / "out", reference=root / "acdc")
    path.unlink()
    outcome = correct(root / "run", root / "out", reference=root / "acdc")
    assert not list((root / "out" / CASE).iterdir())  # nothing of the earlier run
    assert outcome.failures == {
        CASE: f"{path}: no such file, its failures were not detected. Give the output folder of run."
    }
    save(path, np.zeros((*SHAPE[:2], 5), np.uint16))
    outcome = correct(root / "run", root / "out", reference=root / "acdc")
    assert outcome.failures[CASE].startswith(f"{path}: shape (96, 96, 5), but the segmentation has")


def test_an_output_that_cannot_be_written_stops_all(run):
    root, _ = run
    (root / "out").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="out"):
        correct(root / "run", root / "out", reference=root / "acdc")


def test_where_references_may_lie(tmp_path):
    labels = heart(1)
    for name in (
        "a_gt.nii.gz",
        "deep/er/b_seg.nii",
        "c/segmentation.nii.gz",
        "d.nii.gz",
        "cine/phase03_gt.nii.gz",
    ):
        save(tmp_path / name, labels)
    save(tmp_path / "other" / "phase03_gt.nii.gz", labels)
    save(tmp_path / "a.nii.gz", labels)  # the scan
    save(tmp_path / "run" / "a" / "segmentation.nii.gz", labels)  # a prediction: second to _gt
    (tmp_path / ".part-7-c.nii.gz").write_bytes(b"")
    references = References(tmp_path)
    own = tmp_path / "elsewhere"
    for case, name in (
        ("a", "a_gt.nii.gz"),
        ("b", "deep/er/b_seg.nii"),
        ("c", "c/segmentation.nii.gz"),
        ("d", "d.nii.gz"),
        ("cine/phase03", "cine/phase03_gt.nii.gz"),
    ):
        assert references.find(case, own) == tmp_path / name
    with pytest.raises(ValueError, match="2 label files for phase03"):
        references.find("phase03", own)
    with pytest.raises(ValueError, match="no label file for c"):
        references.find("c", tmp_path / "c")  # a prediction is no reference of its own


def test_whole_floating_point_labels_are_fine(tmp_path):
    save(tmp_path / "a_gt.nii.gz", heart(1).astype(np.float32))
    save(tmp_path / "a.nii.gz", heart(1))
    labels = read_reference(tmp_path / "a_gt.nii.gz", read_volume(tmp_path / "a.nii.gz"))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, heart(1))


@pytest.mark.parametrize("axes", ["LPI", "SAR", "ILP"])
def test_a_reference_with_turned_axes_is_turned_back(tmp_path, axes):
    affine = np.array([[-1.5, 0, 0, 40], [0, -1.2, 0, 30], [0, 0, 8, -20], [0, 0, 0, 1]], dtype=float)
    labels = heart(1)[:, :-2]  # three different sizes
    image = nib.Nifti1Image(labels, affine)
    nib.save(image, tmp_path / "a.nii.gz")
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), tmp_path / "a_gt.nii.gz")
    assert load(tmp_path / "a_gt.nii.gz").shape != labels.shape or axes == "LPI"
    reference = read_reference(tmp_path / "a_gt.nii.gz", read_volume(tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(reference, labels)


def test_turned_axes_of_a_reference_beside_acdcs_affine(tmp_path):
    """ACDC's affines say 1 mm: a reference with the true one, and turned axes, is turned back, or refused."""
    labels = heart(1)[:, :-2]
    scan = nib.Nifti1Image(labels, np.diag([-1.0, -1.0, 1.0, 1.0]))
    scan.header.set_zooms((1.5, 1.2, 8.0))
    content = bytearray(scan.to_bytes())
    content[80:92] = np.array([1.5, 1.2, 8.0], "<f4").tobytes()  # pixdim only
    (tmp_path / "a.nii").write_bytes(content)
    prediction = read_volume(tmp_path / "a.nii")
    assert prediction.spacing == pytest.approx((1.5, 1.2, 8)) and abs(prediction.image.affine[0, 0]) == 1
    true = nib.Nifti1Image(labels, np.diag([-1.5, -1.2, 8.0, 1.0]))
    nib.save(nib.as_closest_canonical(true), tmp_path / "a_gt.nii.gz")
    np.testing.assert_array_equal(read_reference(tmp_path / "a_gt.nii.gz", prediction), labels)
    uncoded = nib.Nifti1Image(labels, None)  # it does not say how it lies, and nibabel invents axes
    uncoded.header.set_zooms((1.5, 1.2, 8.0))
    nib.save(uncoded, tmp_path / "b.nii.gz")
    nib.save(nib.Nifti1Image(labels, np.diag([1.5, 1.2, 8.0, 1.0])), tmp_path / "b_gt.nii.gz")
    np.testing.assert_array_equal(read_reference(tmp_path / "b_gt.nii.gz", read_volume(tmp_path / "b.nii.gz")), labels)
    elsewhere = nib.Nifti1Image(labels, np.diag([1.5, 1.2, 8.0, 1.0]))  # the voxels' order, and other axes
    nib.save(elsewhere, tmp_path / "a_gt.nii.gz")
    with pytest.raises(ValueError, match=r"a_gt.nii.gz: its axes run otherwise than the prediction's \(RAS, not LPS\)"):
        read_reference(tmp_path / "a_gt.nii.gz", prediction)


def test_references_in_a_linked_folder(tmp_path):
    save(tmp_path / "elsewhere" / "p1" / "p1_ed_gt.nii.gz", heart(1))
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "references" / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = References(tmp_path / "references").find("p1_ed", tmp_path / "run")
    assert found == tmp_path / "references" / "again" / "p1" / "p1_ed_gt.nii.gz"


def test_a_case_whose_folder_is_a_link_is_one(run, tmp_path):
    root, cases = run
    (root / "run" / CASE).rename(tmp_path / "moved")
    (root / "run" / CASE).symlink_to(tmp_path / "moved", target_is_directory=True)
    assert [folder.name for folder in case_folders(root / "run")] == sorted(cases)


def test_references_of_cases_that_are_named_by_their_folder(tmp_path):
    """As `find_scans` names them, where several patients have files of the same names."""
    for patient in ("p1", "p2"):
        for name in ("sax", "sax_gt"):
            save(tmp_path / patient / f"{name}.nii.gz", heart(1))
    references = References(tmp_path)
    for scan in find_scans(tmp_path):
        assert references.find(scan.case, tmp_path / "run") == scan.path.parent / "sax_gt.nii.gz"


def test_references_of_acdcs_cine_are_its_frames(tmp_path):
    """Of which phase 0 is frame 1; a label file by the phase's own name comes first."""
    for number in (1, 12):
        save(tmp_path / "patient001" / f"patient001_frame{number:02d}_gt.nii.gz", heart(1))
    references, own = References(tmp_path), tmp_path / "run"
    found = references.find("patient001_4d/phase11", own)
    assert found == tmp_path / "patient001" / "patient001_frame12_gt.nii.gz"
    assert references.find("patient001/phase00", own).name == "patient001_frame01_gt.nii.gz"
    with pytest.raises(MissingLabels, match=r"for patient001_4d/phase01\. .*, and for patient001_frame02\."):
        references.find("patient001_4d/phase01", own)
    assert patient_and_phase("patient001_4d/phase11", found) == ("patient001_4d", "unknown")
    (tmp_path / "patient001" / "Info.cfg").write_text("ED: 1\nES: 12\n")
    assert patient_and_phase("patient001_4d/phase11", found) == ("patient001_4d", "ES")
    save(tmp_path / "patient001_4d" / "phase11_gt.nii.gz", heart(1))
    assert References(tmp_path).find("patient001_4d/phase11", own).name == "phase11_gt.nii.gz"


def test_patient_and_phase(tmp_path):
    reference = tmp_path / "x_gt.nii.gz"
    assert patient_and_phase("patient001_frame01", reference) == ("patient001", "unknown")
    (tmp_path / "Info.cfg").write_text("ED: 1\nES: 12\n")  # the challenge's test patients have no group
    assert patient_and_phase("patient001_frame01", reference) == ("patient001", "ED")
    assert patient_and_phase("patient001_frame12", reference) == ("patient001", "ES")
    assert patient_and_phase("patient001_frame02", reference) == ("patient001", "unknown")
    assert patient_and_phase("demo_ed", reference) == ("demo", "ED")
    assert patient_and_phase("demo_ES", reference) == ("demo", "ES")
    assert patient_and_phase("cine/phase07", reference) == ("cine", "unknown")
    assert patient_and_phase("anything", reference) == ("anything", "unknown")
    (tmp_path / "Info.cfg").write_text("ED: one\nES: 12\nGroup: NOR\n")
    with pytest.raises(ValueError, match="Info.cfg: ED is no frame number: 'one'"):
        patient_and_phase("patient001_frame01", reference)
