"""The bundles as a MONAI user starts them: configs agree, networks fit the metadata, training runs and resumes."""

import contextlib
import csv
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.data import MetaTensor

from cardiac_qc_plugin.bundle import (
    NETWORKS,
    BundlePredictor,
    SegmentWithBundled,
    find_detectors,
    load_detector,
    root_cause,
)
from cardiac_qc_plugin.checkpoints import detector_file, load_weights, read_threshold, save_weights
from cardiac_qc_plugin.data import ImageDegradation, PatchAugmentation, hold_out, read_fold
from cardiac_qc_plugin.data.predictions import MAP_FILES
from cardiac_qc_plugin.metrics import dice_and_hausdorff
from cardiac_qc_plugin.networks import FailureResNet
from cardiac_qc_plugin.workflows.calibrate import read_calibration
from cardiac_qc_plugin.workflows.files import file_sha256, read_volume, write_like

ROOT = Path(__file__).parent.parent
SEGMENTATION = [f"cardiac_{name}_segmentation" for name in ("dn", "drn", "unet")]
BUNDLES = [*SEGMENTATION, "cardiac_segmentation_failure"]


def config(bundle, name):
    return json.loads((ROOT / "bundles" / bundle / "configs" / f"{name}.json").read_text())


def train(bundle, acdc_like, ckpt_dir, *overlays, interrupt=None, **overrides):
    """Run a bundle's training, or an overlay on it, in this process; two iterations unless overridden."""
    configs = ROOT / "bundles" / bundle / "configs"
    settings = {
        "bundle_root": str(ROOT / "bundles" / bundle),
        "dataset_dir": str(acdc_like / "data"),
        "data_list_file_path": str(acdc_like / "folds.json"),
        "ckpt_dir": str(ckpt_dir),
        "iterations": 2,
        "epoch_length": 1,
        "batch_size": 2,
        **overrides,
    }
    files = [str(configs / name) for name in ("train.json", *overlays)]
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", **settings)
    workflow.initialize()
    missing = workflow.check_properties()
    if interrupt is not None:
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(Events.EPOCH_STARTED(once=interrupt), lambda engine: 1 / 0)
    with pytest.raises(RuntimeError) if interrupt else contextlib.nullcontext():
        workflow.run()
    workflow.finalize()
    return workflow, missing


@pytest.mark.parametrize("bundle", BUNDLES)
def test_network_fits_the_metadata(bundle):
    configs = ROOT / "bundles" / bundle / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        n=8,
        bundle_root=str(configs.parent),
    )


@pytest.mark.parametrize("bundle", BUNDLES)
def test_range_of_the_output_is_that_of_logits(bundle):
    parser = ConfigParser(config(bundle, "inference"))
    stated = config(bundle, "metadata")["network_data_format"]["outputs"]["pred"]["value_range"] or (-np.inf, np.inf)
    network = load_weights(parser.get_parsed_content("network_def"), ROOT / "bundles" / bundle / "models" / "model.pt")
    with torch.no_grad():
        output = network.eval()(torch.rand(1, 2 if bundle == BUNDLES[-1] else 1, 96, 96))
    assert stated[0] <= output.min() and output.max() <= stated[1]
    assert not torch.allclose(output.sum(dim=1), torch.ones(()))  # no probabilities


@pytest.mark.parametrize("bundle", BUNDLES)
def test_readme_has_the_settings_and_their_defaults(bundle):
    """Settings that a table names are the configuration's, with its plain values; and so are those of both tables."""
    readme = (ROOT / "bundles" / bundle / "docs" / "README.md").read_text()
    configs, named = {name: config(bundle, name) for name in ("inference", "train")}, {}
    for name, settings in configs.items():
        besides, _, table = readme.partition(f" (`configs/{name}.json`)")[2].partition(":\n\n")
        named[name] = set()
        for row in table.partition("\n\n")[0].splitlines()[2:]:
            keys, defaults = re.findall("`(.+?)`", row.split("|")[1]), row.split("|")[2].split(", ")
            named[name] |= {key.partition("#")[0] for key in keys}
            for key, default in zip(keys, defaults, strict=False) if len(keys) == len(defaults) else ():
                value, default = settings.get(key), default.strip(" `")
                if isinstance(value, int | float):
                    assert json.loads(default) == value, key
                elif isinstance(value, str) and not value.startswith("$"):
                    assert default == value or (default, value) == ("none", ""), key
        assert named[name] <= set(settings)
    both = named["inference"] & set(configs["train"])
    same = {key for key in both if configs["inference"][key] == configs["train"][key]}
    assert set(re.findall(r"`(\w+)`", besides.partition("and in")[0])) == same  # of the training's table
    assert both - same <= named["train"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_and_inference_agree(bundle):
    training = config(bundle, "train")
    inference = json.loads(json.dumps(config(bundle, "inference")).replace("@displayable_configs#", "@"))
    shared = {"network_def", "network", "spacing", "region_size", "min_size"} & set(training)
    assert {key: training[key] for key in shared} == {key: inference[key] for key in shared}
    trained, inferred = training["train"]["deterministic_transforms"], inference["preprocessing"]["transforms"]
    if bundle in SEGMENTATION:
        assert trained == inferred
        return
    settings = {step["_target_"]: {k: v for k, v in step.items() if k != "keys"} for step in trained}
    for step in inferred:  # it may segment first, where training reads what was segmented before
        used = {k: v for k, v in step.items() if k not in ("keys", "allow_missing_keys")}
        assert used.items() <= settings.get(step["_target_"], used).items()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_whole_augmentation_is_in_the_configuration(bundle):
    augmentation = config(bundle, "train")["train"]["augmentation"]
    expected = set(PatchAugmentation.__dataclass_fields__)
    if bundle not in SEGMENTATION:  # its map and its segmentation belong to the scan as it is
        expected.remove("degradation")
    else:
        degradation = augmentation["degradation"].keys() - {"_target_", "_disabled_"}
        assert degradation == ImageDegradation.__dataclass_fields__.keys()
    assert augmentation.keys() - {"_target_"} == expected


def test_segmentation_bundles_differ_in_network_and_regime_only():
    own = {"network_def", "patch_size", "loss", "learning_rate", "max_grad_norm"}
    for name in ("train", "inference"):
        first, *others = ({k: v for k, v in config(bundle, name).items() if k not in own} for bundle in SEGMENTATION)
        assert all(other == first for other in others)
    for name in ("evaluate", "multi_gpu_train", "multi_gpu_evaluate"):
        assert (
            len({(ROOT / "bundles" / bundle / "configs" / f"{name}.yaml").read_text() for bundle in SEGMENTATION}) == 1
        )
    assert len({(ROOT / "bundles" / bundle / "configs" / "acdc_folds.json").read_text() for bundle in BUNDLES}) == 1


@pytest.mark.parametrize(
    ("bundle", "overrides"),
    [
        ("cardiac_dn_segmentation", {"loss": "brier", "patch_size": 32}),
        ("cardiac_drn_segmentation", {"loss": "ce", "patch_size": 32, "degraded": 0.5}),
        ("cardiac_unet_segmentation", {"loss": "soft_dice", "patch_size": 32}),
    ],
)
def test_segmentation_trains(bundle, overrides, acdc_like, tmp_path):
    workflow, missing = train(bundle, acdc_like, tmp_path, val_interval=2, **overrides)
    assert missing == []
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert trainer.state.iteration == 2
    degradation = workflow.parser.get_parsed_content("train#augmentation").degradation
    if "degraded" in overrides:
        assert (degradation.share, degradation.motion_share) == (0.5, 0.2)
    else:
        assert degradation is None
    assert 0 <= workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_mean_dice"] <= 1
    fresh = workflow.parser.get_parsed_content("network_def")
    load_weights(fresh, tmp_path / "model.pt")
    assert not list(tmp_path.glob("resume*"))


@pytest.mark.parametrize("bundle", ["cardiac_dn_segmentation", "cardiac_segmentation_failure"])
def test_a_damaged_validation_label_is_known_before_training(bundle, acdc_like, tmp_path):
    shutil.copytree(acdc_like, tmp_path / "acdc")
    training, validation = read_fold(tmp_path / "acdc" / "folds.json", tmp_path / "acdc" / "data", 0)
    settings = {}
    if bundle == "cardiac_segmentation_failure":
        validation, settings = hold_out(training)[1], {"predictions_dir": str(acdc_like / "predictions")}
    label = Path(validation[-1]["label"])
    volume = read_volume(label)
    write_like(label, np.where(volume.data > 0, 7, 0).astype(np.uint8), volume)
    with pytest.raises(RuntimeError) as info:
        train(bundle, tmp_path / "acdc", tmp_path / "models", val_interval=9, iterations=3, **settings)
    assert label.name in str(root_cause(info.value)) and "7" in str(root_cause(info.value))
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]


def test_augmentation_is_left_out_as_the_readmes_say(acdc_like, tmp_path):
    """On the command line null would be a text, and MONAI drops None."""
    readmes = [(ROOT / "bundles" / bundle / "docs" / "README.md").read_text() for bundle in SEGMENTATION]
    ((key, value),) = {re.search(r"""none with `--"(.+?)" '(.+?)'`""", readme).groups() for readme in readmes}
    workflow, _ = train("cardiac_dn_segmentation", acdc_like, tmp_path, val_interval=9, patch_size=32, **{key: value})
    assert workflow.parser.get_parsed_content("train#trainer").state.iteration == 2
    assert workflow.parser.get_parsed_content("train#dataset").augmentation is None


def csv_rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_evaluate_overlay_scores_the_left_out_fold(acdc_like, tmp_path):
    """Its figures are those of the pipeline's own metrics on what inference writes for the same fold."""
    bundle = "cardiac_drn_segmentation"
    common = {"samples": 2, "amp": False}
    workflow, missing = train(
        bundle,
        acdc_like,
        tmp_path,
        "evaluate.yaml",
        output_dir=str(tmp_path / "eval"),
        ckpt_path=str(ROOT / "bundles" / bundle / "models" / "model.pt"),
        **common,
    )
    assert missing == []
    items = [i for i in json.loads((acdc_like / "folds.json").read_text())["training"] if i["fold"] == 0]
    predict = BundlePredictor(ROOT / "bundles" / bundle, **common)
    expected = []
    for item in items:
        reference = read_volume(acdc_like / "data" / item["label"])
        labels = np.asarray(predict({"image": str(acdc_like / "data" / item["image"])})["pred"])[0]
        expected.append(list(dice_and_hausdorff(labels, reference.data, reference.spacing).values()))
    for name, score in (("val_mean_dice", "dice"), ("val_hausdorff_mm", "hausdorff")):
        rows = csv_rows(tmp_path / "eval" / f"{name}_raw.csv")
        assert [Path(row["filename"]).name for row in rows] == [Path(item["image"]).name for item in items]
        found = [[float(row[f"class{index}"]) for index in range(3)] for row in rows]
        np.testing.assert_allclose(found, [[getattr(s, score) for s in scores] for scores in expected], rtol=1e-4)
    metrics = workflow.parser.get_parsed_content("validate#evaluator").state.metrics
    dice = np.mean([[s.dice for s in scores] for scores in expected])
    assert metrics["val_mean_dice"] == pytest.approx(dice, rel=1e-5)


def test_evaluate_overlay_judges_the_detector(acdc_like, tmp_path):
    models = ROOT / "bundles" / "cardiac_segmentation_failure" / "models"
    overrides = {"predictions_dir": str(acdc_like / "predictions"), "map": "emap", "output_dir": str(tmp_path)}
    _, missing = train("cardiac_segmentation_failure", acdc_like, models, "evaluate.yaml", **overrides)
    assert missing == []
    record = json.loads((tmp_path / "detection.json").read_text())
    assert record["threshold"] == json.loads((models / "drn_emap_operating_point.json").read_text())["threshold"]
    assert record["n_volumes"] == 10 and record["validation"]["regions_failing"] > 0
    assert "val_region_average_precision" in (tmp_path / "metrics.csv").read_text()


def start(arguments, tmp_path, **options):
    """Run a module of python, as a user does, from another folder."""
    command = [sys.executable, "-m", *arguments]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def distributed_settings(overlays, acdc_like, tmp_path, bundle="cardiac_dn_segmentation", **options):
    configs = ROOT / "bundles" / bundle / "configs"
    return {
        "config_file": [str(configs / name) for name in ("train.json", *overlays)],
        "bundle_root": str(configs.parent),
        "dataset_dir": str(acdc_like / "data"),
        "data_list_file_path": str(acdc_like / "folds.json"),
        "ckpt_dir": str(tmp_path),
        "output_dir": str(tmp_path / "eval"),
        **options,
    }


def two_processes(run, *places, **options):
    """Two processes on CPUs, forks of this one with what torchrun would tell them."""
    settings = distributed_settings(*places, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_as, args=(rank, port, run, settings)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]


def run_as(rank, port, run, settings):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(dict(zip(names, map(str, (rank, rank, 2, 2, "127.0.0.1", port)), strict=True)))
    monai.bundle.run(run, **settings)


def test_two_processes_train_and_evaluate(acdc_like, tmp_path):
    regime = {"iterations": 2, "epoch_length": 1, "val_interval": 2, "batch_size": 2, "patch_size": 32}
    arguments = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run", "training"]
    settings = distributed_settings(["multi_gpu_train.yaml"], acdc_like, tmp_path, **regime)
    finished = start(arguments, tmp_path, **settings)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert not list(tmp_path.glob("resume*"))
    settings = {"samples": 2, "amp": False}
    two_processes("evaluating", ["evaluate.yaml", "multi_gpu_evaluate.yaml"], acdc_like, tmp_path, **settings)
    together = csv_rows(tmp_path / "eval" / "val_mean_dice_raw.csv")
    train("cardiac_dn_segmentation", acdc_like, tmp_path, "evaluate.yaml", output_dir=str(tmp_path / "one"), **settings)
    alone = csv_rows(tmp_path / "one" / "val_mean_dice_raw.csv")
    assert len(alone) == 10 and sorted(map(str, together)) == sorted(map(str, alone))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_mirrored_stacks_are_trained_on_as_others(bundle, acdc_like, tmp_path):
    """What a converter stored mirrored, image and label and maps, becomes what the network sees of the scan itself."""
    item = json.loads((acdc_like / "folds.json").read_text())["training"][0]
    folder = acdc_like / "predictions" / Path(item["image"]).name.removesuffix(".nii.gz")
    files = {"image": acdc_like / "data" / item["image"], "label": acdc_like / "data" / item["label"]}
    if "failure" in bundle:
        files |= {"segmentation": folder / "segmentation.nii.gz", "uncertainty": folder / "bayesian.nii.gz"}
    stored = {"usual": {}, "mirrored": {}}
    for key, path in files.items():
        volume = read_volume(path)
        for name, step in (("usual", 1), ("mirrored", -1)):
            affine = np.diag([-volume.spacing[0], -step * volume.spacing[1], volume.spacing[2], 1.0])
            affine[1, 3] = 0 if step == 1 else -volume.spacing[1] * (volume.data.shape[1] - 1)
            stored[name][key] = str(tmp_path / f"{name}_{key}.nii.gz")
            nib.save(nib.Nifti1Image(np.ascontiguousarray(volume.data[:, ::step]), affine), stored[name][key])
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles" / bundle / "configs" / "train.json"))
    parser.update({"bundle_root": str(ROOT / "bundles" / bundle)})
    prepare = parser.get_parsed_content("train#preprocessing")
    usual, mirrored = (prepare(stored[name]) for name in ("usual", "mirrored"))
    for key in ("image", "label"):
        assert usual[key].any()
        torch.testing.assert_close(
            *(one[key].as_subclass(torch.Tensor) for one in (mirrored, usual)), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("fold", [1, -1])
def test_evaluation_without_a_fold_scores_all_volumes(fold, acdc_like):
    parser = ConfigParser()
    configs = ROOT / "bundles" / "cardiac_drn_segmentation" / "configs"
    parser.read_config([str(configs / name) for name in ("train.json", "evaluate.yaml")])
    settings = {"dataset_dir": acdc_like / "data", "data_list_file_path": acdc_like / "folds.json", "fold": fold}
    parser.update({name: str(value) if name != "fold" else value for name, value in settings.items()})
    items = json.loads((acdc_like / "folds.json").read_text())["training"]
    expected = [item["image"] for item in items if fold in (item["fold"], -1)]
    found = parser.get_parsed_content("validate#dataset").data
    assert sorted(str(Path(item["image"]).relative_to(acdc_like / "data")) for item in found) == sorted(expected)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_several_processes_may_leave_no_fold_out(bundle, acdc_like):
    parser = ConfigParser()
    configs = ROOT / "bundles" / bundle / "configs"
    parser.read_config([str(configs / name) for name in ("train.json", "multi_gpu_train.yaml")])
    own = {"data_list_file_path": str(acdc_like / "folds.json"), "dataset_dir": str(acdc_like / "data"), "fold": -1}
    parser.update({"bundle_root": str(configs.parent), "predictions_dir": str(acdc_like / "predictions"), **own})
    assert parser.get_parsed_content("validate#sampler") is None
    assert len(parser.get_parsed_content("validate#dataloader")) == 0


SAME_BATCHES = """
network_def#features: [4, 8]
network_def#dropout: 0.0
share: "$slice(int(os.environ.get('RANK', 0)), None, int(os.environ.get('WORLD_SIZE', 1)))"
train#dataloader: "$[{key: value[@share] for key, value in batch.items()} for batch in torch.load(@batches)]"
losses:
  _target_: MetricLogger
  loss_transform: "$monai.handlers.from_engine(['loss'], first=True)"
+imports:
- "$import torch"
+initialize:
- "$@losses.attach(@train#trainer)"
+run:
- "$torch.save(@losses.loss, @ckpt_dir + '/losses_' + os.environ.get('RANK', 'joint') + '.pt')"
"""


def test_two_processes_learn_as_one_with_the_joint_batch(acdc_like, tmp_path):
    """The loss of every iteration, averaged over the processes, and the weights; a network whose normalization does not
    look at other images, without dropout."""
    bundle = "cardiac_unet_segmentation"
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "image": torch.rand(4, 1, 32, 32, generator=generator),
            "label": torch.randint(4, (4, 1, 32, 32), generator=generator),
        }
        for _ in range(8)
    ]
    torch.save(batches, tmp_path / "batches.pt")
    (tmp_path / "same.yaml").write_text(SAME_BATCHES)
    options = {"batches": str(tmp_path / "batches.pt"), "iterations": 8, "epoch_length": 8, "amp": False}
    overlays = ["multi_gpu_train.yaml", str(tmp_path / "same.yaml")]
    two_processes("training", overlays, acdc_like, tmp_path, bundle, **options)
    weights = torch.load(tmp_path / "model.pt")
    train(bundle, acdc_like, tmp_path, str(tmp_path / "same.yaml"), **options)
    both, joint = ([torch.load(tmp_path / f"losses_{n}.pt") for n in names] for names in (("0", "1"), ("joint",)))
    curves = [np.mean([[value for _, value in curve] for curve in curves], axis=0) for curves in (both, joint)]
    assert len(curves[0]) == 8 and not np.allclose(both[0], both[1])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
    torch.testing.assert_close(weights, torch.load(tmp_path / "model.pt"), rtol=0.01, atol=1e-3)


def test_two_processes_train_a_detector(acdc_like, tmp_path):
    options = {"predictions_dir": str(acdc_like / "predictions"), "patch_size": 40, "min_size": 40, "iterations": 2}
    two_processes("training", ["multi_gpu_train.yaml"], acdc_like, tmp_path, "cardiac_segmentation_failure", **options)
    assert json.loads((tmp_path / "model_operating_point.json").read_text())["n_volumes"] == 2
    overlays = ["evaluate.yaml", "multi_gpu_evaluate.yaml"]
    two_processes(
        "evaluating",
        overlays,
        acdc_like,
        tmp_path,
        "cardiac_segmentation_failure",
        map="bmap",
        predictions_dir=str(acdc_like / "predictions"),
    )
    assert json.loads((tmp_path / "eval" / "detection.json").read_text())["n_volumes"] == 10


def test_failure_detector_trains_and_chooses_its_operating_point(acdc_like, tmp_path):
    predictions = str(acdc_like / "predictions")
    overrides = {"predictions_dir": predictions, "patch_size": 40, "min_size": 40, "val_interval": 1}
    workflow, missing = train("cardiac_segmentation_failure", acdc_like, tmp_path, **overrides)
    assert missing == []
    point = json.loads((tmp_path / "model_operating_point.json").read_text())
    assert 0 <= point["threshold"] <= 1
    # 10 patients, 5 of them in the training fold, one of these held out, two phases
    assert point["n_volumes"] == 2
    assert workflow.parser.get_parsed_content("train#trainer").state.iteration == 2


def test_detector_is_kept_when_no_held_out_region_fails(acdc_like, tmp_path):
    """Without an operating point, also without that of an earlier training."""
    shutil.copytree(acdc_like / "predictions", tmp_path / "predictions")
    _, held_out = hold_out(read_fold(acdc_like / "folds.json", acdc_like / "data", 0)[0])
    for item in held_out:
        folder = tmp_path / "predictions" / Path(item["image"]).name.removesuffix(".nii.gz")
        nib.save(nib.load(item["label"]), folder / "segmentation.nii.gz")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model_operating_point.json").write_text('{"threshold": 0.5}')
    predictions = {"predictions_dir": str(tmp_path / "predictions"), "patch_size": 40, "min_size": 40}
    with pytest.raises(RuntimeError) as error:
        train("cardiac_segmentation_failure", acdc_like, tmp_path / "models", **predictions)
    assert "regions fails, so no threshold can be chosen" in str(root_cause(error.value))
    assert [path.name for path in (tmp_path / "models").glob("model*")] == ["model.pt"]


@pytest.mark.parametrize("bundle", [SEGMENTATION[0], BUNDLES[-1]])
def test_training_on_all_patients_watches_none(bundle, acdc_like, tmp_path):
    """No item is left out, and no detector's patient held out; so there is no operating point."""
    overrides = {"predictions_dir": str(acdc_like / "predictions")} if "failure" in bundle else {}
    workflow, _ = train(bundle, acdc_like, tmp_path, fold=-1, patch_size=40, iterations=1, val_interval=1, **overrides)
    data = [workflow.parser.get_parsed_content(f"{part}#dataset").data for part in ("train", "validate")]
    assert [len(items) for items in data] == [20, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_training_resumes(workers, acdc_like, tmp_path):
    """Stopped after two of three epochs, it goes on with the third to the same weights; other settings start anew."""
    overrides = {"patch_size": 32, "val_interval": 100, "iterations": 3, "num_workers": workers}
    train("cardiac_dn_segmentation", acdc_like, tmp_path, interrupt=3, **overrides)
    other, _ = train("cardiac_dn_segmentation", acdc_like, tmp_path / "other", fold=1, **overrides)
    assert other.parser.get_parsed_content("resume") is None
    assert other.parser.get_parsed_content("resume_dir").endswith("_brier_1_0_0.003_2_32_0.0_0_0_3")
    other.parser.update({"learning_rate": 1e-4, "snapshots": 3, "degraded": 0.25, "pretrained": "a"})  # starts anew
    other.parser.parse()
    assert other.parser.get_parsed_content("resume_dir").endswith("_brier_1_0_0.0001_2_32_0.25_3_3904355907_3")
    workflow, _ = train("cardiac_dn_segmentation", acdc_like, tmp_path, **overrides)
    trainer = workflow.parser.get_parsed_content("train#trainer")
    steps = workflow.parser.get_parsed_content("optimizer").state_dict()["state"][0]["step"]
    assert trainer.state.iteration == 3 and int(steps) == 3
    assert workflow.parser.get_parsed_content("resume") is not None
    train("cardiac_dn_segmentation", acdc_like, tmp_path / "uninterrupted", **overrides)
    resumed, expected = (torch.load(p / "model.pt", weights_only=True) for p in (tmp_path, tmp_path / "uninterrupted"))
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def test_dn_learns_two_slices_by_heart(acdc_like):
    """By its own loss, optimizer and learning rate; judged without dropout and with running statistics."""
    folder, scan = ROOT / "bundles" / SEGMENTATION[0], acdc_like / "data/patient001/patient001_frame01"
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "train.json"))
    parser.update({"bundle_root": str(folder), "spacing": 3.0, "device": "$torch.device('cpu')"})
    preprocess, network, optimizer, loss = (
        parser.get_parsed_content(name) for name in ("train#preprocessing", "network", "optimizer", "train#loss")
    )
    item = preprocess({"image": f"{scan}.nii.gz", "label": f"{scan}_gt.nii.gz"})
    image, label = (item[key].as_subclass(torch.Tensor).float().movedim(-1, 0)[:2] for key in ("image", "label"))
    for _ in range(100):
        optimizer.zero_grad()
        loss(network.train()(image), label).backward()
        optimizer.step()
    with torch.no_grad():
        found = network.eval()(image).argmax(dim=1).numpy()
    scores = dice_and_hausdorff(found.transpose(1, 2, 0), label[:, 0].numpy().transpose(1, 2, 0), (3.0, 3.0, 10.0))
    assert min(score.dice for score in scores.values()) > 0.8


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_papers_regime_trains(bundle, acdc_like, tmp_path):
    """Two iterations with the paper's optimizer and schedule; the sizes it states hold without an override."""
    overrides = {"patch_size": 40, "min_size": 40, "predictions_dir": str(acdc_like / "predictions"), "val_interval": 9}
    workflow, _ = train(bundle, acdc_like, tmp_path, "paper.json", **overrides)
    get = workflow.parser.get_parsed_content
    assert type(get("optimizer")) is torch.optim.Adam and get("train#trainer").state.iteration == 2
    assert get("train#dataset").augmentation is None
    configs = ROOT / "bundles" / bundle / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / "train.json"), str(configs / "paper.json")])
    parser["network"] = torch.nn.Conv2d(1, 4, 1)
    names = ("iterations", "batch_size", "patch_size")
    detector, snapshots = bundle == "cardiac_segmentation_failure", bundle == "cardiac_dn_segmentation"
    stated = (20000, 32, 80) if detector else (100000, 16, 151 if snapshots else 128)
    assert tuple(parser.get_parsed_content(name) for name in names) == stated
    optimizer, schedule = (parser.get_parsed_content(name) for name in ("optimizer", "lr_scheduler"))
    rates = []
    for _ in range(stated[0]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # section V: the rate falls to a tenth after 25,000 (detector: 10,000) steps; the DN restarts every 10,000
    if snapshots:
        assert np.flatnonzero(np.diff(rates) > 0).tolist() == list(range(9999, 99999, 10000))
        assert rates[10000] == pytest.approx(0.02) and rates[9999] < 1e-6
    else:
        every, first = (10000, 1e-4) if detector else (25000, 1e-3)
        np.testing.assert_allclose(rates[::every], [first * 0.1**n for n in range(stated[0] // every)])
        assert len(set(np.round(rates, 12))) == stated[0] // every


def test_command_line_runs_inference(acdc_like, tmp_path):
    """`python -m monai.bundle run evaluating` from another folder writes the three volumes of each scan."""
    bundle = ROOT / "bundles" / "cardiac_dn_segmentation"
    network = ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"), workflow_type="infer", bundle_root=str(bundle)
    ).parser.get_parsed_content("network_def")
    save_weights(network, tmp_path / "model.pt")
    command = [sys.executable, "-m", "monai.bundle", "run", "evaluating"]
    options = {
        "config_file": bundle / "configs" / "inference.json",
        "bundle_root": bundle,
        "dataset_dir": acdc_like / "data" / "patient001",
        "output_dir": tmp_path / "out",
        "ckpt_path": tmp_path / "model.pt",
        "samples": 2,
    }
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=300)
    names = sorted(path.name for path in (tmp_path / "out").rglob("*.nii.gz"))
    kinds = ("bayesian", "entropy", "segmentation")
    assert names == [f"patient001_frame{frame}_{kind}.nii.gz" for frame in ("01", "11") for kind in kinds]
    written = read_volume(next((tmp_path / "out").rglob("*frame01_segmentation.nii.gz")))
    original = read_volume(acdc_like / "data" / "patient001" / "patient001_frame01.nii.gz")
    assert written.data.shape == original.data.shape
    np.testing.assert_allclose(written.spacing, original.spacing, rtol=1e-5)


def test_failure_bundle_stands_alone(acdc_like, tmp_path):
    """Given images only it segments them first, and finds the same regions as from the files of that segmentation.

    The files have the names that the pipeline gives them, or those of the segmentation bundle.
    """
    segmenter = ROOT / "bundles" / "cardiac_drn_segmentation"
    bundle = ROOT / "bundles" / "cardiac_segmentation_failure"
    scans = acdc_like / "data" / "patient001"
    segmented = BundlePredictor(segmenter, map="emap")
    for image in scans.glob("*_frame??.nii.gz"):
        result, scan = segmented({"image": str(image)}), read_volume(image)
        name = image.name.removesuffix(".nii.gz")
        folder, before = tmp_path / "predictions" / name, f"{name}_" if "frame01" in name else ""
        write_like(folder / f"{before}segmentation.nii.gz", np.asarray(result["pred"])[0].astype(np.uint8), scan)
        write_like(folder / f"{before}entropy.nii.gz", np.asarray(result["emap"])[0].astype(np.float32), scan)
    common = {"bundle_root": str(bundle), "dataset_dir": str(scans), "map": "emap"}
    for name, settings in {"alone": {}, "given": {"predictions_dir": str(tmp_path / "predictions")}}.items():
        workflow = ConfigWorkflow(
            config_file=str(bundle / "configs" / "inference.json"),
            workflow_type="infer",
            output_dir=str(tmp_path / name),
            **common,
            **settings,
        )
        workflow.initialize()
        assert workflow.check_properties() == []
        workflow.run()
        workflow.finalize()
    names = {name: sorted(p.name for p in (tmp_path / name).rglob("*.nii.gz")) for name in ("alone", "given")}
    assert len(names["alone"]) == 6 and len(names["given"]) == 4  # the segmentation only where it was made
    for given in (tmp_path / "given").rglob("*.nii.gz"):
        alone = read_volume(tmp_path / "alone" / given.relative_to(tmp_path / "given"))
        np.testing.assert_allclose(alone.data, read_volume(given).data, rtol=1e-5, atol=1e-6)


def test_half_of_the_precomputed_maps_is_refused():
    image = MetaTensor(torch.zeros(1, 4, 4, 1), meta={"filename_or_obj": "scan.nii.gz"})
    with pytest.raises(ValueError, match="scan.nii.gz: there is a segmentation only"):
        SegmentWithBundled("nowhere", "bmap", 10)({"image": image, "segmentation": image})


@pytest.mark.parametrize("name", ["inference.json", "train.json"])
def test_each_network_and_map_has_a_detector_of_its_own(name, tmp_path):
    """Training writes where inference reads: weights, and the operating point beside them."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles" / "cardiac_segmentation_failure" / "configs" / name))
    files = {}
    for model in NETWORKS:
        for map in MAP_FILES:
            parser.update({"bundle_root": str(tmp_path), "segmentation_model": model, "map": map})
            parser.parse(reset=True)
            files[Path(parser.get_parsed_content("ckpt_path"))] = (model, map)
    assert {path.parent for path in files} == {tmp_path / "models"} and len(files) == 6
    (tmp_path / "models").mkdir()
    for number, (path, detector) in enumerate(files.items()):
        path.touch()
        assert detector in find_detectors(tmp_path) and len(find_detectors(tmp_path)) == number + 1
    if name == "inference.json":
        path.with_name(f"{path.stem}_operating_point.json").write_text('{"threshold": 0.25}')
        assert parser.get_parsed_content("threshold") == 0.25


@pytest.mark.parametrize(
    ("names", "inferer"),
    [(["inference.json"], "inferer"), (["train.json", "evaluate.yaml"], "validate#inferer")],
    ids=["inference", "evaluate"],
)
@pytest.mark.parametrize("channels", [2, 3])
def test_a_detector_sees_what_its_weights_are_for(names, inferer, channels, tmp_path):
    configs = ROOT / "bundles" / "cardiac_segmentation_failure" / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / name) for name in names])
    parser["ckpt_path"] = str(tmp_path / "mine.pt")
    save_weights(FailureResNet(in_channels=channels), tmp_path / "mine.pt")
    load_weights(parser.get_parsed_content("network_def"), tmp_path / "mine.pt")  # which refuses another number
    assert parser.get_parsed_content(inferer).see_segmentation is (channels == 3)


def test_a_detector_that_is_not_there_is_named_with_those_that_are(tmp_path):
    folder = tmp_path / "cardiac_segmentation_failure"
    shutil.copytree(ROOT / "bundles" / folder.name / "configs", folder / "configs")
    with pytest.raises(ValueError, match="no detector for the unet and the emap, but for none. Train one"):
        load_detector("unet", "emap", root=tmp_path)
    (folder / "models").mkdir()
    for model, map in (("drn", "bmap"), ("dn", "emap")):
        (folder / "models" / detector_file(model, map)).touch()
    with pytest.raises(ValueError, match="but for drn bmap, dn emap. Train one .*--segmentation_model unet --map emap"):
        load_detector("unet", "emap", root=tmp_path)


def test_without_an_operating_point_a_threshold_is_asked_for(tmp_path):
    path = tmp_path / "dn_emap.pt"
    with pytest.raises(ValueError, match="dn_emap_operating_point.json: no operating point .* or give a threshold"):
        read_threshold(path)
    (tmp_path / "dn_emap_operating_point.json").write_text("{}")
    with pytest.raises(ValueError, match="dn_emap_operating_point.json: no operating point .*'threshold'"):
        read_threshold(path)


def test_evaluation_tells_a_missing_operating_point_before_it_reads_scans(tmp_path):
    bundle = ROOT / "bundles" / "cardiac_segmentation_failure"
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / name) for name in ("train.json", "evaluate.yaml")])
    parser.update({"bundle_root": str(bundle), "ckpt_path": str(tmp_path / "mine.pt")})
    save_weights(FailureResNet(), tmp_path / "mine.pt")
    with pytest.raises(RuntimeError) as error:  # MONAI's, with the reason as its cause
        parser.get_parsed_content("initialize")
    assert "mine_operating_point.json: no operating point" in str(error.value.__cause__)


def test_calibrations_are_of_the_shipped_weights_and_of_unseen_patients():
    folder = ROOT / "bundles" / "cardiac_segmentation_failure" / "models"
    folds = config("cardiac_segmentation_failure", "acdc_folds")["training"]
    unseen = {item["meta"]["patient"] for item in folds if item["fold"] == 0}
    detectors = find_detectors(folder.parent)
    assert {("drn", "bmap"), ("drn", "emap"), ("dn", "bmap"), ("dn", "emap")} <= set(detectors)
    for model, map in detectors:
        weights = folder / detector_file(model, map)
        segmentation = ROOT / "bundles" / f"cardiac_{model}_segmentation" / "models" / "model.pt"
        for turns, name in ((1, "calibration"), (4, "turns4_calibration")):
            calibration = read_calibration(folder / f"{weights.stem}_{name}.json")
            assert (calibration.model, calibration.map, calibration.turns) == (model, map, turns)
            assert set(calibration.patients) == unseen and len(calibration.patients) == len(unseen)
            assert calibration.weights_sha256 == {
                f"cardiac_{model}_segmentation": file_sha256(segmentation),
                "cardiac_segmentation_failure": file_sha256(weights),
            }


@pytest.mark.parametrize("weights", sorted((ROOT / "bundles").glob("*/models/*.pt")), ids=lambda path: path.name)
def test_shipped_weights_are_plain_half_precision(weights):
    state = torch.load(weights, weights_only=True)
    assert all(value.dtype in (torch.float16, torch.int64) for value in state.values())
    assert all(bool(torch.isfinite(value.float()).all()) for value in state.values())


def test_a_device_is_no_code(tmp_path):
    code = f"cpu') if open('{tmp_path / 'trap'}', 'w') else torch.device('cpu"
    with pytest.raises(ValueError, match="There is no device"):
        BundlePredictor(ROOT / "bundles" / "cardiac_dn_segmentation", code)
    with pytest.raises(ValueError, match="could not convert"):
        load_detector("dn", "bmap", threshold=f"$open('{tmp_path / 'trap'}', 'w') and 0.5")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("build", [None, "13.0"])
def test_a_gpu_that_is_not_there(monkeypatch, build):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if build else 0)
    monkeypatch.setattr(torch.version, "cuda", build)
    why = r"sees 1 GPU" if build else "this torch is a CPU build"
    with pytest.raises(ValueError, match=rf"There is no device 'cuda:1' here: .*{why}"):
        BundlePredictor(ROOT / "bundles" / "cardiac_dn_segmentation", "cuda:1")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_device_may_be_given_by_its_name(bundle):
    """As MONAI Label gives it."""
    parser = ConfigParser()
    parser.read_config(ROOT / "bundles" / bundle / "configs" / "train.json")
    parser.update({"device": "cpu"})
    assert parser.get_parsed_content("num_workers") == 0
    assert parser.get_parsed_content("train#dataloader#pin_memory") is False
