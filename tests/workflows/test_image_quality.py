"""Worse images: what the degradations do to a phantom, and the printed figures of hand-made runs."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from miniature_run import BOXES, SPACING, cells_inside, load, write_patients
from scipy import stats
from sklearn.metrics import average_precision_score

from cardiac_qc_plugin.data import acdc_datalist
from cardiac_qc_plugin.data.phantom import write_acdc_like
from cardiac_qc_plugin.transforms.failure_labels import failure_mask
from cardiac_qc_plugin.workflows.calibrate import THRESHOLDS, Calibration
from cardiac_qc_plugin.workflows.files import write_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KINDS = ("original", "noise", "bias", "blur", "contrast", "motion")


@pytest.fixture
def benchmark(monkeypatch):
    def run(*arguments):
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", ["image_quality.py", *map(str, arguments)])
        return runpy.run_path(str(BENCHMARKS / "image_quality.py"), run_name="__main__")

    return run


def test_degradations(tmp_path, benchmark):
    write_acdc_like(tmp_path / "data", 4, shape=(96, 96), n_slices=7)
    write_json(tmp_path / "folds.json", acdc_datalist(tmp_path / "data", folds=2))
    benchmark(
        "degrade", "--datalist", tmp_path / "folds.json", "--root", tmp_path / "data", "--output", tmp_path / "out"
    )
    folder = tmp_path / "out"
    written = {
        kind: sorted(path.relative_to(folder / kind) for path in folder.rglob(f"{kind}/*/*.gz")) for kind in KINDS
    }
    assert len(written["original"]) == 4 and all(names == written["original"] for names in written.values())
    name = written["original"][0]
    scan = load(tmp_path / "data" / name)
    images = {kind: load(folder / kind / name).astype(float) for kind in KINDS}
    original = images["original"]
    np.testing.assert_allclose(original, 1000 * np.clip(scan / np.percentile(scan, 99.9), 0, 1), atol=0.51)
    infos = [path / name.parent / "Info.cfg" for path in (tmp_path / "data", folder / "blur")]
    assert infos[0].read_text() == infos[1].read_text()
    grown = (images["noise"] ** 2 - original**2).mean()  # Rician: by twice the variance, whatever the signal
    assert grown == pytest.approx(2 * 60**2, rel=0.1)
    np.testing.assert_allclose(images["contrast"], (original / 1000) ** 2 * 1000, atol=1.5)
    spectrum = (np.abs(np.fft.fftshift(np.fft.fft2(images["blur"], axes=(0, 1)), axes=(0, 1))) ** 2).sum(2)
    radius = np.hypot(*(np.indices(spectrum.shape) - 48))
    assert spectrum[radius > 18].sum() < 1e-3 * spectrum.sum() and spectrum[(radius > 10) & (radius < 16)].sum() > 0
    changed = [z for z in range(7) if np.abs(images["motion"][..., z] - original[..., z]).mean() > 1]
    assert len(changed) == 7 // 3
    bright = (original > 300) & (images["bias"] < 4000)
    ratio = np.where(bright, np.log(np.maximum(images["bias"], 1) / np.maximum(original, 1)), np.nan)
    curvature = np.concatenate([np.diff(ratio, n=2, axis=axis).ravel() for axis in (0, 1)])
    assert np.nanstd(ratio) > 0.1 and np.nanmax(np.abs(curvature)) < 0.02  # smooth


def write_runs(root):
    """Two folders of runs; in the second the detector has everything at half of its probability, so half is flagged."""
    cases = write_patients(root, 2)
    (root / "runs").mkdir()
    shutil.move(root / "run", root / "runs" / "original")
    for number, path in enumerate(sorted((root / "runs" / "original").rglob("qc.json"))):
        qc = json.loads(path.read_text())
        qc["segmentation"] = {"bundle": "cardiac_dn_segmentation", "weights_sha256": "a", "samples": 10}
        qc["detection"] |= {"bundle": "cardiac_segmentation_failure", "weights_sha256": "b"}
        qc["scores"]["urgency"] = float([2, 0, 3, 1][number])
        path.write_text(json.dumps(qc))
    shutil.copytree(root / "runs" / "original", root / "runs" / "noise")
    for path in (root / "runs" / "noise").rglob("qc.json"):
        qc = json.loads(path.read_text())
        qc["detection"]["threshold"] = 0.8
        qc["scores"]["urgency"] += 0.5
        path.write_text(json.dumps(qc))
    n, caught = 12, 100 * (np.array(THRESHOLDS) <= 0.3)  # what lies above 0.3 catches nothing
    calibration = Calibration(
        "dn", "bmap", 10, {}, "paper", "numbers", np.array(THRESHOLDS), tuple(f"p{i}" for i in range(n)),
        np.full(n, 100), np.tile(caught, (n, 1)), np.tile(caught, (n, 1)),
    )  # fmt: skip
    (root / "models").mkdir()
    calibration.write(root / "models" / "dn_bmap_calibration.json")
    return cases


def test_figures(tmp_path, benchmark, capsys):
    cases = write_runs(tmp_path)
    benchmark(
        "measure", "--predictions", tmp_path / "runs", "--reference", tmp_path / "acdc", "--models", tmp_path / "models"
    )
    header, *lines = [line.split(" | ") for line in capsys.readouterr().out.strip().split("\n")]
    assert [line[:2] for line in lines] == [["original", "4"], ["noise", "4"], ["all", "8"]]
    scans, promised = [], max(t for t in THRESHOLDS if t <= 0.3)
    for case, (prediction, reference) in cases.items():
        failures = failure_mask(prediction, reference, SPACING)
        files = {"detector": "failure_probability", "map": "bayesian"}
        maps = {name: load(tmp_path / f"runs/original/{case}/{file}.nii.gz") for name, file in files.items()}
        cells = [
            (failures[rows, cols, z].sum(), *(volume[rows, cols, z].astype(float).mean() for volume in maps.values()))
            for z, box in enumerate(BOXES)
            for _, _, rows, cols in cells_inside(box)
        ]
        pairs = [(prediction == label, reference == label) for label in (1, 2, 3)]
        dice = np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])
        scans.append((np.array(cells), failures.sum(), 1 - dice))
    both = [(scan, 0.5, urgency) for scan, urgency in zip(scans, (2, 0, 3, 1), strict=True)]
    both += [(scan, 0.8, urgency + 0.5) for scan, _, urgency in both]
    for line, own in zip(lines, (both[:4], both[4:], both), strict=True):
        cells = np.concatenate([scan[0] for scan, *_ in own])
        flagged = np.concatenate([scan[0][:, 1] >= threshold for scan, threshold, _ in own])
        found = [scan[0][scan[0][:, 1] >= threshold, 0].sum() / scan[1] for scan, threshold, _ in own]
        risk, urgency = np.array([scan[2] for scan, *_ in own]), np.array([urgency for *_, urgency in own])
        failing = cells[:, 0] > 0
        kept = risk[np.argsort(urgency, kind="stable")]
        expected = dict(
            zip(
                header[2:],
                [
                    1 - risk.mean(),
                    100 * failing.mean(),
                    100 * average_precision_score(failing, cells[:, 1].round(6)),
                    100 * average_precision_score(failing, cells[:, 2].round(6)),
                    100 * flagged.mean(),
                    100 * failing[flagged].mean(),
                    100 * np.mean(found),
                    np.mean([kept[: i + 1].mean() for i in range(len(kept))]),
                    stats.pearsonr(urgency, risk).statistic,
                ],
                strict=False,
            )
        )
        for name, text in zip(header[2:], line[2:11], strict=False):
            assert float(text.rstrip("%")) == pytest.approx(expected[name], abs=0.06 if "%" in text else 6e-3), name
    patients = [
        (sum(s[0][s[0][:, 1] >= promised, 0].sum() for s in pair) / sum(s[1] for s in pair),
         sum((s[0][:, 1] >= promised).sum() for s in pair))
        for pair in (scans[:2], scans[2:])
    ]  # fmt: skip
    caught, regions = np.array(patients).T
    for line in lines[:2]:
        numbers = [float(number) for number in re.findall(r"[\d.]+", " ".join(line[11:]))]
        assert numbers == pytest.approx([100 * caught.mean(), 100 * caught.std(ddof=1), regions.mean()], abs=0.6)
