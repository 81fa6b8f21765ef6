"""Exported bundles where the plugin cannot be imported: what the zoo's CI does, and the same results as before."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser, download_large_files, run

from cardiac_qc_plugin.checkpoints import load_weights, save_weights
from cardiac_qc_plugin.workflows.export import export, vendor
from cardiac_qc_plugin.workflows.files import write_json

ROOT = Path(__file__).parent.parent
BUNDLES = ROOT / "bundles"
DN, DRN, UNET = (f"cardiac_{name}_segmentation" for name in ("dn", "drn", "unet"))
FAILURE = "cardiac_segmentation_failure"
NETWORKS = {
    DN: ["dilated_cnn"],
    DRN: ["dilated_resnet", "residual"],
    UNET: ["unet"],
    FAILURE: ["failure_resnet", "residual"],
}

# Python imports this at its start; MONAI's optional imports take an ImportError for a package that is not installed
NO_PLUGIN = """
import sys

class NoPlugin:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cardiac_qc_plugin":
            raise ModuleNotFoundError(f"{name} was asked for")

sys.meta_path.insert(0, NoPlugin())
"""

# What the zoo's CI does with a bundle, in one process
ZOO_CHECKS = """
import json, os, pkgutil, sys
from importlib import import_module
from monai.bundle import ConfigWorkflow, ckpt_export, verify_net_in_out

bundle, scratch, inference, training = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
files = {name: f"{bundle}/configs/{name}.json" for name in ("metadata", "inference", "train")}
common = {"net_id": "network_def", "meta_file": files["metadata"], "config_file": files["inference"]}
verify_net_in_out(**common, device="cpu", n=1, p=1, any=1, bundle_root=bundle)
ckpt_export(
    **common, filepath=f"{scratch}/model.ts", ckpt_file=f"{bundle}/models/model.pt", key_in_ckpt="", bundle_root=bundle
)
evaluate = [files["train"], f"{bundle}/configs/evaluate.yaml"]
scored = {**training, "output_dir": f"{scratch}/scores", "validate#inferer#amp": False}
if "samples" in inference:
    scored["samples"] = inference["samples"]
runs = (("infer", files["inference"], inference), ("train", files["train"], training), ("train", evaluate, scored))
for kind, config_file, settings in runs:
    workflow = ConfigWorkflow(config_file=config_file, workflow_type=kind, bundle_root=bundle, **settings)
    workflow.initialize()
    assert workflow.check_properties() == [], workflow.check_properties()
    workflow.run()
    workflow.finalize()
import scripts
assert os.path.dirname(scripts.__file__) == f"{bundle}/scripts"
for module in pkgutil.walk_packages(scripts.__path__, "scripts."):
    vars(import_module(module.name))
assert not any(name.startswith("cardiac_qc_plugin") for name in sys.modules)
"""


def new_network(bundle):
    """A bundle's network with random weights."""
    config = ConfigParser()
    config.read_config(str(BUNDLES / bundle / "configs" / "inference.json"))
    return config.get_parsed_content("network_def")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """All bundles exported and unzipped into one folder; returns the bundle folders by name."""
    root = tmp_path_factory.mktemp("export")
    for bundle in NETWORKS:
        weights = None
        if not (BUNDLES / bundle / "models" / "model.pt").is_file():
            weights = root / f"{bundle}.pt"
            save_weights(new_network(bundle), weights)
        archive = export(bundle, root / "dist", weights=weights)
        with zipfile.ZipFile(archive) as content:
            content.extractall(root)
    return {bundle: root / bundle for bundle in NETWORKS}


@pytest.fixture
def bundle_dir(tmp_path):
    """A folder with a copy of the DN's bundle with random weights, to be tampered with."""
    folder = tmp_path / "bundles" / DN
    for path in (BUNDLES / DN).rglob("*"):
        if path.is_file():
            (folder / path.relative_to(BUNDLES / DN)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(BUNDLES / DN)).write_bytes(path.read_bytes())
    save_weights(new_network(DN), folder / "models" / "model.pt")
    return folder.parent


def without_plugin(tmp_path, *command, cwd=None, path=()):
    """Run Python where the plugin cannot be imported; returns what it printed."""
    (tmp_path / "sitecustomize.py").write_text(NO_PLUGIN)
    paths = os.pathsep.join(map(str, (tmp_path, *path)))
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd or tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def inference_settings(bundle, acdc_like):
    settings = {"dataset_dir": str(acdc_like / "data" / "patient001")}
    return settings | ({"predictions_dir": str(acdc_like / "predictions")} if bundle == FAILURE else {"samples": 2})


def assert_same_volumes(found, expected):
    names = sorted(path.relative_to(expected) for path in expected.rglob("*.nii.gz"))
    assert names and names == sorted(path.relative_to(found) for path in found.rglob("*.nii.gz"))
    for name in names:
        first, second = nib.load(found / name), nib.load(expected / name)
        assert first.get_data_dtype() == second.get_data_dtype()
        np.testing.assert_array_equal(first.affine, second.affine)
        arrays = np.asarray(first.dataobj), np.asarray(second.dataobj)
        # two processes may differ in a float's last bit
        rtol = 1e-6 if arrays[0].dtype.kind == "f" else 0
        np.testing.assert_allclose(*arrays, rtol=rtol, atol=rtol, err_msg=str(name))


def test_the_plugin_is_really_absent(tmp_path):
    code = "try:\n    import cardiac_qc_plugin\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert without_plugin(tmp_path, "-c", code).strip() == "cardiac_qc_plugin was asked for"


@pytest.mark.parametrize("bundle", NETWORKS)
def test_exported_bundle_stands_alone(bundle, exported, acdc_like, tmp_path):
    """Network, TorchScript, properties, inference with the results of the repository's bundle, training."""
    inference = {**inference_settings(bundle, acdc_like), "output_dir": str(tmp_path / "alone")}
    training = {
        "dataset_dir": str(acdc_like / "data"),
        "data_list_file_path": str(acdc_like / "folds.json"),
        "ckpt_dir": str(tmp_path / "trained"),
        "iterations": 1,
        "epoch_length": 1,
        "batch_size": 1,
        "patch_size": 32 if bundle != FAILURE else 40,
    }
    if bundle == FAILURE:
        training |= {"predictions_dir": str(acdc_like / "predictions"), "min_size": 40}
    arguments = (exported[bundle], tmp_path, json.dumps(inference), json.dumps(training))
    without_plugin(tmp_path, "-c", ZOO_CHECKS, *arguments, path=[exported[bundle]])
    assert (tmp_path / "model.ts").is_file()
    assert "val_" in (tmp_path / "scores" / "metrics.csv").read_text()
    load_weights(new_network(bundle), tmp_path / "trained" / "model.pt")

    run(
        config_file=str(BUNDLES / bundle / "configs" / "inference.json"),
        bundle_root=str(BUNDLES / bundle),
        ckpt_path=str(exported[bundle] / "models" / "model.pt"),
        **inference_settings(bundle, acdc_like),
        output_dir=str(tmp_path / "repository"),
    )
    assert_same_volumes(tmp_path / "alone", tmp_path / "repository")


def test_command_line_in_the_exported_folder(exported, acdc_like, tmp_path):
    """As the zoo's READMEs have it: from the bundle's folder, no paths set."""
    command = ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json", "--samples", 2]
    command += ["--dataset_dir", acdc_like / "data" / "patient001", "--output_dir", tmp_path / "out"]
    without_plugin(tmp_path, *command, cwd=exported[DN])
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 6


@pytest.mark.parametrize("bundle", NETWORKS)
def test_metadata_follows_the_schema_without_the_plugin(bundle, exported):
    metadata = json.loads((exported[bundle] / "configs" / "metadata.json").read_text())
    packages = set(metadata["required_packages_version"])
    assert not any("cardiac" in name for name in packages)
    assert {"nibabel", "pytorch-ignite", "scipy", "scikit-image", "fire"} <= packages
    assert ("scikit-learn" in packages) == (bundle == FAILURE)  # its operating point is chosen with it
    schema = Path(__file__).with_name("meta_schema_20240725.json")
    jsonschema.validate(metadata, json.loads(schema.read_text()))


@pytest.mark.parametrize("bundle", NETWORKS)
def test_only_what_is_needed_is_vendored(bundle, exported):
    folder = exported[bundle]
    runs_others = (folder / "scripts" / "bundle.py").is_file()
    networks = sorted({name for names in NETWORKS.values() for name in names}) if runs_others else NETWORKS[bundle]
    assert sorted(path.stem for path in (folder / "scripts" / "networks").glob("[a-z]*.py")) == networks
    assert not (folder / "scripts" / "reports").exists()
    assert not (folder / "scripts" / "data" / "phantom.py").exists()
    assert "cardiac_qc_plugin." not in "".join(path.read_text() for path in folder.rglob("configs/*.json"))
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", ROOT / "pyproject.toml", "."]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_zip_holds_no_leftovers_and_is_reproducible(bundle_dir, tmp_path):
    folder = bundle_dir / DN
    first = export(DN, tmp_path / "first", bundle_dir)
    assert first.name == f"{DN}_v{json.loads((folder / 'configs' / 'metadata.json').read_text())['version']}.zip"
    for name in ("models/resume_0/a.pt", "models/model.pt.part", "eval/a.nii.gz", "configs/__pycache__/a.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("leftover")
    second = export(DN, tmp_path / "second", bundle_dir)
    assert first.read_bytes() == second.read_bytes()
    assert list(second.parent.iterdir()) == [second]
    names = zipfile.ZipFile(second).namelist()
    assert names == sorted(names) and {name.split("/")[0] for name in names} == {DN}
    assert {f"{DN}/LICENSE", f"{DN}/models/model.pt", f"{DN}/docs/data_license.txt"} <= set(names)


def test_overlay_is_rewritten_with_its_comments(bundle_dir, tmp_path):
    pytest.importorskip("yaml")
    overlay = (
        "# scores against references\nimports:\n- $from cardiac_qc_plugin.metrics import mean_sd as m, pearson\n"
        "scores:\n  _target_: cardiac_qc_plugin.data.hold_out  # by patient\n"
        'loss: "$cardiac_qc_plugin.losses.BrierLoss"\n'
    )
    (bundle_dir / DN / "configs" / "evaluate.yaml").write_text(overlay)
    with zipfile.ZipFile(export(DN, tmp_path, bundle_dir)) as archive:
        text = archive.read(f"{DN}/configs/evaluate.yaml").decode()
        names = set(archive.namelist())
        required = json.loads(archive.read(f"{DN}/configs/metadata.json"))["required_packages_version"]
    assert text == overlay.replace("cardiac_qc_plugin.", "scripts.")
    assert {f"{DN}/scripts/{name}.py" for name in ("metrics/statistics", "data/folds", "losses")} <= names
    assert f"{DN}/scripts/metrics/detection.py" not in names
    assert "PyYAML" in required


def test_bundle_that_runs_another_one_has_its_modules():
    """In one process there is one package called scripts, so it has to serve both bundles."""
    config = '"_target_": "cardiac_qc_plugin.bundle.BundlePredictor"'
    siblings = {"inference.json": (BUNDLES / DRN / "configs" / "inference.json").read_text()}
    assert {"networks/dilated_resnet.py", "inferers.py"} <= set(vendor({"a": config}, siblings)[0])
    without = '"_target_": "cardiac_qc_plugin.losses.BrierLoss"'
    assert set(vendor({"a": without}, siblings)[0]) == {"__init__.py", "losses.py"}


@pytest.mark.parametrize(("detector", "channels"), [("dn_emap", 3), ("drn_emap", 2)])
def test_other_weights_can_be_loaded(detector, channels, tmp_path):
    """As ``monai.bundle.load`` does, whose network is the one of the training config."""
    weights = BUNDLES / FAILURE / "models" / f"{detector}.pt"
    with zipfile.ZipFile(export(FAILURE, tmp_path / "dist", weights=weights)) as content:
        content.extractall(tmp_path)
    code = f"from monai.bundle import load; print(next(load({FAILURE!r}, bundle_dir='.').parameters()).shape[1])"
    assert without_plugin(tmp_path, "-c", code, path=[tmp_path / FAILURE]).split()[-1] == str(channels)


def test_other_weights_come_with_their_own_operating_point(tmp_path):
    shipped = BUNDLES / FAILURE / "models"
    for name in ("mine.pt", "mine_operating_point.json"):
        shutil.copy(shipped / name.replace("mine", "dn_emap"), tmp_path / name)
    with zipfile.ZipFile(export(FAILURE, tmp_path / "dist", weights=tmp_path / "mine.pt")) as content:
        names = {name.partition("/")[2] for name in content.namelist() if "/models/" in name}
        point = content.read(f"{FAILURE}/models/model_operating_point.json")
    assert point == (tmp_path / "mine_operating_point.json").read_bytes()
    # of the bundle's own weights
    assert not {"models/model_calibration.json", "models/model_turns4_calibration.json"} & names
    assert {"models/dn_bmap_calibration.json", "models/dn_bmap_turns4_calibration.json"} <= names
    (tmp_path / "mine_operating_point.json").unlink()
    with pytest.raises(ValueError, match="model_operating_point.json|mine_operating_point.json: no operating point"):
        export(FAILURE, tmp_path / "dist", weights=tmp_path / "mine.pt")


def test_large_weights_become_an_asset(tmp_path):
    pytest.importorskip("yaml")
    archive = export(DRN, tmp_path / "dist", weights_url=(tmp_path / "dist").as_uri())
    assert archive.stat().st_size < 1_000_000
    zipfile.ZipFile(archive).extractall(tmp_path)
    assert not (tmp_path / DRN / "models").exists()
    download_large_files(str(tmp_path / DRN))
    shipped = BUNDLES / DRN / "models" / "model.pt"
    assert (tmp_path / DRN / "models" / "model.pt").read_bytes() == shipped.read_bytes()


def test_bad_bundles_are_refused_in_one_line(bundle_dir, tmp_path):
    folder = bundle_dir / DN

    def refusal(**options):
        with pytest.raises(ValueError) as error:
            export(**{"bundle": DN, "output": tmp_path / "dist", "bundle_dir": bundle_dir, **options})
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no MONAI bundle there" in refusal(bundle="cardiac_mlp_segmentation")
    assert "belong to another network" in refusal(weights=BUNDLES / DRN / "models" / "model.pt")
    assert "no such file" in refusal(weights=tmp_path / "none.pt")
    (folder / "models" / "model.pt").unlink()
    assert "models/model.pt: no such file. Train the bundle, or give weights with --weights." in refusal()
    save_weights(new_network(DN), folder / "models" / "model.pt")

    train = folder / "configs" / "train.json"
    text = train.read_text()
    train.write_text(text.replace("cardiac_qc_plugin.losses.", "cardiac_qc_plugin.lost."))
    message = "train.json names cardiac_qc_plugin.lost.segmentation_loss, but cardiac_qc_plugin has no 'lost'."
    assert refusal().endswith(message)
    train.write_text(text)

    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    write_json(folder / "configs" / "metadata.json", {**metadata, "version": "9.9.9"})
    assert "version 9.9.9 is not in the changelog" in refusal()
    write_json(folder / "configs" / "metadata.json", metadata)
    (folder / "LICENSE").unlink()
    assert "LICENSE: no such file" in refusal()
    assert not (tmp_path / "dist").exists()
