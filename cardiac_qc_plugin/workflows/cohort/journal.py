"""What a run over a cohort has to remember, on disk, so that memory does not grow with the cohort."""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.data.inputs import InputFile, heart_of, two_homes

__all__ = ["Journal"]

SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
CREATE TABLE files (
    id INTEGER PRIMARY KEY, name TEXT, heart TEXT, other_name TEXT, other_heart TEXT, given INTEGER, folder TEXT,
    path TEXT
);
CREATE TABLE cases (
    file INTEGER, number INTEGER, name TEXT, heart TEXT, role TEXT, status TEXT, message TEXT,
    row TEXT, worklist TEXT, urgency REAL, region_failure REAL, sampled INTEGER,
    PRIMARY KEY (file, number)
);
CREATE TABLE hearts (name TEXT PRIMARY KEY, file INTEGER, is_pair INTEGER, row TEXT);
"""
FAILED_BY_NAME = "CASE WHEN status != 'done' THEN cases.name END, CASE WHEN status != 'done' THEN message END"
DOUBLED = "SELECT name FROM files GROUP BY name HAVING COUNT(*) > 1"
SCATTERED = "SELECT heart FROM files GROUP BY heart HAVING COUNT(DISTINCT folder) > 1"


class Journal:
    """The files of a cohort, and what became of them, in order; SQLite does the sorting.

    It is made anew in every run: what is done is told by the results themselves.

    Args:
        path: a file that is not there yet.
    """

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.executescript(SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def add_files(self, files: Iterable[InputFile]) -> None:
        """Take in what there is to process; names are those of :func:`~cardiac_qc_plugin.data.inputs.find_scans`.

        Raises:
            ValueError: if two files would give the same case, or files of different folders the same heart.
        """
        rows = (
            (
                *(file.name, file.heart, file.name_with_folder, heart_of(file.name_with_folder)),
                *(file.case is not None, str(file.home), os.path.realpath(file.path)),
            )
            for file in files
        )
        self.db.executemany("INSERT INTO files VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
        self.db.execute(  # by one list of all: a second one would be made of rows that are changed already
            f"""UPDATE files SET name = other_name, heart = other_heart WHERE id IN
                (SELECT id FROM files WHERE name IN ({DOUBLED}) OR heart IN ({SCATTERED}))"""
        )
        if doubled := self.db.execute(f"{DOUBLED} LIMIT 1").fetchone():
            raise ValueError(f"Several files would give the case '{doubled[0]}'. Rename them.")
        found = self.db.execute(
            """SELECT heart, MIN(path), MAX(path) FROM files WHERE NOT given
               GROUP BY heart HAVING COUNT(DISTINCT folder) > 1 LIMIT 1"""
        )
        if scattered := found.fetchone():
            raise two_homes(*scattered)

    def count(self, table: str, where: str = "1") -> int:
        """Rows of a table."""
        return self.db.execute(f"SELECT COUNT(*) FROM {table} WHERE {where}").fetchone()[0]

    def files(self) -> Iterator[tuple[int, str, str]]:
        """Number, name and path of every file; rows may be added meanwhile."""
        last = 0
        while rows := self.db.execute("SELECT id, name, path FROM files WHERE id > ? LIMIT 500", (last,)).fetchall():
            yield from rows
            last = rows[-1][0]

    def add_case(self, file: int, number: int, row: dict[str, Any], worklist: dict[str, Any] | None) -> None:
        """Keep a case's row of the table, and of the worklist where there is one."""
        names = ("case", "heart", "role", "status", "message")
        scores = (row.get("urgency"), row.get("region_failure"), "sample_disagreement" in row)
        values = (file, number, *(row.get(name) for name in names), json.dumps(row), json.dumps(worklist), *scores)
        self.db.execute(f"INSERT OR REPLACE INTO cases VALUES ({', '.join('?' * len(values))})", values)

    def repeated(self) -> list[str]:
        """Names of cases that several files gave."""
        return [name for (name,) in self.db.execute("SELECT name FROM cases GROUP BY name HAVING COUNT(*) > 1")]

    def add_heart(self, file: int, is_pair: bool, row: dict[str, Any]) -> None:
        """Keep a heart's line of ``indices.csv``."""
        self.db.execute(
            "INSERT OR REPLACE INTO hearts VALUES (?, ?, ?, ?)", (row["case"], file, is_pair, json.dumps(row))
        )

    def pairs(self) -> Iterator[tuple[int, str, list[str]]]:
        """Hearts of which end-diastole and end-systole are single scans: first file, name, and cases."""
        found = self.db.execute(
            """SELECT MIN(file), heart, json_group_array(name) FROM
               (SELECT * FROM cases WHERE status = 'done' AND role IS NOT NULL ORDER BY heart, file)
               GROUP BY heart HAVING COUNT(DISTINCT role) = 2 ORDER BY MIN(file)"""
        )
        return ((file, heart, json.loads(cases)) for file, heart, cases in found)

    def rows(self) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """The table, what failed first: each case's row, and its heart's line."""
        found = self.db.execute(
            f"""SELECT cases.row, hearts.row FROM cases LEFT JOIN hearts ON cases.heart = hearts.name
               ORDER BY cases.status = 'done', {FAILED_BY_NAME}, cases.file, cases.number"""
        )
        return ((json.loads(row), heart and json.loads(heart)) for row, heart in found)

    def indices(self) -> Iterator[dict[str, Any]]:
        """Lines of ``indices.csv``: cines, then pairs."""
        found = self.db.execute("SELECT row FROM hearts ORDER BY is_pair, file")
        return (json.loads(row) for (row,) in found)

    @property
    def urgency(self) -> str:
        """The column by which cases are ordered: with samples of some cases only, the failing regions."""
        mixed = self.count("(SELECT DISTINCT sampled FROM cases WHERE status = 'done')") > 1
        return "region_failure" if mixed else "urgency"

    def worklist(self) -> Iterator[dict[str, Any]]:
        """Rows of the worklist: what failed, then the others, the most urgent first."""
        found = self.db.execute(
            f"""SELECT worklist, status, {self.urgency} FROM cases
                ORDER BY status = 'done', {FAILED_BY_NAME}, {self.urgency} DESC, file, number"""
        )
        for rank, (row, status, urgency) in enumerate(found, start=1):
            chosen = {"urgency": round(urgency, 4)} if status == "done" else {}
            yield {"rank": rank, **json.loads(row), **chosen}

    def failures(self) -> Iterator[tuple[str, str]]:
        """Case and message of what failed, by name."""
        found = "SELECT name, message FROM cases WHERE status != 'done' ORDER BY name, message"
        return iter(self.db.execute(found))

    def most_urgent(self, limit: int) -> list[tuple[str, str | None, float]]:
        """Case, heart if it was measured, and urgency of so many cases, in the order of the input."""
        return self.db.execute(
            f"""SELECT cases.name, hearts.name, {self.urgency} FROM cases LEFT JOIN hearts ON cases.heart = hearts.name
                WHERE cases.rowid IN
                (SELECT rowid FROM cases WHERE status = 'done' ORDER BY {self.urgency} DESC LIMIT ?)
                ORDER BY cases.file, cases.number""",
            (limit,),
        ).fetchall()
