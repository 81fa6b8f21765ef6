"""What the algorithm templates have in common: a segmentation bundle as an Auto3DSeg algorithm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from monai.apps.auto3dseg import BundleAlgo
from monai.bundle import ConfigParser

from cardiac_qc_plugin.bundle import find_bundle
from cardiac_qc_plugin.workflows.files import read_json, write_text

from .fold import DATALIST, NOT_COPIED, Fold, split_settings

__all__ = ["TEMPLATES", "BayesianAlgo", "template_parameters"]

TEMPLATES = Path(__file__).parent / "algorithm_templates"
SCRIPTS = Path(__file__).parent / "fold_scripts"


def template_parameters(name: str, templates: str | Path = TEMPLATES) -> dict[str, Any]:
    """Content of an algorithm template's ``hyper_parameters.yaml``."""
    return yaml.safe_load(Path(templates, name, "configs", "hyper_parameters.yaml").read_text())


class BayesianAlgo(BundleAlgo):
    """A segmentation bundle as an Auto3DSeg algorithm; the template's ``hyper_parameters.yaml`` names the bundle.

    Of AutoRunner's input it reads ``datalist`` and ``dataroot``, and two entries of its own: ``settings``, entries of
    the bundle's configs to replace (``{"iterations": 4000}``), and ``bundle_dir``, the folder of the bundles.
    """

    def pre_check_skip_algo(self, skip_bundlegen: bool = False, skip_info: str = "") -> tuple[bool, str]:
        """Skip data that are no stacks of short-axis slices, or have other labels or channels than the bundle."""
        stats = ConfigParser.load_config_file(self.data_stats_files)["stats_summary"]
        in_plane, slices = sorted(stats["image_stats"]["spacing"]["median"])[1:]  # any axis may hold the slices
        metadata = read_json(self.source_bundle() / "configs" / "metadata.json")["network_data_format"]
        classes = metadata["outputs"]["pred"]["channel_def"]
        labels = [int(label) for label in stats["label_stats"]["labels"]]
        if slices < 2 * in_plane:
            reason = f"slices are {slices:g} mm apart at {in_plane:g} mm in plane: no stack of short-axis slices."
        elif stats["image_stats"]["channels"]["max"] != metadata["inputs"]["image"]["num_channels"]:
            reason = "the images have several channels."
        elif not set(labels) <= {int(label) for label in classes}:
            reason = f"the labels are {labels}; this bundle's are {classes}."
        else:
            return skip_bundlegen, skip_info
        return True, f"{skip_info} {reason}".strip()

    def source(self) -> dict[str, Any]:
        """AutoRunner's input."""
        return ConfigParser.load_config_file(self.data_list_file)

    def source_bundle(self) -> Path:
        """The bundle that folds get a copy of."""
        name = template_parameters(self.name, self.template_path)["bundle"]
        return find_bundle(name, self.source().get("bundle_dir"))

    def fill_template_config(self, data_stats_filename: str, algo_path: str, **kwargs: Any) -> dict[str, Any]:
        """Copy the bundle, without weights, and the datalist into a fold's folder; say what to train on, and how.

        Args:
            data_stats_filename: not used: what the data are like is checked before, and the bundle knows the rest.
            algo_path: the fold's folder.
            kwargs: ``fold``, the number of the fold.
        """
        source, bundle = self.source(), self.source_bundle()
        copy = Path(algo_path) / bundle.name
        shutil.copytree(bundle, copy, ignore=NOT_COPIED)
        shutil.copyfile(source["datalist"], copy / "configs" / "datalist.json")
        shutil.copytree(SCRIPTS, Path(algo_path) / "scripts", dirs_exist_ok=True)
        metadata = read_json(copy / "configs" / "metadata.json")["network_data_format"]
        filled = {
            "bundle": bundle.name,
            "modality": source["modality"],
            "input_channels": metadata["inputs"]["image"]["num_channels"],
            "output_classes": metadata["outputs"]["pred"]["num_channels"],
            "class_names": list(metadata["outputs"]["pred"]["channel_def"].values())[1:],
            "fold": kwargs["fold"],
            "dataset_dir": os.path.abspath(source["dataroot"]),
            **DATALIST,
            "settings": source.get("settings", {}),
        }
        split_settings(copy, filled["settings"])
        file = Path(algo_path) / "configs" / "hyper_parameters.yaml"
        write_text(file, yaml.safe_dump(filled, sort_keys=False))
        return {file.name: filled}

    def train(self, train_params: dict | None = None, device_setting: dict | None = None) -> None:
        """Train in a process of its own, on the first of the visible GPUs, with the Python that runs now.

        Args:
            train_params: entries of the bundle's configs to replace.
            device_setting: see :meth:`monai.apps.auto3dseg.AutoRunner.set_device_info`.

        Raises:
            RuntimeError: if the process fails; it has said why.
        """
        self.device_setting.update(device_setting or {})
        python = str(self.device_setting["CMD_PREFIX"] or "").split() or [sys.executable]
        script, config = Path(self.output_path, "scripts", "train.py"), Fold(self.output_path).file
        options = [f"--{key}={value}" for key, value in (train_params or {}).items()]
        device = str(self.device_setting["CUDA_VISIBLE_DEVICES"]).split(",")[0]
        command = [*python, str(script), "run", f"--config_file={config}", *options]
        code = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": device}).returncode
        if code:
            raise RuntimeError(f"{self.output_path}: training failed with exit code {code}; its messages are above.")
