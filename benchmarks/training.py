"""Steps per second of each bundle's training, and what share of a step is data, forward, backward and optimizer.

    python benchmarks/training.py [--bundles dn,drn,unet,failure] [--json FILE] [--quick]

The steps of each bundle's `train.json`, in its own batch size and precision, on random volumes (256 x 256 x 8); the
networks take turns, a process of its own for each, and medians over their turns are printed. `--quick`: one turn.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.bundle import DETECTOR, find_bundle
from cardiac_qc_plugin.workflows.reproduction.step_time import training_step

NAMES = {name: f"cardiac_{name}_segmentation" for name in ("dn", "drn", "unet")}
NAMES["failure"] = DETECTOR
PARTS = ("data", "forward", "backward", "optimizer")


def turn(name: str) -> dict[str, Any]:
    config = find_bundle(NAMES[name]) / "configs" / "train.json"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # its peak memory is its own
        return pool.submit(training_step, [str(config)], {}).result()


def main(a: argparse.Namespace) -> None:
    names = a.bundles.split(",")
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(1 if a.quick else 3):
        for name in names:
            turns[name].append(turn(name))
    print(f"{'':10}{'steps/s':>9}" + "".join(f"{part:>11}" for part in PARTS) + f"{'memory':>10}")
    results = {}
    for name, own in turns.items():
        medians = {key: statistics.median(step[key] for step in own) for key in ("seconds", *PARTS, "memory_gb")}
        total = sum(medians[part] for part in PARTS)
        shares = "".join(f"{medians[part] / total:11.1%}" for part in PARTS)
        print(f"{name:10}{1 / medians['seconds']:9.2f}{shares}{medians['memory_gb']:7.1f} GB")
        results[name] = medians | {key: own[0][key] for key in ("device", "threads")}
    if a.json:
        a.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", default=",".join(NAMES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one turn for each")
    main(parser.parse_args())
