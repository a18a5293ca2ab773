"""Finding the other ranks, and stopping."""

import signal
import subprocess
import sys
import time

import pytest

from llm_core import distributed
from llm_core.distributed import interface_towards
from llm_core.errors import UserError


def test_the_interface_is_the_one_whose_route_leads_to_the_host() -> None:
    assert interface_towards("127.0.0.1") in ("lo", "lo0")


def test_a_first_machine_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR nowhere\.invalid: cannot be reached .* --master_addr"):
        interface_towards("nowhere.invalid")


ENDLESS_STEP = """
import time
from llm_core.distributed import StopRequest

with StopRequest() as stop:
    print("in a step", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked to stop", flush=True)
    time.sleep(60)
"""


def test_a_second_ctrl_c_does_not_wait_for_the_step_and_one_that_comes_at_once_is_the_first() -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDLESS_STEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked to stop\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(distributed._SAME_INTERRUPT + 0.5)
    process.send_signal(signal.SIGTERM)
    assert process.poll() is None, "none of these is a person who does not want to wait"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "(Ctrl-C again: stop without)" in said
    assert "stopped without saving; --resume auto goes on from the last checkpoint" in said
