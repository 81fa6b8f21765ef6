"""The run over a cohort on a Ray cluster: its files are those of the run on one machine."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cardiac_qc_plugin.data.dicom import dicom_files
from cardiac_qc_plugin.data.inputs import READERS, InputFile, check_list_options, folder_files, input_files, phases
from cardiac_qc_plugin.reports import write_report

from ..calibrate import write_operating_curve
from ..cine import Given, choose_phases, group_cines, table_row, write_cines
from ..files import OutputError, check_readable, write_csv, write_json
from ..import_dicom import Inputs, Skipped, import_dicom, write_skipped
from ..references import Outcome
from ..run import Predictors, failed_row, forget, process, worklist_row
from ..table import TABLE, case_row, failed_case_row, with_heart, write_table
from .journal import Journal
from .pool import Cluster, Died, Work, WorkerPool, connected
from .store import FolderStore, Store, open_store

__all__ = ["CohortWorker", "run_cohort"]

REPORT_CASES = 1000  # on the report's page, the most urgent
DEATHS = "quarantine.json"
Load = Callable[[], tuple[Predictors, Predictors | None]]


class CohortWorker:
    """What a worker does: all phases of a file, or the indices of a pair of end-diastole and end-systole.

    Args:
        output: where results go, a folder or URL.
        load: loads the bundles, see :func:`~cardiac_qc_plugin.workflows.run.load_predictors`.
        given: phases of end-diastole and end-systole of all cines.
        dicom: settings of :func:`~cardiac_qc_plugin.workflows.import_dicom.import_dicom`.
    """

    def __init__(
        self, output: str, load: Load, given: Given = (None, None), dicom: Mapping[str, Any] | None = None
    ) -> None:
        self.store = open_store(output)
        self.predictors, self.preview = load()
        self.given, self.dicom = given, dicom or {}

    def __call__(self, task: tuple[str, Path | list[str]]) -> dict[str, Any]:
        """The cases of a file, or the heart of these cases.

        Returns:
            ``cases``: rows of the table and of the worklist; ``failures``: (case, reason); ``hearts``: lines of
            ``indices.csv``; ``skipped``: series that are no short-axis cine.

        Raises:
            OutputError: if a result cannot be stored.
        """
        name, what = task
        with self.store.working(name) as root:
            if isinstance(what, list):
                return {"hearts": self.pair(root, what)}
            return self.file(root, name, what)

    def file(self, root: Path, name: str, path: Path) -> dict[str, Any]:
        """All phases of a file, or of a folder of DICOM files, whose cases have names of their own."""
        dicom = path.is_dir() or dicom_files(path)
        inputs = self.from_dicom(root, path) if dicom else Inputs(phases(name, path))
        scans, failures = inputs.scans, inputs.failures
        for case, _ in failures:
            forget(root, case)
        cases, broken, records = process(scans, root, self.predictors, self.preview, self.given)
        detects = self.predictors[1] is not None
        rows = [(case_row(qc), worklist_row(qc) if detects else None) for qc in cases]
        hearts = [table_row(one) for one in records]
        return {"cases": rows, "failures": [*failures, *broken], "hearts": hearts, "skipped": inputs.skipped}

    def from_dicom(self, root: Path, path: Path) -> Inputs:
        """The short-axis cines of a DICOM file, or of a folder of them."""
        if not isinstance(self.store, FolderStore):
            raise ValueError(f"{path}: DICOM files need a folder as output, {self.store} is none.")
        if path.is_dir():
            check_readable(path)
        files = dicom_files(path)
        inputs = import_dicom(files, root, **self.dicom)
        if not inputs.scans and not inputs.failures:
            raise ValueError(f"{path}: no short-axis cine among its {len(files)} DICOM files.")
        return inputs

    def pair(self, root: Path, cases: list[str]) -> list[dict[str, Any]]:
        """The indices of a heart of which end-diastole and end-systole are single scans."""
        cines = group_cines([self.store.read_json(f"{case}/qc.json") for case in cases], root, self.given)
        return [table_row(record) for record in write_cines(cines, {one.name: choose_phases(one) for one in cines})]


class Deaths:
    """Inputs over which workers died, kept in the output: one that did it often is not tried again.

    Args:
        store: the output.
        tries: how often an input is tried.
    """

    def __init__(self, store: Store, tries: int) -> None:
        self.store, self.tries = store, tries
        self.record: dict[str, dict[str, Any]] = store.read_json(DEATHS) or {}

    def known(self, name: str, path: str) -> bool:
        """Whether an input was tried often enough, and has not been replaced since."""
        entry = self.record.get(name)
        return entry is not None and entry["input"] == stamp(path) and len(entry["deaths"]) >= self.tries

    def add(self, name: str, path: str, died: Died) -> bool:
        """Note a death; returns whether to try again."""
        entry = self.record.get(name)
        if entry is None or entry["input"] != stamp(path):
            entry = self.record[name] = {"input": stamp(path), "deaths": []}
        entry["deaths"].append(died._asdict())
        self.save()
        return len(entry["deaths"]) < self.tries

    def forget(self, name: str) -> None:
        """It was no fault of the input."""
        if self.record.pop(name, None):
            self.save()

    def save(self) -> None:
        """Keep the record, for a later run and for whoever looks into the files."""
        self.store.write(DEATHS, partial(write_json, data=self.record))

    def message(self, name: str, path: str) -> str:
        """What is said of a quarantined input."""
        deaths = self.record[name]["deaths"]
        reasons = "; ".join(dict.fromkeys(death["reason"] for death in deaths))
        return f"{path}: quarantined, its worker died {len(deaths)} time(s) ({reasons})."


def stamp(path: str) -> list[Any]:
    """What tells that a file was replaced."""
    try:
        stat = Path(path).stat()
    except OSError:
        return [path, None, None]
    return [path, stat.st_size, stat.st_mtime_ns]


class Run:
    """One run: what there is to do, what became of it, and how far it is.

    Args:
        store: the output.
        journal: with the files.
        deaths: inputs over which workers died before.
        curve: what each threshold catches, for the report.
    """

    def __init__(self, store: Store, journal: Journal, deaths: Deaths, curve: Mapping[str, Any] | None = None) -> None:
        self.store, self.journal, self.deaths, self.curve = store, journal, deaths, curve
        self.failed = 0
        self.skipped: list[Skipped] = []

    def carry_out(self, pool: WorkerPool) -> None:
        """Process all files, then the pairs among them."""
        self.under_way: dict[int, tuple[str, str]] = {}
        total = self.journal.count("files")
        form = "{desc}{n_fmt} of {total_fmt} files done{postfix}, {rate_fmt}, {remaining} left"
        with tqdm(total=total, unit="file", bar_format=form, mininterval=1, smoothing=0.1) as bar:
            for number, result in pool.each(self.tasks(bar), self.retry):
                self.keep(number, *self.under_way.pop(number), result)
                self.advance(bar)
        tries = Counter()

        def again(number: int, died: Died) -> bool:
            tries[number] += 1
            return tries[number] < self.deaths.tries

        pairs = ((file, (heart, cases)) for file, heart, cases in self.journal.pairs())
        for number, result in pool.each(pairs, again):
            if isinstance(result, Died):
                raise RuntimeError(f"Workers die while they write the indices of a heart: {result.reason}")
            if isinstance(result, Exception):
                raise result
            for row in result["hearts"]:
                self.journal.add_heart(number, True, row)

    def tasks(self, bar: tqdm) -> Iterator[tuple[int, tuple[str, Path]]]:
        """The files that are not quarantined, as the workers ask for them."""
        for number, name, path in self.journal.files():
            if self.deaths.known(name, path):
                self.quarantine(number, name, path)
                self.advance(bar)
                continue
            self.under_way[number] = name, path
            yield number, (name, Path(path))

    def retry(self, number: int, died: Died) -> bool:
        """A worker died over a file."""
        return self.deaths.add(*self.under_way[number], died)

    def keep(self, number: int, name: str, path: str, result: Any) -> None:
        """Note what became of a file."""
        if isinstance(result, OutputError):  # no other file could be written either
            raise result
        if isinstance(result, Died):
            return self.quarantine(number, name, path)
        self.deaths.forget(name)
        if isinstance(result, Exception):
            reason = str(result) if isinstance(result, ValueError) else f"{type(result).__name__}: {result}"
            result = {"cases": [], "failures": [(name, reason)], "hearts": [], "skipped": []}
        self.skipped += result["skipped"]
        for index, (row, worklist) in enumerate(result["cases"]):
            self.journal.add_case(number, index, row, worklist)
        for index, (case, reason) in enumerate(result["failures"], start=len(result["cases"])):
            self.journal.add_case(number, index, failed_case_row(case, reason), failed_row(case, reason))
        self.failed += bool(result["failures"])
        for row in result["hearts"]:
            self.journal.add_heart(number, False, row)

    def quarantine(self, number: int, name: str, path: str) -> None:
        """A file that is not tried again."""
        reason = self.deaths.message(name, path)
        self.journal.add_case(number, 0, failed_case_row(name, reason, "quarantined"), failed_row(name, reason))
        self.failed += 1

    def advance(self, bar: tqdm) -> None:
        """One file more on the bar."""
        if self.failed:
            bar.set_postfix_str(f"{self.failed} failed", refresh=False)
        bar.update()

    def finish(self) -> Outcome:
        """Write what covers all cases, and sum up."""
        journal, write = self.journal, self.store.write
        if journal.count("hearts"):
            write("indices.csv", partial(write_csv, rows=journal.indices))
        else:
            self.store.remove("indices.csv")  # of a run with others
        done = journal.count("cases", "status = 'done'")
        lines = [f"{done} case(s) done, {journal.count('cases') - done} failed."]
        lines += causes(journal.failures())
        repeated = {
            case: "several inputs are this case, and its files are those of one. Name each."
            for case in journal.repeated()
        }
        lines += [f"  {case}: {message}" for case, message in repeated.items()]
        if self.skipped:
            write("skipped_series.csv", partial(write_skipped, skipped=self.skipped))
            lines += ["Skipped:", *(f"  {item}" for item in self.skipped)]
        else:
            self.store.remove("skipped_series.csv")
        if not journal.count("cases", "worklist = 'null'"):  # with detection
            write("worklist.csv", partial(write_csv, rows=journal.worklist, last="message"))
            lines.append(f"Worklist: {self.store}/worklist.csv")
            if isinstance(self.store, FolderStore):
                self.report(self.store.folder)
                lines.append(f"Report:   {self.store}/report.html")
        write(TABLE, partial(write_table, rows=(with_heart(*pair) for pair in journal.rows())))
        lines.append(f"Table:    {self.store}/{TABLE}")
        return Outcome("\n".join(lines), repeated | dict(self.failures()))

    def failures(self) -> list[tuple[str, str]]:
        """Case and reason of what failed, as far as a page has room for it."""
        return list(islice(self.journal.failures(), REPORT_CASES))

    def report(self, folder: Path) -> None:
        """The page, of the most urgent cases."""
        write_operating_curve(folder, self.curve)
        chosen = self.journal.most_urgent(REPORT_CASES)
        cases = []
        for case, _, urgency in chosen:
            qc = self.store.read_json(f"{case}/qc.json")
            cases.append({**qc, "scores": {**qc["scores"], "urgency": urgency}})
        hearts = dict.fromkeys(heart for _, heart, _ in chosen)
        found = [self.store.read_json(f"{heart}/cine.json") for heart in hearts if heart]
        skipped = [str(item) for item in self.skipped]
        if (more := self.journal.count("cases") - len(cases) - len(self.failures())) > 0:
            skipped.append(f"{more} less urgent cases: worklist.csv has all. This page and its sums are of the others.")
        write_report(folder, cases, self.failures(), found, skipped)


def causes(failures: Iterable[tuple[str, str]]) -> list[str]:
    """Failures by cause, the most frequent first, with the cases of each; many are counted."""
    groups: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for case, message in failures:
        cause = re.sub(r"\d+(\.\d+)?", "N", re.sub(r"^\S*[/\\]\S*:\s|\(.*\)", "", message)).strip()
        counts[cause] = counts.get(cause, 0) + 1
        if len(groups.setdefault(cause, [])) < 5:
            groups[cause].append(f"    {case}: {message}")
    lines = []
    for cause in sorted(counts, key=lambda cause: -counts[cause]):
        more = counts[cause] - len(groups[cause])
        lines += [f"  {counts[cause]} x {cause}", *groups[cause]]
        lines += [f"    and {more} more, see the worklist"] if more else []
    return lines


def cohort_files(source: Path, root: str | Path | None, fold: int | None, store: Store) -> Iterator[InputFile]:
    """Files as :func:`~cardiac_qc_plugin.data.inputs.input_files` has them; a folder with DICOM files is one more."""
    if source.suffix in READERS or not dicom_files(source):
        yield from input_files(source, root, fold, str(store))
        return
    check_list_options(source, root, fold)
    yield InputFile(source, f"DICOM {source.resolve().name}")  # its cases get other names, so it is no file's heart
    if source.is_dir():
        yield from map(InputFile, folder_files(source, str(store)))


def run_cohort(
    source: str | Path,
    output: str | Path,
    make: Callable[[], Work],
    cluster: Cluster,
    tries: int = 3,
    root: str | Path | None = None,
    fold: int | None = None,
    curve: Mapping[str, Any] | None = None,
) -> Outcome:
    """Process a cohort on a Ray cluster.

    The files written are those of :func:`~cardiac_qc_plugin.workflows.run.run`, bit for bit on devices of one type,
    whatever the order; and a case that is done is skipped likewise. Memory does not grow with the cohort, except by the
    failures' causes and the 1,000 most urgent cases on the report's page.

    Args:
        source: see :func:`~cardiac_qc_plugin.data.inputs.input_files`; all nodes have to see these files.
        output: a folder that all nodes share, or an fsspec URL.
        make: returns a `CohortWorker`, once in each worker.
        cluster: where to compute.
        tries: after so many deaths of its worker an input is quarantined.
        root, fold: see :func:`~cardiac_qc_plugin.data.inputs.input_files`.
        curve: what each threshold catches, for the report's sliders.

    Returns:
        What was done; the failures are the first thousand at most.

    Raises:
        OutputError: if results cannot be stored; what was stored before is kept.
        ValueError: bad input, or a bundle that cannot be loaded.
        RuntimeError: if workers die before they have loaded.
    """
    if tries < 1:
        raise ValueError(f"--retries is 1 or more, got {tries}.")
    store = open_store(output)
    with tempfile.TemporaryDirectory(prefix="cardiac_qc_") as temporary:
        journal = Journal(Path(temporary) / "journal.db")
        journal.add_files(cohort_files(Path(source), root, fold, store))
        run = Run(store, journal, Deaths(store, tries), curve)
        with connected(cluster) as ray:
            pool = WorkerPool(ray, make, cluster)
            try:
                run.carry_out(pool)
            finally:
                pool.close()
        outcome = run.finish()
        journal.close()
    return outcome
