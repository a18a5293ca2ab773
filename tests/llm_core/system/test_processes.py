"""Memory, garbage collection, and processes that end with their parent."""

import gc
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from llm_core.system import infrequent_garbage_collection

# Prints the page faults of a large tensor after others of its size have been freed.
_ALLOCATE = """
import resource, sys
import torch
from llm_core.system import processes
if sys.argv[1] == "keep":
    processes.keep_freed_memory()
for _ in range(10):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# Waits for input in place of loading modules, and only then asks to end with its parent.
_CHILD = """
import sys
from llm_core.system import processes
print("loading", flush=True)
sys.stdin.readline()
processes.die_with_parent()
print("asked", flush=True)
sys.stdin.read()
"""
# Prints the id of the child that it starts.
_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""


def start() -> tuple["subprocess.Popen[str]", psutil.Process]:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (pid,) = lines - {"loading"}
    return parent, psutil.Process(int(pid))


def ended(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_process_ends_when_its_parent_is_killed() -> None:
    parent, child = start()
    assert parent.stdin is not None and parent.stdout is not None
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "asked\n"
    parent.send_signal(signal.SIGKILL)
    assert ended(child)


def test_a_process_whose_parent_died_earlier_ends_immediately() -> None:
    parent, child = start()
    assert parent.stdin is not None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert ended(child), "the orphan is still running"
    parent.stdin.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_kept_memory_is_reused_without_page_faults() -> None:
    def pages(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", _ALLOCATE, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    tensor = 64 * 1024 * 1024 // 4096
    assert pages("return") > tensor / 2
    assert pages("keep") < tensor / 100


def test_the_garbage_collection_threshold_is_restored() -> None:
    before = gc.get_threshold()
    with suppress(LookupError), infrequent_garbage_collection():
        assert gc.get_threshold()[0] > before[0] > 0
        raise LookupError
    assert gc.get_threshold() == before
