"""Effort against gain, against a brute force that corrects files and measures them with `dice_and_hausdorff`."""

import csv
import json
import shutil

import numpy as np
import pytest
from miniature_run import BOXES, SHAPE, SPACING, cells_inside, load, write_patients

from cardiac_qc_plugin.metrics.effort import ReviewedVolume
from cardiac_qc_plugin.metrics.segmentation import dice_and_hausdorff
from cardiac_qc_plugin.transforms.correction import simulate_correction
from cardiac_qc_plugin.transforms.failure_labels import failure_mask
from cardiac_qc_plugin.transforms.regions import region_grid
from cardiac_qc_plugin.workflows.effort import effort, read_case
from cardiac_qc_plugin.workflows.references import References


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("effort")
    cases = write_patients(root, 2)
    outcome = effort(root / "run", root / "acdc", root / "out", seeds=2)
    assert not outcome.failures
    with open(root / "out" / "effort.csv", newline="") as stream:
        return root, cases, list(csv.DictReader(stream)), outcome.text


def cells():
    """Slice, rows and columns of every region in the image."""
    found = [(z, rows, cols) for z, box in enumerate(BOXES) for _, _, rows, cols in cells_inside(box)]
    return [(z, rows, cols) for z, rows, cols in found if rows.start < rows.stop and cols.start < cols.stop]


def brute_force(root, cases, score, scope, regions):
    """Dice, Hausdorff distance and caught failures after so many regions of each patient, or of the cohort."""
    ranked = {}
    for case, (prediction, reference) in cases.items():
        for z, rows, cols in cells():
            group = case.split("_")[0] if scope == "patient" else "all"
            ranked.setdefault(group, []).append(
                (-score(case, prediction, reference, (rows, cols, z)), case, rows, cols, z)
            )
    flagged = {case: np.zeros(SHAPE, bool) for case in cases}
    for group in ranked.values():
        group.sort(key=lambda entry: entry[0])  # a stable sort, as the run's own order of ids
        for _, case, rows, cols, z in group[: regions * (1 if scope == "patient" else 2)]:
            flagged[case][rows, cols, z] = True
    scores, caught, total, slices = [], {}, {}, 0
    for case, (prediction, reference) in cases.items():
        corrected = simulate_correction(prediction, reference, flagged[case])
        own = dice_and_hausdorff(corrected, reference, SPACING).values()
        scores.append(np.nanmean([(s.dice, s.hausdorff_penalized) for s in own], axis=0))
        failures, patient = failure_mask(prediction, reference, SPACING[:2]), case.split("_")[0]
        caught[patient] = caught.get(patient, 0) + (failures & flagged[case]).sum()
        total[patient] = total.get(patient, 0) + failures.sum()
        slices += flagged[case].any(axis=(0, 1)).sum()
    return *np.mean(scores, axis=0), np.mean([caught[p] / total[p] for p in total]), slices / 2


def score_by_map(root, name):
    maps = {}

    def score(case, prediction, reference, region):
        if case not in maps:
            maps[case] = load(root / "run" / case / f"{name}.nii.gz")
        return maps[case][region].mean()

    return score


def score_by_failures():
    maps = {}

    def score(case, prediction, reference, region):
        if case not in maps:
            maps[case] = failure_mask(prediction, reference, SPACING[:2]) + (prediction != reference) / 1e6
        return maps[case][region].sum()

    return score


@pytest.mark.parametrize("scope", ["patient", "cohort"])
@pytest.mark.parametrize("order", ["detector", "uncertainty", "oracle_failures"])
def test_curves_are_those_of_a_brute_force(study, order, scope):
    root, cases, rows, _ = study
    names = {"detector": "failure_probability", "uncertainty": "bayesian"}
    score = score_by_map(root, names[order]) if order in names else score_by_failures()
    for regions in (0, 2, 10, 50):
        (row,) = [
            r for r in rows if (r["order"], r["scope"], float(r["regions_per_patient"])) == (order, scope, regions)
        ]
        expected = brute_force(root, cases, score, scope, regions)
        found = [float(row[key]) for key in ("dice", "hausdorff_mm", "caught", "slices")]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert float(row["dice"]) > 0.8  # something was gained, so a curve that stays at its start would be found


def test_shares_are_of_the_correction_of_all_failures(study):
    _, cases, rows, text = study
    upper = []
    for prediction, reference in cases.values():
        corrected = simulate_correction(
            prediction, reference, failures=failure_mask(prediction, reference, SPACING[:2]), rule="upper_bound"
        )
        own = dice_and_hausdorff(corrected, reference, SPACING).values()
        upper.append(np.nanmean([(s.dice, s.hausdorff_penalized) for s in own], axis=0))
    dice, distance = np.mean(upper, axis=0)
    curve = [row for row in rows if (row["order"], row["scope"]) == ("detector", "patient")]
    start = curve[0]
    for row in curve:
        gain = float(row["dice"]) - float(start["dice"])
        assert float(row["dice_share"]) == pytest.approx(gain / (dice - float(start["dice"])), rel=1e-6)
        fall = float(row["hausdorff_mm"]) - float(start["hausdorff_mm"])
        whole = distance - float(start["hausdorff_mm"])
        assert float(row["hausdorff_share"]) == pytest.approx(fall / whole, rel=1e-6, abs=1e-9)
    assert curve[-1]["all_regions"] == "1" and float(curve[-1]["dice_share_of_all_regions"]) == pytest.approx(1)
    assert float(curve[-1]["regions_per_patient"]) == 2 * len(cells())
    assert f" {100 * float(curve[2]['dice_share']):.0f} % |" in text


def test_the_oracle_by_dice_gain_is_ahead(study):
    _, _, rows, _ = study
    dice = {(r["order"], r["scope"], r["regions_per_patient"]): float(r["dice"]) for r in rows}
    for (order, scope, regions), value in dice.items():
        assert value <= dice["oracle_dice", scope, regions] + 1e-3, (order, scope, regions)
    assert dice["random", "patient", "10.0"] < dice["detector", "patient", "10.0"]


def test_hausdorff_of_appearing_and_vanishing_structures():
    reference = np.zeros((16, 16, 2), np.uint8)
    reference[2:6, 2:6, 0] = 1
    reference[9:14, 9:14, 1] = 3
    prediction = np.zeros_like(reference)
    prediction[0:5, 9:13, 0] = 2  # a structure that the reference lacks, and two that are missing
    grid = region_grid([(0, 16, 0, 16)] * 2, reference.shape, 8)
    volume = ReviewedVolume(prediction, reference, SPACING, grid)
    order, labels = np.array([1, 0, 7, 2, 3, 4, 5, 6]), prediction.copy()
    found, dice = volume.hausdorff(order, range(9)), volume.dice(order, range(9))
    for count in range(9):
        if count:
            region = grid.indices()[order[count - 1]]
            labels[region] = reference[region]
        expected = dice_and_hausdorff(labels, reference, SPACING).values()
        np.testing.assert_allclose(found[count], [s.hausdorff_penalized for s in expected], rtol=1e-6)
        np.testing.assert_allclose(dice[count], [s.dice for s in expected], rtol=1e-6)
    np.testing.assert_array_equal(volume.hausdorff(order, [3, 8]), found[[3, 8]])  # not from the start on


def test_hausdorff_to_the_inner_surface_of_a_ring():
    """Where the reference's surface lies inside the prediction, whose own is farther away than its voxels."""
    reference = np.zeros((16, 16, 3), np.uint8)
    reference[2:14, 2:14] = 2
    reference[6:10, 6:10] = 3
    prediction = np.where(reference > 0, 2, 0).astype(np.uint8)
    volume = ReviewedVolume(prediction, reference, (1.0, 1.0, 9.0), region_grid([(0, 16, 0, 16)] * 3, (16, 16, 3), 8))
    expected = [s.hausdorff_penalized for s in dice_and_hausdorff(prediction, reference, (1.0, 1.0, 9.0)).values()]
    assert expected[1] == 3
    np.testing.assert_allclose(volume.hausdorff(np.arange(12), [0])[0], expected, rtol=1e-6)


def test_regions_of_slices_without_a_heart_change_nothing():
    """Below and above it, where no voxel can be wrong."""
    prediction, reference = np.zeros((2, 16, 16, 4), np.uint8)
    reference[2:14, 2:14, 1:3], prediction[3:14, 2:12, 1:3] = 3, 3
    volume = ReviewedVolume(prediction, reference, SPACING, region_grid([(0, 16, 0, 16)] * 4, reference.shape, 8))
    empty, heart = [0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]
    before, after, corrected = volume.hausdorff(np.array(empty + heart), [0, 8, 16])[:, 2]
    assert before == after > corrected == 0


def copy_with_emap(root, target):
    shutil.copytree(root / "run", target)
    for record in target.rglob("qc.json"):
        record.write_text(record.read_text().replace('"bmap"', '"emap"'))


def test_other_cases_are_not_drawn_beside(study, tmp_path):
    root, *_ = study
    copy_with_emap(root, tmp_path / "run")
    for case in ("patient002_frame01", "patient002_frame05"):
        shutil.rmtree(tmp_path / "run" / case)
    with pytest.raises(ValueError, match="different cases: 2 are in one of them only, patient002_frame01 say"):
        effort(root / "run", root / "acdc", tmp_path / "out", compare=[tmp_path / "run"], seeds=1)
    assert not (tmp_path / "out" / "effort.csv").exists()


def test_a_case_that_fails_in_one_folder_is_left_out_of_all(study, tmp_path):
    root, *_ = study
    copy_with_emap(root, tmp_path / "emap")
    (tmp_path / "emap" / "patient002_frame05" / "entropy.nii.gz").unlink()
    outcome = effort(root / "run", root / "acdc", tmp_path / "out", compare=[tmp_path / "emap"], seeds=2)
    assert list(outcome.failures) == [f"{tmp_path / 'emap'}: patient002_frame05"]
    shutil.copytree(root / "run", tmp_path / "three")
    shutil.rmtree(tmp_path / "three" / "patient002_frame05")
    effort(tmp_path / "three", root / "acdc", tmp_path / "alone", seeds=2)
    with open(tmp_path / "out" / "effort.csv", newline="") as both, open(tmp_path / "alone" / "effort.csv") as alone:
        assert [row for row in csv.DictReader(both) if row["map"] == "bmap"] == list(csv.DictReader(alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda qc: qc.pop("detection"), "its failures were not detected"),
        (lambda qc: [qc["detection"].pop(key) for key in ("map", "boxes")], "its detection lacks map, boxes"),
        (lambda qc: qc["detection"]["boxes"].pop(), "not one of boxes for each of the 4 slices"),
    ],
)
def test_a_record_that_lacks_something_is_named(study, tmp_path, change, message):
    """As a failure of this case, with which the others go on."""
    root, case = study[0], "patient001_frame05"
    shutil.copytree(root / "run" / case, tmp_path / case)
    record = json.loads((tmp_path / case / "qc.json").read_text())
    change(record)
    (tmp_path / case / "qc.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"^{tmp_path / case}/qc.json: {message}"):
        read_case(case, tmp_path / case, References(root / "acdc"), "paper", "last")


def test_one_map_for_each_folder(study, tmp_path):
    root, *_ = study
    copy_with_emap(root, tmp_path / "run")
    shutil.copy(root / "run" / "patient001_frame05" / "qc.json", tmp_path / "run" / "patient001_frame05")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'run'}: cases of the maps bmap and emap"):
        effort(tmp_path / "run", root / "acdc", tmp_path / "out")


def test_the_command(study, tmp_path, command):
    root, *_ = study
    copy_with_emap(root, tmp_path / "run")
    (tmp_path / "run" / "patient002_frame05" / "qc.json").write_text("{}")
    (tmp_path / "run").rename(tmp_path / "2024")  # which Fire takes for a number
    places = ("--reference", root / "acdc", "--output", tmp_path / "out", "--compare_map", "2024")
    result = command("effort", "--predictions", root / "run", *places, "--seeds", 1, cwd=tmp_path)
    assert result.returncode == 1, result.stderr  # a case without detection
    assert "patient002_frame05" in result.stdout and "not detected" in result.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["failed"]) == 1 and [own["n_cases"] for own in summary["sets"]] == [3, 3]
    for name in ("effort.png", "effort.svg", "effort.csv", "summary.md"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_bad_settings(study, tmp_path):
    root, *_ = study
    with pytest.raises(ValueError, match="seeds"):
        effort(root / "run", root / "acdc", tmp_path, seeds=0)
    with pytest.raises(ValueError, match="has the bmap, as .*run"):
        effort(root / "run", root / "acdc", tmp_path, compare=[root / "run"], seeds=1)
    with pytest.raises(ValueError, match="criterion"):
        effort(root / "run", root / "acdc", tmp_path, criterion="mine")
