"""The paper's Table IV from files: three versions of a few cases against numpy and scipy."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from miniature_run import load, save, write_patients
from scipy import stats

from cardiac_qc_plugin.workflows.compare_expert import compare_expert
from cardiac_qc_plugin.workflows.correct import correct

EDITED = ("patient001_frame01", "patient001_frame05", "patient002_frame01", "patient003_frame01")


@pytest.fixture
def study(tmp_path):
    """The expert does half of what the reference says in flagged regions, in four of six cases."""
    cases = write_patients(tmp_path, 3)
    for case in EDITED:
        prediction, reference = cases[case]
        edited, flagged = prediction.copy(), load(tmp_path / "run" / case / "failure_regions.nii.gz") > 0
        half = flagged & (np.indices(flagged.shape)[0] % 2 == 0)
        edited[half] = reference[half]
        save(tmp_path / "masks" / f"{case}.nii.gz", edited)
    return tmp_path, cases


def versions(root, cases, case):
    prediction, reference = cases[case]
    flagged = load(root / "run" / case / "failure_regions.nii.gz") > 0
    simulated = np.where(flagged, reference, prediction)
    return {"auto": prediction, "simulated": simulated, "expert": load(root / "masks" / f"{case}.nii.gz")}


def dice(labels, reference, label):
    ours, true = labels == label, reference == label
    return 2 * (ours & true).sum() / (ours.sum() + true.sum())


def test_table_of_the_edited_cases(study):
    root, cases = study
    outcome = compare_expert(root / "run", root / "masks", root / "acdc", root / "out")
    assert not outcome.failures and "4 of 6 cases" in outcome.text
    with open(root / "out" / "table4.csv", newline="") as stream:
        rows = {(r["metric"], r["scenario"], r["phase"], r["structure"]): r for r in csv.DictReader(stream)}
    assert {phase for _, _, phase, _ in rows} == {"ED", "ES"}
    assert {row["n_excluded"] for row in rows.values()} == {"0"}
    for phase, own in (("ED", [c for c in EDITED if c.endswith("01")]), ("ES", ["patient001_frame05"])):
        for label, name in ((1, "RV"), (2, "LVM"), (3, "LV")):
            scores = {
                scenario: [dice(versions(root, cases, case)[scenario], cases[case][1], label) for case in own]
                for scenario in ("auto", "simulated", "expert")
            }
            for scenario, values in scores.items():
                row = rows["dice", scenario, phase, name]
                assert float(row["mean"]) == pytest.approx(np.mean(values)) and int(row["n"]) == len(own)
                if len(own) > 1:
                    assert float(row["sd"]) == pytest.approx(np.std(values, ddof=1))
                if scenario == "auto":
                    assert row["mann_whitney_p"] == row["wilcoxon_p"] == ""
                elif values != scores["auto"]:
                    expected = stats.mannwhitneyu(scores["auto"], values, alternative="two-sided").pvalue
                    assert float(row["mann_whitney_p"]) == pytest.approx(expected)
                    assert float(row["wilcoxon_p"]) == pytest.approx(stats.wilcoxon(scores["auto"], values).pvalue)
            assert np.mean(scores["auto"]) <= np.mean(scores["expert"]) <= np.mean(scores["simulated"]) + 1e-9
    published = rows["hausdorff", "expert", "ES", "RV"]
    assert (published["paper_mean"], published["paper_sd"], published["paper_significant"]) == ("12.5", "4.7", "1")
    summary = json.loads((root / "out" / "summary.json").read_text())
    assert summary["not_edited"] == ["patient002_frame05", "patient003_frame05"]
    changed = sum((versions(root, cases, c)["expert"] != cases[c][0]).sum() for c in EDITED)
    assert summary["n_voxels_changed"]["expert"] == changed > 0


def test_two_labelled_phases_of_a_cine_are_end_diastole_and_end_systole(study):
    """As `evaluate` has it: of a DICOM cine, say, where nothing but the labels tells."""
    root, _ = study
    for frame, phase in (("frame01", 9), ("frame05", 6)):
        name = f"phase{phase:02d}"
        shutil.copytree(root / "run" / f"patient001_{frame}", root / "cines" / "study" / name)
        for folder, file in (("masks", f"patient001_{frame}.nii.gz"), ("acdc", f"patient001_{frame}_gt.nii.gz")):
            target = root / f"{folder}_of_cines" / "study" / f"{name}{'_gt' * (folder == 'acdc')}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(next((root / folder).rglob(file)), target)
    outcome = compare_expert(root / "cines", root / "masks_of_cines", root / "acdc_of_cines", root / "out")
    assert not outcome.failures
    with open(root / "out" / "cases.csv", newline="") as stream:
        found = {row["case"]: row for row in csv.DictReader(stream)}
    assert {case: row["phase"] for case, row in found.items()} == {"study/phase09": "ED", "study/phase06": "ES"}
    with open(root / "out" / "table4.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["phase"] for row in rows} == {"ED", "ES"} and {row["n"] for row in rows} == {"1"}
    assert all(row["paper_mean"] for row in rows if row["metric"] != "hausdorff_penalized")
    # a third phase with labels, edited or not: which of them are the two?
    shutil.copytree(root / "cines" / "study" / "phase06", root / "cines" / "study" / "phase11")
    labels = root / "acdc_of_cines" / "study"
    shutil.copy(labels / "phase06_gt.nii.gz", labels / "phase11_gt.nii.gz")
    compare_expert(root / "cines", root / "masks_of_cines", root / "acdc_of_cines", root / "out")
    with open(root / "out" / "cases.csv", newline="") as stream:
        assert {row["case"]: row["phase"] for row in csv.DictReader(stream)} == dict.fromkeys(found, "unknown")


def test_output_of_correct_gives_the_same(study):
    root, _ = study
    correct(root / "run", root / "corrected", edited=root / "masks")
    shutil.rmtree(root / "corrected" / "patient002_frame05", ignore_errors=True)
    texts = []
    for name in ("masks", "corrected"):
        compare_expert(root / "run", root / name, root / "acdc", root / "out")
        texts.append((root / "out" / "table4.csv").read_text())
    assert texts[0] == texts[1]


def test_mask_saved_with_turned_axes_counts_as_it_was_meant(study):
    """As some editors save; `correct --edited` accepts it, by the same rule."""
    root, _ = study
    compare_expert(root / "run", root / "masks", root / "acdc", root / "out")
    file = root / "masks" / f"{EDITED[0]}.nii.gz"
    turned = nib.load(file).as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
    turned.header.set_zooms(nib.load(file).header.get_zooms())
    nib.save(turned, file)
    compare_expert(root / "run", root / "masks", root / "acdc", root / "turned")
    assert (root / "turned" / "table4.csv").read_bytes() == (root / "out" / "table4.csv").read_bytes()


def test_masks_that_are_refused(study):
    root, cases = study
    case = "patient001_frame05"
    outside = load(root / "masks" / f"{case}.nii.gz").copy()
    outside[0, 0, :] = 1
    save(root / "masks" / f"{case}.nii.gz", outside)
    outcome = compare_expert(root / "run", root / "masks", root / "acdc", root / "out")
    assert list(outcome.failures) == [case] and "outside the flagged regions" in outcome.text
    outcome = compare_expert(root / "run", root / "masks", root / "acdc", root / "out", on_outside="drop")
    assert not outcome.failures and "dropped: 4" in outcome.text
    correct(root / "run", root / "simulated", reference=root / "acdc")
    with pytest.raises(ValueError, match="a simulated correction"):
        compare_expert(root / "run", root / "simulated", root / "acdc", root / "out")
    correct(root / "run", root / "corrected", edited=root / "masks", on_outside="drop")
    changed = load(root / "run" / case / "segmentation.nii.gz").copy()
    changed[50, 50, 0] = 0
    save(root / "run" / case / "segmentation.nii.gz", changed)
    outcome = compare_expert(root / "run", root / "corrected", root / "acdc", root / "out")
    assert list(outcome.failures) == [case] and "made from another segmentation" in outcome.text
    (root / "others").mkdir()
    save(root / "others" / "somebody.nii.gz", changed)
    with pytest.raises(ValueError, match=r"none of the 6 cases of (.|\n)*no label file for patient001_frame01\."):
        compare_expert(root / "run", root / "others", root / "acdc", root / "out")
    with pytest.raises(ValueError, match="on_outside"):
        compare_expert(root / "run", root / "masks", root / "acdc", root / "out", on_outside="keep")


def test_the_command(study, command):
    root, _ = study
    places = ("--predictions", root / "run", "--reference", root / "acdc", "--output", root / "out")
    result = command("compare_expert", *places, "--expert", root / "masks")
    assert result.returncode == 0, result.stderr
    assert "auto + expert, paper" in result.stdout and "p, auto + expert, Wilcoxon" in result.stdout
    (root / "empty").mkdir()
    save(root / "empty" / "other.nii.gz", load(root / "masks" / f"{EDITED[0]}.nii.gz"))
    result = command("compare_expert", *places, "--expert", root / "empty")
    assert result.returncode == 1 and "masks of none of the 6 cases" in result.stderr
