"""Bundles with small untrained networks, for runs in tests and benchmarks."""

import json
import shutil
from pathlib import Path

import torch

from cardiac_qc_plugin.checkpoints import save_weights
from cardiac_qc_plugin.networks import DilatedCNN, FailureResNet

BUNDLES = Path(__file__).parents[2] / "bundles"
POISON = 31000  # a scan with this value kills its process, see `write_bundles`


def edit(path, change):
    """Change a JSON file."""
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def write_bundles(root, poisonable=False):
    """Copies of the DN and the failure bundle with untrained weights.

    Args:
        root: folder for them.
        poisonable: give the DN's preprocessing a step that kills its process at the value `POISON`, as a decoder with a
            bug might, and a coarse grid.
    """
    torch.manual_seed(0)
    networks = {"cardiac_dn_segmentation": DilatedCNN(), "cardiac_segmentation_failure": FailureResNet()}
    for name, network in networks.items():
        shutil.copytree(BUNDLES / name, root / name, ignore=shutil.ignore_patterns("models"))
        save_weights(network, root / name / "models" / "model.pt")
    models = root / "cardiac_segmentation_failure" / "models"
    for map in ("bmap", "emap"):
        shutil.copy(models / "model.pt", models / f"dn_{map}.pt")
        (models / f"dn_{map}_operating_point.json").write_text('{"threshold": 0.5}')
    if poisonable:
        edit(root / "cardiac_dn_segmentation/configs/inference.json", poison)
    return root


def poison(config):
    function = f"$lambda image: os.kill(os.getpid(), 9) if image.max() == {POISON} else image"
    step = {"_target_": "Lambdad", "keys": "image", "func": function}
    config["imports"].append("$import os")
    config["preprocessing"]["transforms"].insert(2, step)
    config["spacing"] = 2.8
