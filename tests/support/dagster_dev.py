"""A real `dagster dev` on a textmill home: start and stop, the actions of the web UI through its GraphQL API, and the runs."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from dagster_graphql import DagsterGraphQLClient

ROOT = Path(__file__).parent.parent.parent
SELECTOR = {"repositoryLocationName": "pipeline.definitions", "repositoryName": "__repository__"}
FINISHED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)

_START_SENSOR = """
mutation ($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) { ... on Sensor { name } ... on PythonError { message } }
}
"""


class DagsterDev:
    """A `dagster dev`, started as in the README, with the repository's dagster.yaml in its DAGSTER_HOME."""

    def __init__(self, home: Path, dagster_home: Path, **settings: Any) -> None:
        """settings: changes to dagster.yaml, merged into its sections."""
        self.home = home
        self.dagster_home = dagster_home
        instance = yaml.safe_load((ROOT / "dagster.yaml").read_text())
        for section, values in settings.items():
            instance[section] |= values
        (dagster_home / "dagster.yaml").write_text(yaml.safe_dump(instance))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._log = dagster_home / "dagster_dev.log"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "dagster", "dev", "-m", "pipeline.definitions", "-h", "127.0.0.1", "-p", str(self._port)]
        environment = os.environ | {"DAGSTER_HOME": str(self.dagster_home), "TEXTMILL_HOME": str(self.home)}
        with open(self._log, "ab") as output:
            self._server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._server.poll() is None:
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.address}/server_info", timeout=5).close()
                return
            time.sleep(0.2)
        pytest.fail(f"dagster dev does not answer:\n{self.log()}")

    def stop(self) -> None:
        """Sends Ctrl-C as a terminal does, then kills the remaining processes."""
        if self._server is None or self._server.poll() is not None:
            return
        family = self.family()
        self._server.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        self._server.wait()

    def cut_the_power(self) -> None:
        """Kills every process at once, as a power failure does."""
        assert self._server is not None
        family = self.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._server.wait()
        psutil.wait_procs(family, timeout=20)

    def family(self) -> list[psutil.Process]:
        assert self._server is not None
        return [psutil.Process(self._server.pid), *psutil.Process(self._server.pid).children(recursive=True)]

    def launch(self, run_config: dict[str, Any], job: str = "pretrain", assets: list[str] | None = None) -> str:
        """Launches a job, or some assets of it, as the launchpad does, and returns the id of the run."""
        client = DagsterGraphQLClient("127.0.0.1", self._port)
        return client.submit_job_execution(job, run_config=run_config, asset_selection=assets)

    def terminate(self, run_id: str) -> None:
        """Does what the button Terminate in the UI does."""
        DagsterGraphQLClient("127.0.0.1", self._port).terminate_run(run_id)

    def switch_on(self, sensor: str) -> None:
        answer = DagsterGraphQLClient("127.0.0.1", self._port)._execute(
            _START_SENSOR, {"selector": SELECTOR | {"sensorName": sensor}}
        )
        assert answer["startSensor"] == {"name": sensor}

    def runs(self) -> list[dg.DagsterRun]:
        """Every run, the oldest first."""
        with dg.DagsterInstance.from_config(str(self.dagster_home)) as instance:
            return list(instance.get_runs())[::-1]

    def messages(self, run_id: str) -> str:
        """The log of a run, with its errors."""
        with dg.DagsterInstance.from_config(str(self.dagster_home)) as instance:
            return "\n".join(
                f"{entry.message}\n{entry.user_message}\n{entry.dagster_event}" for entry in instance.all_logs(run_id)
            )

    def worker(self, run_id: str) -> psutil.Process:
        """The process that executes a run."""
        with dg.DagsterInstance.from_config(str(self.dagster_home)) as instance:
            records = instance.all_logs(run_id)
        pids = [int(text.split("pid: ")[1].split(")")[0]) for text in (record.message for record in records) if "pid: " in text]
        return psutil.Process(pids[-1])

    def wait_for_run(self, number: int, seconds: float) -> dg.DagsterRun:
        """Waits until the run with this number, counted from 0, has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            runs = self.runs()
            if len(runs) > number and runs[number].status in FINISHED:
                return runs[number]
            time.sleep(0.5)
        pytest.fail(f"run {number} did not end: {[(run.job_name, run.status) for run in self.runs()]}\n{self.log()}")

    def log(self) -> str:
        return self._log.read_text()[-6000:]


@contextmanager
def dagster_dev(home: Path, dagster_home: Path, **settings: Any) -> Iterator[DagsterDev]:
    server = DagsterDev(home, dagster_home, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
