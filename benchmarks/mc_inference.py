"""Monte Carlo dropout as every tutorial does it, against the inferer: time, memory, and whether the maps are as good.

    python benchmarks/mc_inference.py [--quick] [--json FILE] [--device cuda]

The textbook: fp32, NCHW, T passes of the whole volume, all samples kept, then their mean and standard deviation. The
inferer: the whole field, and the heart's region, which is the bundles' default. The volume is the synthetic heart,
224 x 224 x 10, T = 10. Networks without trained weights get seeded random ones; as they find no heart, their region is
the one that the DRN finds.

The ceiling is this machine's own rate of a 3x3 convolution, in the precision that the inferer reports for the network,
measured in turns with the rest (8-bit integers, of which a part is in fp32, are no ceiling that a U-net could reach
without AVX512-VNNI); the share is the time that the (T + 1) passes would take at that rate, over the time that they
took. Peak memory is that of a process that does nothing else. The maps are compared with an estimate from 200 textbook
samples.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cardiac_qc_plugin import inferers
from cardiac_qc_plugin.inferers import MCDropoutSliceInferer, heart_window
from cardiac_qc_plugin.sampling import FusedNetwork
from cardiac_qc_plugin.transforms.uncertainty import bayesian_map

SAMPLES = 10
MARGIN = MCDropoutSliceInferer().margin


def textbook(network: nn.Module, volume: torch.Tensor, samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (D, K, H, W) of the samples of a volume (1, 1, H, W, D)."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.train()
    slices = volume[0].movedim(-1, 0)
    with torch.no_grad():
        drawn = torch.stack([network(slices).softmax(dim=1) for _ in range(samples)])
        return drawn.mean(dim=0), drawn.std(dim=0)


def estimate(network: nn.Module, volume: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and b-map of many textbook samples, (K, H, W, D) and (H, W, D), without keeping them."""
    parts = [textbook(network, volume, 20) for _ in range(samples // 20)]
    means, stds = (torch.stack(part) for part in zip(*parts, strict=True))
    variance = (stds**2).mean(dim=0) * 19 / 20 + means.var(dim=0, correction=0)
    return maps(means.mean(dim=0), (variance * samples / (samples - 1)).sqrt())


def maps(mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return mean.movedim(0, -1), bayesian_map(std, dim=1)[:, 0].movedim(0, -1)


def region(volume: torch.Tensor, network: nn.Module) -> tuple[slice, slice]:
    """The heart of a volume as a trained network sees it."""
    sure = MCDropoutSliceInferer(samples=0)(volume, network)[0]
    return heart_window(sure[: len(sure) // 2 - 1].movedim(-1, 0), MARGIN)


def flops(network: nn.Module, volume: torch.Tensor, window: tuple[slice, slice] | None = None) -> int:
    """Floating point operations of a pass over a slice, or over a region of it."""
    image, call = volume[..., 0], network
    if window is not None:
        rows, cols = window
        border = getattr(network, "border", 0)
        if border:  # the region comes with its surroundings
            call = copy.deepcopy(network)
            for convolution in (module for module in call.modules() if isinstance(module, nn.Conv2d)):
                convolution.padding, convolution.padding_mode = (0, 0), "zeros"
        image = F.pad(image, (border,) * 4)[
            ..., rows.start : rows.stop + 2 * border, cols.start : cols.stop + 2 * border
        ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(image)
    return counter.get_total_flops()


def agreement(network: nn.Module, volume: torch.Tensor, reference_samples: int) -> dict[str, dict[str, float]]:
    """Mean absolute difference of the probabilities, correlation of the b-map, share of equal labels, by method.

    In the heart's region, since networks that are not trained are uncertain everywhere.
    """
    inside = (..., *inferers.heart_window(), slice(None))
    expected, expected_bmap = (part[inside] for part in estimate(network, volume, reference_samples))
    results = {"textbook": maps(*textbook(network, volume))}
    for name in ("whole", "heart"):
        made = MCDropoutSliceInferer(SAMPLES, region=name)(volume, network)[0]
        classes = len(made) // 2 - 1
        results[name] = made[:classes], made[classes]
    results = {name: [part[inside] for part in pair] for name, pair in results.items()}
    return {
        name: {
            "probabilities": float((mean - expected).abs().mean()),
            "bmap_correlation": float(np.corrcoef(bmap.cpu().ravel(), expected_bmap.cpu().ravel())[0, 1]),
            "argmax": float((mean.argmax(dim=0) == expected.argmax(dim=0)).float().mean()),
        }
        for name, (mean, bmap) in results.items()
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def methods(network: nn.Module, volume: torch.Tensor) -> dict[str, Callable[[], object]]:
    return {
        "textbook": lambda: (textbook(network, volume), synchronize()),
        "whole": lambda: (MCDropoutSliceInferer(SAMPLES)(volume, network), synchronize()),
        "heart": lambda: (MCDropoutSliceInferer(SAMPLES, region="heart")(volume, network), synchronize()),
    }


def main(json: Path | None, quick: bool, device: str, networks: list[str], repeats: int, cpu_time: bool) -> None:
    place, clock = torch.device(device), measure.clock(cpu_time)
    rates = measure.ceilings(place, clock)
    print(measure.describe(place, rates))
    volume = measure.phantom(slices=2 if quick else 10).to(place)
    part = volume[:, :, 32:192, 32:192, volume.shape[-1] // 2][..., None]
    drn = measure.load_network("drn").to(place)
    windows = [region(field, drn) for field in (volume, part)]
    rows, quality, report = [], [], {"machine": rates}
    for name in networks:
        network = measure.load_network(name).to(place)
        textbook_network = measure.load_network(name).to(place)
        kind = FusedNetwork(network, amp=True).precision
        ceiling, operations = measure.convolution(place, kind)
        calls = methods(network, volume)
        calls["textbook"] = methods(textbook_network, volume)["textbook"]
        calls["ceiling"] = lambda ceiling=ceiling: [ceiling() for _ in range(20)] and synchronize()
        network = network.to(memory_format=torch.channels_last)
        inferers.heart_window = lambda *_: windows[0]
        for call in methods(network, volume[..., :1]).values():  # warm up
            call()
        seconds = measure.interleaved(calls, 1 if quick else repeats, clock)
        rate = 20 * operations / seconds.pop("ceiling")
        full, small = flops(textbook_network.eval(), volume), flops(textbook_network, volume, windows[0])
        work = {"whole": (SAMPLES + 1) * full, "heart": full + SAMPLES * small}
        ratio = {key: seconds["textbook"] / value for key, value in seconds.items()}
        share = {key: value * volume.shape[-1] / rate / seconds[key] for key, value in work.items()}
        peak = {} if quick else {key: measure.peak_memory(__file__, "--peak", name, key) for key in seconds}
        for key, value in seconds.items():
            cells = [f"{ratio[key]:.1f}", f"{share[key]:.0%}" if key in share else "", f"{peak.get(key, np.nan):.2f}"]
            rows.append([f"{name} {key}", f"{value:.2f}", *cells])
        rows.append([f"{name} ceiling: {rate / 1e9:.0f} GFLOP/s in {kind}", "", "", "", ""])
        inferers.heart_window = lambda *_: windows[1]
        compared = agreement(network, part, 40 if quick else 200)
        trained = "" if measure.has_weights(name) else " (random weights)"
        for key, values in compared.items():
            cells = [f"{values['probabilities']:.4f}", f"{values['bmap_correlation']:.3f}", f"{values['argmax']:.2%}"]
            quality.append([f"{name} {key}{trained}", *cells])
        report[name] = {
            "speedup": ratio["whole"],
            "seconds": seconds["whole"],
            "ceiling_share": share["whole"],
            "ceiling_gflops": rate / 1e9,
            "precision": kind,
            "heart": {"speedup": ratio["heart"], "seconds": seconds["heart"], "ceiling_share": share["heart"]},
            "textbook_seconds": seconds["textbook"],
            "peak_gib": peak,
            "agreement": compared,
        }
    height, width = ((window.stop - window.start) for window in windows[0])
    print(f"\n{' x '.join(str(n) for n in volume.shape[2:])}, T = {SAMPLES}; the heart's region: {height} x {width}\n")
    print(measure.table(["", "seconds", "times faster", "of ceiling", "peak GiB"], rows))
    print(f"\nagainst {40 if quick else 200} textbook samples of a slice, in the heart's region\n")
    print(measure.table(["", "|probability|", "b-map correlation", "same label"], quality))
    measure.write_json(json, report)


def peak(name: str, method: str) -> None:
    """Peak memory of one method, for :func:`measure.peak_memory`."""
    volume = measure.phantom()
    if method == "heart":
        window = region(volume, measure.load_network("drn"))
        inferers.heart_window = lambda *_: window
    methods(measure.load_network(name), volume)[method]()
    print(measure.own_peak())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="two slices, once, without memory: about a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=["unet", "drn", "dn"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu_time", action="store_true", help="CPU time of one thread, for a machine in use")
    parser.add_argument("--peak", nargs=2, metavar=("NETWORK", "METHOD"), help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    child = arguments.pop("peak")
    peak(*child) if child else main(**arguments)
