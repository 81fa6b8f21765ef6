"""How time and memory grow with the samples, the slices, the size in plane and the scans in a batch.

    python benchmarks/growth.py [--network drn] [--region whole] [--quick] [--json FILE]

Each line is a process of its own, that segments the synthetic heart three times after a warm-up: the median. The slope
is that of the logarithm of the seconds over the logarithm of what grows: 1 is proportional.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import measure
import numpy as np

from cardiac_qc_plugin.inferers import MCDropoutSliceInferer

BASE = {"samples": 5, "slices": 5, "size": 128, "scans": 1}
GROWTH = {"samples": [1, 5, 20, 60], "slices": [5, 10, 20, 40], "size": [128, 192, 256, 384, 512], "scans": [1, 2, 4]}
QUICK = {"samples": [1, 5, 20], "slices": [5, 10], "size": [128, 192], "scans": [1, 2]}


def once(network: str, region: str, cpu_time: bool, samples: int, slices: int, size: int, scans: int) -> None:
    """Print the median seconds of three runs, and the peak memory in GiB."""
    clock = measure.clock(cpu_time)
    net = measure.load_network(network)
    volume = measure.phantom(size, slices).expand(scans, -1, -1, -1, -1)
    infer = MCDropoutSliceInferer(samples, region=region)
    infer(volume[:1, ..., :1], net)
    seconds = measure.interleaved({"run": lambda: infer(volume, net)}, 3, clock)
    print(seconds["run"], measure.own_peak())


def main(network: str, region: str, cpu_time: bool, quick: bool, json: Path | None) -> None:
    rows, report = [], {}
    for what, values in (QUICK if quick else GROWTH).items():
        measured = []
        for value in values:
            setting = [str(v) for v in (BASE | {what: value}).values()]
            command = [sys.executable, __file__, "--once", *setting, "--network", network, "--region", region]
            command += ["--cpu_time"] if cpu_time else []
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            measured.append([float(word) for word in result.stdout.split()[-2:]])
        seconds, peaks = np.transpose(measured)
        slopes = [np.polyfit(np.log(values), np.log(y), 1)[0] for y in (seconds, peaks)]
        for value, second, peak in zip(values, seconds, peaks, strict=True):
            rows.append([f"{what} {value}", f"{second:.2f}", f"{peak:.2f}", "", ""])
        rows[-1][3:] = [f"{slope:.2f}" for slope in slopes]
        report[what] = {
            "values": values,
            "seconds": seconds.tolist(),
            "peak_gib": peaks.tolist(),
            "slope_seconds": slopes[0],
            "slope_peak": slopes[1],
        }
    base = ", ".join(f"{value} {what}" for what, value in BASE.items())
    print(f"{network}, region {region}; unless it grows: {base}\n")
    print(measure.table(["", "seconds", "peak GiB", "slope of seconds", "slope of peak"], rows))
    measure.write_json(json, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="drn", choices=["dn", "drn", "unet"])
    parser.add_argument("--region", default="whole", choices=["heart", "whole"])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--cpu_time", action="store_true", help="CPU time of one thread, for a machine in use")
    parser.add_argument(
        "--once", nargs=4, type=int, metavar=tuple(name.upper() for name in BASE), help=argparse.SUPPRESS
    )
    arguments = vars(parser.parse_args())
    setting = arguments.pop("once")
    once(arguments["network"], arguments["region"], arguments["cpu_time"], *setting) if setting else main(**arguments)
