import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from torch import nn

from cardiac_qc_plugin.checkpoints import (
    EpochCheckpoint,
    check_version,
    epoch_length,
    load_weights,
    remove_checkpoint,
    save_weights,
    sees_segmentation,
)
from cardiac_qc_plugin.metrics import VolumeDetection
from cardiac_qc_plugin.networks import DilatedCNN, FailureResNet
from cardiac_qc_plugin.workflows.files import write_json
from cardiac_qc_plugin.workflows.operating_point import choose_operating_point


def network(seed: int = 0, **options) -> DilatedCNN:
    torch.manual_seed(seed)
    net = DilatedCNN(features=(3, 4), dilations=(1, 2), classifier_features=5, **options)
    net.layers[5].running_mean.normal_()  # as after training
    net.layers[5].num_batches_tracked.fill_(70_000)  # beyond fp16's range
    return net


@pytest.fixture
def weights(tmp_path):
    save_weights(network(), tmp_path / "models" / "model.pt")  # makes the folder
    return tmp_path / "models" / "model.pt"


def test_round_trip(weights):
    target = network(seed=1)
    assert load_weights(target, weights) is target
    for (name, value), expected in zip(target.state_dict().items(), network().state_dict().values(), strict=True):
        assert value.dtype == expected.dtype, name
        rounded = expected.numpy().astype(np.float16) if expected.is_floating_point() else expected.numpy()
        np.testing.assert_array_equal(value.numpy(), rounded.astype(value.numpy().dtype), err_msg=name)


def test_file_is_a_bare_state_dict_in_half_precision(weights):
    state = torch.load(weights, weights_only=True)
    assert list(state) == list(network().state_dict())
    for value in state.values():
        assert value.dtype == (torch.float16 if value.is_floating_point() else torch.int64)
    assert [path.name for path in weights.parent.iterdir()] == ["model.pt"]


def test_saving_twice_replaces_the_file(weights):
    save_weights(network(seed=1), str(weights))
    expected = network(seed=1).layers[0].weight.half()
    assert torch.equal(torch.load(weights, weights_only=True)["layers.0.weight"], expected)


def test_saving_leaves_the_network_alone(tmp_path):
    net = network().to(memory_format=torch.channels_last).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    save_weights(net, tmp_path / "model.pt")
    for name, value in net.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("exists", [False, True])
def test_failed_save_leaves_nothing_new(exists, tmp_path, monkeypatch):
    """As when the disk fills up after some bytes: neither a partial file nor a lost old one."""
    path = tmp_path / "model.pt"
    if exists:
        path.write_bytes(b"old")

    def full_disk(state, file, **options):
        with open(file, "wb") as stream:
            stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(network(), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"model.pt": b"old"} if exists else {})


def test_weights_beyond_half_precision_are_refused(tmp_path):
    """Otherwise they would turn into infinity without a word."""
    net = network()
    net.layers[5].running_var[0] = 1e6
    with pytest.raises(ValueError, match="layers.5.running_var"):
        save_weights(net, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_diverged_training_ends_at_the_epoch_and_keeps_the_checkpoint_before(value, tmp_path):
    net = network()

    def step(engine, batch):
        if engine.state.epoch == 2:
            net.layers[0].bias.data[1] = value

    trainer = Engine(step)
    EpochCheckpoint(tmp_path, {"model": net}, seed=0).attach(trainer)
    with pytest.raises(ValueError, match="diverged in epoch 2.*learning_rate"):
        trainer.run([0, 1], max_epochs=5)
    load_weights(network(seed=1), tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "checkpoint.pt")["model"]["layers.0.bias"].isfinite().all()


def test_further_processes_draw_other_numbers_and_write_nothing(tmp_path, monkeypatch):
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        trainer = Engine(lambda engine, batch: drawn.append(float(torch.rand(()))))
        EpochCheckpoint(tmp_path / str(rank), {"model": network()}, seed=3).attach(trainer)
        trainer.run([0], max_epochs=3)
    assert len(set(drawn)) == 6
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == ["0/checkpoint.pt"]


def test_trainers_checkpoint_is_read(tmp_path):
    """As MONAI's CheckpointSaver writes it: the state dict under "model", beside the optimizer's."""
    path = tmp_path / "checkpoint.pt"
    net = network()
    torch.save({"model": net.state_dict(), "optimizer": torch.optim.Adam(net.parameters()).state_dict()}, path)
    loaded = load_weights(network(seed=1), path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))


# Files that are refused; each message names the file, and the network stays as it was


def corrupt(path):
    path.write_bytes(path.read_bytes()[:-300])


def no_weights(path):
    torch.save([1, 2, 3], path)


def text(path):
    path.write_text("not a checkpoint\n")


def empty(path):
    path.write_bytes(b"")


def optimizer_only(path):
    torch.save({"optimizer": {}}, path)


def code(path):
    """A pickle that would run a command."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "attacked"),)

    path.write_bytes(pickle.dumps(Attack(), protocol=2))


def numbers(path):
    torch.save(dict.fromkeys(network().state_dict(), 1.0), path)


def strange_model(path):
    torch.save({"model": 3}, path)


@pytest.mark.parametrize(
    "damage",
    [corrupt, no_weights, text, empty, optimizer_only, code, numbers, strange_model],
    ids=lambda f: f.__name__,
)
def test_damaged_file(damage, weights):
    damage(weights)
    net = network(seed=1)
    with pytest.raises(ValueError, match="model.pt") as error:
        load_weights(net, weights)
    assert str(weights) in str(error.value)
    assert not (weights.parent / "attacked").exists()
    assert torch.equal(net.layers[0].weight, network(seed=1).layers[0].weight)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="none.pt: no such file"):
        load_weights(network(), tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("other", "entry"),
    [
        (lambda: network(in_channels=2), "layers.0.weight"),  # another shape
        (lambda: nn.Conv2d(1, 4, 1), "bias"),  # other names
        (lambda: nn.Sequential(network()), "0.layers.0.bias"),
    ],
)
def test_weights_of_another_network(weights, other, entry):
    net = other()
    before = [value.clone() for value in net.state_dict().values()]
    with pytest.raises(ValueError, match="belong to another network") as error:
        load_weights(net, weights)
    for part in (str(weights), type(net).__name__, f"'{entry}'"):
        assert part in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


@pytest.mark.parametrize("channels", [2, 3])
def test_weights_tell_whether_a_detector_sees_the_segmentation(channels, tmp_path):
    save_weights(FailureResNet(in_channels=channels), tmp_path / "model.pt")
    assert sees_segmentation(tmp_path / "model.pt") is (channels == 3)


def test_weights_without_channels(tmp_path):
    save_weights(nn.Linear(3, 2), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match="linear.pt: not the weights of a convolutional network"):
        sees_segmentation(tmp_path / "linear.pt")
    with pytest.raises(ValueError, match="none.pt: no such file"):
        sees_segmentation(tmp_path / "none.pt")


def test_detector_of_other_regions_is_refused(tmp_path):
    """Its weights fit a network for any of them, so the operating point beside them tells."""
    save_weights(FailureResNet(region_size=4), tmp_path / "model.pt")
    load_weights(FailureResNet(region_size=8), tmp_path / "model.pt")  # nothing is known of it
    volume, point = VolumeDetection([0.2, 0.8], [0, 1], [0, 0], [0]), tmp_path / "model_operating_point.json"
    choose_operating_point([volume], point, beta=2, region_size=4)
    load_weights(FailureResNet(region_size=4), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt: trained for regions of 4 pixels, .* Give region_size 4\."):
        load_weights(FailureResNet(region_size=8), tmp_path / "model.pt")
    point.write_text("{")
    with pytest.raises(ValueError, match="model_operating_point.json: not the operating point"):
        load_weights(FailureResNet(region_size=8), tmp_path / "model.pt")
    save_weights(FailureResNet(region_size=8), tmp_path / "model.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("required", ["1.2.3", "1.2.9", None, "1.3.3", "2.2.3"])
def test_bundles_of_another_minor_version_are_refused(required, tmp_path, monkeypatch):
    monkeypatch.setattr("cardiac_qc_plugin.checkpoints.__version__", "1.2.3")
    packages = {} if required is None else {"cardiac-qc-plugin": required}
    write_json(tmp_path / "configs" / "metadata.json", {"version": "0.7", "required_packages_version": packages})
    if required in ("1.3.3", "2.2.3"):
        with pytest.raises(ValueError, match=f"needs cardiac-qc-plugin {required}, and 1.2.3 is installed"):
            check_version(tmp_path)
    else:
        assert check_version(tmp_path) == "0.7"


def test_only_the_checkpoint_is_removed(tmp_path):
    """The folder may be a user's own."""
    (tmp_path / "checkpoint.pt").touch()
    (tmp_path / "precious.txt").touch()
    remove_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "checkpoint.pt").touch()
    remove_checkpoint(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_a_killed_save_leaves_nothing_behind_for_good(tmp_path):
    """What a kill leaves is replaced by the next checkpoint, and removed with it at the training's end."""
    pid = os.fork()
    if pid == 0:
        torch.save = lambda state, file: (Path(file).write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL))
        checkpoint_once(tmp_path / "resume")
    os.waitpid(pid, 0)
    (left,) = (tmp_path / "resume").iterdir()
    assert left.read_bytes() == b"half" and left.name != "checkpoint.pt"
    checkpoint_once(tmp_path / "resume")
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["checkpoint.pt"]
    left.write_bytes(b"half")
    remove_checkpoint(tmp_path / "resume")
    assert not (tmp_path / "resume").exists()


def checkpoint_once(folder):
    trainer = Engine(lambda engine, batch: None)
    EpochCheckpoint(folder, {"model": nn.Conv2d(1, 1, 1)}, seed=0).attach(trainer)
    trainer.run([0], max_epochs=1)


def test_operating_point_stays_for_weights_of_the_same_regions(tmp_path):
    weights, point = tmp_path / "model.pt", tmp_path / "model_operating_point.json"
    for record, size, stays in (('{"threshold": 0.3, "region_size": 8}', 8, True), ('{"threshold": 0.3}', 4, True),
                                ('{"threshold": 0.3, "region_size": 8}', 4, False)):  # fmt: skip
        point.write_text(record)
        save_weights(FailureResNet(region_size=size), weights)
        assert point.exists() == stays
        load_weights(FailureResNet(region_size=size), weights)


@pytest.mark.parametrize("iterations", [1, 2, 40, 250, 300, 1001, 3250, 4500, 8000, 100_000])
def test_epochs_divide_a_training(iterations):
    length = epoch_length(iterations)
    assert iterations % length == 0 and min(iterations, 20) <= length <= 250
    assert not any(iterations % n == 0 for n in range(length + 1, 251))


def test_epochs_divide_the_parts_of_a_training():
    assert epoch_length(8000, 5) == 200 and epoch_length(8000, 0) == 250
    with pytest.raises(ValueError, match="1009 iterations cannot be divided into epochs of 20 to 250.*1250"):
        epoch_length(1009)
