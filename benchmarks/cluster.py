"""Runs over cohorts on a Ray cluster: failures, throughput, overhead and memory, on synthetic hearts.

    python benchmarks/cluster.py failures --scans 300 --poison 5
    python benchmarks/cluster.py throughput --scans 60
    python benchmarks/cluster.py memory --rows 300 30000

The networks are the dilated CNN and the detector with random weights, and the scans phantoms of 48 x 56 pixels and
three slices: what is measured is the engine, not the networks. `memory` uses a stub that does no inference at all: it
copies one real case for every row of a manifest. All nodes are processes of the machine that runs this.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("RAY_worker_niceness", "0")  # as the local engine, to compare
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "workflows"))


def write_scans(folder, scans, poison=0):
    """Phantoms as pairs of end-diastole and end-systole, of which some are poisoned, evenly spread."""
    import nibabel as nib
    import numpy as np
    from tiny_bundles import POISON

    from cardiac_qc_plugin.data.phantom import write_acdc_like

    write_acdc_like(folder, (scans + 1) // 2, shape=(48, 56), n_slices=3)
    files = sorted(file for file in folder.glob("*/*.nii.gz") if "_gt" not in file.name)[:scans]
    chosen = files[scans // (2 * poison) :: scans // poison][:poison] if poison else []
    for file in chosen:
        image = nib.load(file)
        voxels = np.asarray(image.dataobj).copy()
        voxels[3, 4, 1] = POISON
        nib.save(nib.Nifti1Image(voxels, None, image.header), file)
    return files, {file.name.removesuffix(".nii.gz") for file in chosen}


def write_manifest(path, files):
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image"])
        writer.writerows([file] for file in files)


def nodes_of(count):
    """A Ray cluster of nodes with one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    others = [nodes.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(count - 1)]
    ray.init(address=nodes.address, log_to_driver=False)
    return nodes, others


def reporting(make, folder):
    """Load a worker that leaves its process's number and node in a folder."""
    import ray

    folder.mkdir(exist_ok=True)
    (folder / f"{os.getpid()}_{ray.get_runtime_context().get_node_id()}").touch()
    return make()


def living(folder):
    """Process number and node of the workers that live, by `reporting`."""
    found = [path.name.split("_") for path in folder.iterdir()]
    return [(int(pid), node) for pid, node in found if Path(f"/proc/{pid}").exists()]


def records(output):
    """Bytes of every file of the cases and hearts; of records, the content without times.

    Without their pages: these say where a case stands in the worklist, which has more cases with the poisoned ones.
    """
    found = {}
    for path in output.glob("*/**/*"):
        if path.name == "report.html":
            continue
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            for stage in record.get("stages", {}).values():
                stage.pop("seconds")
            found[path.relative_to(output)] = record
        elif path.is_file():
            found[path.relative_to(output)] = path.read_bytes()
    return found


def done(output):
    return len(list(output.glob("*/qc.json")))


def failures(root, scans, poison):
    """A node and a worker are killed in mid-run, and some scans kill their worker; compared with the local engine."""
    import ray
    from tiny_bundles import write_bundles

    from cardiac_qc_plugin.data.inputs import find_scans
    from cardiac_qc_plugin.workflows.cohort.engine import CohortWorker, run_cohort
    from cardiac_qc_plugin.workflows.cohort.pool import Cluster
    from cardiac_qc_plugin.workflows.run import load_predictors, run

    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    bundles = write_bundles(root / "bundles", poisonable=True)
    files, poisoned = write_scans(root / "data", scans, poison)
    load = partial(load_predictors, "dn", "bmap", 2, "all", "cpu", bundles)
    nodes, others = nodes_of(3)
    output, killed = root / "ray", []

    def kill():
        while done(output) < scans // 4:
            time.sleep(0.2)
        used = {node for _, node in living(root / "pids")}
        nodes.remove_node(next(node for node in others if node.node_id in used), allow_graceful=False)
        killed.append(f"node with a worker at {done(output)} cases")
        while done(output) < scans // 2:
            time.sleep(0.2)
        os.kill(living(root / "pids")[0][0], 9)
        killed.append(f"worker at {done(output)} cases")

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    start = time.perf_counter()
    make = partial(reporting, partial(CohortWorker, str(output), load), root / "pids")
    outcome = run_cohort(root / "data", output, make, Cluster(workers=2), tries=3)
    seconds = time.perf_counter() - start
    thread.join()
    print(outcome.text)
    again = time.perf_counter()
    second = run_cohort(root / "data", output, make, Cluster(workers=2), tries=3)
    again = time.perf_counter() - again
    ray.shutdown()
    nodes.shutdown()
    local = [scan for scan in find_scans(root / "data") if scan.case not in poisoned]
    start = time.perf_counter()
    run(local, root / "local", *load()[0])
    ours, theirs = records(output), records(root / "local")
    with open(output / "worklist.csv", newline="") as stream:
        rows = [row["case"] for row in csv.DictReader(stream)]
    result = {
        "scans": len(files),
        "killed": killed,
        "done": done(output),
        "quarantined": sorted(outcome.failures),
        "quarantined_are_the_poisoned": set(outcome.failures) == poisoned,
        "rows_of_the_worklist": len(rows),
        "rows_doubled": len(rows) - len(set(rows)),
        "files_equal_to_the_local_engines": ours == theirs,
        "files": len(ours),
        "files_that_differ": [str(name) for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)],
        "seconds": round(seconds, 1),
        "seconds_of_a_second_run": round(again, 1),
        "second_run_equal": second.failures == outcome.failures and records(output) == theirs,
        "seconds_of_the_local_engine": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result, indent=2))


def throughput(root, scans):
    """One worker, two workers, two workers, one worker; and the local engine with one thread."""
    import torch
    from tiny_bundles import write_bundles

    from cardiac_qc_plugin.data.inputs import find_scans
    from cardiac_qc_plugin.workflows.cohort.engine import CohortWorker, Run
    from cardiac_qc_plugin.workflows.cohort.pool import Cluster
    from cardiac_qc_plugin.workflows.run import load_predictors, run

    bundles = write_bundles(root / "bundles")
    write_scans(root / "data", scans)
    load = partial(load_predictors, "dn", "bmap", 2, "all", "cpu", bundles)
    nodes, _ = nodes_of(2)
    rates = {1: [], 2: []}
    for workers in (1, 2, 2, 1):
        output = root / f"ray{workers}_{len(rates[workers])}"
        rates[workers].append(
            scans
            / timed_run(root / "data", output, partial(CohortWorker, str(output), load), Cluster(workers=workers), Run)
        )
    import ray

    ray.shutdown()
    nodes.shutdown()
    torch.set_num_threads(1)
    models = load()[0]
    start = time.perf_counter()
    run(find_scans(root / "data"), root / "local", *models)
    local = scans / (time.perf_counter() - start)
    best = {workers: max(values) for workers, values in rates.items()}
    print(
        json.dumps(
            {
                "scans": scans,
                "scans_per_second": rates,
                "ratio_of_best": round(best[2] / best[1], 2),
                "local_one_thread": local,
                "load": os.getloadavg(),
            },
            indent=2,
        )
    )


def timed_run(source, output, make, cluster, run_class):
    """Seconds from the moment when all workers have loaded."""
    from cardiac_qc_plugin.data.inputs import input_files
    from cardiac_qc_plugin.workflows.cohort.engine import Deaths
    from cardiac_qc_plugin.workflows.cohort.journal import Journal
    from cardiac_qc_plugin.workflows.cohort.pool import WorkerPool, connected
    from cardiac_qc_plugin.workflows.cohort.store import open_store

    store = open_store(output)
    journal = Journal(output / "journal.db")
    journal.add_files(input_files(source))
    with connected(cluster) as ray:
        pool = WorkerPool(ray, make, cluster)
        ray.wait(list(pool.events), num_returns=len(pool.events))
        start = time.perf_counter()
        run_class(store, journal, Deaths(store, 3)).carry_out(pool)
        seconds = time.perf_counter() - start
        pool.close()
    return seconds


class Stub:
    """Copies the files of one real case, under each case's name; no inference.

    Args:
        output: where results go.
        folder: of the real case.
        record: its ``qc.json``, without flagged regions.
    """

    def __init__(self, output, folder, record):
        self.output, self.folder, self.record = output, folder, record

    def __call__(self, task):
        from cardiac_qc_plugin.workflows.files import write_json
        from cardiac_qc_plugin.workflows.run import worklist_row
        from cardiac_qc_plugin.workflows.table import case_row

        name, _ = task
        qc = {**self.record, "case": name}
        shutil.copytree(self.folder, self.output / name)
        write_json(self.output / name / "qc.json", qc)
        return {"cases": [(case_row(qc), worklist_row(qc))], "failures": [], "hearts": [], "skipped": []}


def memory(root, rows):
    """Peak memory of the driver, which is a process of its own, for manifests of some lengths."""
    from tiny_bundles import write_bundles

    from cardiac_qc_plugin.data.inputs import find_scans
    from cardiac_qc_plugin.workflows.run import load_predictors, run

    bundles = write_bundles(root / "bundles")
    write_scans(root / "data", 2)
    models, _ = load_predictors("dn", "bmap", 2, "all", "cpu", bundles)
    qc = run(find_scans(root / "data")[:1], root / "one", *models)[0]
    qc["detection"] |= {"regions": [], "flagged_slices": []}
    (root / "record.json").write_text(json.dumps(qc))
    for count in rows:
        command = [sys.executable, __file__, "driver", "--root", str(root), "--rows", str(count)]
        print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def driver(root, rows):
    """One driver of `memory`."""
    import ray

    from cardiac_qc_plugin.workflows.cohort.engine import run_cohort
    from cardiac_qc_plugin.workflows.cohort.pool import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    output, manifest = root / f"rows{rows}", root / f"rows{rows}.csv"
    write_manifest(manifest, (f"case{number:06d}.nii.gz" for number in range(rows)))
    start = time.perf_counter()
    record = json.loads((root / "record.json").read_text())
    run_cohort(manifest, output, partial(Stub, output, root / "one" / record["case"], record), Cluster(workers=2))
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    seconds = time.perf_counter() - start
    print(json.dumps({"rows": rows, "driver_peak_mib": round(peak, 1), "seconds": round(seconds, 1)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, options in {
        "failures": {"--scans": 300, "--poison": 5},
        "throughput": {"--scans": 60},
        "memory": {"--rows": [300, 30000]},
        "driver": {"--rows": 300},
    }.items():
        command = commands.add_parser(name)
        command.add_argument("--root", type=Path, help="folder for everything, instead of a temporary one")
        for option, default in options.items():
            command.add_argument(option, type=int, default=default, nargs="+" if isinstance(default, list) else None)
    arguments = vars(parser.parse_args())
    work, root = globals()[arguments.pop("command")], arguments.pop("root")
    temporary = Path(tempfile.mkdtemp()) if root is None else root
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        work(temporary, **arguments)
    finally:
        if root is None:
            shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
