"""MONAI's bundle commands and the model zoo's checks on all four bundles, and what a mistake gets."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, load, onnx_export, verify_metadata

from cardiac_qc_plugin.bundle import root_cause
from cardiac_qc_plugin.checkpoints import load_weights, save_weights
from cardiac_qc_plugin.data.acdc import acdc_datalist
from cardiac_qc_plugin.data.phantom import write_acdc_like
from cardiac_qc_plugin.inferers import MCDropoutSliceInferer
from cardiac_qc_plugin.workflows.files import write_json

ROOT = Path(__file__).parent.parent
BUNDLES = ROOT / "bundles"
SCHEMA = Path(__file__).with_name("meta_schema_20240725.json")  # of the model zoo
DN, DRN, UNET = (f"cardiac_{name}_segmentation" for name in ("dn", "drn", "unet"))
FAILURE = "cardiac_segmentation_failure"
ALL = [DN, DRN, UNET, FAILURE]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small phantoms in ACDC's layout with a two-fold datalist."""
    root = tmp_path_factory.mktemp("data")
    write_acdc_like(root / "acdc", 4, shape=(48, 56), n_slices=2)
    write_json(root / "folds.json", acdc_datalist(root / "acdc", folds=2))
    return root


@pytest.fixture(scope="module", params=ALL)
def folder(request, tmp_path_factory):
    """A bundle with weights: as shipped, or a copy with random ones where none are shipped."""
    shipped = BUNDLES / request.param
    if (shipped / "models" / "model.pt").is_file():
        return shipped
    copy = tmp_path_factory.mktemp("bundles") / request.param
    shutil.copytree(shipped, copy)
    save_weights(new_network(copy), copy / "models" / "model.pt")
    return copy


def files(folder):
    """Arguments by which MONAI's commands find a bundle."""
    return {
        "net_id": "network_def",
        "meta_file": str(folder / "configs" / "metadata.json"),
        "config_file": str(folder / "configs" / "inference.json"),
        "bundle_root": str(folder),
    }


def new_network(folder):
    parser = ConfigParser()
    parser.read_config(files(folder)["config_file"])
    return parser.get_parsed_content("network_def")


def trained_network(folder):
    return load_weights(new_network(folder), folder / "models" / "model.pt").eval()


def in_channels(folder):
    return 2 if folder.name == FAILURE else 1


def test_verify_metadata(folder, tmp_path):
    schema = tmp_path / "schema.json"  # a schema that is there is not fetched again
    schema.write_text(SCHEMA.read_text())
    verify_metadata(meta_file=files(folder)["meta_file"], filepath=str(schema))
    metadata = json.loads(Path(files(folder)["meta_file"]).read_text())
    assert metadata["version"] in metadata["changelog"]
    assert metadata["schema"].endswith(SCHEMA.name)
    assert all(isinstance(value, float) for value in metadata.get("eval_metrics", {}).values())
    assert ("eval_metrics" in metadata) == (BUNDLES in folder.parents)  # measured where weights are shipped


def test_files_are_those_that_the_zoo_asks_for(folder):
    """Names, JSON style, sections of the zoo's readme template; one newline at the end of files, no trailing blanks."""
    configs = ("metadata.json", "inference.json", "train.json", "logging.conf")
    overlays = ("evaluate.yaml", "multi_gpu_train.yaml", "multi_gpu_evaluate.yaml")
    names = [f"configs/{name}" for name in (*configs, *overlays)]
    for name in ("LICENSE", "models/model.pt", "docs/README.md", "docs/data_license.txt", *names):
        assert (folder / name).is_file(), name
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".yaml", ".md", ".conf", ".txt") and "eval" not in path.parts:
            text = path.read_text()
            assert text.endswith("\n") and not text.endswith("\n\n"), path
            assert not re.search(r"[ \t]+$", text, re.MULTILINE) and "\r" not in text, path
    for path in (folder / "configs").glob("*.json"):
        assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=4, ensure_ascii=False) + "\n"
    readme = (folder / "docs" / "README.md").read_text()
    sections = "Authors|Tags|Model Description|Data|Performance|System Configuration|Limitations|Citation|References"
    for section in sections.split("|"):
        assert re.search(rf"^##+ \*\*{section}", readme, re.MULTILINE), section


def test_exported_torchscript_gives_the_same_maps(folder, tmp_path):
    ckpt_export(
        **files(folder),
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(folder / "models" / "model.pt"),
        key_in_ckpt="",
    )
    network, script = trained_network(folder), torch.jit.load(tmp_path / "model.ts").eval()
    inputs = torch.rand(1, in_channels(folder), 64, 64, 2)
    inferer = MCDropoutSliceInferer(samples=2, seed=5, amp=False)
    maps, expected = inferer(inputs, script), inferer(inputs, network)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
    classes = expected.shape[1] // 2 - 1
    assert expected[:, classes].max() > 0  # a b-map without spread would agree with anything


def test_exported_onnx_gives_the_same_logits(folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shape = [1, in_channels(folder), 64, 64]
    onnx_export(
        **files(folder),
        filepath=str(tmp_path / "model.onnx"),
        ckpt_file=str(folder / "models" / "model.pt"),
        key_in_ckpt="",
        input_shape=shape,
    )
    inputs = torch.rand(shape)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    logits = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(logits, trained_network(folder)(inputs), rtol=1e-3, atol=1e-3)


def test_monai_loads_the_network_with_its_weights(folder):
    network = load(name=folder.name, bundle_dir=str(folder.parent), device="cpu")
    expected = trained_network(folder).state_dict()
    torch.testing.assert_close(dict(network.state_dict()), dict(expected))


def command(arguments, cwd, **options):
    """Run `python -m monai.bundle` as a user does."""
    parts = [sys.executable, "-m", "monai.bundle", *arguments]
    parts += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return subprocess.run(parts, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("place", ["repository", "bundle", "elsewhere"])
def test_inference_runs_from_everywhere(place, data, tmp_path):
    folder = BUNDLES / DRN
    cwd = {"repository": ROOT, "bundle": folder, "elsewhere": tmp_path}[place]
    relative = Path(os.path.relpath(folder, cwd))
    options = {} if place == "bundle" else {"bundle_root": relative}
    scans = {"dataset_dir": data / "acdc" / "patient001", "output_dir": tmp_path / "out", "samples": 2}
    run = ["run"] if place == "bundle" else ["run", "evaluating"]
    finished = command(run, cwd, config_file=relative / "configs" / "inference.json", **options, **scans)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 6


@pytest.mark.parametrize("bundle", [DRN, FAILURE])
def test_results_of_a_single_slice_lie_on_its_grid(bundle, data, tmp_path):
    affine = np.diag([-2.5, -2.5, 10.0, 1.0])
    image = nib.load(data / "acdc" / "patient001" / "patient001_frame01.nii.gz").get_fdata()[..., 1:]
    (tmp_path / "scans").mkdir()
    nib.save(nib.Nifti1Image(image.astype(np.int16), affine), tmp_path / "scans" / "slice.nii.gz")
    run = workflow(bundle, "infer", dataset_dir=str(tmp_path / "scans"), output_dir=str(tmp_path / "out"), samples=2)
    run.initialize()
    run.run()
    results = [nib.load(path) for path in (tmp_path / "out").rglob("*.nii.gz")]
    assert [result.shape for result in results] == 3 * [(48, 56, 1)]
    for result in results:
        np.testing.assert_array_equal(result.affine, affine)
        assert result.header.get_zooms() == (2.5, 2.5, 10.0)


def test_tracking_by_mlflow(data, tmp_path):
    pytest.importorskip("mlflow", reason="pip install mlflow")
    finished = command(
        ["run", "training"],
        tmp_path,
        config_file=BUNDLES / DN / "configs" / "train.json",
        bundle_root=BUNDLES / DN,
        tracking="mlflow",
        output_dir=tmp_path / "out",
        ckpt_dir=tmp_path / "models",
        dataset_dir=data / "acdc",
        data_list_file_path=data / "folds.json",
        iterations=1,
        patch_size=32,
        batch_size=1,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "out" / "mlruns.db").is_file()


def workflow(bundle, kind, *overlays, **overrides):
    configs = BUNDLES / bundle / "configs"
    name = "train.json" if kind == "train" else "inference.json"
    return ConfigWorkflow(
        config_file=[str(configs / file) for file in (name, *overlays)],
        workflow_type=kind,
        **{"bundle_root": str(BUNDLES / bundle), **overrides},
    )


def refusal(bundle, kind, *overlays, **overrides):
    """The one line that a mistake gets."""
    with pytest.raises((RuntimeError, ValueError)) as error:
        run = workflow(bundle, kind, *overlays, **overrides)
        run.initialize()
        run.run()
    message = str(root_cause(error.value))
    assert "\n" not in message
    return message


def test_mistakes_get_one_line(data, tmp_path):
    training = {
        "dataset_dir": str(data / "acdc"),
        "data_list_file_path": str(data / "folds.json"),
        "ckpt_dir": str(tmp_path),
        "iterations": 1,
        "patch_size": 32,
        "batch_size": 1,
    }
    assert "Unknown segmentation loss 'mse': choose" in refusal(DN, "train", **training, loss="mse")
    assert "fold 7 would leave nothing on one side. Its folds are [0, 1], and -1 leaves none out." in refusal(
        DN, "train", **training | {"fold": 7}
    )
    message = refusal(DN, "train", **training | {"dataset_dir": str(tmp_path / "none")})
    assert "no such file, but" in message and "--dataset_dir" in message
    message = refusal(DN, "train", **training | {"data_list_file_path": str(tmp_path / "none.json")})
    assert "none.json: cannot be read as a datalist" in message
    message = refusal(FAILURE, "train", **training | {"predictions_dir": str(tmp_path), "patch_size": 40})
    assert "segmentation.nii.gz is missing. Segment the images first" in message
    assert "iterations has to be 1 or more" in refusal(DN, "train", **training | {"iterations": 0})
    assert "(emap), got 'cmap'" in refusal(DRN, "infer", dataset_dir=str(data / "acdc"), map="cmap", samples=2)
    assert not list(tmp_path.iterdir())


def test_wrong_weights_and_versions_get_one_line(data, tmp_path):
    scans = {"dataset_dir": str(data / "acdc" / "patient001"), "output_dir": str(tmp_path / "out")}
    message = refusal(DRN, "infer", ckpt_path=str(tmp_path / "none.pt"), **scans)
    assert "none.pt: no such file. Train the bundle, or fetch the weights that it ships." in message
    message = refusal(DRN, "infer", ckpt_path=str(BUNDLES / FAILURE / "models" / "model.pt"), **scans)
    assert "belong to another network than DilatedResNet22" in message
    message = refusal(DRN, "infer", **{"network_def#in_channels": 2}, **scans)
    assert "belong to another network" in message
    message = refusal(DRN, "train", "evaluate.yaml", ckpt_path=str(tmp_path / "none.pt"))
    assert "none.pt: no such file." in message
    metadata = json.loads(Path(files(BUNDLES / DRN)["meta_file"]).read_text())
    metadata["required_packages_version"]["cardiac-qc-plugin"] = "9.1.0"
    write_json(tmp_path / "configs" / "metadata.json", metadata)
    message = refusal(DRN, "infer", bundle_root=str(tmp_path), **scans)
    assert "the bundle needs cardiac-qc-plugin 9.1.0, and" in message
    message = refusal(FAILURE, "infer", samples=1, **scans)  # the detector would see a map of zeros
    assert "The b-map needs 2 samples or more, got 1." in message
    message = refusal(FAILURE, "infer", segmentation_bundle=str(tmp_path / "none"), **scans)
    assert f"{tmp_path / 'none'}: no bundle there to segment " in message and "predictions_dir" in message


@pytest.mark.parametrize("bundle", [DN, FAILURE])
def test_other_labels_are_named_in_an_evaluation(bundle, acdc_like, tmp_path):
    """They were refused in a training only."""
    shutil.copytree(acdc_like / "data", tmp_path / "data")
    for path in (tmp_path / "data").rglob("*_gt.nii.gz"):
        label = nib.load(path)
        nib.save(nib.Nifti1Image((label.get_fdata() * 85).astype(np.uint8), label.affine, label.header), path)
    data = {"dataset_dir": str(tmp_path / "data"), "data_list_file_path": str(acdc_like / "folds.json")}
    own = {"predictions_dir": str(acdc_like / "predictions")} if bundle == FAILURE else {"samples": 0}
    message = refusal(bundle, "train", "evaluate.yaml", output_dir=str(tmp_path), **data, **own)
    assert re.search(r"_gt\.nii\.gz has the values \[85\.0, 170\.0, 255\.0\]; labels are 0 background, 1 RV", message)


def test_scan_with_channels_is_refused_on_the_command_line(tmp_path):
    """The user sees the line that names the file and what to do."""
    scan = tmp_path / "scans" / "colour.nii.gz"
    scan.parent.mkdir()
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((32, 32, 3, 2), dtype=np.float32), np.eye(4)), scan)
    options = {"bundle_root": BUNDLES / DRN, "dataset_dir": scan.parent, "output_dir": tmp_path / "out"}
    finished = command(["run"], tmp_path, config_file=BUNDLES / DRN / "configs" / "inference.json", **options)
    assert finished.returncode != 0
    assert re.search(r"^ValueError: .*colour\.nii\.gz: expected one 3-D stack of slices, got", finished.stderr, re.M)
