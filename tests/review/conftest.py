import multiprocessing
import os
import re
import runpy
import sys
from contextlib import contextmanager

import pytest
from seats import PIPELINE, write_predictions


@pytest.fixture
def predictions(tmp_path):
    return write_predictions(tmp_path)


@pytest.fixture
def serve():
    """Start the command in a fork, which need not import anew; gives the process and the address that it printed."""

    @contextmanager
    def started(predictions, output, *options):
        places = ("--predictions", predictions, "--output", output)
        arguments = list(map(str, (PIPELINE, "review", *places, "--reviewer", "Dr A", "--no_browser", *options)))
        read, write = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=run_command, args=(arguments, write))
        process.start()
        os.close(write)
        try:
            with open(read) as lines:
                for line in lines:
                    if match := re.search(r"http://\S+", line):
                        yield process, match[0]
                        return
                pytest.fail("the server gave no address")
        finally:
            process.kill()
            process.join()

    return started


def run_command(arguments, output):
    sys.argv = arguments
    sys.stdout = open(output, "w")  # which keeps back what is not flushed, as a pipe of the command does
    runpy.run_path(arguments[0], run_name="__main__")
