"""The file of messages between a training and its step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from pipeline.messages import MessageFile


def _message(method: str, params: Any) -> bytes:
    return json.dumps({"__dagster_pipes_version": "0.1", "method": method, "params": params}).encode() + b"\n"


def test_messages_are_read_when_asked_for_and_whole_and_one_that_is_broken_is_told(tmp_path: Path) -> None:
    path = tmp_path / "messages"
    seen: list[Sequence[Any]] = []

    @dg.asset
    def spoken_to(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
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
        result = dg.materialize([spoken_to], instance=instance)
        told = [entry.user_message or entry.message for entry in instance.all_logs(result.run_id)]
    assert result.success
    assert seen == [(), (), ("first",), ("first",), ("first", "last")]
    assert any(f"{path}: b'no JSON'" in message for message in told)
    assert not any("did not receive" in message for message in told)
