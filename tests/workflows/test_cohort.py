"""The run over a cohort on a Ray cluster of two nodes: its files are the local run's, whatever dies meanwhile."""

import csv
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny_bundles import POISON, write_bundles

from cardiac_qc_plugin.data.inputs import find_scans
from cardiac_qc_plugin.data.phantom import write_acdc_like, write_phantom
from cardiac_qc_plugin.workflows.files import read_json
from cardiac_qc_plugin.workflows.run import CaseFailures, load_predictors, run

ray = pytest.importorskip("ray", reason="pip install 'cardiac-qc-plugin[cluster]'")

from cardiac_qc_plugin.workflows.cohort import Cluster, CohortWorker, run_cohort  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a CPU each."""
    from ray.cluster_utils import Cluster as Nodes

    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args=node)
    nodes.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
    ray.init(address=nodes.address, log_to_driver=False)
    yield Cluster(workers=2)
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five patients' pairs and a cine, a poison scan and a text file; and bundles that the poison kills."""
    root = tmp_path_factory.mktemp("world")
    write_bundles(root / "bundles", poisonable=True)
    write_acdc_like(root / "data", 5, shape=(48, 56), n_slices=2)
    write_cine(root / "data" / "cine.nii.gz")
    image = nib.load(root / "data" / "patient001" / "patient001_frame01.nii.gz")
    poisoned = np.asarray(image.dataobj).copy()
    poisoned[3, 4, 1] = POISON
    nib.save(nib.Nifti1Image(poisoned, image.affine, image.header), root / "data" / "poison.nii.gz")
    (root / "data" / "text.nii.gz").write_text("no image")
    return root


def write_cine(path):
    from cardiac_qc_plugin.data.phantom import ShortAxisPhantom

    phantom = ShortAxisPhantom(seed=1, shape=(48, 56), n_slices=2, spacing=(2.5, 2.5, 20.0))
    made = write_phantom(path.parent / "made", "cine", phantom, phases={}, cine_frames=3, with_labels=False)
    made["4d"].rename(path)


def loader(world):
    return partial(load_predictors, "dn", "bmap", 2, "ed_es", "cpu", world / "bundles")


def ray_run(world, output, cluster, source=None, **options):
    make = partial(CohortWorker, str(output), loader(world))
    return run_cohort(source or world / "data", output, make, cluster, **options)


@pytest.fixture(scope="module")
def local(world, tmp_path_factory):
    """What the local engine makes of all but the poison."""
    output = tmp_path_factory.mktemp("local")
    models, preview = loader(world)()
    scans = [scan for scan in find_scans(world / "data") if scan.case != "poison"]
    with pytest.raises(CaseFailures, match="1 case"):
        run(scans, output, *models, preview=preview)
    return output


def contents(output):
    """Bytes of every file of the cases and hearts; of records, the content without times."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        if path.is_file() and (len(name.parts) > 1 or name.name == "indices.csv"):
            found[name.as_posix()] = path.read_bytes() if path.suffix != ".json" else timeless(read_json(path))
    return found


def timeless(record):
    for stage in record.get("stages", {}).values():
        stage.pop("seconds")
    return record


def rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def finished(world, cluster, tmp_path_factory):
    """A run in which a worker is killed; output and summary."""
    output = tmp_path_factory.mktemp("ray")
    return output, ray_run(world, output, cluster, tries=2)


def test_same_files_as_the_local_engine(finished, local):
    output, outcome = finished
    assert contents(output) == contents(local)
    assert set(outcome.failures) == {"poison", "text"}
    ours, theirs = rows(output / "worklist.csv"), rows(local / "worklist.csv")
    assert [{**row, "rank": ""} for row in ours if row["case"] != "poison"] == [{**row, "rank": ""} for row in theirs]
    print(outcome.text)
