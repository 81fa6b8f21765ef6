import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
from seats import PIPELINE, write_predictions


@pytest.fixture
def predictions(tmp_path):
    return write_predictions(tmp_path)


@pytest.fixture
def serve():
    """Start the command as a user does; gives the process and the address that it printed."""

    @contextmanager
    def started(predictions, output, *options):
        command = [sys.executable, PIPELINE, "review", "--predictions", predictions, "--output", output]
        process = subprocess.Popen(
            [*map(str, command), "--reviewer", "Dr A", "--no_browser", *options],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            for line in process.stdout:
                if match := re.search(r"http://\S+", line):
                    yield process, match[0]
                    return
            pytest.fail("the server gave no address")
        finally:
            process.kill()
            process.wait()

    return started
