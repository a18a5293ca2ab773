"""Processes are killed under a real `dagster dev` with the repository's dagster.yaml: a retry finishes the training."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from dagster._core.storage.tags import PARENT_RUN_ID_TAG
from dagster._daemon.auto_run_reexecution.event_log_consumer import EventLogConsumerDaemon

from llm_core.system import held, read_json
from llm_core.training import read_metrics
from pipeline.catalog.catalog import Catalog
from tests.pipeline.conftest import TINY
from tests.support.dagster_dev import ROOT, DagsterDev, dagster_dev

pytestmark = pytest.mark.slow

STEPS = 1000
PREPARATION = ["raw_text", "trained_tokenizer", "tokenized_shards"]
# Interval of Dagster's run monitoring.
POLL_SECONDS = 3


@pytest.fixture(scope="module")
def server(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterDev]:
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(corpus_dir, home / "raw_text_data")
    monitoring = {"poll_interval_seconds": POLL_SECONDS}
    with dagster_dev(home, tmp_path_factory.mktemp("dagster_home"), run_monitoring=monitoring) as server:
        server.launch({"ops": {asset: config()["ops"][asset] for asset in PREPARATION}}, job="prepare_data")
        assert server.wait_for_run(0, 120).status == dg.DagsterRunStatus.SUCCESS, server.log()
        yield server


def config(**checkpoint: Any) -> dict[str, Any]:
    """The tiny lineage with a training that takes some seconds and saves often."""
    ops = {name: {"config": dict(options)} for name, options in TINY.items()}
    ops["checkpoint"]["config"] |= {"max_steps": STEPS, "eval_interval": STEPS, "save_interval": 50} | checkpoint
    return {"ops": ops}


def launch_training(server: DagsterDev, **checkpoint: Any) -> str:
    """Launches that part of the job alone, on the text that the server's home has prepared."""
    return server.launch({"ops": {"checkpoint": config(**checkpoint)["ops"]["checkpoint"]}}, assets=["checkpoint"])


def begin(server: DagsterDev, seed: int, whole: bool = False) -> tuple[int, str, Path]:
    """Launches a training and waits for its first checkpoint.

    whole: the whole job, instead of its training alone.

    Returns:
        The number of the Dagster run, its id, and the run folder.
    """
    checkpoints = server.home / "checkpoints"
    known = set(checkpoints.glob("*/"))
    number = len(server.runs())
    dagster_id = server.launch(config(seed=seed)) if whole else launch_training(server, seed=seed)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for run_dir in set(checkpoints.glob("*/")) - known:
            if list(run_dir.glob("checkpoint_step_*.pt.json")):
                return number, dagster_id, run_dir
        time.sleep(0.05)
    pytest.fail(f"no checkpoint was saved\n{server.log()}")


def check_finished_by_a_retry(server: DagsterDev, number: int, dagster_id: str, run_dir: Path) -> None:
    failed = server.wait_for_run(number, 120)
    assert (failed.run_id, failed.status) == (dagster_id, dg.DagsterRunStatus.FAILURE)
    retried = server.wait_for_run(number + 1, 240)
    assert retried.status == dg.DagsterRunStatus.SUCCESS, server.log()
    assert retried.tags[PARENT_RUN_ID_TAG] == dagster_id
    state = read_json(run_dir / "run.json")
    assert (state["status"], state["steps_done"]) == ("finished", STEPS)
    assert state["resumed_from_step"] >= 50
    runs = Catalog(server.home / "catalog.duckdb").query("SELECT * FROM training_runs WHERE status = 'finished'")
    assert run_dir.name in {run["run_id"] for run in runs}


def test_a_killed_rank_is_resumed_by_a_retry(server: DagsterDev) -> None:
    number, dagster_id, run_dir = begin(server, seed=1)
    family = server.worker(dagster_id).children(recursive=True)
    (rank,) = [
        p for p in family if "pipeline.processes.training_rank" in p.cmdline() and "torch.distributed.run" not in p.cmdline()
    ]
    rank.kill()
    check_finished_by_a_retry(server, number, dagster_id, run_dir)


def test_a_killed_run_worker_is_resumed_by_a_retry(server: DagsterDev) -> None:
    number, dagster_id, run_dir = begin(server, seed=2, whole=True)
    worker = server.worker(dagster_id)
    family = worker.children(recursive=True)
    worker.kill()
    check_finished_by_a_retry(server, number, dagster_id, run_dir)
    assert not psutil.wait_procs(family, timeout=30)[1], "no orphan continues training"


def test_a_run_that_is_terminated_saves_and_leaves_no_process(server: DagsterDev) -> None:
    number, dagster_id, run_dir = begin(server, seed=7)
    family = server.worker(dagster_id).children(recursive=True)
    server.terminate(dagster_id)
    assert server.wait_for_run(number, 120).status == dg.DagsterRunStatus.CANCELED, server.log()
    assert not psutil.wait_procs(family, timeout=30)[1]
    last_step = max(line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train")
    state = read_json(run_dir / "run.json")
    assert (state["status"], state["steps_done"]) == ("preempted", last_step)
    runs = Catalog(server.home / "catalog.duckdb").query("SELECT run_id FROM training_runs WHERE status = 'preempted'")
    assert run_dir.name in {run["run_id"] for run in runs}


def test_a_run_started_in_a_terminal_is_left_alone(server: DagsterDev, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(seed=8)))
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "pipeline.definitions", "-j", "pretrain"]
    environment = os.environ | {"DAGSTER_HOME": str(server.dagster_home), "TEXTMILL_HOME": str(server.home)}
    done = subprocess.run([*command, "-c", str(tmp_path / "run.yaml")], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = server.runs()[-1]
    with dg.DagsterInstance.from_config(str(server.dagster_home)) as instance:
        record = instance.get_run_record_by_id(run.run_id)
        assert record is not None and record.end_time - record.start_time > 2 * POLL_SECONDS, "long enough to be monitored"
        failures = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE).records
    assert run.status == dg.DagsterRunStatus.SUCCESS and not failures


def test_a_failure_that_needs_a_fix_is_not_retried(server: DagsterDev) -> None:
    number = len(server.runs())
    invalid: list[dict[str, Any]] = [{"source_weights": {"nowhere": 1.0}}, {"source_weights": {"*": 0.0}}]
    for options in invalid:
        launch_training(server, **options)
    for offset in range(len(invalid)):
        assert server.wait_for_run(number + offset, 120).status == dg.DagsterRunStatus.FAILURE
    time.sleep(15)  # Dagster decides on retries every few seconds
    assert len(server.runs()) == number + len(invalid)


def test_text_that_changed_after_its_snapshot_is_read_again_by_the_retry(server: DagsterDev) -> None:
    number, text = len(server.runs()), server.home / "raw_text_data" / "restless.txt"
    text.write_text("A line that is about to change.\n" * 50)
    processed = server.home / "processed_data"
    with held(processed, pytest.fail):
        dagster_id = server.launch(config(max_steps=6))
        waiting = f"process {os.getpid()} is changing the prepared data"
        deadline = time.monotonic() + 120
        while waiting not in server.messages(dagster_id) and time.monotonic() < deadline:
            time.sleep(0.2)
    others: list[str] = []
    while not others:  # until the snapshot step holds the folder; the next step then waits for this process
        time.sleep(0.01)
        with held(processed, others.append):
            text.write_text(f"A line of {time.monotonic_ns()}, which has changed since.\n" * 50)
    assert server.wait_for_run(number, 120).status == dg.DagsterRunStatus.FAILURE
    assert "restless.txt: changed since the snapshot was taken" in server.messages(dagster_id)
    retried = server.wait_for_run(number + 1, 240)
    assert retried.status == dg.DagsterRunStatus.SUCCESS, server.log()
    assert retried.tags[PARENT_RUN_ID_TAG] == dagster_id


def test_trainings_and_an_evaluation_take_turns_on_one_device_and_no_run_waits_for_itself(server: DagsterDev) -> None:
    """The first run trains and evaluates."""
    number, *_ = begin(server, seed=3, whole=True)
    launch_training(server, seed=4, max_steps=6)
    alone = {"ops": {"evaluation": config()["ops"]["evaluation"]}}
    server.launch(alone, job="__ASSET_JOB", assets=["evaluation"])
    began = time.monotonic()
    while server.runs()[number].status == dg.DagsterRunStatus.STARTED and time.monotonic() - began < 8:
        for run in server.runs()[number + 1 : number + 3]:
            assert run.status in (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED)
        time.sleep(0.5)
    for waited in range(number, number + 3):
        assert server.wait_for_run(waited, 120).status == dg.DagsterRunStatus.SUCCESS, server.log()
    with dg.DagsterInstance.from_config(str(server.dagster_home)) as instance:
        records = [instance.get_run_record_by_id(run.run_id) for run in server.runs()[number : number + 3]]
    first, *others = sorted(records, key=lambda record: record.start_time)
    assert first.dagster_run.run_id == server.runs()[number].run_id
    for earlier, later in pairwise([first, *others]):
        assert later.start_time >= earlier.end_time


def test_after_a_power_failure_the_training_continues_automatically(server: DagsterDev) -> None:
    number, dagster_id, run_dir = begin(server, seed=5)
    server.cut_the_power()
    assert server.runs()[number].status == dg.DagsterRunStatus.STARTED, "no process was left to record that it ended"
    server.start()
    check_finished_by_a_retry(server, number, dagster_id, run_dir)


def test_a_retry_that_dagster_forgot_is_launched_after_all(server: DagsterDev) -> None:
    number, dagster_id, run_dir = begin(server, seed=6)
    server.cut_the_power()
    with dg.DagsterInstance.from_config(str(server.dagster_home)) as instance:
        instance.report_run_failed(server.runs()[number])
        last_event = instance.event_log_storage.get_maximum_record_id()
        cursor = f"{EventLogConsumerDaemon.daemon_type()}_CURSOR-{dg.DagsterEventType.RUN_FAILURE.value}"
        assert cursor in instance.daemon_cursor_storage.get_cursor_values({cursor})
        instance.daemon_cursor_storage.set_cursor_values({cursor: str(last_event)})
    server.start()
    check_finished_by_a_retry(server, number, dagster_id, run_dir)
