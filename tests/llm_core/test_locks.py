"""One process at a time writes to a folder."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_core.locks import held, preparing

_HOLDER = """
import sys, time
from pathlib import Path
from llm_core.locks import held
with held(Path(sys.argv[1]), print):
    print("has it", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> "subprocess.Popen[str]":
    """A process that has the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    process = hold(tmp_path)
    yield process
    process.kill()
    process.wait()


def test_who_comes_second_is_told_of_the_process_and_waits(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    told: list[str] = []

    def release(text: str) -> None:
        told.append(text)
        assert holder.poll() is None
        assert holder.stdin is not None
        holder.stdin.close()

    with preparing(tmp_path, release):
        assert told == [f"{tmp_path}: process {holder.pid} is changing the prepared data; waiting for it"]
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_who_does_not_want_to_wait_raises(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    def refuse(pid: str) -> None:
        raise RuntimeError(pid)

    with pytest.raises(RuntimeError, match=str(holder.pid)), held(tmp_path, refuse):
        pytest.fail("two processes have one folder")


def test_a_killed_process_gives_the_folder_back(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(tmp_path, lambda pid: pytest.fail(f"{pid} still has it")):
        pass


def test_a_program_that_is_started_meanwhile_does_not_hold_it_too(tmp_path: Path) -> None:
    with held(tmp_path, pytest.fail):
        sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with held(tmp_path, pytest.fail):
            pass
    finally:
        sleeper.kill()
        sleeper.wait()


def test_an_interrupt_ends_the_waiting(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    def interrupt(pid: str) -> None:
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -INT {os.getpid()}"])

    with pytest.raises(KeyboardInterrupt), held(tmp_path, interrupt):
        pytest.fail("two processes have one folder")
    assert holder.poll() is None
