"""Where the results of a cohort go: a folder that all workers share, or an object store."""

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..files import OutputError, file_sha256, parse_json, read_json, write_file
from ..run import OF_ALL_CASES

__all__ = ["FolderStore", "Store", "UrlStore", "open_store"]

RECORDS = ("qc.json", "cine.json", "dicom.json")  # a case or heart counts as done by its record, which is written last
PUT_IS_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "memory"}


class FolderStore:
    """A folder on a file system that all nodes mount.

    Args:
        folder: made if it is not there.

    Raises:
        OutputError: if it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(error.errno, f"cannot write {folder}: {error.strerror}") from error

    def __str__(self) -> str:
        return str(self.folder)

    def read_json(self, name: str) -> Any:
        """Content of a JSON object's file, None where there is none; ValueError where it is damaged."""
        return read_json(self.folder / name) if (self.folder / name).is_file() else None

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file by a function of a path; it appears when it is complete."""
        write_file(self.folder / name, write)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def working(self, name: str) -> Iterator[Path]:
        """A folder in which `name` has what is stored under it, and what is changed below it is stored."""
        yield self.folder


class UrlStore:
    """A file system of fsspec, such as S3.

    Credentials and endpoints are fsspec's own settings (its configuration files, ``FSSPEC_...``, or those of the
    service), on every node.

    Args:
        url: such as ``s3://bucket/prefix``.

    Raises:
        ValueError: if fsspec does not know the protocol, or lacks a package for it.
        OutputError: if it cannot be reached, or written.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ValueError("A URL needs fsspec: pip install 'cardiac-qc-plugin[cluster]'") from error
        self.url = url.rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{url}: {error}") from error
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.atomic = bool(protocols & PUT_IS_ATOMIC)
        with self.reaching(""):
            self.fs.makedirs(self.root, exist_ok=True)
            probe = f"{self.root}/.part-{secrets.token_hex(4)}"
            self.fs.pipe_file(probe, b"probe")  # a missing bucket or permission shows before hours of work
            self.fs.rm_file(probe)

    def __str__(self) -> str:
        return self.url

    @contextlib.contextmanager
    def reaching(self, name: str) -> Iterator[None]:
        """What goes wrong inside is an `OutputError` that names the store."""
        try:
            yield
        except Exception as error:  # each service has its own errors
            cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise OutputError(f"cannot reach {self.url}/{name}: {cause}") from error

    def read_json(self, name: str) -> Any:
        """Content of a JSON object's file, None where there is none; ValueError where it is damaged."""
        with self.reaching(name):
            try:
                content = self.fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None
        return parse_json(lambda: content, f"{self.url}/{name}")

    def put(self, path: Path, name: str) -> None:
        """Store a file; a reader sees the old one or the new one."""
        target = f"{self.root}/{name}"
        with self.reaching(name):
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            if self.atomic:
                self.fs.put_file(str(path), target)
            else:
                part = f"{target.rpartition('/')[0]}/.part-{secrets.token_hex(4)}-{path.name}"
                self.fs.put_file(str(path), part)
                self.fs.mv(part, target)

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file by a function of a path; it appears when it is complete."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            write_file(path, write)
            self.put(path, name)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self.reaching(name), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")

    @contextlib.contextmanager
    def working(self, name: str) -> Iterator[Path]:
        """A folder in which `name` has what is stored under it, and what is changed below it is stored.

        Records are removed first and written last, so whoever reads the store meanwhile sees no record without its
        files. An empty file stands for each that is of all cases: where it is removed, the store's is.
        """
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            with self.reaching(name):
                self.fs.invalidate_cache()
                if self.fs.exists(f"{self.root}/{name}"):
                    (root / name).mkdir(parents=True)
                    self.fs.get(f"{self.root}/{name}/", f"{root / name}/", recursive=True)
                    for file in OF_ALL_CASES:
                        if self.fs.exists(f"{self.root}/{file}"):
                            (root / file).touch()
            before = versions(root)
            yield root
            after = versions(root)
            changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
            for file in sorted(changed & before.keys(), key=lambda file: file.name not in RECORDS):
                if file.name in RECORDS or file not in after:
                    self.remove(file.as_posix())
            for file in sorted(changed & after.keys(), key=lambda file: (file.name in RECORDS, file)):
                self.put(root / file, file.as_posix())


Store = FolderStore | UrlStore


def versions(root: Path) -> dict[Path, str]:
    """Files below a folder, and a digest of each."""
    return {file.relative_to(root): file_sha256(file) for file in root.rglob("*") if file.is_file()}


def open_store(output: str | Path) -> Store:
    """The store behind a folder or URL."""
    text = str(output)
    if text.startswith("file://"):
        return FolderStore(Path(text.removeprefix("file://")))
    return UrlStore(text) if "://" in text else FolderStore(Path(text).resolve())
