"""Training under Dagster: its environment, cancellation, failures and progress reports; no process outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from llm_core.checkpoint import newest_valid
from llm_core.system import read_json, write_json
from pipeline.assets.checkpoint import checkpoint
from pipeline.catalog.database import CatalogBusyError
from pipeline.processes.tools import download_environment, run_tool, training_environment
from pipeline.processes.training import LiveRecords
from pipeline.resources import Torchrun
from tests.pipeline.conftest import Home

# Materializes the checkpoint asset in its own process, with a training that would take hours.
_STEP = """
import sys
from pathlib import Path
import dagster as dg
from pipeline.assets.checkpoint import checkpoint
from tests.pipeline.conftest import Home
with dg.DagsterInstance.ephemeral() as instance:
    Home(Path(sys.argv[1]), instance).materialize(
        checkpoint, expect_success=False, checkpoint={"max_steps": 10000000, "nproc_per_node": 2, "save_interval": 0}
    )
"""


def start_step(home: Home) -> tuple[subprocess.Popen[bytes], list[psutil.Process], Path]:
    """The process of the step, its descendants and the run folder, after the first training step."""
    root = home.folders.root
    known = set(home.folders.checkpoints.iterdir())
    # In its own process group, so that only a signal sent to its processes can end them.
    with open(root / "step.err", "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _STEP, str(root)], stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        for run_dir in set(home.folders.checkpoints.iterdir()) - known:
            metrics = run_dir / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size:
                return process, psutil.Process(process.pid).children(recursive=True), run_dir
        time.sleep(0.1)
    raise AssertionError("the training did not begin")


def survivors(processes: list[psutil.Process], within: float) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=within)[1]


def check_that_the_catalog_holds_the_metrics_so_far(home: Home, process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """While it trains."""

    def recorded(at_least: int) -> int:
        """Waits until the catalog has at least that many steps and returns the last one."""
        question = (
            "SELECT max(step) AS step, count(mfu) AS mfu FROM train_metrics JOIN training_runs USING (run_id) WHERE run_id = ?"
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            (row,) = home.catalog.query(question + " AND status = 'running'", [run_dir.name])
            if row["step"] is not None and row["step"] >= at_least:
                assert row["mfu"] == row["step"], "each step has its device utilization"
                return int(row["step"])
            time.sleep(0.2)
        raise AssertionError(f"step {at_least} was not recorded in the catalog during training")

    recorded(recorded(1) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_the_step_records_its_metrics_saves_leaves_no_process_and_loses_at_most_a_step(
    number: signal.Signals, trained_home: tuple[Home, Any], clone: Any
) -> None:
    home, _ = clone(trained_home)
    process, family, run_dir = start_step(home)
    assert len(family) >= 3, "torchrun and two ranks"
    if number == signal.SIGTERM:
        check_that_the_catalog_holds_the_metrics_so_far(home, process, run_dir)
    process.send_signal(number)
    process.wait(timeout=60)
    assert not survivors(family, within=30)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last_step = max(line["step"] for line in lines if line["kind"] == "train")
    record, _ = newest_valid(run_dir)
    assert record is not None
    assert record.step >= last_step - 1
    assert json.loads((run_dir / "run.json").read_text())["status"] == "preempted"
    if number != signal.SIGKILL:
        message = (home.folders.root / "step.err").read_text().strip().splitlines()[-1]
        assert message.startswith(
            f"textmill: the training was stopped at step {record.step} of 10000000, saved; run the same job"
        )


@pytest.mark.slow
def test_a_killed_training_is_resumed_by_the_next_run(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, first = clone(trained_home)
    run_dir = home.folders.checkpoints / home.metadata(first, "checkpoint")["run_id"]
    # The state after a kill between steps 3 and 6.
    for name in ("checkpoint_step_6.pt", "checkpoint_step_6.pt.json"):
        (run_dir / name).unlink()
    write_json(run_dir / "run.json", read_json(run_dir / "run.json") | {"status": "running"})
    again = home.materialize(checkpoint)
    assert home.metadata(again, "checkpoint")["checkpoint_id"] == home.metadata(first, "checkpoint")["checkpoint_id"]
    assert json.loads((run_dir / "run.json").read_text())["resumed_from_step"] == 3


def test_no_secret_of_the_orchestrator_reaches_the_training(
    trained_home: tuple[Home, Any], clone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "canary-5f2c")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-5f2c")
    monkeypatch.setenv("NVIDIA_API_KEY", "canary-5f2c")
    monkeypatch.setenv("HF_TOKEN", "canary-5f2c")
    assert "canary-5f2c" not in training_environment({}).values()
    home, _ = clone(trained_home)
    result = home.materialize(checkpoint, checkpoint={"max_steps": 2, "eval_interval": 0, "seed": 3})
    written = b"".join(path.read_bytes() for path in home.folders.root.rglob("*") if path.is_file())
    assert b"canary-5f2c" not in written
    assert "canary-5f2c" not in str(result.all_events)


def test_the_training_gets_network_and_memory_settings_and_the_harness_gets_download_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "FI_PROVIDER": "efa", "UCX_TLS": "rc"}
    hub = {
        "https_proxy": "http://proxy:3128",
        "NO_PROXY": "localhost",
        "SSL_CERT_FILE": "/ca.pem",
        "REQUESTS_CA_BUNDLE": "/ca.pem",
    }
    hub |= {"HF_HOME": "/cache", "HF_TOKEN": "of the user"}
    for name, value in (settings | hub | {"GITHUB_TOKEN": "of another program"}).items():
        monkeypatch.setenv(name, value)
    assert settings.items() <= training_environment({}).items()
    assert not hub.keys() & training_environment({}).keys()
    assert hub.items() <= download_environment().items()
    assert "GITHUB_TOKEN" not in training_environment(download_environment())


def test_a_killed_tool_may_be_retried_and_a_failed_one_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "refuses.py").write_text("raise SystemExit('no')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with dg.build_asset_context() as context:
        with pytest.raises(dg.Failure, match=r"killed was killed by signal 9 \(Killed\)") as killed:
            run_tool(context, "killed", {})  # type: ignore[arg-type]
        with pytest.raises(dg.Failure, match="refuses ended with code 1: no") as refused:
            run_tool(context, "refuses", {})  # type: ignore[arg-type]
    assert (killed.value.allow_retries, refused.value.allow_retries) == (True, False)


def test_the_progress_of_a_tool_is_logged_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "print(f'done {n} of 3', end='\\r' if n else '\\n', file=sys.stderr)"
    (tmp_path / "works.py").write_text(f"import sys\nfor n in range(3):\n    {program}\nprint('result')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("pipeline.processes.tools._LOG_SECONDS", 0.0)
    logged: list[str] = []
    with dg.build_asset_context() as context:
        monkeypatch.setattr(context.log, "info", logged.append)
        run_tool(context, "works", {})  # type: ignore[arg-type]
    assert logged[1:] == ["done 0 of 3", "done 1 of 3", "done 2 of 3", "result\n"]


@pytest.mark.slow
def test_a_training_on_one_machine_opens_no_port_to_others(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    process, family, _ = start_step(home)
    try:
        open_to_others = [
            (member.pid, connection.laddr)
            for member in family
            for connection in member.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in ("127.0.0.1", "::1")
        ]
        assert open_to_others == []
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert not survivors(family, within=30)


@pytest.mark.slow
def test_a_failed_training_shows_the_reason_on_the_run_page(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    result = home.materialize(checkpoint, expect_success=False, checkpoint={"source_weights": {"nowhere": 1.0}})
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    reason = failure.event_specific_data.user_failure_data.description
    assert reason.startswith('source_weights: no source "nowhere" in this text')


def stopped(home: Home, first: Any) -> Path:
    """The run folder, in the state of a training that was stopped at step 3."""
    run_dir = home.folders.checkpoints / home.metadata(first, "checkpoint")["run_id"]
    for name in ("checkpoint_step_6.pt", "checkpoint_step_6.pt.json"):
        (run_dir / name).unlink()
    write_json(run_dir / "run.json", read_json(run_dir / "run.json") | {"status": "preempted", "steps_done": 3})
    return run_dir


def failure_of(result: Any) -> Any:
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    return failure.event_specific_data.user_failure_data


def test_a_training_that_never_begins_is_not_described_by_the_record_of_an_earlier_attempt(
    trained_home: tuple[Home, Any], clone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, first = clone(trained_home)
    stopped(home, first)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('no torch today')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    failure = failure_of(home.materialize(checkpoint, expect_success=False))
    assert failure.description.startswith("the training ended with code 1 and status 'not started'")
    assert "no torch today" in failure.metadata["last_output"].value


def test_the_reason_of_a_failed_training_is_reported_even_if_the_catalog_fails_too(
    trained_home: tuple[Home, Any], clone: Any
) -> None:
    home, first = clone(trained_home)
    stopped(home, first)
    shard = max((home.folders.prepared.root / "dataset").glob("*.arrow"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (home.folders.catalog).write_bytes(b"no database")
    result = home.materialize(checkpoint, expect_success=False)
    assert shard.name in failure_of(result).description
    assert any("the failed run is not in the catalog: " in message for message in home.messages(result))


def test_progress_is_reported_while_it_trains(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    result = home.materialize(checkpoint, checkpoint={"max_steps": 400, "seed": 9, "eval_interval": 100})
    observed = [event.asset_observation_data.asset_observation for event in result.all_events if event.is_asset_observation]
    steps = [observation.metadata["step"].value for observation in observed if "loss" in observation.metadata]
    assert steps
    assert steps == sorted(steps)
    assert any("val_loss" in observation.metadata for observation in observed)
    assert 0 < home.metadata(result, "checkpoint")["mfu"] < 1


def test_messages_after_the_last_read_are_reported_too(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    home.torchrun = Torchrun(report_seconds=3600)
    result = home.materialize(checkpoint, checkpoint={"seed": 9})
    observed = [event.asset_observation_data.asset_observation for event in result.all_events if event.is_asset_observation]
    assert [seen.metadata["step"].value for seen in observed if "val_loss" in seen.metadata] == [3, 6]


def test_a_catalog_that_fails_never_ends_a_training(capfd: pytest.CaptureFixture[str]) -> None:
    calls = []

    def record() -> None:
        calls.append(time.monotonic())
        raise CatalogBusyError("catalog.duckdb: busy for 5 seconds")

    records = LiveRecords(dg.build_asset_context(), record, seconds=0.05)
    for _ in range(20):
        records.record_if_due()
        time.sleep(0.01)
    assert 2 <= len(calls) <= 5, "at intervals, not at every report"
    assert "training continues: catalog.duckdb: busy for 5 seconds" in capfd.readouterr().err


def test_slow_records_are_made_less_often() -> None:
    calls = []

    def record() -> None:
        calls.append(time.monotonic())
        time.sleep(0.02)

    records = LiveRecords(dg.build_asset_context(), record, seconds=0.001)
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        records.record_if_due()
    assert len(calls) <= 3, "at most 0.02 of every 0.42 seconds"
