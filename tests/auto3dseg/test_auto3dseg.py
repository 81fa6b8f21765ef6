"""AutoRunner as a user starts it, on phantoms: generation, training, scores, ensemble, and a fold as a bundle."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.apps.auto3dseg import AlgoEnsembleBuilder, AutoRunner, EnsembleRunner, import_bundle_algo_history
from monai.bundle import ConfigParser, verify_net_in_out
from scipy import ndimage

from cardiac_qc_plugin.auto3dseg import TEMPLATES, BayesianAlgo, Fold, UncertaintyEnsemble
from cardiac_qc_plugin.auto3dseg.ensemble import ensemble_maps
from cardiac_qc_plugin.auto3dseg.fold import validate
from cardiac_qc_plugin.bundle import find_bundle
from cardiac_qc_plugin.checkpoints import load_weights
from cardiac_qc_plugin.data.acdc import acdc_datalist
from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_acdc_like, write_phantom
from cardiac_qc_plugin.workflows.auto3dseg import EnsembleSegmenter, auto3dseg
from cardiac_qc_plugin.workflows.files import write_json
from cardiac_qc_plugin.workflows.fold_to_bundle import fold_to_bundle

sys.path.append(str(Path(__file__).parents[1] / "data"))
from dicom_files import PHASES  # noqa: E402
from dicom_files import cine as dicom_cine  # noqa: E402
from dicom_files import write as write_dicom  # noqa: E402

ROOT = Path(__file__).parents[2]
DN = "cardiac_dn_segmentation"
SETTINGS = {"iterations": 2, "epoch_length": 1, "batch_size": 2, "patch_size": 32, "samples": 2, "amp": False}


def pipeline(*arguments, cwd):
    """The command line, by a Python that is not on the PATH."""
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "scripts" / "pipeline.py", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Phantoms in ACDC's layout, and a datalist with two folds and one scan for testing."""
    root = tmp_path_factory.mktemp("auto3dseg")
    write_acdc_like(root / "data", 4, shape=(40, 44), n_slices=2, spacing=(4.0, 4.0, 20.0))
    datalist = acdc_datalist(root / "data", folds=2)
    write_json(root / "folds.json", {**datalist, "testing": [{"image": datalist["training"][0]["image"]}]})
    return root


@pytest.fixture(scope="module")
def trained(data):
    """Folder with AutoRunner's results in ``out``, made by the command line."""
    options = [text for key, value in SETTINGS.items() for text in (f"--{key}", str(value))]
    image = data / "data" / "patient001" / "patient001_frame01.nii.gz"
    places = ["--datalist", "folds.json", "--root", "data", "--output", "out", "--algos", "bayesdn"]
    result = pipeline("auto3dseg", *places, *options, "--input", str(image), cwd=data)
    assert result.returncode == 0, result.stderr
    assert "bayesdn_0: 0." in result.stdout and "1 scan(s) segmented by bayesdn_0, bayesdn_1" in result.stdout
    return data


def probabilities(folder, image, samples=2):
    """Probabilities of a fold on the image's grid, from the parts of its bundle's inference config one by one."""
    bundle = Fold(folder).bundle
    config = ConfigParser(json.loads((bundle / "configs" / "inference.json").read_text()))
    config.update({"bundle_root": str(bundle), "samples": samples, "amp": False})
    network = load_weights(config.get_parsed_content("network_def"), config.get_parsed_content("ckpt_path"))
    data = config.get_parsed_content("preprocessing")({"image": str(image)})
    data["pred"] = config.get_parsed_content("inferer")(data["image"][None], network)[0]
    for step in config.get_parsed_content("postprocessing").transforms[:4]:  # split, agreement, drop votes, invert
        data = step(data)
    assert type(step).__name__ == "Invertd"
    return np.asarray(data["pred"])


def members_probabilities(root, image):
    return np.stack([probabilities(root / "out" / name, image) for name in ("bayesdn_0", "bayesdn_1")])


def largest_components(labels):
    result = np.zeros_like(labels)
    for label in (1, 2, 3):
        parts, count = ndimage.label(labels == label, np.ones((3, 3, 3)))
        if count:
            result[parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])] = label
    return result


def test_every_fold_is_a_complete_folder(trained):
    for number in (0, 1):
        fold = Fold(trained / "out" / f"bayesdn_{number}")
        assert fold.parameters["fold"] == number and fold.parameters["settings"] == SETTINGS
        assert fold.parameters["class_names"] == ["RV", "LVM", "LV"] and fold.parameters["output_classes"] == 4
        assert (fold.bundle / "configs" / "datalist.json").read_bytes() == (trained / "folds.json").read_bytes()
        assert {"algo.py", "train.py", "validate.py", "infer.py"} <= {p.name for p in fold.folder.glob("scripts/*")}
        weights = torch.load(fold.bundle / "models" / "model.pt", weights_only=True)
        assert next(iter(weights.values())).dtype == torch.float16
        assert not list(fold.bundle.glob("models/resume*"))
    first, second = (torch.load(p, weights_only=True) for p in sorted(trained.glob(f"out/*/{DN}/models/model.pt")))
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_score_is_the_dice_of_the_fold_left_out(trained):
    """Against Dice coefficients counted by hand, class by class and scan by scan."""
    fold = Fold(trained / "out" / "bayesdn_1")
    items = [item for item in json.loads((trained / "folds.json").read_text())["training"] if item["fold"] == 1]
    dice = []
    for item in items:
        members = probabilities(fold.folder, trained / "data" / item["image"], samples=0)
        pred = largest_components(members.argmax(axis=0))
        label = nib.load(trained / "data" / item["label"]).get_fdata()
        for number in (1, 2, 3):
            a, b = pred == number, label == number
            if b.any():
                dice.append((item["image"], 2 * (a & b).sum() / (a.sum() + b.sum())))
    # MONAI's MeanDice: mean over the classes of a scan, then over scans
    expected = np.mean([np.mean([d for name, d in dice if name == item["image"]]) for item in items])
    assert len(items) == 4
    np.testing.assert_allclose(fold.score()["best_avg_dice_score"], expected, atol=1e-5)


def test_ensemble_is_the_mean_and_its_map_the_disagreement(trained):
    image = trained / "data" / "patient001" / "patient001_frame01.nii.gz"
    folder, scan = trained / "out" / "ensemble" / "patient001_frame01", nib.load(image)
    written = {name: nib.load(folder / f"{name}.nii.gz") for name in ("segmentation", "bayesian", "entropy")}
    for volume in written.values():
        assert volume.shape == scan.shape
        np.testing.assert_allclose(volume.affine, scan.affine)
        assert volume.header.get_zooms() == scan.header.get_zooms()
    members = members_probabilities(trained, image)
    mean = members.mean(axis=0)
    np.testing.assert_array_equal(written["segmentation"].get_fdata(), largest_components(mean.argmax(axis=0)))
    spread = np.clip(2 * members.std(axis=0, ddof=1), 0, 1).mean(axis=0)
    np.testing.assert_allclose(written["bayesian"].get_fdata(), spread, atol=1e-6)
    assert spread.max() > 0
    entropy = -np.sum(mean * np.log(np.clip(mean, 1e-30, None)), axis=0) / np.log(4)
    np.testing.assert_allclose(written["entropy"].get_fdata(), entropy, atol=1e-5)
    record = json.loads((folder / "qc.json").read_text())["segmentation"]
    assert record["members"] == ["bayesdn_0", "bayesdn_1"] and record["samples"] == 2
    assert record["turns"] == 1 and EnsembleSegmenter(trained / "out", turns=2).config["turns"] == 2


def test_stock_ensemble_and_ours_run_on_the_same_folder(trained, tmp_path):
    """MONAI's own runner takes our folds; ours, by MONAI's builder, saves the map beside the same labels."""
    out, source = str(trained / "out"), str(trained / "out" / "input.yaml")
    settings = {"output_dir": str(tmp_path / "stock"), "output_postfix": "ensemble"}
    EnsembleRunner(source, out, num_fold=2, mgpu=False, **settings).run()
    builder = AlgoEnsembleBuilder(import_bundle_algo_history(out), source)
    builder.set_ensemble_method(UncertaintyEnsemble(n_fold=2))
    save = {"_target_": "SaveImage", "output_dir": str(tmp_path / "ours"), "output_postfix": "ensemble"}
    save |= {"separate_folder": False, "resample": False, "savepath_in_metadict": True}
    ours = builder.get_ensemble()({"image_save_func": save})
    stock = next((tmp_path / "stock").rglob("*_ensemble.nii.gz"))
    np.testing.assert_array_equal(nib.load(ours[0]).get_fdata(), nib.load(stock).get_fdata())
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert names == ["patient001_frame01_bayesian.nii.gz", "patient001_frame01_ensemble.nii.gz"]
    image = trained / "data" / "patient001" / "patient001_frame01.nii.gz"
    spread = np.clip(2 * members_probabilities(trained, image).std(axis=0, ddof=1), 0, 1).mean(axis=0)
    np.testing.assert_allclose(nib.load(tmp_path / "ours" / names[0]).get_fdata(), spread, atol=1e-6)


def test_the_pages_example_segments(trained, tmp_path, monkeypatch):
    """With a datalist as the command writes it, without a list for testing."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "out", "runs/auto3dseg")
    datalist = acdc_datalist(trained / "data", folds=2)
    source = Path("runs/auto3dseg/input.yaml")
    write_json(tmp_path / "folds.json", datalist)
    content = {**yaml.safe_load(source.read_text()), "datalist": str(tmp_path / "folds.json")}
    source.write_text(yaml.safe_dump(content))
    Path("SCANS").mkdir()
    shutil.copy(trained / "data" / "patient001" / "patient001_frame01.nii.gz", "SCANS")
    page = (ROOT / "docs" / "auto3dseg.md").read_text()
    exec(page[page.index("from pathlib", page.index("with MONAI's builder:")) :].partition("```")[0], {})
    written = sorted(path.name for path in Path("out/patient001_frame01").iterdir())
    assert written == ["patient001_frame01_bayesian.nii.gz", "patient001_frame01_labels.nii.gz"]


def test_moved_folder_runs(trained, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained / "out", moved)
    fold = Fold(moved / "bayesdn_0")
    before = fold.score()
    fold.progress.unlink()
    assert validate(str(fold.file)) == before
    segmenter = EnsembleSegmenter(moved)
    assert all(moved in Path(m.predictor.config["bundle_root"]).parents for m in segmenter.members.values())


def test_same_command_does_nothing_again_and_another_request_is_refused(trained):
    """Weights stay as they are; other settings do not silently go on with the algorithms that are there."""
    weights = sorted(trained.glob(f"out/*/{DN}/models/model.pt"))
    before = [path.stat().st_mtime_ns for path in weights]
    common = {"datalist": trained / "folds.json", "root": trained / "data", "output": trained / "out"}
    scores = auto3dseg(**common, algos="bayesdn", settings=SETTINGS)
    assert list(scores) == ["bayesdn_0", "bayesdn_1"]
    assert [path.stat().st_mtime_ns for path in weights] == before
    with pytest.raises(ValueError, match="was made with other settings, algos. Choose another output folder"):
        auto3dseg(**common, algos="bayesunet", settings={**SETTINGS, "iterations": 3})


def test_generation_of_all_templates(data, tmp_path):
    """Each template takes its own bundle, and the settings of AutoRunner's input."""
    source = {"modality": "MRI", "datalist": str(data / "folds.json"), "dataroot": str(data / "data")}
    source["settings"] = {"network_def#dropout": 0.2}
    flags = {"train": False, "ensemble": False}
    AutoRunner(str(tmp_path), source, templates_path_or_url=str(TEMPLATES), **flags).run()
    for name in ("dn", "drn", "unet"):
        for number in (0, 1):
            fold = Fold(tmp_path / f"bayes{name}_{number}")
            assert fold.bundle.name == f"cardiac_{name}_segmentation"
            assert not (fold.bundle / "models").exists()
            assert fold.training().parser["network_def"]["dropout"] == 0.2
            assert fold.overrides("inference") == {"network_def#dropout": 0.2}


def test_failed_training_says_why(data, tmp_path, capfd):
    source = {"modality": "MRI", "datalist": str(data / "folds.json"), "dataroot": str(data / "data")}
    runner = AutoRunner(str(tmp_path), source, "bayesdn", templates_path_or_url=str(TEMPLATES), ensemble=False)
    runner.set_training_params({"itertions": 1})
    with pytest.raises(RuntimeError, match="bayesdn_0: training failed with exit code 1; its messages are above"):
        runner.run()
    expected = f"error: {DN} has no setting 'itertions' in configs/train.json or inference.json.\n"
    assert capfd.readouterr().err.endswith(expected)


@pytest.mark.parametrize(
    ("spacing", "channels", "labels", "reason"),
    [
        ([1.5, 1.5, 5.0], 1, [0, 1, 2, 3], ""),
        ([8.0, 1.4, 1.4], 1, [0, 2, 3], ""),
        ([1.5, 1.5, 1.5], 1, [0, 1, 2, 3], "no stack of short-axis slices"),
        ([1.5, 1.5, 5.0], 4, [0, 1, 2, 3], "several channels"),
        ([1.5, 1.5, 5.0], 1, [0, 1, 2, 3, 4], "the labels are [0, 1, 2, 3, 4]"),
    ],
)
def test_other_data_are_skipped(spacing, channels, labels, reason, tmp_path):
    image_stats = {"spacing": {"median": spacing}, "channels": {"max": channels}}
    stats = {"stats_summary": {"image_stats": image_stats, "label_stats": {"labels": labels}}}
    for name, content in {"stats": stats, "input": {"modality": "MRI"}}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    algo = BayesianAlgo(str(TEMPLATES))
    algo.name = "bayesunet"
    algo.set_data_stats(str(tmp_path / "stats.yaml"))
    algo.set_data_source(str(tmp_path / "input.yaml"))
    skipped, text = algo.pre_check_skip_algo()
    assert skipped == bool(reason) and reason in text


def check_bundle(folder, metrics):
    """What MONAI does with a bundle, and what its metadata say."""
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert 0 <= metadata["eval_metrics"]["val_mean_dice"] <= 1
    assert metadata["eval_metrics"] == {k: v for k, v in metrics.items() if np.isfinite(v)}
    own = json.loads((ROOT / "bundles" / DN / "configs" / "metadata.json").read_text())["version"]
    new = f"{own[: own.rindex('.')]}.{int(own.split('.')[2]) + 1}"
    assert list(metadata["changelog"])[0] == metadata["version"] == new
    jsonschema.validate(metadata, json.loads((ROOT / "tests" / "meta_schema_20240725.json").read_text()))
    files = {"meta_file": "metadata.json", "config_file": "inference.json"}
    files = {key: str(folder / "configs" / name) for key, name in files.items()}
    verify_net_in_out(net_id="network_def", **files, device="cpu", n=4, bundle_root=str(folder))
    network = monai.bundle.load(folder.name, bundle_dir=str(folder.parent), workflow_type="inference", device="cpu")
    weights = torch.load(folder / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(value, weights[key].to(value.dtype)) for key, value in network.state_dict().items())
    assert f"> **Version {new}**: {metadata['changelog'][new]}." in (folder / "docs" / "README.md").read_text()
    return metadata


def test_fold_becomes_a_bundle(trained, tmp_path):
    result = pipeline("fold_to_bundle", "--source", "out/bayesdn_1", "--output", str(tmp_path / "made"), cwd=trained)
    assert result.returncode == 0, result.stderr
    fold, folder = Fold(trained / "out" / "bayesdn_1"), tmp_path / "made" / DN
    check_bundle(folder, fold.score()["metrics"])
    config = {name: json.loads((folder / "configs" / f"{name}.json").read_text()) for name in ("train", "inference")}
    assert config["train"]["fold"] == 1 and config["train"]["iterations"] == 2 and config["inference"]["samples"] == 2
    original = json.loads((ROOT / "bundles" / DN / "configs" / "train.json").read_text())
    assert config["train"]["dataset_dir"] == original["dataset_dir"]
    assert config["train"]["data_list_file_path"] == "$@bundle_root + '/configs/datalist.json'"
    assert {p.name for p in folder.iterdir()} == {"LICENSE", "configs", "docs", "models"}
    with pytest.raises(ValueError, match="is there already. Choose another output folder"):
        fold_to_bundle(fold.folder, tmp_path / "made")


def test_checkpoint_becomes_a_bundle(trained, tmp_path):
    """A file of weights with its datalist and fold is measured to the same Dice as the fold it came from."""
    fold = Fold(trained / "out" / "bayesdn_0")
    data = {"datalist": trained / "folds.json", "root": trained / "data", "settings": {"amp": False}}
    weights = fold.bundle / "models" / "model.pt"
    folder = fold_to_bundle(weights, tmp_path, DN, fold=0, **data)
    check_bundle(folder, fold.score()["metrics"])
    unmeasured = fold_to_bundle(weights, tmp_path / "unmeasured", DN, version="1.0.0")
    metadata = json.loads((unmeasured / "configs" / "metadata.json").read_text())
    assert "eval_metrics" not in metadata and metadata["changelog"]["1.0.0"] == "weights of model.pt"


def test_fold_to_bundle_refuses_in_one_line(trained, tmp_path):
    def refusal(source, **options):
        with pytest.raises(ValueError) as error:
            fold_to_bundle(source, tmp_path / "out", **options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists() and ".part-" not in str(error.value)
        return str(error.value)

    weights = trained / "out" / "bayesdn_0" / DN / "models" / "model.pt"
    assert "no such file. Give a folder that Auto3DSeg generated" in refusal(trained / "data")
    assert "which bundle do these weights belong to?" in refusal(weights)
    assert "none.pt: no such folder or file" in refusal(tmp_path / "none.pt", bundle=DN)
    assert "belong to another network" in refusal(weights, bundle="cardiac_unet_segmentation")
    assert "version 0.1.0 is in its changelog already" in refusal(weights, bundle=DN, version="0.1.0")
    data = {"datalist": trained / "folds.json", "root": trained / "data"}
    assert "fold 7 would leave nothing on one side" in refusal(weights, bundle=DN, fold=7, **data)
    untrained = tmp_path / "bayesdn_0"
    shutil.copytree(trained / "out" / "bayesdn_0", untrained, ignore=shutil.ignore_patterns("progress.yaml", "models"))
    assert "Train the fold first" in refusal(untrained)


def test_bad_requests_are_refused_in_one_line(data, tmp_path):
    datalist = json.loads((data / "folds.json").read_text())

    def refusal(change=None, **options):
        write_json(tmp_path / "folds.json", {**datalist, **(change or {})})
        with pytest.raises(ValueError) as error:
            auto3dseg(tmp_path / "folds.json", data / "data", tmp_path / "out", **options)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return str(error.value)

    items = datalist["training"]
    missing = [{**items[0], "label": "patient001/none.nii.gz"}, *items[1:]]
    assert refusal({"training": missing}).startswith(f"{data}/data/patient001/none.nii.gz: no such file, but ")
    assert "has 2 folds, so num_fold is 1 to 2; got 3" in refusal(num_fold=3)
    assert "two folds or more: give another --num_fold" in refusal(num_fold=1, ensemble=True)
    gap = [{**item, "fold": 2 * item["fold"]} for item in items]
    assert "without gaps, two or more; got [0, 2]" in refusal({"training": gap})
    assert "got [-1, 0, 1]" in refusal({"training": [*items, {**items[0], "fold": -1}]})
    assert "item 1 of 'training' has to name a file" in refusal({"training": [{"image": "a.nii.gz"}]})
    assert "got [None]" in refusal({"training": [{key: item[key] for key in ("image", "label")} for item in items]})
    expected = "Unknown algorithm 'bayesmlp': choose from bayesdn, bayesdrn, bayesunet."
    assert refusal(algos="bayesdn,bayesmlp") == expected
    assert "has no setting 'itertions'" in refusal(settings={"itertions": 3})
    assert "no MONAI bundle there" in refusal(bundle_dir=tmp_path)


def test_input_from_dicom(command, tmp_path, monkeypatch):
    """Is made NIfTI before the training, beside what lies there as NIfTI; nothing of it is dropped without a word."""
    write_dicom(tmp_path / "in", dicom_cine())
    write_phantom(tmp_path / "in", "other", ShortAxisPhantom(shape=(40, 40), n_slices=2), phases={"ed": 0.0})
    calls = []
    workflows = "cardiac_qc_plugin.workflows"
    monkeypatch.setattr(f"{workflows}.auto3dseg.auto3dseg", lambda *args: calls.append(args) or {"bayesdn_0": 0.5})
    monkeypatch.setattr(f"{workflows}.auto3dseg.EnsembleSegmenter", lambda output: SimpleNamespace(members=["a", "b"]))
    monkeypatch.setattr(f"{workflows}.run.run", lambda scans, *args: calls.append((scans, *args)) or scans)
    words = ("--datalist", "folds.json", "--root", "data", "--output", tmp_path / "out", "--input", tmp_path / "in")
    result = command("auto3dseg", *words)
    assert result.returncode == 0, result.stderr
    assert f"{PHASES + 1} scan(s) segmented by a, b in {tmp_path / 'out' / 'ensemble'}." in result.stdout
    (*_, ensemble), (scans, folder, *_) = calls
    assert ensemble and folder == str(tmp_path / "out" / "ensemble")
    assert all(scan.path.is_file() for scan in scans) and scans[-1].case == "other_ed"


def test_ensemble_needs_two_members(trained):
    with pytest.raises(ValueError, match="two or more of them, got 1"):
        ensemble_maps([torch.full((4, 2, 2, 1), 0.25)])
    history = import_bundle_algo_history(str(trained / "out"))
    ensemble = UncertaintyEnsemble(n_fold=2)
    ensemble.set_algos(history[:1])
    with pytest.raises(ValueError, match="two trained folds or more, got 1"):
        ensemble.collect_algos()


def test_bundles_that_are_not_installed(monkeypatch, tmp_path):
    """An installed package has no bundles beside it."""
    monkeypatch.setattr("cardiac_qc_plugin.bundle.BUNDLES", tmp_path / "site-packages" / "bundles")
    with pytest.raises(ValueError, match="Bundles come with the repository, not with the package"):
        find_bundle(DN)
