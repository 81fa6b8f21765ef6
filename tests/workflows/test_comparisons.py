"""Benchmarks that compare runs, on hand-made ones: every printed figure against numpy."""

import json
import re
import runpy
import shutil
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from miniature_run import BOXES, SPACING, cells_inside, load, save, write_patients
from scipy import stats

from cardiac_qc_plugin.transforms.failure_labels import failure_mask

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a benchmark prints."""

    def run(script, *arguments):
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def dice(labels, other):
    """Of RV, LVM, LV."""
    pairs = [(labels == label, other == label) for label in (1, 2, 3)]
    return [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]


def write_runs(root, count):
    """Runs over four scans; each further one has a band less of every structure, another map and other regions."""
    cases = write_patients(root, 2)
    runs = [root / "run"] + [root / f"run{k}" for k in range(1, count)]
    segmentations = {case: [prediction] for case, (prediction, _) in cases.items()}
    for k, run in enumerate(runs):
        if k:
            shutil.copytree(runs[0], run)
        for number, case in enumerate(cases):
            folder = run / case
            qc = json.loads((folder / "qc.json").read_text())
            qc["scores"] |= {"urgency": float((number * (1 + k)) % 4), "sample_disagreement": 0.1 * number + 0.05 * k}
            qc["detection"]["regions"] = [{}] * (number + k)
            (folder / "qc.json").write_text(json.dumps(qc))
            if k:
                labels = cases[case][0].copy()
                labels[40 + 4 * k : 44 + 4 * k + 2 * number] = 0
                segmentations[case].append(labels)
                save(folder / "segmentation.nii.gz", labels)
                save(folder / "bayesian.nii.gz", (load(folder / "bayesian.nii.gz") ** 2).astype(np.float32))
                save(folder / "failure_regions.nii.gz", np.roll(load(folder / "failure_regions.nii.gz"), 8 * k, 0))
    references = [reference for _, reference in cases.values()]
    return runs, list(segmentations.values()), references


def test_two_runs(tmp_path, printed):
    runs, segmentations, references = write_runs(tmp_path, 2)
    text = printed("two_runs.py", "--predictions", ",".join(map(str, runs)), "--reference", tmp_path / "acdc")
    lines = text.split("\n")
    scores = np.array([[dice(one, ref) for one in pair] for pair, ref in zip(segmentations, references, strict=True)])
    assert lines[0] == "4 scans" and lines[1].split() == ["Dice", "LV", "RV", "LVM", "mean"]
    for k, line in enumerate(lines[2:4]):
        means = scores[:, k, [2, 0, 1]].mean(axis=0)
        assert numbers(line.removeprefix(str(runs[k]))) == pytest.approx([*means, means.mean()], abs=6e-5)
    change = np.abs(scores[:, 0] - scores[:, 1])
    assert numbers(lines[4]) == pytest.approx([change.mean(), change.max()], abs=6e-5)
    hearts = [(a > 0) | (b > 0) for a, b in segmentations]
    other = sum((a != b).sum() for a, b in segmentations) / sum(heart.sum() for heart in hearts)
    assert numbers(lines[5])[0] / 100 == pytest.approx(other, abs=6e-5)
    cases = sorted(path.name for path in runs[0].iterdir())
    maps = [
        [load(run / case / "bayesian.nii.gz")[heart] for run in runs] for case, heart in zip(cases, hearts, strict=True)
    ]
    correlation = [stats.pearsonr(*pair).statistic for pair in maps]
    difference = np.mean([np.abs(a - b).mean() for a, b in maps])
    mean = np.mean([np.concatenate(pair).mean() for pair in maps])
    found = numbers(lines[6].replace("b-maps", ""))
    assert found == pytest.approx([np.mean(correlation), min(correlation), difference, mean], abs=6e-5)
    flagged = np.array([[load(run / case / "failure_regions.nii.gz") > 0 for run in runs] for case in cases])
    same = 2 * (flagged[:, 0] & flagged[:, 1]).sum() / flagged.sum()
    assert numbers(lines[7]) == pytest.approx([0 + 1 + 2 + 3, 1 + 2 + 3 + 4, 100 * same], abs=0.06)
    assert numbers(lines[8]) == pytest.approx([stats.spearmanr([0, 1, 2, 3], [0, 2, 0, 2]).statistic], abs=6e-5)


def test_disagreement_of_three_runs(tmp_path, printed):
    runs, segmentations, references = write_runs(tmp_path, 3)
    text = printed("disagreement.py", "--predictions", ",".join(map(str, runs)), "--reference", tmp_path / "acdc")
    votes = []
    for first, *others in segmentations:
        counted = np.array([[(one == label) for one in (first, *others)] for label in range(4)]).sum(axis=1)
        most = counted.max(axis=0) == counted  # several labels, where all three differ: the first run's is taken
        votes.append(np.where(np.take_along_axis(most, first[None].astype(int), 0)[0], first, most.argmax(axis=0)))
    apart = [1 - np.mean([np.mean(dice(a, b)) for a, b in combinations(own, 2)]) for own in segmentations]
    samples = 0.1 * np.arange(4)[:, None] + 0.05 * np.arange(3)
    for k, name in enumerate([*map(str, runs), "vote"]):
        labels = votes if k == 3 else [own[k] for own in segmentations]
        risk = np.array([1 - np.mean(dice(a, b)) for a, b in zip(labels, references, strict=True)])
        scores = {"the runs": np.array(apart), "all runs' samples": samples.mean(axis=1), "oracle": risk}
        scores |= {} if k == 3 else {"its samples": samples[:, k]}
        for score, values in scores.items():
            (line,) = [one for one in text.split("\n") if one.startswith(f"{name} ") and f" {score} " in one]
            kept = risk[np.argsort(values, kind="stable")]  # the least suspicious scan first
            area = np.mean([kept[: i + 1].mean() for i in range(4)])
            expected = [1 - risk.mean(), area, stats.pearsonr(values, risk).statistic]
            assert numbers(line.removeprefix(name).replace(score, "")) == pytest.approx(expected, abs=6e-4), (
                name,
                score,
            )


def test_regions(tmp_path, printed):
    cases = write_patients(tmp_path, 2)
    text = printed("regions.py", "--predictions", tmp_path / "run", "--reference", tmp_path / "acdc", "--flagged", 0.1)
    failing, scores, scan, voxels, total = [], {"detector": [], "uncertainty": []}, [], [], []
    for number, (case, (prediction, reference)) in enumerate(cases.items()):
        failures = failure_mask(prediction, reference, SPACING)
        total.append(failures.sum())
        files = {"detector": "failure_probability", "uncertainty": "bayesian"}
        maps = {name: load(tmp_path / "run" / case / f"{file}.nii.gz") for name, file in files.items()}
        for z, box in enumerate(BOXES):
            for _, _, rows, cols in cells_inside(box):
                failing.append(failures[rows, cols, z].any())
                voxels.append(failures[rows, cols, z].sum())
                scan.append(number)
                for name, volume in maps.items():
                    scores[name].append(volume[rows, cols, z].astype(float).mean())
    failing = np.array(failing)
    assert f"4 scans, {failing.size} regions, of which {failing.mean():.2%} fail" in text
    for name, values in scores.items():
        values = np.array(values).round(6)
        area, found = 0.0, 0
        for threshold in np.unique(values)[::-1]:
            hits = failing[values >= threshold]
            area, found = area + (hits.sum() - found) * hits.mean(), hits.sum()
        match = re.search(rf"{name}: average precision ([\d.]+)\n(.*)", text)
        assert float(match[1]) == pytest.approx(area / failing.sum(), abs=6e-5)
        flagged = values >= np.quantile(values, 0.9)
        share = [np.sum(np.array(voxels)[flagged & (np.array(scan) == i)]) / total[i] for i in range(4)]
        expected = [100 * flagged.mean(), 100 * failing[flagged].mean(), 100 * np.mean(share)]
        assert numbers(match[2]) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("script", ["two_runs.py", "disagreement.py", "regions.py"])
def test_a_scan_without_labels_is_named(tmp_path, printed, script):
    runs, *_ = write_runs(tmp_path, 2)
    next((tmp_path / "acdc").rglob("patient001_frame01_gt.nii.gz")).unlink()
    next((tmp_path / "acdc").rglob("patient001_frame01.nii.gz")).unlink()
    given = runs[0] if script == "regions.py" else ",".join(map(str, runs))
    with pytest.raises(SystemExit, match="patient001_frame01: .*no label file"):
        printed(script, "--predictions", given, "--reference", tmp_path / "acdc")
