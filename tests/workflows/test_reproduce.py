"""The reproduction in miniature: what a user types, what is done again after a change or a kill, and its numbers."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from cardiac_qc_plugin.bundle import BundlePredictor
from cardiac_qc_plugin.data.acdc import acdc_datalist
from cardiac_qc_plugin.data.inputs import Scan
from cardiac_qc_plugin.data.phantom import write_acdc_like
from cardiac_qc_plugin.reports.paper_tables import GRID, Experiment, clinical_rows, detection_rows, overlap_rows
from cardiac_qc_plugin.transforms.failure_labels import failure_mask
from cardiac_qc_plugin.workflows.files import read_json, read_volume, write_json
from cardiac_qc_plugin.workflows.reproduction import ablations, plan, stage_work, step_time
from cardiac_qc_plugin.workflows.reproduction import grid as grid_module
from cardiac_qc_plugin.workflows.reproduction.ablations import cluster_shares, tolerance_shares
from cardiac_qc_plugin.workflows.reproduction.grid import Grid, Settings
from cardiac_qc_plugin.workflows.reproduction.reproduce import reproduce, training_budgets
from cardiac_qc_plugin.workflows.reproduction.stages import Budget, BudgetSpent, Stage, carry_out
from cardiac_qc_plugin.workflows.reproduction.training import read_losses

ROOT = Path(__file__).parents[2]
RUN = "drn_ce/fold{}/bmap"
CASES = ("patient002_frame01", "patient004_frame01")  # of fold 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six phantoms with two folds, and the bundles on a coarse grid, with a regime of small patches."""
    root = tmp_path_factory.mktemp("world")
    write_acdc_like(root / "data", 6, shape=(48, 56), n_slices=2)
    write_json(root / "folds.json", acdc_datalist(root / "data", folds=2))
    shutil.copytree(ROOT / "bundles", root / "bundles", ignore=shutil.ignore_patterns("models"))
    for configs in (root / "bundles").glob("*/configs"):
        detector = "failure" in configs.parent.name
        tiny = {"epoch_length": 1, "batch_size": 2, "patch_size": 48 if detector else 32, "train#augmentation": None}
        write_json(configs / "tiny.json", tiny if detector else tiny | {"val_interval": 1000})
        for name in ("train", "inference"):
            config = read_json(configs / f"{name}.json")
            write_json(configs / f"{name}.json", config | ({} if detector else {"spacing": 2.8}))
    return root


@pytest.fixture(scope="module")
def settings(world):
    """One network, loss and map, both folds, two iterations each."""
    return Settings(
        data=world / "data",
        output=world / "out",
        folds=(0, 1),
        models=("drn",),
        losses=("ce",),
        maps=("bmap",),
        regime="tiny",
        iterations=2,
        detector_iterations=2,
        samples=2,
        detector_maps="in_sample",
        datalist=world / "folds.json",
        bundle_dir=world / "bundles",
    )


def command(settings, output, **options):
    """The command line of these settings."""
    options = {
        "data": settings.data,
        "output": output,
        "datalist": settings.datalist,
        "bundle_dir": settings.bundle_dir,
        "models": "drn",
        "losses": "ce",
        "maps": "bmap",
        "regime": "tiny",
        "iterations": 2,
        "detector_iterations": 2,
        "samples": 2,
        "detector_maps": "in_sample",
        **options,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(ROOT / "scripts" / "pipeline.py"), "reproduce", *words]


@pytest.fixture(scope="module")
def grid(settings):
    """The miniature grid, as a user runs it; what it printed."""
    ran = subprocess.run(
        command(settings, settings.output, folds="0,1"), capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def written(output):
    """Time of the last change of every file of the stages."""
    return {p.relative_to(output).as_posix(): p.stat().st_mtime_ns for p in output.glob("drn_ce/**/*") if p.is_file()}


def test_tables_agree_with_the_files(settings, grid):
    assert re.search(r"^13 stage\(s\) carried out", grid, re.MULTILINE)
    output, reference = settings.output, settings.data
    dice, failing = {"ED": [], "ES": []}, []
    for fold in (0, 1):
        items = [item for item in settings.items if item["fold"] == fold]
        folder = output / RUN.format(fold) / "in_sample" / "detected"
        assert {p.parent.name for p in folder.glob("*/qc.json")} == {Path(i["image"]).name[:-7] for i in items}
        for item in items:
            label = read_volume(reference / item["label"])
            found = read_volume(folder / Path(item["image"]).name[:-7] / "segmentation.nii.gz").data
            a, b = found == 2, label.data == 2
            dice[item["meta"]["phase"]].append(2 * (a & b).sum() / (a.sum() + b.sum()))
            failing.append(failure_mask(found, label.data).any(axis=(0, 1)).mean())
    table = rows_of(output / "tables" / "table1.csv")
    chosen = [r for r in table if (r["model"], r["metric"], r["structure"]) == ("DRN-CE+MC", "dice", "LVM")]
    for phase, values in dice.items():
        before, after = (r for r in chosen if r["phase"] == phase)
        assert (float(before["mean"]), float(before["sd"])) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert before["n"] == "6" and before["folds"] == "0 1"
        assert after["corrected_with"] == "b-map" and float(after["mean"]) >= float(before["mean"])
    assert len(table) == 2 * 12 * 2 * 6  # metrics, combinations, before and after, cells
    assert {r["mean"] for r in table if r["model"] != "DRN-CE+MC"} == {""}  # not run
    (third,) = (
        r
        for r in rows_of(output / "tables" / "table3.csv")
        if (r["model"], r["map"], r["criterion"]) == ("DRN-CE", "b-map", "paper")
    )
    assert float(third["slices_failing_pct"]) == pytest.approx(100 * np.mean(failing))
    assert third["paper_average_precision_pct"] == "69.0"


def test_the_page_and_the_figures(settings, grid):
    page = (settings.output / "results.md").read_text()
    for text in (
        "| DRN-CE+MC, paper | 0.961 ± 0.02 | 0.926 ± 0.03 |",
        "Not run. Figure 7.",
    ):
        assert text in page
    assert "DN-Brier" not in page and page.count("Not run.\n") == 3  # Table V, other detectors, clusters
    assert any(
        row["model"] == "DN-Brier" and row["paper_mean"] for row in rows_of(settings.output / "tables/table1.csv")
    )
    assert "| drn_ce/fold0/segmentation | tiny | 2 of 2 |" in page
    for picture in re.findall(r"\]\((figures/\S+)\.png\)", page):
        for suffix in ("png", "svg", "csv"):
            assert (settings.output / f"{picture}.{suffix}").stat().st_size > 0
    assert page.count("](figures/") == 3


def test_the_detector_learns_from_its_networks_own_patients(settings, grid):
    for fold in (0, 1):
        training = settings.output / RUN.format(fold) / "training"
        patients = {path.parent.name[:10] for path in training.glob("*/qc.json")}
        assert patients == {item["meta"]["patient"] for item in settings.items if item["fold"] != fold}


def test_a_second_run_does_nothing_and_a_change_only_what_follows(settings, grid, world):
    output = world / "changed"
    shutil.copytree(settings.output, output)
    settings = replace(settings, output=output)  # a moved folder stays valid
    before = written(output)
    assert "0 stage(s) carried out, 13 there already" in reproduce(settings).text
    assert written(output) == before
    outcome = reproduce(replace(settings, detector_iterations=3))
    assert "7 stage(s) carried out, 6 there already" in outcome.text and outcome.failures == {}
    changed = {name for name, when in written(output).items() if before.get(name) != when}
    assert all("in_sample" in name or "evaluation" in name for name in changed)
    for fold in (0, 1):
        folder = f"{RUN.format(fold)}/in_sample"
        assert {f"{folder}/detector/model.pt", f"{folder}/detector/model_operating_point.json"} <= changed
        assert len(read_losses(output / folder / "detector" / "loss.csv")) == 3
    weights = output / "drn_ce/fold1/segmentation/model.pt"
    weights.write_bytes(weights.read_bytes() + b"0")  # somebody else's weights are not used under this name
    stages = {stage.name: stage.done for stage in Grid(replace(settings, detector_iterations=3)).by_fold()}
    assert [done for name, done in stages.items() if "fold1" in name] == [False] * 6
    assert all(done for name, done in stages.items() if "fold0" in name)


def test_damaged_files_are_made_anew(settings, grid, world):
    """A scan is skipped where it has been segmented already; what somebody did to its files has to be noticed."""
    output = world / "damaged"
    shutil.copytree(settings.output, output)
    names = [
        f"{RUN.format(0)}/test/{case}/{name}" for case, name in zip(CASES, ("bayesian", "segmentation"), strict=True)
    ]
    files = [output / f"{name}.nii.gz" for name in names]
    before = [path.read_bytes() for path in files]
    files[0].write_bytes(before[0][: len(before[0]) // 2])
    shutil.copyfile(files[1].with_name("entropy.nii.gz"), files[1])  # a whole file, but of something else
    outcome = reproduce(replace(settings, output=output))
    assert "1 stage(s) carried out, 12 there already" in outcome.text and outcome.failures == {}
    assert [path.read_bytes() for path in files] == before


def test_killed_in_training_it_ends_with_the_same_weights(settings, world):
    """SIGKILL in the middle; afterwards every weight and every loss is that of a training that was left alone."""
    options = {"iterations": 12, "folds": 0}
    killed = world / "killed"
    curve = killed / "drn_ce/fold0/segmentation/loss.csv"
    with subprocess.Popen(
        command(settings, killed, **options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        limit = time.monotonic() + 300
        while len(read_losses(curve)) < 3 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 3 <= len(read_losses(curve)) < 12
    assert not (curve.parent / "model.pt").exists() and list(curve.parent.glob("resume_*/checkpoint.pt"))
    ended = []
    for output in (killed, world / "alone"):
        stage = Grid(replace(settings, output=output, folds=(0,), iterations=12)).network("drn", "ce", 0)
        stage.run(Budget())
        losses = [(iteration, loss) for iteration, loss, _ in read_losses(stage.folder / "loss.csv")]
        ended.append((torch.load(stage.folder / "model.pt", weights_only=True), losses))
        assert not list(stage.folder.glob("resume_*"))
    assert [iteration for iteration, _ in ended[0][1]] == list(range(1, 13))
    assert ended[0][1] == ended[1][1]
    torch.testing.assert_close(ended[0][0], ended[1][0], rtol=0, atol=0)


def test_a_spent_budget_keeps_the_checkpoint_and_says_what_remains(settings, world):
    settings = replace(settings, output=world / "budget", folds=(0,), iterations=3)
    outcome = reproduce(settings, budget_minutes=1e-9)
    assert "0 stage(s) carried out" in outcome.text and "7 stage(s) left" in outcome.text and outcome.failures == {}
    assert "  drn_ce/fold0/segmentation" in outcome.text
    stage = Grid(settings).network("drn", "ce", 0)
    with pytest.raises(BudgetSpent):
        stage.run(Budget(1e-9))
    assert len(read_losses(stage.folder / "loss.csv")) == 1 and not stage.done
    before = written(settings.output)
    told = reproduce(settings, dry_run=True).text
    assert re.search(r"drn_ce/fold0/segmentation +to do: 3 iterations, resumes near 1, \d+\.\d\d h", told)
    assert re.search(r"drn_ce/fold0/bmap/test +to do: 6 scans, T = 2, ", told)
    assert re.search(r"train cardiac_drn_segmentation: \d+\.\d+ s per step on \w+ with 1 thread", told)
    assert re.search(r"segment cardiac_drn_segmentation: \d+ ns per pixel, and \d+ a sample, on ", told)
    assert written(settings.output) == before
    times = read_json(settings.output / "step_times.json").values()
    for step in (t for t in times if "seconds" in t):
        parts = sum(step[part] for part in ("data", "forward", "backward", "optimizer"))
        assert 0 < step["seconds"] and parts == pytest.approx(step["seconds"], rel=0.5)
    carry_out([stage], Budget())
    assert stage.done and len(read_losses(stage.folder / "loss.csv")) == 3


def test_the_plan_counts_checkpoints_of_these_settings_only(settings, tmp_path, monkeypatch):
    shares = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.25)
    step = {"seconds": 1.0, "pass": 1, "sample": 1, "memory_gb": None, "device": "cpu", "threads": 1} | shares
    monkeypatch.setattr(plan, "measured", lambda *arguments: step)
    other, own = (replace(settings, output=tmp_path, folds=(0, -1), iterations=n) for n in (7200, 3600))
    network = Grid(other).network("drn", "ce", 0)
    checkpoint = stage_work.resume_folder(network) / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (network.folder / "loss.csv").write_text("iteration,loss,seconds\n" + "5400,0.1,60\n")
    line = r"drn_ce/fold0/segmentation +to do: "
    assert re.search(line + r"7200 iterations, resumes near 5400, 0\.50 h", reproduce(other, dry_run=True).text)
    assert re.search(line + r"3600 iterations, 1\.00 h", reproduce(own, dry_run=True).text)
    assert "drn_ce/all/segmentation" in reproduce(replace(own, folds=(-1,)), dry_run=True).text
    grids = [Grid(each) for each in (other, own)]
    assert [len(training_budgets(grid)) for grid in grids if grid.by_fold()] == [1, 0]


def test_defaults_given_explicitly_change_nothing(settings):
    bare, given = replace(settings, iterations=None, samples=None), replace(settings, iterations=8000, samples=10)
    first, second = (Grid(each).maps("drn", "ce", "bmap", 0, "test") for each in (bare, given))
    assert first.settings == second.settings and first.needs[0].settings == second.needs[0].settings
    other = Grid(replace(bare, samples=20)).maps("drn", "ce", "bmap", 0, "test")
    assert other.settings == first.settings | {"samples": 20} and other.info["own"]["samples"] == 20


def test_a_regime_of_one_network_beside_results_of_another(settings, grid, world):
    """The tables show what was run with the settings of the call, which the other network cannot have been."""
    write_json(world / "bundles/cardiac_unet_segmentation/configs/coarse.json", {"batch_size": 2})
    own = Grid(replace(settings, regime="coarse", models=("unet",)))
    assert {experiment.run[0] for experiment in own.over_folds()} == {"unet"}


def test_times_of_another_precision_are_measured_anew(tmp_path, monkeypatch):
    config, cache = tmp_path / "train.json", tmp_path / "step_times.json"
    config.write_text("{}")
    for bits, known in (("fp32", 1), ("fp32", 1), ("bf16", 2)):
        monkeypatch.setattr(step_time, "precision", lambda device, bits=bits: bits)
        assert step_time.measured(cache, Counter, [str(config)]) == {str(config): 1}
        assert len(read_json(cache)) == known


def test_out_of_fold_maps_and_ablations(settings, grid, monkeypatch):
    monkeypatch.setattr(grid_module, "SAMPLES", (1, 3))
    monkeypatch.setattr(grid_module, "REGION_SIZES", (4,))
    monkeypatch.setattr(ablations, "TOLERANCES", (0.0, 3.0))
    settings = replace(settings, detector_maps="out_of_fold", ablations=("samples", "region_size", "labels"))
    outcome = reproduce(settings)
    assert outcome.failures == {}
    detector = Grid(settings).detector("drn", "ce", "bmap", 0)
    assert [need.name for need in detector.needs] == ["drn_ce/fold1/bmap/test"]
    point = read_json(settings.output / RUN.format(0) / "out_of_fold_region_size4/detected/patient002_frame01/qc.json")
    assert point["detection"]["region_size"] == 4
    table = rows_of(settings.output / "tables" / "table5.csv")
    ours = {(r["metric"], r["samples"]): r["mean"] for r in table if r["model"] == "DRN-CE"}
    assert len(table) == 2 * 8 * 3 and {s for (_, s), mean in ours.items() if mean} == {"1", "3"}
    cases = rows_of(settings.output / "drn_ce/evaluation/3_samples/cases.csv")
    values = [float(row[f"dice_{name}"]) for row in cases for name in ("LV", "RV", "LVM")]
    assert float(ours["dice", "3"]) == pytest.approx(np.mean(values)) and len(values) == 36
    page = (settings.output / "results.md").read_text()
    assert "](figures/figure7.png)" in page and "](figures/figure8.png)" in page
    assert "| DRN-CE+MC | 20 | 0 1 |" in page


@pytest.mark.parametrize("samples", [None, 10])
def test_a_runs_own_number_of_samples_is_not_sampled_twice(settings, samples):
    grid = Grid(replace(settings, samples=samples))
    own = grid.maps("drn", "ce", "bmap", 0, "test")
    assert grid.maps("drn", "ce", "bmap", 0, "test", 10) is own  # the bundle's number
    assert grid.maps("drn", "ce", "bmap", 0, "test", 20).name == f"{own.name}_20_samples"


def test_what_the_paper_only_names(settings, world):
    """A detector that sees the segmentation, one with other maps, and members in the place of dropout samples."""
    ablations = ("see_segmentation", "detector_maps", "ensemble", "snapshots")
    for bundle in (world / "bundles").glob("*_segmentation/configs"):
        cycles = read_json(bundle / "snapshots.json") | read_json(bundle / "tiny.json") | {"snapshots": 2}
        write_json(bundle / "cycles.json", cycles)
    detector = world / "bundles/cardiac_segmentation_failure/configs"
    shutil.copy(detector / "tiny.json", detector / "cycles.json")
    output = world / "named"
    settings = replace(settings, output=output, regime="cycles", members=2, ablations=ablations)
    settings = replace(settings, models=("dn",), losses=("brier",))  # the smallest network
    assert reproduce(settings).failures == {}
    detected = output / "dn_brier/fold0"
    seen = Grid(settings).detector("dn", "brier", "bmap", 0, settings.detectors["see_segmentation", None]).folder
    weights = torch.load(seen / "model.pt", weights_only=True)["features.0.0.weight"]
    assert weights.shape[1] == 3 and seen.parent.name == "in_sample_see_segmentation"
    assert (detected / "bmap/out_of_fold/detected/patient002_frame01/failure_probability.nii.gz").is_file()
    members = [detected / f"segmentation{suffix}" / "model.pt" for suffix in ("", "_seed1")]
    snapshots = [detected / "segmentation" / f"snapshot{n}.pt" for n in (1, 2)]
    first, last, final, other = (torch.load(p, weights_only=True)["layers.0.weight"] for p in snapshots + members)
    assert torch.equal(last, final) and not torch.equal(first, last) and not torch.equal(final, other)
    for source, files in (("ensemble", members), ("snapshots", snapshots)):
        case = detected / source / "in_sample/detected/patient002_frame01"
        record = read_json(case / "qc.json")["segmentation"]
        assert record["samples"] == len(files) == len(record["sample_volume_ml"]["LV"])
        networks = [BundlePredictor(settings.segmenter("dn"), ckpt_path=str(path), samples=0) for path in files]
        scan = settings.data / "patient002/patient002_frame01.nii.gz"
        inputs = networks[0].preprocessing({"image": str(scan)})["image"][None]
        with torch.no_grad():
            slices = inputs[0].movedim(-1, 0).as_subclass(torch.Tensor)
            probabilities = torch.stack([each.network(slices).softmax(dim=1) for each in networks])
        spread = (2 * probabilities.std(dim=0)).clamp(0, 1).mean(dim=1).movedim(0, -1)  # Eq. 1, on the coarse grid
        written = read_volume(case / "bayesian.nii.gz").data
        assert written.mean() == pytest.approx(float(spread.mean()), rel=0.05) and written.max() > 0
    table = rows_of(output / "tables" / "ablations.csv")
    variants = ["", "see_segmentation", "detector_maps: out_of_fold", "members: ensemble", "members: snapshots"]
    assert [row["variant"] for row in table] == variants and all(row["mean_dice"] for row in table)
    assert all(0 <= float(row["aurc_oracle"]) <= float(row["aurc"]) for row in table)
    assert "| DN-Brier, b-map | members: ensemble | 0 1 |" in (output / "results.md").read_text()
    with pytest.raises(ValueError, match="'tiny' with 2 iterations of dn leaves no snapshots"):
        Grid(replace(settings, regime="tiny")).by_fold()


def test_detectors_have_no_part_in_a_regime_of_the_networks_only(settings):
    grid = Grid(replace(settings, regime="snapshots", iterations=10))
    trainings = grid.network("drn", "ce", 0), grid.detector("drn", "ce", "snapshots", 0)
    names = [[Path(file).name for file in stage.info["configs"]] for stage in trainings]
    assert names == [["train.json", "snapshots.json"], ["train.json"]]
    with pytest.raises(ValueError, match="cardiac_drn_segmentation has no regime 'snapshot'"):
        Grid(replace(settings, regime="snapshot")).by_fold()


def test_tracking_by_mlflow(settings, world):
    pytest.importorskip("mlflow", reason="pip install mlflow")
    stage = Grid(replace(settings, output=world / "tracked", tracking="mlflow", iterations=1)).network("dn", "brier", 0)
    stage.run(Budget())
    assert (stage.folder / "mlruns.db").is_file() and stage.done


def test_what_is_shipped_learns_from_all(settings, grid, world):
    """A detector of all patients, with the operating point of both folds together."""
    output = world / "shipped"
    shutil.copytree(settings.output, output)
    settings = replace(settings, output=output, folds=(0, 1, -1))
    outcome = reproduce(settings)
    assert "4 stage(s) carried out, 13 there already" in outcome.text and outcome.failures == {}
    folder = output / "drn_ce/all/bmap/in_sample"
    assert not (folder / "detector/model_operating_point.json").exists() and (folder / "detector/model.pt").is_file()
    assert len(list((output / "drn_ce/all/bmap/training").glob("*/qc.json"))) == 12
    point = read_json(folder / "operating_point/operating_point.json")
    assert point["n_volumes"] == 12 and point["beta"] == 2.0
    probabilities = [
        read_volume(path).data for path in output.glob("drn_ce/fold*/bmap/in_sample/detected/*/failure_prob*")
    ]
    assert any(np.isclose(values, point["threshold"], atol=1e-6).any() for values in probabilities)


def test_weights_elsewhere_in_another_layout_are_not_ignored(settings, tmp_path):
    (tmp_path / "drn_ce" / "fold0").mkdir(parents=True)
    (tmp_path / "drn_ce" / "fold0" / "model.pt").touch()
    with pytest.raises(ValueError, match=r"no weights .* such as drn_ce/fold0/segmentation/model\.pt"):
        reproduce(replace(settings, trained=tmp_path), dry_run=True)


def test_weights_that_were_trained_elsewhere(settings, grid, world):
    """They are taken as they are: nothing is trained, and no patient is segmented for a training."""
    given, output = world / "given", world / "taken"
    for folder in ("drn_ce/fold0/segmentation", "drn_ce/fold0/bmap/in_sample/detector"):
        shutil.copytree(settings.output / folder, given / folder)
    taking = replace(settings, output=output, folds=(0,), iterations=3, trained=given)
    outcome = reproduce(taking)
    assert "6 stage(s) carried out" in outcome.text and not outcome.failures
    assert not list(output.glob("**/loss.csv")) and not (output / "drn_ce/fold0/bmap/training").exists()
    for name in ("failure_probability", "segmentation"):
        paths = [root / RUN.format(0) / "in_sample/detected" for root in (settings.output, output)]
        first, second = (sorted(path.glob(f"*/{name}.nii.gz")) for path in paths)
        assert [read_volume(p).data.tolist() for p in first] == [read_volume(p).data.tolist() for p in second] != []
    assert "| drn_ce/fold0/segmentation | trained elsewhere |  |  |  |" in (output / "results.md").read_text()

    assert "0 stage(s) carried out" in reproduce(taking).text
    point = given / "drn_ce/fold0/bmap/in_sample/detector/model_operating_point.json"
    write_json(point, read_json(point) | {"threshold": 0.5})
    assert "4 stage(s) carried out" in reproduce(taking).text  # the detector, and what comes after it
    point.unlink()
    with pytest.raises(ValueError, match="model_operating_point.json: no such file, but it belongs to the model.pt"):
        reproduce(taking)


def test_detectors_learn_from_out_of_fold_maps_where_all_folds_are_there(settings):
    auto = replace(settings, detector_maps="auto")
    assert auto.detector.maps == "out_of_fold" and replace(auto, folds=(1,)).detector.maps == "in_sample"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("vgg",)}, "--models are of drn, unet, dn, got 'vgg'"),
        ({"folds": (2,)}, "--folds are of 0, 1, -1, got '2'"),
        ({"losses": ("brier",)}, "None of the models drn has one of these losses"),
        ({"detector_maps": "out_of_fold", "folds": (0,)}, "need the networks of all folds: give --folds 0,1"),
        ({"ablations": ("detector_maps",), "folds": (1,)}, "need the networks of all folds: give --folds 0,1"),
        ({"members": 1}, "--members is 2 or more"),
        ({"iterations": 0}, "--iterations is 1 or more, got 0"),
        ({"samples": 1}, "--samples is 2 or more, got 1"),
        ({"ablations": ("samples",), "losses": ("soft_dice",)}, "--ablations samples needs the bmap of the DRN"),
        ({"ablations": ("ensemble",), "maps": ("emap",)}, "--ablations ensemble needs the bmap: see --maps"),
        ({"trained": Path("nowhere")}, "--trained nowhere: no such folder, or no model.pt in it"),
    ],
)
def test_settings_that_cannot_be(settings, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(settings, **change)


def test_bad_data_and_regime_are_named(settings, tmp_path):
    with pytest.raises(ValueError, match="patient001_frame01.nii.gz: no such file, but .*folds.json lists it"):
        Grid(replace(settings, data=tmp_path))
    with pytest.raises(ValueError, match="has no regime 'long'"):
        Grid(replace(settings, regime="long")).by_fold()
    items = [item for item in settings.items if item["fold"] == 0]
    two = sorted({item["meta"]["patient"] for item in settings.items if item["fold"] == 1})[:2]
    items += [item for item in settings.items if item["meta"]["patient"] in two]
    write_json(tmp_path / "few.json", {"training": items})
    with pytest.raises(ValueError, match="few.json: fold 0 leaves fewer than three patients to train a detector"):
        replace(settings, datalist=tmp_path / "few.json")
    items = read_json(settings.datalist)["training"]
    for fold, message in (({"fold": "0"}, 'has the fold "0"'), ({"fold": None}, "has no fold")):
        write_json(tmp_path / "odd.json", {"training": [items[0], items[1] | fold]})
        with pytest.raises(ValueError, match=f"odd.json: item 2 of 'training' {message}"):
            replace(settings, datalist=tmp_path / "odd.json")


def test_a_segmentation_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Beside cases it has left a table and the hearts' folders; a case of another datalist goes."""
    stage = Stage(tmp_path, "maps", {}, partial(stage_work.segment_scans, "cpu"), ("a/qc.json",))
    stage.info["scans"] = [Scan("a", Path("a.nii.gz"))]
    for name in ("indices.csv", "heart/cine.json", "a/qc.json", "old/qc.json"):
        (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / name).write_text("{}")
    called = []
    monkeypatch.setattr(stage_work, "segmenter", lambda *args: None)
    monkeypatch.setattr(stage_work, "run", lambda scans, folder, *args: called.append(scans))
    assert carry_out([stage], Budget()).carried_out == ["maps"] and called == [stage.info["scans"]]
    assert sorted(path.name for path in stage.folder.iterdir()) == ["a", "heart", "indices.csv"]


def test_a_failing_stage_stops_only_what_needs_it(tmp_path):
    def write(stage, budget):
        (stage.folder / "result").write_text(stage.name)

    def fail(stage, budget):
        raise ValueError("no heart in this scan")

    def stage(name, work, *needs):
        return Stage(tmp_path, name, {}, work, ("result",), needs)

    bad = stage("bad", fail)
    stages = [bad, stage("after", write, bad), stage("other", write), stage("empty", lambda stage, budget: None)]
    progress = carry_out(stages, Budget())
    assert progress.carried_out == ["other"] and progress.remaining == ["after"]
    assert progress.failures["bad"] == "no heart in this scan" and "was not written" in progress.failures["empty"]


def summary():
    """An evaluation with numbers of its own in every place that a table reads."""

    def spread(start):
        return {"mean": start, "sd": start / 10, "n": 50}

    cell = {"dice": spread(0.9), "hausdorff": spread(8.0), "n_missing": 2, "n_absent": 0}
    names = ("LV", "RV", "LVM")
    tests = {"mann_whitney_p": 0.06, "wilcoxon_p": 0.01, "n_excluded": 1}
    cells = [
        {"metric": metric, "phase": phase, "structure": name, "after": spread(after), **tests}
        for metric, after in (("dice", 0.95), ("hausdorff", 5.0))
        for phase in ("ED", "ES")
        for name in names
    ]
    index = {"bias": -1.5, "sd": 2.5, "mae": 2.0, "r": 0.99, "n": 25, "n_excluded": 0}
    clinical = dict.fromkeys(("lv_edv", "lv_ef", "rv_edv", "rv_ef", "lvm_mass"), index)
    point = {"regions_flagged": 0.02, "region_precision": 0.5, "region_recall": 0.6, "voxel_sensitivity": 0.7}
    found = {
        "slice_average_precision": {"mean_curve": 0.75, "per_patient": {**spread(0.8), "n_excluded": 3}},
        "operating_point": point | {"false_positive_regions": 12.0},
        "slices_failing_percent": 40.0,
        "regions_failing_percent": 2.5,
    }
    return {
        "segmentation": {phase: dict.fromkeys(names, cell) for phase in ("ED", "ES")},
        "clinical": clinical,
        "comparison": {"cells": cells, "clinical": clinical, "clinical_tests": dict.fromkeys(clinical, tests)},
        "detection": {"criteria": {"paper": found, "released_code": found}},
    }


def test_rows_of_the_tables(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary()))

    class Done:
        folder, done = tmp_path, True

    experiments = [Experiment("grid", "unet", "soft_dice", "emap", None, [0, 2], Done())]
    rows = [r for r in overlap_rows(experiments) if r["model"] == "U-net-soft-Dice" and r["metric"] == "hausdorff_mm"]
    alone, corrected = (next(r for r in rows if r["corrected_with"] == map) for map in ("", "e-map"))
    assert (alone["mean"], alone["n_missing"], alone["folds"], alone["paper_mean"]) == (8.0, 2, "0 2", 6.1)
    assert (corrected["mean"], corrected["wilcoxon_p"], corrected["paper_significant"]) == (5.0, 0.01, 1)
    (index,) = (r for r in clinical_rows(experiments) if r["bias"] and r["index"] == "LVEF_pct" and r["corrected_with"])
    assert (index["paper_bias"], index["paper_sd"], index["mae"], index["wilcoxon_p"]) == (1.9, 4.9, 2.0, 0.01)
    row = next(r for r in detection_rows(experiments) if r["n_patients"])
    assert (row["model"], row["ap_mean_curve_pct"], row["paper_average_precision_pct"]) == ("U-net-soft-Dice", 75, 76)
    assert (row["regions_flagged_pct"], row["paper_slices_failing_pct"], row["n_excluded"]) == (2, 46.7, 3)
    assert len(GRID) == 12 and len(detection_rows([])) == 24


def test_label_rules_by_hand():
    """A square LV; errors by rings around and inside it, whose distances to its boundary are known."""
    reference = np.zeros((40, 40, 2), np.uint8)
    reference[10:30, 10:30] = 3
    prediction = reference.copy()
    prediction[30:36, 12:28, 0] = 3  # outside, 1 to 6 voxels from the boundary
    prediction[10:14, 14:26, 0] = 0  # inside, 0 to 3 voxels from it
    prediction[20, 20, 1] = 0  # alone, in the apical slice, where any size counts
    shares = {(row["tolerance"], row["side"]): row["share"] for row in tolerance_shares(prediction, reference)}
    assert shares[0.0, "outside"] == 1.0
    assert shares[3.0, "outside"] == pytest.approx(3 / 6)  # 4, 5 and 6
    assert shares[6.0, "outside"] == 0.0
    errors = 4 * 12 + 1
    assert shares[2.0, "inside"] == pytest.approx((12 + 1) / errors)  # the row at 3, and the voxel at 9
    assert shares[0.0, "inside"] == pytest.approx((3 * 12 + 1) / errors)
    prediction[38, 38, 0] = 3  # alone, far outside, not in the apical slice
    clusters = {row["min_cluster"]: row for row in cluster_shares(prediction, reference)}
    total = 6 * 16 + errors + 1
    assert clusters[1]["share"] == pytest.approx((3 * 16 + 12 + 1 + 1) / total)
    assert clusters[5]["share"] == pytest.approx((3 * 16 + 12 + 1) / total)
    assert clusters[20]["slices"] == 1.0
