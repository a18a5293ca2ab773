"""A run launcher that detects dead runs, so that Dagster can fail and retry them.

Dagster's default launcher notices a killed run only while the code server that started it is alive. After a power failure, or if
all of `dagster dev` is killed, the run would stay "started" forever and block the queue.
"""

import json
import socket
from typing import Any

from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._grpc.client import DagsterGrpcClient
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value


class WatchedRunLauncher(DefaultRunLauncher):
    """Dagster's default launcher with the health check that run monitoring needs; see dagster.yaml."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: Any) -> CheckRunHealthResult:
        """Whether the code server that started the run is alive and still has it. In doubt the run counts as running.

        A run without a code server was started by `dagster job execute`, possibly on another machine: its state is unknown.
        """
        if GRPC_INFO_TAG not in run.tags:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        server = json.loads(run.tags[GRPC_INFO_TAG])
        if not _accepts(server):
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "the code server that started it is gone")
        client = DagsterGrpcClient(
            port=server.get("port"), socket=server.get("socket"), host=server["host"], use_ssl=server.get("use_ssl", False)
        )
        try:
            reply = client.can_cancel_execution(CanCancelExecutionRequest(run_id=run.run_id))
        except DagsterUserCodeUnreachableError:  # busy: wait for the next check
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if deserialize_value(reply, CanCancelExecutionResult).can_cancel:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its process is gone")


def _accepts(server: dict[str, Any]) -> bool:
    """Whether the code server accepts connections; the kernel answers even if the server is busy."""
    family, address = (socket.AF_UNIX, server["socket"]) if server.get("socket") else (socket.AF_INET, None)
    with socket.socket(family) as probe:
        probe.settimeout(10)
        try:
            probe.connect(address or (server["host"], server["port"]))
        except TimeoutError:
            return True
        except OSError:
            return False
    return True
