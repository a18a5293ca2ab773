"""The file in which a training sends messages to its step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from pipeline.processes.training import MessageFile


def _message(method: str, params: Any) -> bytes:
    return json.dumps({"__dagster_pipes_version": "0.1", "method": method, "params": params}).encode() + b"\n"


def test_complete_messages_are_read_on_request_and_a_broken_one_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "messages"
    seen: list[Sequence[Any]] = []

    @dg.asset
    def receiving(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        messages = MessageFile(path)
        with dg.open_pipes_session(context, dg.PipesTempFileContextInjector(), messages) as session:
            first = _message("report_custom_message", {"payload": "first"})
            for piece in (_message("opened", {}), first[:20], first[20:], b"no JSON\n"):
                with open(path, "ab") as file:
                    file.write(piece)
                messages.read()
                seen.append(session.get_custom_messages())
            with open(path, "ab") as file:
                file.write(_message("report_custom_message", {"payload": "last"}) + _message("closed", {}) + first[:20])
        seen.append(session.get_custom_messages())
        return dg.MaterializeResult()

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([receiving], instance=instance)
        logged = [entry.user_message or entry.message for entry in instance.all_logs(result.run_id)]
    assert result.success
    assert seen == [(), (), ("first",), ("first",), ("first", "last")]
    assert any(f"{path}: b'no JSON'" in message for message in logged)
    assert not any("did not receive" in message for message in logged)
