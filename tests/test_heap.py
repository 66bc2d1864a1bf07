"""Whether the memory that tensors have left goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from dyhead_zoo.engine import heap

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

if sys.argv[1] == "return":
    heap.return_large_blocks(2**22)
for _ in range(2):
    large = np.ones(2**21)  # 16 MB: the second comes from the heap, unless large blocks are returned
    above = np.ones(2**14)  # lies above it, so that the heap cannot shrink
    before = held()
    del large
print(before - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="about glibc")
@pytest.mark.parametrize("mode", ["return", "keep"])
def test_large_blocks_are_returned_if_asked_for(mode: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    assert (float(done.stdout) > 15) == (mode == "return")
