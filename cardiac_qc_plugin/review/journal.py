"""The journal of a case's review: one line per action, on the disk before the action counts."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from cardiac_qc_plugin.workflows.files import OutputError

__all__ = ["Journal"]


class Journal:
    """A file of JSON lines that only grows.

    A line counts when it is complete. What a killed process or a full disk left of a line is cut off by the next
    one, so the journal always holds a prefix of what was done.

    Args:
        path: the file; it need not exist.

    Raises:
        ValueError: a complete line is no JSON object; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.is_file() else b""
        self.size = content.rfind(b"\n") + 1
        try:
            self.events: list[dict[str, Any]] = [json.loads(line) for line in content[: self.size].splitlines()]
            if not all(isinstance(event, dict) for event in self.events):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise ValueError(f"{path}: a line is damaged ({error}). Move the file to review the case anew.") from error

    def is_current(self) -> bool:
        """Whether the file still holds these events: it can be moved away, or put back, under the server."""
        if not self.path.is_file():
            return self.size == 0
        with open(self.path, "rb") as stream:
            stream.seek(max(self.size - 1, 0))
            return stream.read(1) == b"\n" if self.size else b"\n" not in stream.read()

    def append(self, event: dict[str, Any]) -> None:
        """Add an event; it is on the disk when this returns.

        Raises:
            OutputError: the file cannot be written, the disk is full, or the file is not the one that was written
                before; the event does not count then.
        """
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        try:
            if not self.is_current():
                raise OSError(errno.ESTALE, "it was removed or changed under the server: open the case again")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
                stream.truncate(self.size)
                stream.seek(self.size)
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(error.errno, f"cannot write {self.path}: {error.strerror or error}") from error
        self.size += len(line)
        self.events.append(event)
