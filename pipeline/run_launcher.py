"""Runs on this machine, watched: one whose process is gone is found out, so that Dagster can fail and retry it.

Dagster's own launcher notices a killed run only while the code server that started it lives. After a power cut, or when the
whole of `dagster dev` was killed, such a run would stand as started for ever, and the queue behind it.
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
    """Dagster's default launcher with the health check that run monitoring asks for; named in dagster.yaml."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: Any) -> CheckRunHealthResult:
        """Whether the code server that started the run lives and still has it; in doubt it runs.

        A run that no code server started is one of `dagster job execute`, perhaps on another machine: only a person can tell.
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
        except DagsterUserCodeUnreachableError:  # busy: the next look will tell
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if deserialize_value(reply, CanCancelExecutionResult).can_cancel:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its process is gone")


def _accepts(server: dict[str, Any]) -> bool:
    """Whether anybody listens where the code server was; the kernel answers, however busy the server is."""
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
