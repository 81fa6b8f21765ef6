"""The benchmarks start, on sizes that take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def start(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_growth_measures_a_run():
    seconds, peak = map(
        float, start("growth.py", "--network", "drn", "--cpu_time", "--once", "1", "1", "64", "1").split()
    )
    assert seconds > 0 and 0.1 < peak < 4


@pytest.mark.parametrize("script", ["growth.py", "mc_inference.py"])
def test_benchmarks_explain_themselves(script):
    assert "--json" in start(script, "--help")
