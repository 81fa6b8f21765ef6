"""Seconds per patient from file to report, by stage: which stage is the largest?

    python benchmarks/pipeline.py [--model drn] [--map bmap] [--samples 10] [--patients 2] [--data ACDC/training]
                                  [--device auto] [--json FILE] [--quick]

Runs the pipeline's `run` on end-diastole and end-systole of synthetic hearts (216 x 256 x 10), or of ACDC's patients,
and times its parts where they are called. Stages overlap (a scan is read and written while the network works on
another), so their seconds add up to more than the wall-clock time; both are printed. Start-up is measured in processes
of their own.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from cardiac_qc_plugin.bundle import load_models
from cardiac_qc_plugin.data.inputs import find_scans
from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_phantom
from cardiac_qc_plugin.workflows import run as workflow

SCRIPT = Path(__file__).parents[1] / "scripts" / "pipeline.py"


class Timer:
    """Seconds by stage, of calls from any thread; a stage called by another counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside = threading.local()

    def timed(self, stage: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            outer, self.inside.seconds = getattr(self.inside, "seconds", 0.0), 0.0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[stage] += spent - self.inside.seconds
                self.inside.seconds = outer + spent

        return call


@contextlib.contextmanager
def timed_stages(predictors: workflow.Predictors, timer: Timer):
    """Time the parts of `run` while in the block."""
    functions = {
        "read": ("read_volume", "file_sha256"),
        "write": ("write_maps", "write_json"),
        "measure": ("structure_volumes", "slice_levels", "plausibility", "sample_volumes"),
        "pages of cases": ("write_case",),
        "report": ("write_report", "write_csv", "write_table_of_run", "write_cines", "write_rows"),
    }
    places = [(workflow, name, stage) for stage, names in functions.items() for name in names]
    for predictor, task in zip(predictors, ("segment", "detect"), strict=True):
        parts = (("preprocessing", "preprocess"), ("inferer", "network"), ("postprocessing", "postprocess"))
        places += [(predictor, name, f"{task}: {stage}") for name, stage in parts]
    kept = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, stage in places:
        setattr(place, name, Timed(getattr(place, name), timer.timed(stage, getattr(place, name))))
    try:
        yield
    finally:
        for place, name, value in kept:
            setattr(place, name, value)


class Timed:
    """Stands for an object: timed when called, itself otherwise."""

    def __init__(self, target: Callable, call: Callable) -> None:
        self.__dict__.update(target=target, call=call)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.target, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.target, name, value)


def startup(scan: Path, folder: Path, options: list[str]) -> dict[str, float]:
    """Seconds of the command's help, and of a command from its start to the first scan's result."""

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, str(SCRIPT), *arguments], check=True, capture_output=True)
        return time.perf_counter() - start

    first = ["run", "--input", str(scan), "--output", str(folder), *options]
    return {"help": seconds("run", "--help"), "first result": seconds(*first)}


def scans_of(data: Path | None, patients: int, folder: Path) -> list:
    if data is not None:
        return find_scans(str(data))[: 2 * patients]
    for seed in range(patients):
        write_phantom(folder / "scans", f"heart{seed}", ShortAxisPhantom(seed=seed + 1))
    return find_scans(str(folder / "scans"))


def main(a: argparse.Namespace) -> None:
    predictors = load_models(a.model, a.map, a.samples, a.device, turns=a.turns)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scans = scans_of(a.data, a.patients, folder)
        workflow.run(scans[:1], folder / "warm", *predictors)
        walls, stages = [], []
        for _ in range(1 if a.quick else 3):
            shutil.rmtree(folder / "out", ignore_errors=True)
            timer = Timer()
            with timed_stages(predictors, timer):
                start = time.perf_counter()
                workflow.run(scans, folder / "out", *predictors)
                walls.append(2 * (time.perf_counter() - start) / len(scans))
            stages.append({name: 2 * spent / len(scans) for name, spent in timer.seconds.items()})
        options = ["--model", a.model, "--map", a.map, "--samples", str(a.samples), "--device", a.device]
        options += ["--turns", str(a.turns)]
        start = startup(scans[0].path, folder / "first", options)
    medians = {name: statistics.median(each.get(name, 0.0) for each in stages) for name in stages[0]}
    total = sum(medians.values())
    turned = f", {a.turns} quarter turns" if a.turns > 1 else ""
    print(f"{a.model}, {a.map}, T = {a.samples}{turned}, {len(scans)} scans; seconds per patient (ED + ES)")
    print(f"{'stage':24}{'seconds':>9}{'share':>8}")
    for name, spent in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"{name:24}{spent:9.2f}{spent / total:8.1%}")
    print(f"{'sum of the stages':24}{total:9.2f}\n{'wall clock':24}{statistics.median(walls):9.2f}")
    print("start-up: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in start.items()))
    if a.json:
        result = {"seconds_per_patient": statistics.median(walls), "stages": medians, "startup": start}
        a.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="drn")
    parser.add_argument("--map", default="bmap")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--patients", type=int, default=2)
    parser.add_argument("--data", type=Path, help="ACDC's training folder, instead of synthetic hearts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one repetition")
    main(parser.parse_args())
