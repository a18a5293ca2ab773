"""Network interfaces and stop requests."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_core.distributed.launch import _RENDEZVOUS, _SAME_INTERRUPT, _store_on_this_machine, interface_to
from llm_core.errors import UserError
from tests.support.names import WORST_NAME


def test_the_interface_is_the_one_that_the_host_is_reached_through() -> None:
    assert interface_to("127.0.0.1") in ("lo", "lo0")


def test_an_unreachable_first_machine_is_reported_by_name() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR nowhere\.invalid: cannot be reached .* --master_addr"):
        interface_to("nowhere.invalid")


def test_the_ranks_of_one_machine_meet_in_a_folder_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "lo")
    folder = tmp_path / WORST_NAME
    folder.mkdir()
    store = _store_on_this_machine(folder, world_size=1)
    store.set("rank", "0")
    assert [path.parent for path in tmp_path.rglob(_RENDEZVOUS)] == [folder]


ENDLESS_STEP = """
import time
from llm_core.distributed.launch import StopRequest

with StopRequest() as stop:
    print("in a step", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked to stop", flush=True)
    for _ in range(6000):  # one long sleep would miss the second of two signals that arrive together
        time.sleep(0.01)
"""


def test_a_second_ctrl_c_does_not_wait_for_the_step_unless_it_follows_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDLESS_STEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked to stop\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(_SAME_INTERRUPT + 0.5)
    process.send_signal(signal.SIGTERM)
    assert process.poll() is None, "none of these asks to stop without saving"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "(Ctrl-C again: stop without)" in errors
    assert "stopped without saving; --resume auto resumes from the last checkpoint" in errors
