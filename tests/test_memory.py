import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cardiac_qc_plugin.memory import keep_memory

FAULTS = """
import resource
import torch
from cardiac_qc_plugin.memory import keep_memory

if {keep}:
    assert keep_memory()
for _ in range(10):
    torch.ones(16 << 20)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_large_buffers_are_used_again():
    """Otherwise each of the 50 costs page faults: 32 of 2 MiB, or 16,384 of 4 KiB."""
    faults = {}
    for keep in (False, True):
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        faults[keep] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults[True] < 300 < faults[False]


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_memory()
