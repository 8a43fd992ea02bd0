"""Memory that is kept is not asked for again."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

WORK = """
import resource, sys
{first}
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    torch.ones(6 * 2**20) + torch.ones(6 * 2**20)  # 24 MiB each
for _ in range(10):
    use()
before = faults()
for _ in range(5):
    use()
print(faults() - before)
"""
KEEP = "from genflow.native.allocator import keep_freed_memory; keep_freed_memory()"


def faults(first: str) -> int:
    plain = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's own, which it moves as it goes
    words = [sys.executable, "-c", WORK.format(first=first)]
    out = subprocess.run(words, capture_output=True, text=True, check=True, env=plain)
    return int(out.stdout)


@pytest.mark.skipif(platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_large_tensors_are_made_of_memory_that_the_process_has():
    assert faults(KEEP) < 100 < 1000 < faults("")


def test_elsewhere_nothing_happens(monkeypatch):
    from genflow.native.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("the C library was loaded"))
    keep_freed_memory()
