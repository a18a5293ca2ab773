"""The pipeline in CI: exit codes, reasons in the last lines, parts of the lineage, and the configurations in the README."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from pipeline.automation.jobs import LINEAGE
from pipeline.definitions import defs
from tests.pipeline.conftest import TINY, Home
from tests.support.dagster_dev import ROOT

MODULE = ["-m", "pipeline.definitions"]
# The code location with a check that always fails.
FAILING_CHECK = """
from pipeline.assets import checks
check = checks.check_raw_text
checks.check_raw_text = lambda snapshot: [result._replace(passed=False) for result in check(snapshot)]
from pipeline.definitions import defs
"""


def dagster(home: Home, *arguments: str, **options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`dagster ...` as in CI, without an instance; options: asset -> options, merged into the tiny ones."""
    ops = {name: {"config": TINY.get(name, {}) | options.get(name, {})} for name in options}
    config = home.folders.root / "run.yaml"
    config.write_text(yaml.safe_dump({"ops": ops}))
    environment = os.environ | {"TEXTMILL_HOME": str(home.folders.root)}
    environment.pop("DAGSTER_HOME", None)
    command = [sys.executable, "-m", "dagster", *arguments, "-c", str(config)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def last_lines(done: subprocess.CompletedProcess[str], count: int = 3) -> str:
    return "\n".join(done.stderr.strip().splitlines()[-count:])


@pytest.mark.slow
def test_a_failure_is_an_exit_code_and_a_reason_in_the_last_lines(
    trained_home: tuple[Home, Any], clone: Any, make_home: Any, tmp_path: Path
) -> None:
    home, _ = clone(trained_home)
    job = ["job", "execute", *MODULE, "-j"]

    options = {"raw_text": {"val_fraction": 0.9}, "checkpoint": {"learning_rat": 0.1, "dropout": 5}}
    bad = dagster(home, *job, "pretrain", **TINY | options)
    assert (bad.returncode, last_lines(bad, 4)) == (
        1,
        "Error: the run configuration does not fit the job pretrain:\n"
        "raw_text.val_fraction 0.9: Input should be less than 0.5\n"
        "checkpoint.dropout 5: Input should be less than 1\n"
        "checkpoint.learning_rat: no such option; did you mean learning_rate?",
    )
    assert "STEP_START" not in bad.stderr and "Traceback" not in bad.stderr

    (tmp_path / "failing.py").write_text(FAILING_CHECK)
    failing = dagster(home, "job", "execute", "-f", str(tmp_path / "failing.py"), "-j", "prepare_data", raw_text={})
    assert failing.returncode == 1
    assert "textmill: raw_text failed: 2 blocking asset checks failed" in last_lines(failing)
    assert "bytes_add_up" in last_lines(failing)
    assert "trained_tokenizer - STEP_START" not in failing.stderr, "the run ends there"

    training = dagster(home, *job, "pretrain", **TINY | {"checkpoint": {"source_weights": {"nowhere": 1}}})
    assert training.returncode == 1
    assert 'textmill: checkpoint failed: source_weights: no source "nowhere" in this text' in last_lines(training)

    for path in sorted(home.storage.raw_text.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    empty = dagster(home, *job, "pretrain", raw_text={})
    assert empty.returncode == 1
    assert f"textmill: raw_text failed: storage.raw_text_dir {home.storage.raw_text}: no .txt" in last_lines(empty)
    assert "Stack Trace" not in empty.stderr and "Stack Trace" not in training.stderr
    assert empty.stderr.count("put text files there") == 2, "in the log and in the last line"
    assert "put text files there" in last_lines(empty)


@pytest.mark.slow
def test_a_part_of_the_lineage_can_run_alone(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    home.folders.current_evaluation.unlink()
    selected = dagster(home, "asset", "materialize", *MODULE, "--select", "checkpoint,evaluation", checkpoint={}, evaluation={})
    assert selected.returncode == 0, selected.stderr
    assert re.findall(r"(\w+) - STEP_START", selected.stderr) == ["checkpoint", "evaluation"]
    assert home.folders.current_evaluation.is_file()
    preparation: dict[str, Any] = {"raw_text": {}, "trained_tokenizer": {}, "tokenized_shards": {}}
    prepared = dagster(home, "job", "execute", *MODULE, "-j", "pretrain", "-o", "raw_text+", **preparation)
    assert prepared.returncode == 0, prepared.stderr
    assert re.findall(r"(\w+) - STEP_START", prepared.stderr) == list(preparation)


def test_every_run_configuration_in_the_documents_fits_the_job() -> None:
    documents = [ROOT / "README.md", ROOT / "deploy" / "README.md"]
    snippets = [text for path in documents for text in re.findall(r"```yaml\n(.*?)```", path.read_text(), flags=re.S)]
    configs = [config for config in map(yaml.safe_load, snippets) if "ops" in config]
    assert len(configs) >= 3
    for config in configs:
        assert dg.validate_run_config(defs.resolve_job_def("pretrain"), config)
        for asset in LINEAGE:
            name = asset.key.to_user_string()
            for option in config["ops"].get(name, {}).get("config", {}):
                assert option in asset.op.config_schema.config_type.fields, option  # type: ignore[union-attr]
