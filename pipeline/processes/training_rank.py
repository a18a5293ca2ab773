"""A training rank under Dagster: `llm_core.train`, with rank 0 reporting progress through Dagster Pipes."""

import os
import sys
import time
from typing import Any

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, open_dagster_pipes

from llm_core import train
from llm_core.distributed.launch import run_rank
from llm_core.training import MetricsLine

_SECONDS_BETWEEN_MESSAGES = 2.0


def main() -> None:
    reports = os.environ.get("RANK") == "0" and DAGSTER_PIPES_CONTEXT_ENV_VAR in os.environ
    if not reports:
        train.main()
        return
    with open_dagster_pipes() as pipes:
        last_sent = 0.0

        def send(record: MetricsLine) -> None:
            """Sends every validation, and training steps from time to time, to keep the message file small."""
            nonlocal last_sent
            if record["kind"] == "train" and time.monotonic() - last_sent < _SECONDS_BETWEEN_MESSAGES:
                return
            last_sent = time.monotonic()
            pipes.report_custom_message(record)

        try:
            train.main(callback=send)
            code: Any = 0
        except SystemExit as end:  # reported already; Dagster would log it with a stack trace
            code = end.code
    sys.exit(code)


if __name__ == "__main__":
    run_rank(main)
