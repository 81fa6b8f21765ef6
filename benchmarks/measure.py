"""What the benchmarks share: interleaved timing, the machine's own ceilings, peak memory, networks and a phantom."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.transforms import ScaleIntensityRangePercentiles
from torch.nn import functional as F

from cardiac_qc_plugin.bundle import find_bundle
from cardiac_qc_plugin.checkpoints import load_weights
from cardiac_qc_plugin.data.phantom import ShortAxisPhantom
from cardiac_qc_plugin.sampling import precision

Clock = Callable[[], float]


def clock(cpu_time: bool) -> Clock:
    """Wall-clock time; or this process's CPU time with one thread, which other users of the machine disturb less."""
    if cpu_time:
        torch.set_num_threads(1)
    return time.process_time if cpu_time else time.perf_counter


def interleaved(work: dict[str, Callable[[], object]], repeats: int, clock: Clock) -> dict[str, float]:
    """Median seconds of each piece of work, run in turns, so that what else the machine does hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def convolution(device: torch.device, kind: str) -> tuple[Callable[[], object], int]:
    """A 3x3 convolution of 256 channels in fp32, bf16 or int8, and how many operations it is."""
    operations = 2 * 4 * 56**2 * 256**2 * 9
    if kind == "int8":
        x = torch.randint(256, (4, 256, 56, 56), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        w, one = torch.randint(-63, 64, (256, 256, 3, 3)).to(torch.int8), [1, 1]
        steps, zeros = torch.ones(256), torch.zeros(256, dtype=torch.long)
        w = torch.ops.onednn.qconv_prepack(w, steps, 1.0, 0, one, one, one, 1, list(x.shape))
        settings = (None, one, one, one, 1, 1.0, 0, torch.float32, "none", [], "")
        return lambda: torch.ops.onednn.qconv2d_pointwise(x, 1.0, 0, w, steps, zeros, *settings), operations
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    x = torch.randn(4, 256, 56, 56, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, w, padding=1), operations


def ceilings(device: torch.device, clock: Clock, repeats: int = 5) -> dict[str, float]:
    """Best rates: matrix product and 3x3 convolution in GFLOP/s, and copying memory in GB/s.

    In fp32, and in the precision that the inferer computes in: others may take minutes.
    """

    def best(call: Callable[[], object]) -> float:
        call()
        times = []
        for _ in range(repeats):
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - start)
        return min(times)

    rates = {}
    for name in dict.fromkeys(["fp32", precision(device)]):
        if dtype := {"fp32": torch.float32, "bf16": torch.bfloat16}.get(name):
            a = torch.randn(2048, 2048, device=device).to(dtype)
            rates[f"matmul_{name}"] = 2 * 2048**3 / best(lambda a=a: a @ a) / 1e9
        call, operations = convolution(device, name)
        rates[f"conv_{name}"] = operations / best(call) / 1e9
    a = torch.randn(32 << 20, device=device)
    b = torch.empty_like(a)
    rates["copy"] = 2 * a.nbytes / best(lambda: b.copy_(a)) / 1e9
    return rates


def peak_memory(script: str, *arguments: str) -> float:
    """Peak resident memory in GiB of a benchmark's subprocess, which ends by printing :func:`own_peak`."""
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def own_peak() -> float:
    """Peak resident memory of this process so far, in GiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def describe(device: torch.device, rates: dict[str, float]) -> str:
    """One line on the machine, one on its ceilings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    amx = ", AMX" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else ""
    listed = {
        kind: ", ".join(f"{rate:.0f} in {key.partition('_')[2]}" for key, rate in rates.items() if key.startswith(kind))
        for kind in ("matmul", "conv")
    }
    return (
        f"{name}{amx}, {torch.get_num_threads()} threads, torch {torch.__version__}, computing in {precision(device)}\n"
        f"ceilings: matrix product {listed['matmul']} GFLOP/s; 3x3 convolution {listed['conv']}; "
        f"copy {rates['copy']:.1f} GB/s"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of equal width, the first to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join(lines)


def write_json(path: Path | None, content: dict) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n")


def phantom(size: int = 224, slices: int = 10) -> torch.Tensor:
    """(1, 1, size, size, slices), scaled as the bundles scale: the synthetic heart at end-diastole, 1.4 mm in plane."""
    image, _ = ShortAxisPhantom(shape=(size, size), n_slices=slices, spacing=(1.4, 1.4, 100 / slices)).frame(0.0)
    scaled = ScaleIntensityRangePercentiles(1, 99, 0, 1, clip=True)(image)
    return torch.as_tensor(scaled, dtype=torch.float32)[None, None]


def load_network(name: str) -> torch.nn.Module:
    """A bundle's network: with the bundle's weights, or with seeded random ones where it has none."""
    folder = find_bundle(f"cardiac_{name}_segmentation")
    config = ConfigParser()
    config.read_config(str(folder / "configs" / "inference.json"))
    torch.manual_seed(0)
    network = config.get_parsed_content("network_def")
    if has_weights(name):
        load_weights(network, folder / "models" / "model.pt")
    return network.eval()


def has_weights(name: str) -> bool:
    return (find_bundle(f"cardiac_{name}_segmentation") / "models" / "model.pt").is_file()
