"""MONAI Label's server as a process, driven over HTTP as 3D Slicer does: our app, and the stock app for bundles."""

import contextlib
import gzip
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from email import message_from_bytes
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from scipy import ndimage

from cardiac_qc_plugin.checkpoints import load_weights, save_weights
from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_phantom

if importlib.util.find_spec("monailabel.main") is None:
    pytest.skip(
        "MONAI Label is not installed here: it has an environment of its own, see scripts/test_monailabel.sh",
        allow_module_level=True,
    )
import requests

ROOT = Path(__file__).parents[2]
APP = ROOT / "cardiac_qc_plugin" / "monailabel"
FAILURE = "cardiac_segmentation_failure"
SAMPLES = {"samples": 2, "device": "cpu"}
BATCH = {"multi_gpu": False, "max_workers": 1, **SAMPLES}


class Server:
    """A running server; each answer is checked for its status."""

    def __init__(self, url):
        self.url = url

    def call(self, method, path, status=200, **arguments):
        response = requests.request(method, self.url + path, timeout=600, **arguments)
        assert response.status_code == status, response.text
        return response

    def infer(self, model, image, status=200, **parameters):
        """Mask (NIfTI image) and JSON of one answer with both."""
        data = {"params": json.dumps(parameters)}
        response = self.call("POST", f"/infer/{model}?image={image}&output=all", status, data=data)
        if status != 200:
            return response.json()["detail"]
        head = f"Content-Type: {response.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True)
            for part in message_from_bytes(head + response.content).get_payload()
        }
        return nifti(parts["image"]), json.loads(parts["params"])

    def label(self, image, tag):
        return nifti(self.call("GET", f"/datastore/label?label={image}&tag={tag}").content)

    def submit(self, image, file):
        with open(file, "rb") as stream:
            self.call("PUT", f"/datastore/label?image={image}&tag=final", files={"label": stream})

    def background(self, task, name, **parameters):
        """Start a training or scoring as clients do, in the background, and wait for its end."""
        self.call("POST", f"/{task}/{name}", json={"device": "cpu", **parameters})
        for _ in range(900):
            state = self.call("GET", f"/{task}/").json()
            if state["status"] not in ("SUBMITTED", "RUNNING"):
                break
            time.sleep(1)
        assert state["status"] == "DONE", "\n".join(state["details"])


def nifti(content):
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


@contextlib.contextmanager
def running(app, studies, log, *conf):
    """A server on a free port of this machine; it is always ended, and its log shown when it does not come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [word for pair in (("zoo_source", "ngc"), ("sam2", "false"), *conf) for word in ("--conf", *pair)]
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", app, "--studies", studies]
    environment = {**os.environ, "MONAI_LABEL_AUTO_UPDATE_SCORING": "false", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port), *settings],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=studies,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}")
        for _ in range(180):
            with contextlib.suppress(requests.ConnectionError):
                server.call("GET", "/info/")
                break
            assert process.poll() is None, Path(log).read_text()
            time.sleep(1)
        else:
            pytest.fail(Path(log).read_text())
        yield server
        assert process.poll() is None, Path(log).read_text()  # nothing that was asked of it ended it
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A heart, the same heart in so much noise that no network can be sure of it, and their labels."""
    folder = tmp_path_factory.mktemp("scans")
    for name, noise in (("clear", 0.02), ("noisy", 0.7)):
        phantom = ShortAxisPhantom(3, shape=(80, 80), n_slices=3, spacing=(2.0, 2.0, 20.0), noise=noise)
        write_phantom(folder, name, phantom, {"ed": 0.0})
    return folder


def make_studies(folder, scans, *names):
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(scans / f"{name}.nii.gz", folder)
    return folder


def shorten_training(bundle):
    """An epoch of two small batches."""
    file = bundle / "configs" / "train.json"
    settings = {"patch_size": 32, "batch_size": 2, "iterations": 2, "epoch_length": 2}
    if bundle.name == FAILURE:
        settings["patch_size"] = 80
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def random_weights(bundle):
    config = ConfigParser()
    config.read_config(bundle / "configs" / "inference.json")
    save_weights(config.get_parsed_content("network_def"), bundle / "models" / "model.pt")


def state(bundle):
    config = ConfigParser()
    config.read_config(bundle / "configs" / "inference.json")
    return load_weights(config.get_parsed_content("network_def"), bundle / "models" / "model.pt").state_dict()


def check_grid(mask, scan):
    scan = nib.load(scan)
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)


def test_app(scans, tmp_path):
    """A user's session: look, score, take the next scan, correct it, train, look again."""
    studies = make_studies(tmp_path / "studies", scans, "clear_ed", "noisy_ed")
    work = tmp_path / "work"
    for name in ("cardiac_drn_segmentation", FAILURE):
        shutil.copytree(ROOT / "bundles" / name, work / "bundles" / name)
    bundle = work / "bundles" / "cardiac_drn_segmentation"
    shorten_training(bundle)
    with running(APP, studies, tmp_path / "log", ("work", str(work)), ("epoch_length", "2")) as server:
        info = server.call("GET", "/info/").json()
        assert {"cardiac_drn_segmentation", "cardiac_qc"} <= set(info["models"])
        assert info["models"]["cardiac_qc"]["labels"] == {"rv": 1, "lvm": 2, "lv": 3}
        assert "qc" in info["strategies"] and "qc" in info["scoring"]
        assert FAILURE not in info["trainers"] and "cardiac_drn_segmentation" in info["trainers"]

        mask, answer = server.infer("cardiac_qc", "clear_ed", **SAMPLES)
        check_infer(server, mask, answer, scans)
        check_promise(server, answer, bundle.parent / FAILURE)
        plain, _ = server.infer("cardiac_drn_segmentation", "clear_ed", **SAMPLES)
        np.testing.assert_array_equal(np.asanyarray(plain.dataobj), np.asanyarray(mask.dataobj))

        assert server.call("POST", "/activelearning/qc", json={}).json()["id"] == "clear_ed"  # the only one scored
        server.background("scoring", "qc", **SAMPLES)
        assert server.call("POST", "/activelearning/qc", json={}).json()["id"] == "noisy_ed"
        infos = {
            name: server.call("GET", f"/datastore/image/info?image={name}").json()["cardiac_qc"]
            for name in ("clear_ed", "noisy_ed")
        }
        agreement = [value or 0 for value in answer["pairwise_dice"].values()]
        assert infos["clear_ed"]["scores"]["urgency"] == pytest.approx(1 - np.mean(agreement))
        assert infos["noisy_ed"]["scores"]["urgency"] > infos["clear_ed"]["scores"]["urgency"]

        server.submit("noisy_ed", scans / "noisy_ed_gt.nii.gz")
        assert server.call("POST", "/activelearning/qc", json={}).json()["id"] == "clear_ed"
        before = state(bundle)
        server.background("train", "cardiac_drn_segmentation", max_epochs=1)
        after = state(bundle)
        assert any(not (before[key] == after[key]).all() for key in before)
        assert not list((bundle / "models").glob("resume_*"))
        _, again = server.infer("cardiac_qc", "clear_ed", **SAMPLES)
        assert again["weights_sha256"] != answer["weights_sha256"]

        server.submit("clear_ed", scans / "clear_ed_gt.nii.gz")
        assert server.call("POST", "/activelearning/qc", json={}).json() == {}  # nothing left
        tags = server.call("GET", "/datastore/").json()["label_tags"]
        assert tags == {"emap": 2, "bmap": 2, "failure": 2, "original": 2, "final": 2}


def check_infer(server, mask, answer, scans):
    """Mask, JSON and tags of one scan against its truth and against each other."""
    labels = np.asanyarray(mask.dataobj)
    check_grid(mask, scans / "clear_ed.nii.gz")
    assert labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 1, 2, 3}
    truth = np.asanyarray(nib.load(scans / "clear_ed_gt.nii.gz").dataobj)
    assert 2 * ((labels == 3) & (truth == 3)).sum() / ((labels == 3).sum() + (truth == 3).sum()) > 0.8
    voxel_ml = np.prod(mask.header.get_zooms()) / 1000
    for number, name in enumerate(("RV", "LVM", "LV"), start=1):
        assert answer["volume_ml"][name] == pytest.approx((labels == number).sum() * voxel_ml)
    failure = np.asanyarray(server.label("clear_ed", "failure").dataobj)
    assert failure.shape == labels.shape
    assert answer["flagged_slices"] == sorted(set(np.nonzero(failure)[2].tolist()))
    for region in answer["regions"]:
        area = failure[region["row0"] : region["row1"], region["col0"] : region["col1"], region["slice"]]
        assert (area == region["id"]).all() and answer["threshold"] <= region["probability"] <= 1
    assert len(answer["regions"]) == failure.max()
    boundary = ndimage.morphological_gradient((labels > 0).astype(int), size=(3, 3, 1)) > 0
    for tag in ("emap", "bmap"):
        values = np.asanyarray(server.label("clear_ed", tag).dataobj)
        assert values.dtype == np.float32 and 0 <= values.min() and values.max() <= 1
        assert values[boundary].mean() > 2 * values[~boundary].mean()  # the network is unsure at contours


def check_promise(server, answer, failure):
    """A share to catch sets the threshold, by the calibration that lies beside the detector (of ten samples)."""
    refused = server.infer("cardiac_qc", "clear_ed", 422, catch="0.9", **SAMPLES)
    assert "made for the samples 10, but this run has 2" in refused and "calibrate again" in refused
    calibration = failure / "models" / "model_calibration.json"
    calibration.write_text(json.dumps(json.loads(calibration.read_text()) | {"samples": 2}))
    _, promised = server.infer("cardiac_qc", "clear_ed", catch="0.9", **SAMPLES)
    promise = promised["promise"]
    assert answer["promise"] is None and (promise["kind"], promise["target"]) == ("catch", 0.9)
    assert promised["threshold"] == promise["threshold"] < answer["threshold"]
    assert len(promised["regions"]) >= len(answer["regions"])


def test_bundles_without_weights_are_not_offered(tmp_path, monkeypatch, caplog):
    from cardiac_qc_plugin.monailabel import main

    dn = "cardiac_dn_segmentation"
    shutil.copytree(ROOT / "bundles" / dn, tmp_path / "bundles" / dn, ignore=shutil.ignore_patterns("models"))
    monkeypatch.setattr(main, "BUNDLES", tmp_path / "bundles")
    (tmp_path / "work").mkdir()
    main.copy_bundles(tmp_path / "work")
    assert f"{dn} has no weights" in caplog.text and not list((tmp_path / "work").iterdir())


def test_app_refuses_what_it_cannot_do(scans, tmp_path):
    """One line each, and the server goes on; a bad scan does not stop a batch."""
    studies = make_studies(tmp_path / "studies", scans, "clear_ed")
    affine = np.diag([2.0, 2, 10, 1])
    nib.save(nib.Nifti1Image(np.ones((32, 32), np.float32), affine), studies / "flat.nii.gz")
    noise = np.random.default_rng(0).random((64, 64, 4), dtype=np.float32)
    nib.save(nib.Nifti1Image(noise, np.eye(4)), studies / "unitless.nii.gz")
    (studies / "torn.nii.gz").write_text("no image")
    work = tmp_path / "work"
    unet = work / "bundles" / "cardiac_unet_segmentation"
    shutil.copytree(ROOT / "bundles" / "cardiac_unet_segmentation", unet, ignore=shutil.ignore_patterns("models"))
    with running(APP, studies, tmp_path / "log", ("work", str(work))) as server:
        bad = {"flat": "expected one stack of slices", "unitless": "1 x 1 x 1 mm", "torn": "not a NIfTI image"}
        for image, reason in bad.items():
            message = server.infer("cardiac_qc", image, 422, **SAMPLES)
            assert f"{image}.nii.gz: " in message and reason in message and "\n" not in message
        message = server.infer("cardiac_drn_segmentation", "flat", 422, **SAMPLES)
        assert "flat.nii.gz: expected one 3-D stack" in message
        message = server.infer("cardiac_drn_segmentation", "torn", 422, **SAMPLES)
        assert "torn.nii.gz" in message and "\n" not in message
        assert "bmap or emap, got 'tmap'" in server.infer("cardiac_qc", "clear_ed", 422, map="tmap")
        trap = tmp_path / "trap"
        for name in ("cardiac_qc", "cardiac_drn_segmentation"):  # nothing that a client sends is evaluated
            code = f"cpu') if open('{trap}', 'w') else torch.device('cpu"
            assert "no device" in server.infer(name, "clear_ed", 422, device=code)
            assert "must not begin" in server.infer(name, "clear_ed", 422, threshold=f"$open('{trap}', 'w')")
        assert not trap.exists()
        for samples in (2.5, "abc"):
            message = server.infer("cardiac_qc", "clear_ed", 422, samples=samples)
            assert message == f"samples is a whole number, got {samples!r}."
        assert "needs 2 samples" in server.infer("cardiac_qc", "clear_ed", 422, samples=1)
        assert "model.pt: no such file" in server.infer("cardiac_qc", "clear_ed", 422, segmentation_model="unet")
        assert "cardiac_unet_segmentation" in server.infer("cardiac_unet_segmentation", "clear_ed", 404)
        assert "No image 'nothing'" in server.infer("cardiac_qc", "nothing", 404)
        scored = server.call("POST", "/scoring/qc?run_sync=true", json=SAMPLES).json()
        assert scored["scored"] == 1 and set(scored["failed"]) == set(bad)
        assert server.call("POST", "/activelearning/qc", json={}).json()["id"] == "clear_ed"
        batch = server.call("POST", "/batch/infer/cardiac_qc?run_sync=true", json=BATCH).json()
        assert "not a NIfTI image" in batch["torn"]["error"] and batch["clear_ed"]["params"]["volume_ml"]


def options(name):
    """What a client may set of a bundle, for one quick answer."""
    return {"threshold": 0.0} if name == FAILURE else {"samples": 1, "map": "emap"}


def test_stock_app(scans, tmp_path):
    """The four bundles in MONAI Label's own app, offline: infer, batch, submit, train, infer again."""
    app = tmp_path / "monaibundle"
    shutil.copytree(Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle", app)
    bundles = [path for path in sorted((ROOT / "bundles").iterdir())]
    for source in bundles:
        copy = shutil.copytree(source, app / "model" / source.name)
        shorten_training(copy)
        if source.name != FAILURE:
            random_weights(copy)  # the test asks what the app does with a bundle, not how well it segments
    names = [path.name for path in bundles]
    studies = make_studies(tmp_path / "studies", scans, "clear_ed")
    with running(app, studies, tmp_path / "log", ("models", ",".join(names))) as server:
        info = server.call("GET", "/info/").json()
        assert set(info["models"]) == set(info["trainers"]) == set(names) and len(names) == 4
        assert info["models"][FAILURE]["labels"] == {"failure": 1}
        for name in names:
            mask, answer = server.infer(name, "clear_ed", **options(name))
            check_grid(mask, scans / "clear_ed.nii.gz")
            values = np.asanyarray(mask.dataobj)
            if name == FAILURE:
                assert 0 < values.max() <= 1 and len(answer["regions"]) > 0
            else:
                assert (
                    values.dtype == np.uint8
                    and values.max() <= 3
                    and set(answer["pairwise_dice"]) == {"RV", "LVM", "LV"}
                )
        model = "cardiac_dn_segmentation"
        batch = server.call("POST", f"/batch/infer/{model}?run_sync=true", json=BATCH).json()
        assert set(batch) == {"clear_ed"}
        check_grid(server.label("clear_ed", "original"), scans / "clear_ed.nii.gz")
        server.submit("clear_ed", scans / "clear_ed_gt.nii.gz")
        for name in names:
            before = state(app / "model" / name)
            server.background("train", name, max_epochs=1)
            after = state(app / "model" / name)
            assert any(not (before[key] == after[key]).all() for key in before)
        for name in (FAILURE, model):
            server.infer(name, "clear_ed", **options(name))
