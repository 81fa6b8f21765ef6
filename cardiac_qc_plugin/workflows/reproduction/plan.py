"""What a reproduction would do, and how long that would take on this machine."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
from monai.bundle import ConfigParser

from .stage_work import resume_folder
from .stages import Stage
from .step_time import inference_time, measured, training_step
from .training import checkpoint_iteration

__all__ = ["describe"]


@cache
def slice_area(path: Path) -> tuple[float, int]:
    """Area of a slice in mm2, and number of slices, from the header alone."""
    image = nib.load(path)
    rows, columns = (size * spacing for size, spacing in zip(image.shape[:2], image.header.get_zooms(), strict=False))
    return rows * columns, image.shape[2]


def training_estimate(stage: Stage, measure: Any) -> tuple[str, float, dict[str, Any]]:
    """What is left of a training, the seconds it takes, and the measured step."""
    info = stage.info
    own = {key: value for key, value in info["own"].items() if key in ("region_size", "see_segmentation")}
    step = measure(training_step, info["configs"], own | info["device"])
    done = checkpoint_iteration(stage.folder / "loss.csv", resume_folder(stage))
    note = f"{info['iterations']} iterations" + (f", resumes near {done}" if done else "")
    return note, step["seconds"] * (info["iterations"] - done), step


def segmentation_estimate(stage: Stage, measure: Any) -> tuple[str, float, dict[str, Any]]:
    """The scans of a segmentation, the seconds it takes, and the measured passes."""
    info = stage.info
    configs = [str(info["bundle"] / "configs" / "inference.json")]
    config = ConfigParser.load_config_files(configs)
    samples = info["own"].get("samples", config["samples"])
    step = measure(inference_time, configs, info["device"])
    areas = [slice_area(scan.path) for scan in info["scans"]]
    pixels = sum(area * slices for area, slices in areas) / config["spacing"] ** 2
    note = f"{len(areas)} scans, T = {samples}"
    return note, 1e-9 * pixels * (step["pass"] + samples * step["sample"]), step


def describe(stages: Sequence[Stage], output: Path) -> str:
    """The plan as text: each stage with what it has to do, and the time and memory of trainings and segmentations.

    A training step and an inference pass of each network are measured, unless ``step_times.json`` has them.

    Args:
        stages: in the order in which they are carried out.
        output: folder for ``step_times.json``.
    """
    measure = partial(measured, output / "step_times.json")
    lines, steps, total = [], {}, 0.0
    for stage in stages:
        if stage.done:
            lines.append(f"{stage.name:60} done")
            continue
        estimate = {"train": training_estimate, "segment": segmentation_estimate}.get(stage.info["kind"])
        if estimate is None:
            lines.append(f"{stage.name:60} to do")
            continue
        note, seconds, step = estimate(stage, measure)
        steps.setdefault(stage_network(stage), step)
        total += seconds
        lines.append(f"{stage.name:60} to do: {note}, {seconds / 3600:.2f} h")
    done = sum(line.endswith(" done") for line in lines)
    lines += ["", f"{len(stages)} stages, {done} done. Trainings and segmentations to do: {total / 3600:.1f} h."]
    lines += ["The other stages take seconds to minutes each, and are not part of it.", ""]
    return "\n".join(lines + [measured_text(name, step) for name, step in steps.items()])


def stage_network(stage: Stage) -> str:
    """What was measured for a stage: the bundle, and whether it was training."""
    return f"{stage.info['kind']} {stage.settings['bundle']}"


def measured_text(name: str, step: dict[str, Any]) -> str:
    """One line on a measurement."""
    where = f"on {step['device']} with {step['threads']} thread(s)"
    memory = "" if step["memory_gb"] is None else f", {step['memory_gb']:.1f} GB besides the data"
    if "seconds" not in step:
        return f"{name}: {step['pass']:.0f} ns per pixel, and {step['sample']:.0f} a sample, {where}{memory}"
    shares = ", ".join(
        f"{part} {step[part] / step['seconds']:.0%}" for part in ("data", "forward", "backward", "optimizer")
    )
    return f"{name}: {step['seconds']:.3f} s per step {where} ({shares}){memory}"
