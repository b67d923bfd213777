# SPDX-License-Identifier: Apache-2.0
import platform
import subprocess
import sys

import pytest

from modeling_moma.utils.hardware import keep_freed_memory


# pages that 64 MiB ask for, again and again
SCRIPT = """
import resource, sys, torch
from modeling_moma.utils.hardware import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is another's")


def run(monkeypatch, argument: str, **environment) -> tuple[str, int]:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", SCRIPT, argument]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return answer[0], int(answer[1])


@needs_glibc
def test_freed_memory_is_taken_again(monkeypatch):
    # unless pages are huge
    assert run(monkeypatch, "plain")[1] > 50
    kept, pages = run(monkeypatch, "keep")
    assert kept == "True" and pages < 50


@needs_glibc
def test_what_the_environment_sets_stays(monkeypatch):
    assert run(monkeypatch, "keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
