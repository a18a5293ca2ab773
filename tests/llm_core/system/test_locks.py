"""Only one process at a time writes to a folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_core.system import held, preparing

_HOLDER = """
import sys, time
from pathlib import Path
from llm_core.system import held
with held(Path(sys.argv[1]), print):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> "subprocess.Popen[str]":
    """A process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    process = hold(tmp_path)
    yield process
    process.kill()
    process.wait()


def test_a_second_process_logs_the_id_of_the_first_and_waits(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    messages: list[str] = []

    def release(text: str) -> None:
        messages.append(text)
        assert holder.poll() is None
        assert holder.stdin is not None
        holder.stdin.close()

    with preparing(tmp_path, release):
        assert messages == [f"{tmp_path}: process {holder.pid} is changing the prepared data; waiting for it"]
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_on_busy_may_raise_instead_of_waiting(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    def refuse(pid: str) -> None:
        raise RuntimeError(pid)

    with pytest.raises(RuntimeError, match=str(holder.pid)), held(tmp_path, refuse):
        pytest.fail("two processes hold one lock")


def test_a_killed_process_releases_the_lock(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(tmp_path, lambda pid: pytest.fail(f"{pid} still holds the lock")):
        pass


def test_a_child_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with held(tmp_path, pytest.fail):
        sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with held(tmp_path, pytest.fail):
            pass
    finally:
        sleeper.kill()
        sleeper.wait()


def test_an_interrupt_ends_the_wait(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    def interrupt(pid: str) -> None:
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -INT {os.getpid()}"])

    with pytest.raises(KeyboardInterrupt), held(tmp_path, interrupt):
        pytest.fail("two processes hold one lock")
    assert holder.poll() is None
