"""The bundles as a MONAI user starts them: configs agree, networks fit the metadata, training runs and resumes."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow, verify_net_in_out
from monai.data import MetaTensor

from cardiac_qc_plugin.bundle import BundlePredictor, SegmentWithBundled
from cardiac_qc_plugin.checkpoints import load_weights, save_weights
from cardiac_qc_plugin.data.acdc import acdc_datalist
from cardiac_qc_plugin.data.phantom import write_acdc_like
from cardiac_qc_plugin.workflows.files import read_volume, write_json, write_like

ROOT = Path(__file__).parent.parent
SEGMENTATION = [f"cardiac_{name}_segmentation" for name in ("dn", "drn", "unet")]
BUNDLES = [*SEGMENTATION, "cardiac_segmentation_failure"]


def config(bundle, name):
    return json.loads((ROOT / "bundles" / bundle / "configs" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def acdc_like(tmp_path_factory):
    """Phantoms in ACDC's layout with a two-fold datalist, and predictions with errors beside them."""
    root = tmp_path_factory.mktemp("acdc")
    write_acdc_like(root / "data", 10)
    datalist = acdc_datalist(root / "data", folds=2)
    write_json(root / "folds.json", datalist)
    for item in datalist["training"]:
        label = read_volume(root / "data" / item["label"])
        folder = root / "predictions" / Path(item["image"]).name.removesuffix(".nii.gz")
        shifted = np.roll(label.data.astype(np.uint8), 5, axis=0)
        write_like(folder / "segmentation.nii.gz", shifted, label)
        for name in ("bayesian", "entropy"):
            write_like(folder / f"{name}.nii.gz", (shifted != label.data).astype(np.float32), label)
    return root


def train(bundle, acdc_like, ckpt_dir, **overrides):
    """Run a bundle's training in this process; two iterations unless overridden."""
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
    workflow = ConfigWorkflow(
        config_file=str(ROOT / "bundles" / bundle / "configs" / "train.json"), workflow_type="train", **settings
    )
    workflow.initialize()
    missing = workflow.check_properties()
    workflow.run()
    workflow.finalize()
    return workflow, missing


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_follows_the_schema(bundle):
    schema = ROOT.parent / "shared" / "schema" / "meta_schema_20240725.json"
    if not schema.is_file():
        pytest.skip("the model zoo's metadata schema is not at hand")
    metadata = config(bundle, "metadata")
    jsonschema.validate(metadata, json.loads(schema.read_text()))
    assert metadata["version"] in metadata["changelog"]


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
def test_training_and_inference_agree(bundle):
    training, inference = config(bundle, "train"), config(bundle, "inference")
    shared = {"network_def", "network", "spacing", "region_size", "min_size", "see_segmentation"} & set(training)
    assert {key: training[key] for key in shared} == {key: inference[key] for key in shared}

    def steps(section):
        named = {}
        for step in section["transforms"]:
            named[step["_target_"]] = {k: v for k, v in step.items() if k not in ("keys", "mode", "allow_missing_keys")}
        return named

    trained, inferred = steps(training["train"]["preprocessing"]), steps(inference["preprocessing"])
    inferred.pop("Compose", None)  # reads what was segmented before, as training's LoadImaged does
    assert {name: trained[name] for name in inferred} == inferred


def test_segmentation_bundles_differ_in_network_and_regime_only():
    own = {"network_def", "patch_size", "loss"}
    for name in ("train", "inference"):
        first, *others = ({k: v for k, v in config(bundle, name).items() if k not in own} for bundle in SEGMENTATION)
        assert all(other == first for other in others)
    folds = {(ROOT / "bundles" / bundle / "configs" / "acdc_folds.json").read_text() for bundle in BUNDLES}
    assert len(folds) == 1


@pytest.mark.parametrize(
    ("bundle", "overrides"),
    [
        ("cardiac_dn_segmentation", {"loss": "brier", "patch_size": 32}),
        ("cardiac_drn_segmentation", {"loss": "ce", "patch_size": 32}),
        ("cardiac_unet_segmentation", {"loss": "soft_dice", "patch_size": 32}),
    ],
)
def test_segmentation_trains(bundle, overrides, acdc_like, tmp_path):
    workflow, missing = train(bundle, acdc_like, tmp_path, val_interval=2, **overrides)
    assert missing == []
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert trainer.state.iteration == 2
    assert 0 <= workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_mean_dice"] <= 1
    fresh = workflow.parser.get_parsed_content("network_def")
    load_weights(fresh, tmp_path / "model.pt")
    assert not list(tmp_path.glob("resume*"))


def test_failure_detector_trains_and_chooses_its_operating_point(acdc_like, tmp_path):
    predictions = str(acdc_like / "predictions")
    overrides = {"predictions_dir": predictions, "patch_size": 40, "min_size": 40}
    workflow, missing = train("cardiac_segmentation_failure", acdc_like, tmp_path, **overrides)
    assert missing == []
    point = json.loads((tmp_path / "model_operating_point.json").read_text())
    assert 0 <= point["threshold"] <= 1
    # 10 patients, 5 of them in the training fold, one of these held out, two phases
    assert point["n_volumes"] == 2
    assert workflow.parser.get_parsed_content("train#trainer").state.iteration == 2


def test_interrupted_training_resumes(acdc_like, tmp_path, monkeypatch):
    """Stopped after two of three epochs, it goes on with the third; with other settings it starts anew."""
    monkeypatch.setattr("shutil.rmtree", lambda path: None)
    overrides = {"patch_size": 32, "val_interval": 100, "iterations": 3}
    stop = "$@train#trainer.add_event_handler(@after_two, lambda engine: engine.terminate())"
    interruption = {"after_two": Events.EPOCH_COMPLETED(once=2), "run": [stop, "$@train#trainer.run()"]}
    train("cardiac_dn_segmentation", acdc_like, tmp_path, **overrides, **interruption)
    other, _ = train("cardiac_dn_segmentation", acdc_like, tmp_path / "other", fold=1, **overrides)
    assert other.parser.get_parsed_content("resume_files") == []
    assert other.parser.get_parsed_content("resume_dir").endswith("_brier_1_0_3")
    workflow, _ = train("cardiac_dn_segmentation", acdc_like, tmp_path, **overrides)
    trainer = workflow.parser.get_parsed_content("train#trainer")
    steps = workflow.parser.get_parsed_content("optimizer").state_dict()["state"][0]["step"]
    assert trainer.state.iteration == 3 and int(steps) == 3
    assert len(workflow.parser.get_parsed_content("resume_files")) == 1


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
    """Given images only it segments them first, and finds the same regions as from the files of that segmentation."""
    segmenter = ROOT / "bundles" / "cardiac_drn_segmentation"
    bundle = ROOT / "bundles" / "cardiac_segmentation_failure"
    scans = acdc_like / "data" / "patient001"
    segmented = BundlePredictor(segmenter, map="emap")
    for image in scans.glob("*_frame??.nii.gz"):
        result, scan = segmented({"image": str(image)}), read_volume(image)
        folder = tmp_path / "predictions" / image.name.removesuffix(".nii.gz")
        write_like(folder / "segmentation.nii.gz", np.asarray(result["pred"])[0].astype(np.uint8), scan)
        write_like(folder / "entropy.nii.gz", np.asarray(result["emap"])[0].astype(np.float32), scan)
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
        SegmentWithBundled("nowhere", "bmap")({"image": image, "segmentation": image})


def test_operating_points_are_those_that_training_chose():
    folder = ROOT / "bundles" / "cardiac_segmentation_failure" / "models"
    for detector in config("cardiac_segmentation_failure", "inference")["detectors"].values():
        chosen = json.loads((folder / f"{Path(detector['weights']).stem}_operating_point.json").read_text())
        assert detector["threshold"] == chosen["threshold"]


@pytest.mark.parametrize("weights", sorted((ROOT / "bundles").glob("*/models/*.pt")), ids=lambda path: path.name)
def test_shipped_weights_are_plain_half_precision(weights):
    state = torch.load(weights, weights_only=True)
    assert all(value.dtype in (torch.float16, torch.int64) for value in state.values())
    assert all(bool(torch.isfinite(value.float()).all()) for value in state.values())
