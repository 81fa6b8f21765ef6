"""How long a training step and an inference pass take on this machine, measured on random numbers."""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

from cardiac_qc_plugin.memory import keep_memory
from cardiac_qc_plugin.sampling import precision

from ..files import read_json, write_json

if sys.platform == "linux":
    import resource

__all__ = ["measured"]

STEPS = 3
SLICES = (2, 1, 224, 224)  # a heart scan at 1.4 mm is about this large
HEART = (112, 128)  # and the heart's region in it: on ACDC 13 to 41 % of the field, 26 % in the mean


def measured(cache: Path, function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The result of a measurement in a process of its own, so that its memory is its own; kept in a file.

    Args:
        cache: JSON file of earlier results; those of another machine or precision are not taken.
        function: `training_step` or `inference_time`.
        *args: its arguments: files of a configuration, and its overrides.
    """
    texts = [Path(file).read_text() for file in args[0]]
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else dict(getattr(torch.cpu, "get_capabilities", dict)())
    bits = precision(torch.device("cuda" if on_gpu else "cpu"))
    machine = [name, bits, torch.get_num_threads(), torch.__version__]
    key = hashlib.sha256(json.dumps([function.__name__, texts, args[1:], machine]).encode()).hexdigest()[:16]
    known = read_json(cache) if cache.is_file() else {}
    if key not in known:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            known[key] = pool.submit(function, *args).result()
        write_json(cache, known)
    return known[key]


def as_it_is(item: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Preprocessing that does nothing."""
    return item


def training_step(configs: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a training step and of its parts, and the peak memory.

    Args:
        configs: files of a bundle's training configuration.
        settings: entries to replace.

    Returns:
        ``seconds`` (median of a step, after one to warm up), ``data``, ``forward``, ``backward`` and ``optimizer``
        (each part's median), ``memory_gb``, ``device`` and ``threads``.
    """
    keep_memory()  # as every training does
    parser = ConfigParser()
    parser.read_config(configs)
    parser.update(settings)
    channels = parser.get_parsed_content("network_def#in_channels")
    rng = np.random.default_rng(0)
    # a heart's share of a slice, or so few voxels that some regions of a detector fail and others do not. With hardly
    # any heart the U-net's gradients become denormal numbers, and a step on a CPU takes six times as long
    foreground = 0.05 if channels == 1 else 5e-4
    volume = {
        "image": rng.random((channels, 256, 256, 8), dtype=np.float32),
        "label": (rng.random((1, 256, 256, 8)) < foreground).astype(np.uint8),
    }
    dataset = {"data": [volume], "transform": as_it_is, "length": STEPS + 1}
    parser.update({f"train#dataset#{key}": value for key, value in dataset.items()})
    parser.parse()
    steps = timed_steps(parser)
    next(steps)  # to warm up
    times = [next(steps) for _ in range(STEPS)]
    parts = {name: statistics.median(step[name] for step in times) for name in times[0]}
    return {"seconds": statistics.median(sum(step.values()) for step in times), **parts, **machine(parser)}


def timed_steps(parser: ConfigParser) -> Iterator[dict[str, float]]:
    """Training steps as MONAI's trainer takes them; yields the seconds of the parts of each."""
    get = parser.get_parsed_content
    network, optimizer, device = get("network").train(), get("optimizer"), get("device")
    loss_function, inferer, batches = get("train#loss"), get("train#inferer"), iter(get("train#dataloader"))
    while True:
        marks = [clock(device)]
        batch = next(batches)
        image, label = batch["image"].to(device), batch["label"].to(device)
        marks.append(clock(device))
        optimizer.zero_grad()
        loss = loss_function(inferer(image, network), label)
        marks.append(clock(device))
        loss.backward()
        marks.append(clock(device))
        optimizer.step()
        marks.append(clock(device))
        yield dict(zip(("data", "forward", "backward", "optimizer"), np.diff(marks).tolist(), strict=True))


def inference_time(configs: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Nanoseconds that a segmentation network takes per pixel of the field without dropout, and for each sample.

    Samples that see the heart's region only are measured on a region of a heart's size.

    Args:
        configs: the files of a bundle's inference configuration.
        settings: entries to replace.

    Returns:
        ``pass`` and ``sample`` in nanoseconds per pixel, ``memory_gb``, ``device`` and ``threads``.
    """
    parser = ConfigParser()
    parser.read_config(configs)
    region = parser.get("region")
    parser.update({**settings, "region": "whole"})
    parser.parse()
    network, inferer, device = (parser.get_parsed_content(name) for name in ("network", "inferer", "device"))
    slices, prepared = torch.rand(SLICES, device=device), inferer.prepare(network.eval())
    seen = slices[..., : HEART[0], : HEART[1]] if region == "heart" else slices

    def seconds(image: torch.Tensor, samples: int) -> float:
        inferer.samples = samples
        inferer(image, prepared)  # to warm up
        start = clock(device)
        inferer(image, prepared)
        return clock(device) - start

    nanoseconds = 1e9 / slices.numel()
    return {
        "pass": nanoseconds * seconds(slices, 0),
        "sample": nanoseconds * (seconds(seen, STEPS) - seconds(seen, 0)) / STEPS,
        **machine(parser),
    }


def clock(device: torch.device) -> float:
    """Seconds, when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(parser: ConfigParser) -> dict[str, Any]:
    """Device, threads, and peak memory of this process on that device; None where the system does not tell."""
    device = parser.get_parsed_content("device")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 if sys.platform == "linux" else None
    return {"memory_gb": peak and round(peak, 2), "device": str(device), "threads": torch.get_num_threads()}
