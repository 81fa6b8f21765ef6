"""The benchmarks start, on sizes that take seconds."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_growth_measures_a_run():
    arguments = ("--network", "drn", "--cpu_time", "--once", "1", "1", "64", "1")
    command = [sys.executable, str(BENCHMARKS / "growth.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    seconds, peak = map(float, done.stdout.split())
    assert seconds > 0 and 0.1 < peak < 4


@pytest.mark.parametrize("script", ["growth.py", "mc_inference.py"])
def test_benchmarks_explain_themselves(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert "--json" in capsys.readouterr().out
