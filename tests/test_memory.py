"""What is free below something that is in use goes back to the system, where the system can."""

import ctypes
import subprocess
import sys

import pytest

from grasp.model import memory

FREED = """
from pathlib import Path
import torch
from grasp.model import memory

def held():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024

del (mapped := [torch.ones(2**22)])[:]  # from now on what is smaller is of the heap
large, small = [], []
for _ in range(200):
    large.append(torch.ones(2**18))
    small.append(torch.ones(2**12))
large.clear()
before = held()
memory.give_back()
print(before - held())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_what_is_free_goes_back():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150  # MiB, of 200


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_elsewhere_nothing_is_done(monkeypatch, error):
    def missing(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", missing)
    memory.give_back()
