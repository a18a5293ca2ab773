"""A cancelled step first stops its training, whenever the interrupt arrives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.errors import UserError
from llm_core.system import held
from pipeline.processes import torchrun as launcher
from pipeline.processes.interrupts import postponed_interrupts
from pipeline.processes.torchrun import TorchrunProcess
from pipeline.processes.training import _wait_for_earlier_attempt
from tests.llm_core.system.test_locks import hold


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_delivered_at_the_end_of_the_block(number: signal.Signals) -> None:
    delivered: list[int] = []
    before = signal.signal(number, lambda number, frame: delivered.append(number))
    try:
        with postponed_interrupts() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert interrupted()
            assert delivered == []
        assert delivered == [number], "once, as if it arrived at the end of the block"
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("moment", ["start", "wait", "stop"])
def test_an_interrupt_at_any_moment_leaves_no_process(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    class Started(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: object) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(600)"], **options)  # type: ignore[call-overload]
            started.append(self)
            if moment == "start":
                interrupt()

        def wait(self, timeout: float | None = None) -> int:
            if moment == "stop" and timeout == 30:
                interrupt()
            return super().wait(timeout)

    monkeypatch.setattr(launcher.subprocess, "Popen", Started)
    process = TorchrunProcess([], dict(os.environ), tmp_path / "log", grace_seconds=30)

    def work() -> None:
        with process:
            if moment == "stop":
                raise RuntimeError("something else went wrong")
            for polls, _ in enumerate(process.wait(0.2)):
                assert polls < 100, "an interrupt ends the wait"
                if moment == "wait":
                    interrupt()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert [one.poll() for one in started] == [-signal.SIGTERM]


def test_a_folder_in_use_by_another_training_is_refused_after_a_while(tmp_path: Path) -> None:
    class Context:
        log = type("Log", (), {"info": staticmethod(print)})

    other = hold(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: process {other.pid} is training in this folder"):
        _wait_for_earlier_attempt(Context, tmp_path, seconds=0.5)  # type: ignore[arg-type]
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {other.pid}"])
    _wait_for_earlier_attempt(Context, tmp_path, seconds=60)  # type: ignore[arg-type]
    with held(tmp_path, pytest.fail):
        pass
    other.communicate()
