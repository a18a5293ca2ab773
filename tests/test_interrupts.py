"""Ctrl-C at any moment: one line, no traceback, exit code 130, and a Dagster run that is canceled."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRunStatus

_TOOLS = ("train", "data_prep_tool", "generate", "export", "evaluate_text", "evaluate_tasks", "collect_garbage")

# A module that is imported by every tool, and takes as long as Ctrl-C needs to arrive.
_SLOW_TO_LOAD = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""

# Ctrl-C during a stage of the data preparation that is called by the name given as the first argument.
_INTERRUPTED_STAGE = """
import os, signal, sys, time
from llm_core import data_prep_tool

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

setattr(data_prep_tool, sys.argv.pop(1), interrupt)
data_prep_tool.main()
"""

# Ctrl-C during a call in C that takes minutes and does not look for signals.
_DEAF_CALL = """
import hashlib, os, signal
from llm_core.cli import run_tool
from llm_core.interrupts import interruptible

def deaf():
    os.kill(os.getpid(), signal.SIGINT)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

run_tool(lambda: interruptible(deaf), "tool", "nothing is lost")
"""

_JOB = """
import os, signal, time
import dagster as dg
from pipeline.automation.executor import cancelable_executor

@dg.asset
def slow():
    os.killpg(0, signal.SIGINT)  # as a terminal does
    time.sleep(60)

defs = dg.Definitions(assets=[slow], jobs=[dg.define_asset_job("job", executor_def=cancelable_executor)])
"""


def run(arguments: Sequence[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process group of its own, which Ctrl-C is sent to."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


@pytest.mark.parametrize("module", [*(f"llm_core.{tool}" for tool in _TOOLS), "pipeline.cli"])
def test_while_a_tool_loads(module: str, tmp_path: Path) -> None:
    tmp_path.joinpath("pydantic.py").write_text(_SLOW_TO_LOAD)
    root = Path(__file__).parent.parent
    done = run(["-m", module], PYTHONPATH=f"{tmp_path}{os.pathsep}{root}")
    assert (done.returncode, done.stderr.strip()) == (130, "stopped before it began: nothing was changed")


@pytest.mark.parametrize("stage", ["take_snapshot", "prepare_tokenizer", "build_dataset"])
def test_while_data_is_prepared(stage: str, corpus_dir: Path, tmp_path: Path) -> None:
    options = ["--input_dir", str(corpus_dir), "--output_dir", str(tmp_path / "data"), "--vocab_size", "512"]
    done = run(["-c", _INTERRUPTED_STAGE, stage, *options])
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(f"what is complete is in {tmp_path / 'data'}; the same command continues from there\n")
    assert list(tmp_path.rglob(".*.tmp")) == []


def test_while_a_call_does_not_look_for_signals() -> None:
    done = run(["-c", _DEAF_CALL])
    assert (done.returncode, done.stderr.strip()) == (130, "tool: stopped; nothing is lost")


def test_a_background_job_ignores_it_as_the_shell_wants(tmp_path: Path) -> None:
    code = "import os, signal; from llm_core.interrupts import *; exit_on_interrupt(); raise_on_interrupt()"
    ignoring = (
        f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {code}; os.kill(os.getpid(), signal.SIGINT); print(7)"
    )
    assert run(["-c", ignoring]).stdout == "7\n"


def test_a_job_is_canceled_and_says_how_to_continue(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(_JOB)
    home = tmp_path / "dagster"
    home.mkdir()
    done = run(["-m", "dagster", "job", "execute", "-f", job, "-j", "job"], DAGSTER_HOME=str(home))
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("textmill: the run was stopped; run the same job again to continue")
    with DagsterInstance.from_config(str(home)) as instance:
        assert [record.status for record in instance.get_runs()] == [DagsterRunStatus.CANCELED]


def test_every_job_can_be_canceled() -> None:
    from pipeline.automation.executor import cancelable_executor
    from pipeline.definitions import defs

    jobs = defs.get_repository_def().get_all_jobs()
    assert {job.executor_def for job in jobs} == {cancelable_executor}
