"""What a failed step reports: names that a user of Dagster can set, and a stack trace only for a programming error."""

import ast
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.storage.tags import RETRY_ON_ASSET_OR_OP_FAILURE_TAG, RETRY_STRATEGY_TAG

from llm_core.errors import DataError, UserError
from pipeline.assets.common import HOOKS
from pipeline.automation.executor import cancelable_executor
from pipeline.failures import in_run_config, one_line_errors
from tests.support.dagster_dev import ROOT

# Options of torchrun, and those of a tool that a run always gives correctly.
NOT_IN_A_RUN = {"--master_addr", "--local-addr", "--resume", "--evaluation"}


@pytest.mark.parametrize(
    ("of_the_tools", "of_a_run"),
    [
        ("--input_dir /a--b: no such folder", "storage.raw_text_dir /a--b: no such folder"),
        ("--output_dir /x: is inside --input_dir /y", "storage.home /x: is inside storage.raw_text_dir /y"),
        ("45 % no_text_field (another --text_field keeps it)", "45 % no_text_field (another text_field keeps it)"),
        ("--vocab_size 500: use --vocab_size 400 or less", "vocab_size 500: use vocab_size 400 or less"),
        ("train a new one with --retrain_tokenizer", "train a new one with retrain_tokenizer: true"),
        ("--nproc_per_node 8: this machine has 2 GPUs", "nproc_per_node 8: this machine has 2 GPUs"),
        ("set torchrun's --master_addr", "set torchrun's --master_addr"),
        ("my--text_field.jsonl: damaged", "my--text_field.jsonl: damaged"),
    ],
)
def test_a_message_names_options_as_the_run_configuration_does(of_the_tools: str, of_a_run: str) -> None:
    assert in_run_config(of_the_tools) == of_a_run


def test_every_flag_in_an_error_of_the_library_has_a_name_in_a_run() -> None:
    files = [path for path in (ROOT / "llm_core").rglob("*.py") if path.parent.name != "llm_core" or path.name == "config.py"]
    raised = [node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    texts = [str(part.value) for node in raised for part in ast.walk(node) if isinstance(part, ast.Constant)]
    assert sum("--" in text for text in texts) > 40
    assert {flag for text in texts for flag in re.findall(r"--[a-z][\w-]+", in_run_config(text))} == NOT_IN_A_RUN


RAISED: list[Exception] = []
LOGGED: list[str] = []


class _Collecting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LOGGED.extend(record.getMessage().splitlines())


def failing_job() -> dg.JobDefinition:
    """A job whose only step raises the error in RAISED, and whose log is in LOGGED."""

    @dg.asset(hooks=HOOKS)
    @one_line_errors
    def fails(context: dg.AssetExecutionContext) -> None:
        raise RAISED[0]

    @dg.logger
    def collecting(context: dg.InitLoggerContext) -> logging.Logger:
        logger = logging.Logger("collecting", logging.DEBUG)
        logger.addHandler(_Collecting())
        return logger

    job = dg.define_asset_job("failing", [fails])
    definitions = dg.Definitions([fails], jobs=[job], loggers={"collecting": collecting}, executor=cancelable_executor)
    return definitions.resolve_job_def("failing")


@pytest.fixture
def fail(tmp_path: Path) -> Iterator[Callable[[Exception], tuple[list[str], Mapping[str, str]]]]:
    """Runs a job that fails with an error; returns the lines of its log and the tags of its run."""
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def run(error: Exception) -> tuple[list[str], Mapping[str, str]]:
            RAISED[:], LOGGED[:] = [error], []
            result = dg.execute_job(
                dg.reconstructable(failing_job), instance=instance, run_config={"loggers": {"collecting": {}}}
            )
            assert not result.success
            failed = instance.get_run_by_id(result.run_id)
            assert failed is not None
            return [*LOGGED], failed.tags

        yield run


@pytest.mark.parametrize("kind", [UserError, DataError, dg.Failure])
def test_an_error_for_the_user_is_in_the_log_once_without_a_stack_trace(kind: type[Exception], fail: Any) -> None:
    lines, _ = fail(kind("--val_fraction 0.1: too small"))
    (reason,) = [line for line in lines if "too small" in line]
    assert reason.endswith(": val_fraction 0.1: too small")
    assert not [line for line in lines if "File " in line or "Stack Trace" in line]


def test_another_error_keeps_its_stack_trace_once(fail: Any) -> None:
    lines, _ = fail(RuntimeError("a mistake in the program"))
    assert lines.count("RuntimeError: a mistake in the program") == 1
    assert len([line for line in lines if Path(__file__).name in line]) == 1


def test_an_error_keeps_its_type_so_that_a_retry_starts_where_it_can_succeed(fail: Any) -> None:
    _, tags = fail(DataError("--data_dir x: changed"))
    assert tags[RETRY_STRATEGY_TAG] == "ALL_STEPS"
    _, tags = fail(UserError("--data_dir x: wrong"))
    assert tags[RETRY_ON_ASSET_OR_OP_FAILURE_TAG] == "false" and RETRY_STRATEGY_TAG not in tags
