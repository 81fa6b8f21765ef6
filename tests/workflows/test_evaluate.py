import csv
import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.image import imread
from miniature_run import (
    BOXES,
    SHAPE,
    SPACING,
    cells_inside,
    hausdorff,
    heart,
    load,
    save,
    spoiled,
    write_case,
    write_patients,
)
from scipy import stats
from sklearn.metrics import average_precision_score

from cardiac_qc_plugin.transforms.failure_labels import failure_mask
from cardiac_qc_plugin.workflows.correct import correct
from cardiac_qc_plugin.workflows.evaluate import evaluate

LABELS = {"LV": 3, "RV": 1, "LVM": 2}
VOXEL_ML = SPACING[0] * SPACING[1] * SPACING[2] / 1000
CASE = "patient001_frame01"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Three patients, evaluated and compared with the simulated correction."""
    root = tmp_path_factory.mktemp("evaluate")
    cases = write_patients(root, 3)
    correct(root / "run", root / "corrected", reference=root / "acdc")
    outcome = evaluate(root / "run", root / "acdc", root / "out", compare=root / "corrected")
    assert not outcome.failures
    return root, cases, outcome


@pytest.fixture
def run(tmp_path):
    return tmp_path, write_patients(tmp_path, 1)


N_REGIONS = sum(1 for box in BOXES for _ in cells_inside(box))  # some cells of the crops lie beside the image


def rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def summary(root):
    return json.loads((root / "out" / "summary.json").read_text())


def dice(prediction, reference):
    return 2 * (prediction & reference).sum() / (prediction.sum() + reference.sum())


def cells_of(cases, measure, frame):
    """A measure by structure over the cases of a phase."""
    own = [pair for case, pair in sorted(cases.items()) if case.endswith(frame)]
    return {
        name: [measure(prediction == label, reference == label) for prediction, reference in own]
        for name, label in LABELS.items()
    }


def test_dice_and_hausdorff_tables(evaluated):
    root, cases, _ = evaluated
    found = summary(root)
    means = []
    for phase, frame in (("ED", "frame01"), ("ES", "frame05")):
        for metric, measure in (("dice", dice), ("hausdorff", hausdorff)):
            for name, values in cells_of(cases, measure, frame).items():
                cell = found["segmentation"][phase][name]
                assert cell[metric]["mean"] == pytest.approx(np.mean(values), rel=1e-6)
                assert cell[metric]["sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-5)
                assert (cell[metric]["n"], cell["n_missing"]) == (3, 0)
                if metric == "dice":
                    means.append(np.mean(values))
    assert found["mean_dice"] == {"mean": pytest.approx(np.mean(means)), "cells": 6}


def test_cases_csv(evaluated):
    root, cases, _ = evaluated
    pandas = pytest.importorskip("pandas")
    table = pandas.read_csv(root / "out" / "cases.csv").set_index("case")
    assert list(table.index) == sorted(cases)
    assert list(table.phase) == ["ED", "ES"] * 3 and list(table.patient[::2]) == [
        "patient001",
        "patient002",
        "patient003",
    ]
    for case, (prediction, reference) in cases.items():
        row = table.loc[case]
        for name, label in LABELS.items():
            assert row[f"dice_{name}"] == pytest.approx(dice(prediction == label, reference == label))
            assert row[f"hausdorff_mm_{name}"] == pytest.approx(hausdorff(prediction == label, reference == label))
            assert row[f"hausdorff_penalized_mm_{name}"] == row[f"hausdorff_mm_{name}"]
            assert row[f"volume_ml_{name}"] == pytest.approx((prediction == label).sum() * VOXEL_ML)
            assert row[f"reference_volume_ml_{name}"] == pytest.approx((reference == label).sum() * VOXEL_ML)
        regions = load(root / "run" / case / "failure_regions.nii.gz")
        assert row.regions == N_REGIONS
        assert row.regions_flagged == regions.max()
        assert row.slices_flagged == (regions > 0).any(axis=(0, 1)).sum()
        failures = failure_mask(prediction, reference)
        assert row.slices_failing == failures.any(axis=(0, 1)).sum()
    assert np.isnan(table.score_region_failure[CASE])


def test_clinical_indices(evaluated):
    root, cases, _ = evaluated
    table = rows(root / "out" / "patients.csv")
    sides = {"automatic": 0, "reference": 1}
    ef = {}
    for side, index in sides.items():
        volume = {
            (case, name): (pair[index] == label).sum() * VOXEL_ML
            for case, pair in cases.items()
            for name, label in LABELS.items()
        }
        for row in table:
            ed, es = (f"{row['patient']}_frame{frame}" for frame in ("01", "05"))
            assert float(row[f"{side}_lv_edv"]) == pytest.approx(volume[ed, "LV"])
            assert float(row[f"{side}_rv_esv"]) == pytest.approx(volume[es, "RV"])
            assert float(row[f"{side}_lvm_mass"]) == pytest.approx(1.05 * volume[ed, "LVM"])
            ef[side, row["patient"]] = 100 * (1 - volume[es, "RV"] / volume[ed, "RV"])
            assert float(row[f"{side}_rv_ef"]) == pytest.approx(ef[side, row["patient"]])
    automatic, reference = (np.array([ef[side, row["patient"]] for row in table]) for side in sides)
    agreement = summary(root)["clinical"]["rv_ef"]
    assert agreement["bias"] == pytest.approx((automatic - reference).mean())
    assert agreement["sd"] == pytest.approx((automatic - reference).std(ddof=1))
    assert agreement["mae"] == pytest.approx(abs(automatic - reference).mean())
    assert agreement["r"] == pytest.approx(np.corrcoef(automatic, reference)[0, 1])
    assert agreement["n"] == 3


def regions_by_hand(root, case, failures):
    """(probability, failure voxels, slice) of every region, from the files and the boxes."""
    probability = load(root / "run" / case / "failure_probability.nii.gz")
    for z, box in enumerate(BOXES):
        for _, _, rows, cols in cells_inside(box):
            inside = probability[rows, cols, z]
            yield float(inside[0, 0]), int(failures[rows, cols, z].sum()), z


@pytest.mark.parametrize("criterion", ["paper", "released_code"])
def test_detection(evaluated, criterion):
    root, cases, _ = evaluated
    sensitivity, false_positives, slice_share, region_share = [], [], [], []
    pooled, by_patient = ([], []), {}
    n_failing = n_found = n_flagged = n_right = outside = total = 0
    for case, (prediction, reference) in cases.items():
        failures = failure_mask(prediction, reference, SPACING[:2], criterion)
        regions = list(regions_by_hand(root, case, failures))
        flagged = [region for region in regions if region[0] >= 0.5]
        sensitivity.append(sum(n for _, n, _ in flagged) / failures.sum())
        false_positives.append(sum(n == 0 for _, n, _ in flagged))
        slice_share.append(failures.any(axis=(0, 1)).mean())
        region_share.append(np.mean([n > 0 for _, n, _ in regions]))
        outside += failures.sum() - sum(n for _, n, _ in regions)
        total += failures.sum()
        n_flagged, n_right = n_flagged + len(flagged), n_right + sum(n > 0 for _, n, _ in flagged)
        n_failing += sum(n > 0 for _, n, _ in regions)
        n_found += sum(n > 0 for _, n, _ in flagged)
        for z in range(4):
            truth, score = failures[..., z].any(), max(p for p, _, index in regions if index == z)
            for own in (pooled, by_patient.setdefault(case[:10], ([], []))):
                own[0].append(truth)
                own[1].append(score)
    found = summary(root)["detection"]
    assert (found["n_cases"], found["thresholds"]) == (6, [0.5])
    found = found["criteria"][criterion]
    point = found["operating_point"]
    assert outside > 0
    assert point["failure_voxels_outside"] == pytest.approx(outside / total)
    assert point["voxel_sensitivity"] == pytest.approx(np.mean(sensitivity))
    assert point["false_positive_regions"] == pytest.approx(np.mean(false_positives))
    assert point["region_precision"] == pytest.approx(n_right / n_flagged)
    assert point["region_recall"] == pytest.approx(n_found / n_failing)
    assert found["slices_failing_percent"] == pytest.approx(100 * np.mean(slice_share))
    assert found["regions_failing_percent"] == pytest.approx(100 * np.mean(region_share))
    precision = found["slice_average_precision"]
    assert precision["pooled"] == pytest.approx(average_precision_score(*pooled))
    values = [average_precision_score(*own) for own in by_patient.values()]
    assert precision["per_patient"]["mean"] == pytest.approx(np.mean(values))
    # the curves: at threshold 0 all regions are positive
    curve = [row for row in rows(root / "out/curves/regions.csv") if row["criterion"] == criterion]
    expected = np.mean([N_REGIONS - N_REGIONS * share for share in region_share])
    assert float(curve[0]["threshold"]) == 0 and 0.999 < float(curve[-2]["threshold"]) < 1
    assert float(curve[0]["false_positives"]) == pytest.approx(expected)
    slices = [row for row in rows(root / "out/curves/slices.csv") if row["criterion"] == criterion]
    assert float(slices[0]["precision"]) == pytest.approx(np.mean(slice_share))


def test_each_fold_of_a_cross_validation_has_its_threshold(evaluated, tmp_path):
    root, cases, _ = evaluated
    flagged = 0
    for number, (case, (prediction, reference)) in enumerate(cases.items()):
        write_case(tmp_path / "run" / case, prediction, reference, number, threshold=0.3 + 0.1 * (number % 2))
        flagged += load(tmp_path / "run" / case / "failure_regions.nii.gz").max()
    evaluate(tmp_path / "run", root / "acdc", tmp_path / "out")
    found = summary(tmp_path)["detection"]
    assert found["thresholds"] == [0.3, 0.4]
    assert found["criteria"]["paper"]["operating_point"]["regions_flagged"] == pytest.approx(flagged / (6 * N_REGIONS))


@pytest.mark.parametrize("name, file", [("emap", "entropy.nii.gz"), ("bmap", "bayesian.nii.gz")])
def test_risk_coverage(evaluated, name, file):
    root, cases, _ = evaluated
    grid = np.linspace(0, 1, 101)
    curves, errors = [], []
    for case, (prediction, reference) in cases.items():
        if not case.endswith("05"):
            continue
        where = np.argwhere(reference)
        box = tuple(slice(*bounds) for bounds in zip(where.min(0), where.max(0) + 1, strict=True))
        wrong, uncertainty = (prediction != reference)[box], load(root / "run" / case / file)[box]
        kept = [uncertainty <= threshold for threshold in sorted(set(uncertainty.ravel().tolist()))]
        coverage, risk = [0, *(mask.mean() for mask in kept)], [0, *((mask & wrong).sum() for mask in kept)]
        curves.append(np.interp(grid, coverage, risk))
        errors.append(wrong.sum())
    written = [row for row in rows(root / "out/curves/risk_coverage.csv") if (row["map"], row["phase"]) == (name, "ES")]
    np.testing.assert_allclose([float(row["coverage"]) for row in written], grid)
    np.testing.assert_allclose([float(row["risk"]) for row in written], np.mean(curves, axis=0))
    found = summary(root)["risk_coverage"][name]["ES"]
    areas = [np.sum((curve[1:] + curve[:-1]) / 2) / 100 for curve in curves]
    assert found["area"] == {
        "mean": pytest.approx(np.mean(areas)),
        "sd": pytest.approx(np.std(areas, ddof=1)),
        "n": 3,
    }
    normalized = np.mean([area / n for area, n in zip(areas, errors, strict=True)])
    assert found["normalized_area"]["mean"] == pytest.approx(normalized)
    assert found["best_normalized_area"]["mean"] < normalized < 0.5


def test_a_map_of_no_samples_measures_nothing(tmp_path):
    """The b-map of a run for the e-map is 0 everywhere."""
    (case,) = write_patients(tmp_path, 1).keys() - {"patient001_frame05"}
    path = tmp_path / "run" / case / "qc.json"
    for samples, maps in ((2, {"emap", "bmap"}), (0, {"emap"}), (1, {"emap"})):
        path.write_text(json.dumps({**json.loads(path.read_text()), "segmentation": {"samples": samples}}))
        evaluate(path.parent, tmp_path / "acdc", tmp_path / "out")
        found = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert set(found["risk_coverage"]) == maps
        assert {name for name in found["scan_level"] if "map" in name} == {f"mean_{name}" for name in maps}


def test_scan_scores(evaluated):
    root, cases, _ = evaluated
    risk = np.array(
        [1 - np.mean([dice(p == label, r == label) for label in (1, 2, 3)]) for _, (p, r) in sorted(cases.items())]
    )
    disagreement = np.array([np.mean(p != r) for _, (p, r) in sorted(cases.items())])
    emap = []
    for case, (prediction, _) in sorted(cases.items()):
        where = np.argwhere(prediction)
        box = tuple(slice(*bounds) for bounds in zip(where.min(0), where.max(0) + 1, strict=True))
        emap.append(load(root / "run" / case / "entropy.nii.gz")[box].mean())
    found = summary(root)["scan_level"]
    assert set(found) == {"sample_disagreement", "region_failure", "mean_emap", "mean_bmap"}
    for name, score in (("sample_disagreement", disagreement), ("mean_emap", np.array(emap))):
        ordered = risk[np.argsort(score)]
        assert found[name]["aurc"] == pytest.approx(np.mean([ordered[: k + 1].mean() for k in range(6)]))
        assert found[name]["pearson"] == pytest.approx(np.corrcoef(score, risk)[0, 1], rel=1e-5)
        best = np.sort(risk)
        assert found[name]["oracle"] == pytest.approx(np.mean([best[: k + 1].mean() for k in range(6)]))
        assert found[name]["random"] == pytest.approx(risk.mean())
    assert (found["region_failure"]["n"], found["region_failure"]["n_excluded"]) == (5, 1)


def test_before_and_after(evaluated):
    root, cases, outcome = evaluated
    after = {
        case: (load(root / "corrected" / case / "segmentation.nii.gz"), reference)
        for case, (_, reference) in cases.items()
    }
    comparison = summary(root)["comparison"]
    fell = 0
    for phase, frame in (("ED", "frame01"), ("ES", "frame05")):
        for metric, measure in (("dice", dice), ("hausdorff", hausdorff)):
            first, second = cells_of(cases, measure, frame), cells_of(after, measure, frame)
            for name in LABELS:
                wanted = {"metric": metric, "phase": phase, "structure": name}
                (cell,) = [c for c in comparison["cells"] if wanted.items() <= c.items()]
                difference = np.mean(second[name]) - np.mean(first[name])
                assert cell["mean_difference"] == pytest.approx(difference, abs=1e-5)
                assert cell["before"]["mean"] == pytest.approx(np.mean(first[name]), rel=1e-6)
                u = stats.mannwhitneyu(first[name], second[name], alternative="two-sided")
                assert cell["mann_whitney_p"] == pytest.approx(u.pvalue)
                if not np.array_equal(first[name], second[name]):
                    assert cell["wilcoxon_p"] == pytest.approx(stats.wilcoxon(first[name], second[name]).pvalue)
                fell += metric == "hausdorff" and difference < -1e-9
    assert comparison["hausdorff_fell"] == fell > 0
    assert f"fell in {fell} of 6 cells" in outcome.text
    assert len(rows(root / "out" / "comparison.csv")) == 18


def test_text_and_figures(evaluated):
    root, _, outcome = evaluated
    text = (root / "out" / "summary.md").read_text(encoding="utf-8")
    assert outcome.text == text
    header = next(line for line in text.splitlines() if "LV ED" in line)
    assert [c.strip() for c in header.split("|")[2:-1]] == [
        "LV ED",
        "RV ED",
        "LVM ED",
        "LV ES",
        "RV ES",
        "LVM ES",
    ]
    cell = summary(root)["segmentation"]["ES"]["RV"]["dice"]
    dices = next(line for line in text.splitlines() if line.startswith("| Dice"))
    assert dices.split("|")[6].strip() == f"{cell['mean']:.3f} ± {cell['sd']:.3f}"
    assert "nan" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for name in ("regions", "slices", "risk_coverage"):
        picture = imread(root / "out" / "figures" / f"{name}.png")
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05


def test_a_missing_structure_is_counted_and_no_zero_distance(run):
    root, cases = run
    prediction, reference = cases[CASE]
    path = root / "run" / CASE / "segmentation.nii.gz"
    save(path, np.where(prediction == 1, 0, prediction).astype(np.uint8))
    outcome = evaluate(root / "run", root / "acdc", root / "out")
    cell = summary(root)["segmentation"]["ED"]["RV"]
    diagonal = np.sqrt(np.sum(np.multiply(SHAPE, SPACING) ** 2))
    assert cell["n_missing"] == 1
    assert cell["dice"] == {"mean": 0.0, "sd": None, "n": 1}
    assert cell["hausdorff"] == {"mean": None, "sd": None, "n": 0}
    assert cell["hausdorff_penalized"]["mean"] == pytest.approx(diagonal)
    row = rows(root / "out" / "cases.csv")[0]
    assert (row["missing_RV"], row["missing_LV"], row["hausdorff_mm_RV"]) == ("1", "0", "nan")
    assert "missing = diagonal" in outcome.text and "nan" not in outcome.text
    assert summary(root)["clinical"]["rv_ef"]["n"] == 0  # no RV at end-diastole: no EF
    assert summary(root)["clinical"]["lv_ef"]["n"] == 1


def test_corrected_folder_alone_has_segmentation_only_and_no_old_curves(run):
    root, _ = run
    evaluate(root / "run", root / "acdc", root / "out")
    assert (root / "out" / "figures" / "regions.png").is_file()
    correct(root / "run", root / "corrected", reference=root / "acdc", rule="upper_bound")
    outcome = evaluate(root / "corrected", root / "acdc", root / "out")
    assert not outcome.failures
    assert "## Segmentation" in outcome.text and "Detection" not in outcome.text
    assert summary(root)["detection"] == summary(root)["risk_coverage"] == {}
    assert not list((root / "out").glob("figures/*")) + list((root / "out").glob("curves/*"))


def test_a_cine_with_labels_at_two_phases(tmp_path, capsys):
    """ACDC's: frames 1 and 5. The other phases are left out, but not those of a cine without any labels."""
    write_patients(tmp_path, 1)
    evaluate(tmp_path / "run", tmp_path / "acdc", tmp_path / "frames")
    cine = tmp_path / "cines" / "patient001_4d"
    for phase in range(6):
        frame = "patient001_frame05" if phase == 4 else "patient001_frame01"
        shutil.copytree(tmp_path / "run" / frame, cine / f"phase{phase:02d}")
    outcome = evaluate(tmp_path / "cines", tmp_path / "acdc", tmp_path / "out")
    assert not outcome.failures
    assert "4 phase(s) of cines without labels left out" in capsys.readouterr().err
    found, expected = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "frames"))
    for key in ("n_cases", "segmentation", "mean_dice", "clinical"):
        assert found[key] == expected[key]
    assert set(found["segmentation"]) == {"ED", "ES"} and found["clinical"]["lv_ef"]["n"] == 1
    shutil.copytree(cine / "phase01", tmp_path / "cines" / "other_4d" / "phase00")
    outcome = evaluate(tmp_path / "cines", tmp_path / "acdc", tmp_path / "out")
    assert list(outcome.failures) == ["other_4d/phase00"]


@pytest.mark.parametrize("swapped", [False, True])
def test_labels_tell_which_of_two_phases_is_end_diastole(tmp_path, swapped):
    """Of a DICOM cine, say: labels by the phases' names, and no Info.cfg. Of three, they do not tell."""
    write_patients(tmp_path, 1)
    evaluate(tmp_path / "run", tmp_path / "acdc", tmp_path / "frames")
    phases = {"frame01": 9 if swapped else 2, "frame05": 6}
    for frame, phase in phases.items():
        shutil.copytree(tmp_path / "run" / f"patient001_{frame}", tmp_path / "cines" / "study" / f"phase{phase:02d}")
        label = tmp_path / "labels" / "study" / f"phase{phase:02d}_gt.nii.gz"
        label.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next((tmp_path / "acdc").rglob(f"patient001_{frame}_gt.nii.gz")), label)
    outcome = evaluate(tmp_path / "cines", tmp_path / "labels", tmp_path / "out")
    assert not outcome.failures
    found, expected = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "frames"))
    for key in ("segmentation", "mean_dice", "clinical"):
        assert found[key] == expected[key]
    third = tmp_path / "cines" / "study" / "phase11"
    shutil.copytree(tmp_path / "cines" / "study" / f"phase{phase:02d}", third)
    shutil.copy(label, label.with_name("phase11_gt.nii.gz"))
    evaluate(tmp_path / "cines", tmp_path / "labels", tmp_path / "out")
    assert set(summary(tmp_path)["segmentation"]) == {"unknown"}
    label.with_name("phase11_gt.nii.gz").write_bytes(b"damaged")  # a third phase all the same
    outcome = evaluate(tmp_path / "cines", tmp_path / "labels", tmp_path / "out")
    assert list(outcome.failures) == ["study/phase11"]
    assert set(summary(tmp_path)["segmentation"]) == {"unknown"}


def test_unknown_phase_has_its_own_columns_and_no_patient(tmp_path):
    reference = heart(1)
    save(tmp_path / "labels" / "scan_gt.nii.gz", reference)
    save(tmp_path / "run" / "scan" / "segmentation.nii.gz", spoiled(reference, 1))
    outcome = evaluate(tmp_path / "run" / "scan", tmp_path / "labels", tmp_path / "out")
    assert set(summary(tmp_path)["segmentation"]) == {"unknown"}
    assert summary(tmp_path)["mean_dice"] == {"mean": None, "cells": 0}
    assert "LV unknown" in outcome.text
    assert not (tmp_path / "out" / "patients.csv").exists()


def test_the_apex_may_lie_first(tmp_path):
    reference = heart(1)[..., :2]
    prediction = reference.copy()
    prediction[47:49, 53:55, 0] = 0  # inside the LV, but only 4 voxels: a failure in the apical slice alone
    folder = tmp_path / "run" / "a"
    save(tmp_path / "labels" / "a_gt.nii.gz", reference)
    save(folder / "segmentation.nii.gz", prediction)
    save(folder / "failure_probability.nii.gz", np.zeros(reference.shape, np.float32))
    detection = {"threshold": 0.5, "region_size": 8, "boxes": BOXES[:2]}
    (folder / "qc.json").write_text(json.dumps({"detection": detection}))
    for apex, failing, found in (("last", 0.0, None), ("first", 50.0, 0.0)):
        evaluate(tmp_path / "run", tmp_path / "labels", tmp_path / "out", apex=apex)
        paper = summary(tmp_path)["detection"]["criteria"]["paper"]
        assert paper["slices_failing_percent"] == failing
        assert paper["operating_point"]["voxel_sensitivity"] == found


def spoil(root, case, kind):
    """Break one file of a case; returns its path."""
    folder = root / "run" / case
    if kind == "no JSON":
        path = folder / "qc.json"
        path.write_text("{")
    elif kind == "box lost":
        path = folder / "qc.json"
        path.write_text(path.read_text().replace(", [24, 104, -8, 72]", ""))
    elif kind == "small map":
        path = folder / "entropy.nii.gz"
        save(path, np.zeros((9, 9, 4), np.float32))
    elif kind == "map with nan":
        path = folder / "bayesian.nii.gz"
        save(path, np.full(SHAPE, np.nan, np.float32))
    elif kind == "probability above 1":
        path = folder / "failure_probability.nii.gz"
        save(path, np.full(SHAPE, 2, np.float32))
        path = folder / "qc.json"
    elif kind == "label 7":
        path = folder / "segmentation.nii.gz"
        save(path, np.full(SHAPE, 7, np.uint8))
    elif kind == "empty reference":
        path = root / "acdc" / case[:10] / f"{case}_gt.nii.gz"
        save(path, np.zeros(SHAPE, np.uint8))
    return path


def test_broken_cases_are_reported_and_the_others_measured(tmp_path):
    cases = sorted(write_patients(tmp_path, 4))
    kinds = ["no JSON", "box lost", "small map", "map with nan"]
    kinds += ["probability above 1", "label 7", "empty reference"]
    broken = {case: spoil(tmp_path, case, kind) for case, kind in zip(cases, kinds, strict=False)}
    outcome = evaluate(tmp_path / "run", tmp_path / "acdc", tmp_path / "out")
    assert outcome.failures.keys() == broken.keys()
    for case, path in broken.items():
        assert outcome.failures[case].startswith(f"{path}: ")
        assert f"- {case}: {path}" in outcome.text
    assert summary(tmp_path)["n_cases"] == 1
    assert summary(tmp_path)["failed"] == outcome.failures


def test_folds_are_measured_together(evaluated, tmp_path):
    """Folders of single folds give the tables of one folder with all cases; a case may be in one of them only."""
    root, cases, _ = evaluated
    for name in ("run", "corrected"):
        for case in cases:
            shutil.copytree(root / name / case, tmp_path / f"{name}{int(case < 'patient002')}" / case)
    folders = [[tmp_path / f"{name}{fold}" for fold in (1, 0)] for name in ("run", "corrected")]
    assert not evaluate(folders[0], root / "acdc", tmp_path / "out", compare=folders[1]).failures
    together, single = summary(tmp_path), summary(root)
    for each in (together, single):
        del each["settings"]
    assert together == single
    test = single["comparison"]["clinical_tests"]["lv_ef"]
    automatic = [float(row["automatic_lv_ef"]) for row in rows(root / "out" / "patients.csv")]
    assert test["before"]["mean"] == pytest.approx(np.mean(automatic)) and test["n"] == 3
    with pytest.raises(ValueError, match="run1: the case patient001_frame01 is in another of the folders"):
        evaluate([root / "run", tmp_path / "run1"], root / "acdc", tmp_path / "out")


def test_no_measurable_case_is_an_error(run):
    root, cases = run
    save(root / "labels" / "other_gt.nii.gz", heart(1))
    with pytest.raises(ValueError, match=rf"none of its 2 case\(s\) could be measured:\n- {CASE}: .*no label file"):
        evaluate(root / "run", root / "labels", root / "out")
    assert not (root / "out").exists()


def test_a_case_in_one_folder_only_is_not_compared(run):
    root, _ = run
    correct(root / "run", root / "corrected", reference=root / "acdc")
    (root / "corrected" / CASE / "segmentation.nii.gz").unlink()
    outcome = evaluate(root / "run", root / "acdc", root / "out", compare=root / "corrected")
    assert outcome.failures == {f"{CASE} (compare)": "in one of the two folders only, so not compared."}
    assert summary(root)["n_cases"] == 2
    assert summary(root)["comparison"]["n_cases"] == 1


def test_a_correction_of_another_segmentation_is_not_compared(run):
    root, cases = run
    correct(root / "run", root / "corrected", reference=root / "acdc")
    _, reference = cases[CASE]
    write_case(root / "run" / CASE, np.roll(reference, 3, axis=0), reference, 9)
    outcome = evaluate(root / "run", root / "acdc", root / "out", compare=root / "corrected")
    record = root / "corrected" / CASE / "correction.json"
    assert outcome.failures[f"{CASE} (compare)"].startswith(f"{record}: made from another segmentation than ")
    assert summary(root)["comparison"]["n_cases"] == 1
    record.write_text('{"case":')  # cut short: its case alone fails
    outcome = evaluate(root / "run", root / "acdc", root / "out", compare=root / "corrected")
    assert outcome.failures.keys() == {f"{CASE} (compare)"} and str(record) in outcome.failures[f"{CASE} (compare)"]
    assert not evaluate(root / "run", root / "acdc", root / "out", compare=root / "run").failures


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"criterion": "strict"}, "'strict'"),
        ({"apex": "left"}, "'left'"),
        ({"reference": "nowhere"}, "nowhere: no such folder"),
        ({"predictions": "empty"}, "no segmentation.nii.gz"),
    ],
)
def test_settings_that_do_not_work(run, settings, message):
    root, _ = run
    paths = {"predictions": root / "run", "reference": root / "acdc"}
    paths |= {key: root / settings.pop(key) for key in list(settings) if key in paths}
    with pytest.raises(ValueError, match=message):
        evaluate(**paths, output=root / "out", **settings)


def test_plausibility_and_intervals(tmp_path):
    """Spoiled masks violate more than their references; intervals that are wide enough cover, narrow ones do not."""
    cases = write_patients(tmp_path, 2)
    for number, case in enumerate(sorted(cases)):
        record = tmp_path / "run" / case / "qc.json"
        qc = json.loads(record.read_text())
        reference = cases[case][1]
        voxel = 1.5 * 1.5 * 8 / 1000
        spread = 50.0 if number < 2 else 1e-6  # of the first patient, of the second
        samples = {
            name: [(reference == label).sum() * voxel + sign * spread for sign in (-1, 0, 1)]
            for label, name in ((1, "RV"), (2, "LVM"), (3, "LV"))
        }
        record.write_text(json.dumps(qc | {"segmentation": {"sample_volume_ml": samples}}))
    evaluate(tmp_path / "run", tmp_path / "acdc", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    mass = summary["intervals"]["lvm_mass_g"]
    assert mass["n"] == 2 and mass["coverage"] == 0.5
    segmentations, references = (summary["plausibility"][name] for name in ("segmentations", "references"))
    # each has a blob of LVM far from the heart
    assert segmentations["criteria"]["fragments_LVM"] == 4 and references["criteria"]["fragments_LVM"] == 0
    assert segmentations["violations"] > references["violations"] and segmentations["n_slices"] == 16
    text = (tmp_path / "out" / "summary.md").read_text()
    assert re.search(r"\| LVM mass \(g\) +\| +50\.0 \|", text)
    assert "## Plausibility: segmentations and references" in text and "## Intervals of the clinical indices" in text
