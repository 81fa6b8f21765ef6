"""The run over a cohort on a Ray cluster of two nodes: its files are the local run's, whatever dies meanwhile."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny_bundles import POISON, write_bundles

from cardiac_qc_plugin.data.inputs import InputFile, find_scans
from cardiac_qc_plugin.data.phantom import write_acdc_like, write_phantom
from cardiac_qc_plugin.workflows.files import OutputError, read_json, write_text
from cardiac_qc_plugin.workflows.run import CaseFailures, load_predictors, run
from cardiac_qc_plugin.workflows.table import table

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray gives its workers little time on a busy machine
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # and ends them when others have its memory
ray = pytest.importorskip("ray", reason="pip install 'cardiac-qc-plugin[cluster]'")

from cardiac_qc_plugin.workflows.cohort.engine import (  # noqa: E402
    CohortWorker,
    Deaths,
    Run,
    cohort_files,
    run_cohort,
)
from cardiac_qc_plugin.workflows.cohort.journal import Journal  # noqa: E402
from cardiac_qc_plugin.workflows.cohort.pool import Cluster  # noqa: E402
from cardiac_qc_plugin.workflows.cohort.store import open_store  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "data"))
from dicom_files import PHASES, cine, write  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a CPU each."""
    from ray.cluster_utils import Cluster as Nodes

    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args=node)
    nodes.add_node(**{key: value for key, value in node.items() if key != "include_dashboard"})
    ray.init(address=nodes.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
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
    """Bytes of every file of the cases and hearts but their pages, which link to each other; of records, the content
    without times."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        if path.is_file() and path.name != "report.html" and (len(name.parts) > 1 or name.name == "indices.csv"):
            found[name.as_posix()] = path.read_bytes() if path.suffix != ".json" else timeless(read_json(path))
    return found


def timeless(record):
    for stage in record.get("stages", {}).values():
        stage.pop("seconds")
    return record


def rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def on_a_full_disk(make):
    """A worker on a node whose disk is full."""
    original = nib.Nifti1Image.to_filename

    def full(image, path, **options):
        if "bayesian" in str(path):
            raise OSError(28, "No space left on device")
        original(image, path, **options)

    nib.Nifti1Image.to_filename = full
    return make()


@pytest.fixture(scope="module")
def finished(world, cluster, tmp_path_factory):
    """A run on a full disk, and the same once more; output and summary."""
    output = tmp_path_factory.mktemp("ray")
    make = partial(on_a_full_disk, partial(CohortWorker, str(output), loader(world)))
    with pytest.raises(OutputError, match=r"cannot write .*/bayesian\.nii\.gz: No space left on device"):
        run_cohort(world / "data", output, make, Cluster(workers=1))
    assert not (output / "worklist.csv").exists()
    return output, ray_run(world, output, cluster, tries=2)


def test_same_files_as_the_local_engine(finished, local):
    """Byte for byte, though a worker died over the poison twice."""
    output, outcome = finished
    assert contents(output) == contents(local)
    ours, theirs = rows(output / "worklist.csv"), rows(local / "worklist.csv")
    assert [{**row, "rank": ""} for row in ours if row["case"] != "poison"] == [{**row, "rank": ""} for row in theirs]
    assert len(ours) == len({row["case"] for row in ours}) == 15  # 10 scans, 3 phases, 2 failures


def test_poison_is_named_and_the_report_made(finished):
    output, outcome = finished
    assert set(outcome.failures) == {"poison", "text"}
    assert "poison.nii.gz: quarantined, its worker died 2 time(s)" in outcome.failures["poison"]
    assert "13 case(s) done, 2 failed." in outcome.text
    assert "1 x not a NIfTI image, or a damaged one" in outcome.text and "1 x quarantined" in outcome.text
    page = (output / "report.html").read_text()
    assert "patient005_frame11" in page and "poison" in page


def test_a_rerun_does_what_is_missing(finished, world, cluster, local):
    """Nothing done is done again; the poison is not tried again until its file is replaced."""
    output, outcome = finished
    (output / "patient002_frame11" / "bayesian.nii.gz").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/**/*.nii.gz")}
    again = ray_run(world, output, Cluster(workers=1), tries=2)
    assert again.failures == outcome.failures
    after = {path: path.stat().st_mtime_ns for path in output.glob("*/**/*.nii.gz")}
    changed = {path.parent.name for path, when in after.items() if before.get(path) != when}
    assert changed == {"patient002_frame11"} and contents(output) == contents(local)
    assert len(read_json(output / "quarantine.json")["poison"]["deaths"]) == 2


def test_table_by_duckdb_and_pandas(finished, local):
    """The table has the numbers of the records; `table` makes the same from the folder."""
    duckdb, pd = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    output, _ = finished
    query = f"SELECT heart, lv_edv_ml FROM '{output}/cases.parquet' WHERE role = 'ED' ORDER BY heart"
    found = dict(duckdb.sql(query).fetchall())
    assert found.keys() >= {f"patient00{number}" for number in range(1, 6)}
    for heart, volume in found.items():
        assert volume == read_json(output / heart / "cine.json")["indices"]["lv_edv_ml"]
    frame = pd.read_parquet(output / "cases.parquet").set_index("case")
    assert frame.loc["poison", "status"] == "quarantined" and frame.loc["text", "status"] == "failed"
    for case in ("patient003_frame01", "cine/phase01"):
        qc, row = read_json(output / case / "qc.json"), frame.loc[case]
        assert row["LV_volume_ml"] == qc["segmentation"]["volume_ml"]["LV"]
        assert row["regions_flagged"] == len(qc["detection"]["regions"])
        assert row["torch_version"] == qc["versions"]["torch"]
        assert row["segmentation_seconds"] == qc["stages"]["segmentation"]["seconds"]
    assert list(frame.loc[["cine/phase00", "cine/phase01", "cine/phase02"], "phase"]) == [0, 1, 2]
    for folder in (output, local):
        made = pd.read_parquet(folder / "cases.parquet").set_index("case").sort_index()
        table(folder)
        again = pd.read_parquet(folder / "cases.parquet").set_index("case").sort_index()
        pd.testing.assert_frame_equal(made, again)


def test_a_url_gets_the_same_files(world, local):
    """The worker itself, on an object store in memory; a second time it stores nothing."""
    import fsspec

    store = fsspec.filesystem("memory")
    work = CohortWorker("memory://cohort", loader(world))
    tasks = [(f"patient001_frame{n}", world / f"data/patient001/patient001_frame{n}.nii.gz") for n in ("01", "11")]
    tasks += [("cine", world / "data/cine.nii.gz"), ("patient001", ["patient001_frame01", "patient001_frame11"])]
    for task in tasks:
        work(task)
    names = [name for name in store.find("/cohort") if not name.endswith("report.html")]
    found = {name.removeprefix("/cohort/"): store.cat(name) for name in names}
    expected = {name: value for name, value in contents(local).items() if name.startswith(("patient001", "cine"))}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (timeless(json.loads(found[name])) if name.endswith(".json") else found[name]) == value
    modified = {name: store.modified(name) for name in store.find("/cohort")}
    work(tasks[0]), work(tasks[2])
    assert {name: store.modified(name) for name in store.find("/cohort")} == modified


@pytest.mark.parametrize("scheme", ["memory://invalidated", ""])
def test_what_is_of_all_cases_goes_with_a_detection(world, tmp_path, scheme):
    """From a folder and from an object store, when a case is only segmented anew; a skipped case takes nothing away."""
    output = scheme or str(tmp_path)
    task = ("patient001_frame01", world / "data/patient001/patient001_frame01.nii.gz")
    work = CohortWorker(output, loader(world))
    work(task)
    names = ("worklist.csv", "report.html", "cases.parquet", "mine.csv")
    for name in names:
        work.store.write(name, lambda path: path.write_text("of the first run"))
    there = work.store.fs.exists if scheme else os.path.exists
    root = work.store.root if scheme else output

    def found():
        return [name for name in names if there(f"{root}/{name}")]

    work(task)
    assert len(found()) == 4
    (segmenter, _), _ = load_predictors("dn", "bmap", 3, "all", "cpu", world / "bundles")
    made = CohortWorker(output, lambda: ((segmenter, None), None))(task)
    assert not made["failures"] and found() == ["mine.csv"]


def test_a_given_phase_that_one_cine_lacks(world, tmp_path):
    """Its phases are done, and the cine is named; by a worker, which sees no other cine, as by the local engine."""
    cine = nib.load(world / "data" / "cine.nii.gz")
    nib.save(cine.slicer[..., :2], tmp_path / "short.nii.gz")
    scans = find_scans(tmp_path / "short.nii.gz") + find_scans(world / "data" / "cine.nii.gz")
    models, _ = loader(world)()
    with pytest.raises(CaseFailures) as caught:
        run(scans, tmp_path / "local", *models, given=(2, 1))
    work = CohortWorker(
        str(tmp_path / "ray"), partial(load_predictors, "dn", "bmap", 2, "all", "cpu", world / "bundles"), (2, 1)
    )
    made = work(("short", tmp_path / "short.nii.gz"))
    work(("cine", world / "data" / "cine.nii.gz"))
    assert made["failures"] == caught.value.failures and "there is no phase 2 among its 2" in made["failures"][0][1]
    assert [row["case"] for row, _ in made["cases"]] == ["short/phase00", "short/phase01"]
    expected = contents(tmp_path / "local")
    expected.pop("indices.csv", None)
    assert contents(tmp_path / "ray") == expected


def test_a_row_may_name_a_folder_of_dicom_files(world, tmp_path):
    file = write(tmp_path / "in" / "study", cine())[3]
    write_text(tmp_path / "in" / "empty" / "notes.txt", "")
    work = CohortWorker(str(tmp_path / "out"), loader(world), dicom={"name_by": "folder"})
    made = work(("study", tmp_path / "in" / "study"))
    assert not made["failures"]
    assert [row["case"] for row, _ in made["cases"]] == [f"study_series7/phase{t:02d}" for t in range(PHASES)]
    assert [row["case"] for row in made["hearts"]] == ["study_series7"] and not made["skipped"]
    file.write_bytes(file.read_bytes()[:-20])
    assert [case for case, _ in work(("study", tmp_path / "in" / "study"))["failures"]] == ["study_series7"]
    assert not list((tmp_path / "out").rglob("segmentation.nii.gz")) + list((tmp_path / "out").rglob("cine.json"))
    with pytest.raises(ValueError, match="empty: no short-axis cine among its 0 DICOM files"):
        work(("empty", tmp_path / "in" / "empty"))
    with pytest.raises(ValueError, match="need a folder as output, memory://dicom is none"):
        CohortWorker("memory://dicom", loader(world))(("study", tmp_path / "in" / "study"))


def test_dicom_files_of_a_folder_are_a_task_of_their_own(world, tmp_path, monkeypatch):
    """And what is no short-axis cine among them is told at the end."""
    study = tmp_path / "study"
    write(study / "cine", cine())
    other = {"SeriesInstanceUID": "1.2.9", "SOPInstanceUID": "1.2.9.1", "SeriesNumber": 9}
    write(study / "single", cine(lambda z, t: other, phases=1, slices=1))
    file = world / "data" / "patient001" / "patient001_frame01.nii.gz"
    (study / file.name).write_bytes(file.read_bytes())
    store = open_store(f"file://{tmp_path}/out")
    assert [one.path for one in cohort_files(study, None, None, store)] == [study, study / file.name]
    (study / file.name).unlink()
    assert [one.path for one in cohort_files(study, None, None, store)] == [study]
    image = next((study / "cine").iterdir())
    assert [one.path for one in cohort_files(image, None, None, store)] == [image]
    with pytest.raises(ValueError, match="no such file"):
        list(cohort_files(tmp_path / "none", None, None, store))
    made = CohortWorker(str(tmp_path / "out"), loader(world))(("study", study))
    assert len(made["cases"]) == PHASES and [item.images for item in made["skipped"]] == [1]
    journal = Journal(tmp_path / "journal.db")
    journal.add_files([InputFile(study)])
    run = Run(store, journal, Deaths(store, 1))
    run.keep(*next(journal.files()), made)
    assert "Skipped:\n  series 9" in run.finish().text
    assert "9" in (tmp_path / "out" / "skipped_series.csv").read_text()
    page = tmp_path / "out" / "report.html"
    assert "series 9" in page.read_text() and "less urgent" not in page.read_text()
    monkeypatch.setattr("cardiac_qc_plugin.workflows.cohort.engine.REPORT_CASES", 3)
    run.finish()
    assert f"{PHASES - 3} less urgent cases: worklist.csv has all." in page.read_text()


def complete(output):
    """Records of finished cases, and when they were written."""
    records = {path: read_json(path) for path in output.glob("*/qc.json")}
    return {path: path.stat().st_mtime_ns for path, record in records.items() if "scores" in record}


def test_stopped_in_the_middle_it_goes_on(world, local, tmp_path):
    """What a user types, with a Ray cluster of its own; SIGTERM is what Slurm and Kubernetes send."""
    manifest = tmp_path / "manifest.csv"
    files = sorted((world / "data").glob("*/*_frame??.nii.gz"))
    manifest.write_text("image\n" + "".join(f"{file}\n" for file in files))
    output = tmp_path / "out"
    words = {"input": manifest, "output": output, "model": "dn", "samples": 2, "device": "cpu", "engine": "ray"}
    words |= {"sample_phases": "ed_es", "workers": 1, "bundle_dir": world / "bundles"}
    arguments = [sys.executable, ROOT / "scripts/pipeline.py", "run"]
    arguments += [str(word) for key, value in words.items() for word in (f"--{key}", value)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        limit = time.monotonic() + 200
        while not complete(output) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Run the same command again" in errors, errors
    before = complete(output)
    assert 0 < len(before) < 10
    work = CohortWorker(str(output), loader(world))
    for file in files:
        work((file.name[:-7], file))
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    expected = {name: value for name, value in contents(local).items() if "_frame" in name}
    assert contents(output) == expected
