"""The parts of the run over a cohort: names and manifests, stores, and workers whose tasks compute nothing."""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from cardiac_qc_plugin.data.inputs import find_scans, input_files
from cardiac_qc_plugin.data.phantom import ShortAxisPhantom, write_acdc_like, write_phantom
from cardiac_qc_plugin.workflows.cohort.engine import causes, cohort_files
from cardiac_qc_plugin.workflows.cohort.journal import Journal
from cardiac_qc_plugin.workflows.cohort.pool import Cluster, Died, WorkerPool, first_line
from cardiac_qc_plugin.workflows.cohort.store import FolderStore, UrlStore, open_store
from cardiac_qc_plugin.workflows.files import OutputError, write_json, write_text
from cardiac_qc_plugin.workflows.reproduction.on_ray import carry_out_on_ray
from cardiac_qc_plugin.workflows.reproduction.stages import Budget, BudgetSpent, Stage

os.environ.setdefault("RAY_worker_niceness", "0")
TINY = ShortAxisPhantom(shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0))


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.db")
    yield journal
    journal.close()


def test_names_are_those_of_find_scans(journal, tmp_path):
    write_acdc_like(tmp_path / "in", 2, shape=(16, 16), n_slices=2, spacing=(10.0, 10.0, 30.0), n_frames=3)
    for folder in ("one", "two"):
        write_phantom(tmp_path / "in" / folder, "heart", TINY, phases={"ed": 0.0}, with_labels=False)
    journal.add_files(input_files(tmp_path / "in"))
    scans = find_scans(tmp_path / "in")
    assert [(name, Path(path)) for _, name, path in journal.files()] == [(scan.case, scan.path) for scan in scans]
    assert {"one_heart_ed", "two_heart_ed"} < {scan.case for scan in scans}


def test_a_heart_lies_in_one_folder(journal, tmp_path):
    """Two patients' end-diastole and end-systole of one name are no pair; a manifest's word holds."""
    (tmp_path / "list.csv").write_text("image,case\nP1/sax_ed.nii,\nP2/sax_es.nii,\nP3/la_ed.nii,\nP3/la_es.nii,\n")
    with open(tmp_path / "list.csv", "a") as stream:
        stream.write("ED/p1_ed.nii,\nES/p1_es.nii,\n")
    names = ["P1_sax_ed", "P2_sax_es", "la_ed", "la_es", "p1_ed", "p1_es"]
    (tmp_path / "P1").mkdir()
    (tmp_path / "P1" / "sax_ed.nii").touch()
    journal.add_files(input_files(tmp_path / "list.csv"))
    assert [name for _, name, _ in journal.files()] == names
    assert [scan.case for scan in find_scans(tmp_path / "list.csv")] == names
    (tmp_path / "list.csv").write_text("image,case\nP1/sax_ed.nii,a_ed\nP2/sax_es.nii,a_es\n")
    assert [scan.case for scan in find_scans(tmp_path / "list.csv")] == ["a_ed", "a_es"]


@pytest.mark.parametrize("files", [("A/x/p_ed.nii", "B/x/p_es.nii"), ("A/p_ed.nii", "B/p_ed.nii", "C/B_p_es.nii")])
def test_folders_that_would_make_one_heart_are_refused(files, tmp_path):
    """Where the folder's name does not tell two patients apart either; both engines name the files."""
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    one, other = files[-2:]
    message = rf"^{tmp_path}/{one} and {tmp_path}/{other} lie in different folders, and would be one heart, '._p'"
    with pytest.raises(ValueError, match=message):
        find_scans(tmp_path)
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(ValueError, match=message):
        journal.add_files(input_files(tmp_path))
    journal.close()
    (tmp_path / "list.csv").write_text(f"image,case\n{one},\n{other},q_es\n")  # the manifest's word holds
    assert len(find_scans(tmp_path / "list.csv")) == 2
    (tmp_path / "list.csv").write_text("image\nA/x/p_ed.nii\nB/../A/x/p_es.nii\n")  # one folder
    (tmp_path / "A" / "x").mkdir(exist_ok=True)
    (tmp_path / "A/x/p_ed.nii").touch()
    assert [scan.case for scan in find_scans(tmp_path / "list.csv")] == ["p_ed", "p_es"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_of_dicom_files_renames_no_scan_in_it(journal, tmp_path, scheme):
    """Not those named like the folder either; and what an interrupted run left in the output is no scan."""
    folder = tmp_path / "p01"
    (folder / "out" / "p02").mkdir(parents=True)
    for name in ("p01.nii.gz", "p01_ed.nii.gz", "p01_es.nii.gz", "out/p02/image.nii.gz"):
        (folder / name).touch()
    (folder / "image").write_bytes(bytes(128) + b"DICM")
    journal.add_files(cohort_files(folder, None, None, open_store(f"{scheme}{folder}/out")))
    cases = [scan.case for scan in find_scans(folder, output=folder / "out")]
    assert [name for _, name, _ in journal.files()][1:] == cases == ["p01", "p01_ed", "p01_es"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_manifest(tmp_path, suffix):
    """Paths are relative to the manifest; a given name stays, others come from the file."""
    items = [{"image": "a/x.nii.gz", "case": "", "fold": 0}, {"image": "b/y.nii", "case": "named", "fold": 1}]
    path = tmp_path / f"list.{suffix}"
    if suffix == "csv":
        path.write_text("image,case,fold,age\na/x.nii.gz,,0,50\nb/y.nii,named,1,60\n")
    else:
        pa = pytest.importorskip("pyarrow")
        pa.parquet = pytest.importorskip("pyarrow.parquet")
        pa.parquet.write_table(pa.Table.from_pylist(items), path)
    files = list(input_files(path))
    assert [(file.path, file.name) for file in files] == [
        (tmp_path / "a/x.nii.gz", "x"),
        (tmp_path / "b/y.nii", "named"),
    ]
    assert [file.name for file in input_files(path, "/data", fold=1)] == ["named"]
    with pytest.raises(ValueError, match="no item in fold 7"):
        list(input_files(path, fold=7))


def test_manifest_without_images(tmp_path):
    (tmp_path / "list.csv").write_text("file\na.nii\n")
    with pytest.raises(ValueError, match=r"list\.csv: item 1 has no 'image', only \['file'\]\. This"):
        list(input_files(tmp_path / "list.csv"))
    (tmp_path / "list.csv").write_text("image;case\na.nii;b,c\n")  # a spreadsheet's separator, and a cell too many
    with pytest.raises(ValueError, match=r"list\.csv: item 1 has no 'image', only \['None', 'image;case'\]\. This"):
        list(input_files(tmp_path / "list.csv"))


def test_doubled_names_of_a_manifest(journal, tmp_path):
    (tmp_path / "list.csv").write_text("image,case\na.nii,same\nb.nii,same\n")
    with pytest.raises(ValueError, match="the case 'same'"):
        journal.add_files(input_files(tmp_path / "list.csv"))
    with pytest.raises(ValueError, match="the case 'same'"):
        find_scans(tmp_path / "list.csv")


def test_datalist_in_pieces(tmp_path):
    """A long datalist is read the same in pieces as at once, whatever lies between its lists."""
    lists = {
        "description": "[",
        "labels": {"0": "]"},
        "empty": [],
        "a": [{"image": f"{i:04}.nii"} for i in range(2000)],
    }
    lists["b"] = ["last.nii", {"image": 'quo"te.nii', "meta": {"x": [1, [2]]}}]
    (tmp_path / "list.json").write_text(json.dumps(lists, indent=1))
    names = [file.name for file in input_files(tmp_path / "list.json")]
    assert names == [f"{i:04}" for i in range(2000)] + ["last", 'quo"te']


def test_worklist_puts_the_most_urgent_first(journal):
    """Equal urgencies keep their order; where some cases have no samples, the failing regions decide."""

    def add(number, case, **scores):
        row = {"case": case, "heart": f"heart of {case}", "status": "done", **scores}
        journal.add_case(number, 0, row, {"case": case, "status": "done", "urgency": scores["urgency"]})

    add(3, "c", urgency=0.2, region_failure=1.0, sample_disagreement=0.2)
    add(1, "a", urgency=0.2, region_failure=3.0, sample_disagreement=0.2)
    add(2, "b", urgency=0.9, region_failure=2.0, sample_disagreement=0.9)
    journal.add_case(4, 0, {"case": "d", "status": "failed", "message": "no"}, {"case": "d", "status": "failed"})
    assert [(row["rank"], row["case"]) for row in journal.worklist()] == [(1, "d"), (2, "b"), (3, "a"), (4, "c")]
    add(5, "e", urgency=7.0, region_failure=2.5)
    assert [row["case"] for row in journal.worklist()] == ["d", "a", "e", "b", "c"]
    assert journal.most_urgent(1) == [("a", None, 3.0)]  # a heart that this run did not measure is none
    journal.add_heart(1, True, {"case": "heart of a"})
    assert journal.most_urgent(2) == [("a", "heart of a", 3.0), ("e", None, 2.5)]


def test_what_failed_comes_first_and_by_name(journal):
    """As on one machine, where a cine's own failure comes after those of all phases."""
    for number, (case, status) in enumerate((("z", "failed"), ("m", "done"), ("a", "quarantined")), start=1):
        row = {"case": case, "status": status, "message": f"{case} broke", "urgency": 0.1}
        journal.add_case(number, 0, row, row)
    assert [row["case"] for row in journal.worklist()] == ["a", "z", "m"]
    assert [row["case"] for row, _ in journal.rows()] == ["a", "z", "m"]
    assert list(journal.failures()) == [("a", "a broke"), ("z", "z broke")]


def test_causes_are_counted():
    failures = [(f"c{n}", f"/data/c{n}.nii.gz: voxel size {n} mm is not positive.") for n in range(7)]
    lines = causes([*failures, ("x", "/data/x.nii: no such file.")])
    assert lines[0] == "  7 x voxel size N mm is not positive." and lines[6] == "    and 2 more, see the worklist"
    assert lines[7:] == ["  1 x no such file.", "    x: /data/x.nii: no such file."]


def test_store_in_memory_writes_records_last(monkeypatch):
    pytest.importorskip("fsspec")
    store = open_store("memory://records")
    with store.working("case") as root:
        write_json(root / "case" / "qc.json", {"made": 1})
        for name in ("a", "b"):
            write_text(root / "case" / name, name)
    assert store.read_json("case/qc.json") == {"made": 1} and store.read_json("other/qc.json") is None
    done = []
    for name in ("put_file", "rm_file"):
        original = getattr(store.fs, name)

        def note(*paths, original=original, name=name):
            done.append((name, paths[-1].rpartition("/")[2]))
            return original(*paths)

        monkeypatch.setattr(store.fs, name, note)
    with store.working("case") as root:
        write_json(root / "case" / "qc.json", {"made": 2})
        write_text(root / "case" / "a", "new")
        (root / "case" / "b").unlink()
    assert done == [("rm_file", "qc.json"), ("rm_file", "b"), ("put_file", "a"), ("put_file", "qc.json")]
    with store.working("case") as root:
        assert {path.name: path.read_text() for path in (root / "case").iterdir() if path.name == "a"} == {"a": "new"}
    assert len(done) == 4  # nothing changed


@pytest.mark.parametrize("content", [b'{"made": ', b"[1]", b"\xff\xfe"])
def test_a_damaged_record_is_named_by_every_store(content, tmp_path):
    """Cut short, no object, no text; it is not the store's fault, so it is no OutputError, which would stop the run."""
    pytest.importorskip("fsspec")
    for store in (open_store("memory://damaged"), open_store(tmp_path / "store")):
        store.write("case/qc.json", lambda path: path.write_bytes(content))
        with pytest.raises(ValueError, match=rf"^{store}/case/qc\.json: cannot be read as JSON .*remove it"):
            store.read_json("case/qc.json")


def test_store_without_atomic_writes_renames(tmp_path):
    """A file system that shows files while they are written, such as SFTP; here the local one."""
    pytest.importorskip("fsspec")
    store = UrlStore(f"local://{tmp_path}/store")
    with store.working("case") as root:
        write_json(root / "case" / "qc.json", {"made": 1})
    store.write("top.json", lambda path: write_json(path, []))
    assert store.read_json("case/qc.json") == {"made": 1}
    assert sorted(path.name for path in (tmp_path / "store").rglob("*") if path.is_file()) == ["qc.json", "top.json"]


def test_store_that_cannot_be_reached(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    with pytest.raises(ValueError, match="nowhere://x: .*nowhere"):
        open_store("nowhere://x")
    store = open_store("memory://gone")

    def refuse(*arguments, **options):
        raise TimeoutError("no answer")

    monkeypatch.setattr(fsspec.filesystem("memory"), "put_file", refuse)
    with pytest.raises(OutputError, match=r"cannot reach memory://gone/case/qc\.json: TimeoutError: no answer"):
        with store.working("case") as root:
            write_json(root / "case" / "qc.json", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write .*file/out"):
        open_store(tmp_path / "file" / "out")
    assert isinstance(open_store(f"file://{tmp_path}/out"), FolderStore)


def unsteady():
    """A worker that notes its tasks in a file; some kill it, once or always, and one raises."""
    import ray

    def work(task):
        kind, log = task
        node = ray.get_runtime_context().get_node_id()
        before = Path(log).read_text().count("\n") if Path(log).is_file() else 0
        with open(log, "a") as stream:
            stream.write(f"{node}\n")
        if kind == "raises":
            raise KeyError("no such entry")
        time.sleep(0.05)
        if kind == "poison" or (kind == "unlucky" and before == 0):
            os.kill(os.getpid(), 9)
        return kind

    return work


@pytest.fixture(scope="module")
def nodes():
    """Three nodes with a CPU each."""
    ray = pytest.importorskip("ray", reason="pip install 'cardiac-qc-plugin[cluster]'")
    from ray.cluster_utils import Cluster as Nodes

    head = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20}  # Ray takes our word for the GPU
    nodes = Nodes(initialize_head=True, head_node_args=head)
    for _ in range(2):
        nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
    ray.init(address=nodes.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def test_workers_and_a_node_die(nodes, tmp_path):
    """Every task ends once; one whose worker died is tried on another node; as many are taken as there are workers."""
    import ray

    kinds = ["sound"] * 60
    kinds[5], kinds[17], kinds[40] = "unlucky", "raises", "poison"
    taken, ended, deaths = [], {}, []

    def tasks():
        for number, kind in enumerate(kinds):
            taken.append(number)
            yield number, (kind, str(tmp_path / f"{number}.log"))

    def retry(number, died):
        deaths.append((number, died.node))
        return [one for one, _ in deaths].count(number) < 3

    pool = WorkerPool(ray, unsteady, Cluster())
    assert len(pool.workers) == 3
    for number, result in pool.each(tasks(), retry):
        assert number not in ended
        ended[number] = result
        assert len(taken) - len(ended) <= 3
        if len(ended) == 20:
            used = {worker.node for worker in pool.workers}
            lost = next(node for node in nodes.worker_nodes if node.node_id in used)
            nodes.remove_node(lost, allow_graceful=False)
    pool.close()
    assert sorted(ended) == list(range(60))
    assert isinstance(ended[17], KeyError) and isinstance(ended[40], Died)
    assert {number for number, result in ended.items() if result == "sound"} == set(range(60)) - {5, 17, 40}
    assert ended[5] == "unlucky"
    tried = (tmp_path / "5.log").read_text().split()
    assert len(tried) >= 2 and tried[0] != tried[1]
    assert "exit" in ended[40].reason and "\n" not in ended[40].reason


def test_reason_of_a_broken_connection(nodes):
    """Ray may say at first that a dead worker is unavailable; the reason is what it says when it knows."""
    import ray

    def die():
        return lambda task: os.kill(os.getpid(), 9)

    pool = WorkerPool(ray, die, Cluster(workers=1))
    (worker,) = pool.workers
    ray.get(worker.actor.load.remote(pool.make))
    broken = ray.exceptions.ActorUnavailableError("Socket closed", None)
    assert pool.death(worker, broken) is broken  # it lives: only the connection broke
    worker.actor.do.remote(None)
    assert "exit" in first_line(pool.death(worker, broken))
    pool.close()


def test_workers_that_cannot_load(nodes):
    import ray

    def fail():
        raise ValueError("no such bundle")

    def die():
        os.kill(os.getpid(), 9)

    for make, error in ((fail, (ValueError, "no such bundle")), (die, (RuntimeError, "Workers die while they load"))):
        pool = WorkerPool(ray, make, Cluster(workers=1))
        with pytest.raises(error[0], match=error[1]):
            list(pool.each([(0, None)], lambda number, died: True))
        pool.close()
    for share, workers in ((1, 1), (0.5, 2)):
        pool = WorkerPool(ray, fail, Cluster(gpus=share))
        assert len(pool.workers) == workers
        pool.close()
    with pytest.raises(ValueError, match="A worker wants 64 CPU"):
        WorkerPool(ray, fail, Cluster(cpus=64))


def note(number, stage, budget):
    """A stage's work: when it ran, and after what."""
    if number == "bad":
        raise ValueError("no heart in this scan")
    if number == "long":
        raise BudgetSpent("half done")
    start = time.time()
    time.sleep(0.5)
    (stage.folder / "result").write_text(json.dumps([start, time.time()]))


def test_stages_side_by_side_and_after_what_they_need(nodes, tmp_path):
    def stage(name, *needs):
        return Stage(tmp_path, name, {}, partial(note, name), ("result",), needs, {"kind": "correct"})

    a, b, bad, long = stage("a"), stage("b"), stage("bad"), stage("long")
    last, after = stage("last", a, b), stage("after", bad)
    stages = [last, after, a, b, bad, long]
    progress = carry_out_on_ray(stages, Budget(), Cluster())
    assert sorted(progress.carried_out) == ["a", "b", "last"] and progress.failures == {"bad": "no heart in this scan"}
    assert sorted(progress.remaining) == ["after", "long"]
    times = {one.name: json.loads((one.folder / "result").read_text()) for one in (a, b, last)}
    assert times["last"][0] >= max(times["a"][1], times["b"][1])
    again = carry_out_on_ray(stages, Budget(1e-9), Cluster())
    assert sorted(again.skipped) == ["a", "b", "last"] and len(again.remaining) == 3
