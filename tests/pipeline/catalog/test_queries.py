"""Rule 37: from a checkpoint to its raw text and back; the `textmill` command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.corpus import take_snapshot
from llm_core.errors import DataError, UserError
from llm_core.layout import Home
from llm_core.system import read_json, write_json
from pipeline.artifacts.pointers import set_current
from pipeline.catalog.catalog import Catalog
from tests.support.artifacts import NASTY, Artifacts, document_id, python
from tests.support.corpora import HALF, fill


def test_rule_37_one_query_returns_everything_a_checkpoint_was_made_from(catalog: Catalog) -> None:
    rows = catalog.lineage(document_id("run2")[:16])
    seen = [NASTY[0], NASTY[2], NASTY[4]]
    assert {row["document_id"] for row in rows} == {document_id(text) for text in seen}, "not what later steps read"
    assert {row["path"] for row in rows} == {*seen, "copy.txt"}, "every raw file that holds the text"
    for row in rows:
        assert (row["tokenizer_id"], row["dataset_id"], row["snapshot_id"]) == ("tok", "data", "snap")
        assert (json.loads(row["config"]), row["code_version"], row["seed"]) == ({"learning_rate": 0.001}, "0.1.0", 1337)
    last = catalog.lineage(document_id("run4")[:16])
    assert {row["document_id"] for row in last} == {document_id(text) for text in NASTY[:-1]}, "never held-out text"


def test_rule_37_one_query_returns_the_checkpoints_that_saw_a_text(catalog: Catalog) -> None:
    steps = {text: [row["step"] for row in catalog.usage(document_id(text))] for text in NASTY}
    assert steps == {text: [2, 4] if row % 2 == 0 else [4] for row, text in enumerate(NASTY[:-1])} | {NASTY[-1]: []}
    assert [row["step"] for row in catalog.usage("copy.txt")] == [2, 4], "a copy counts as its original"


def test_unrecorded_artifacts_are_reported_as_such(catalog: Catalog) -> None:
    with pytest.raises(UserError, match="nope: no checkpoint, run or model in the catalog"):
        catalog.checkpoint_id("nope")
    with pytest.raises(UserError, match=r"nope\.txt: neither a document id nor the path of a raw file"):
        catalog.usage("nope.txt")


def test_the_progress_of_a_running_training_comes_from_its_metrics(artifacts: Artifacts, tmp_path: Path) -> None:
    run_dir = artifacts.run("run", "data", "tok", {})
    state = read_json(run_dir / "run.json")
    write_json(run_dir / "run.json", state | {"status": "running", "steps_done": 2, "tokens_seen": 200})
    catalog = Catalog(tmp_path / "catalog.duckdb")
    catalog.record_run(run_dir)
    (row,) = catalog.runs()
    assert (row["status"], row["steps_done"], row["tokens_seen"]) == ("running", 4, 400)
    write_json(run_dir / "run.json", state | {"status": "preempted", "steps_done": 2, "tokens_seen": 200})
    catalog.record_run(run_dir)
    (row,) = catalog.runs()
    assert (row["status"], row["steps_done"], row["tokens_seen"]) == ("preempted", 2, 200), "where a resume continues"


def test_a_checkpoint_is_found_by_its_run_or_a_prefix_of_its_id(catalog: Catalog) -> None:
    first, last = (document_id(f"run{step}")[:16] for step in (2, 4))
    assert catalog.checkpoint_id(first) == first
    assert catalog.checkpoint_id(first[:6]) == first
    assert catalog.checkpoint_id("run") == last, "the last of the run"
    (model,) = catalog.query("SELECT model_id, checkpoint_id FROM models")
    assert catalog.checkpoint_id(model["model_id"]) == model["checkpoint_id"]
    with pytest.raises(UserError, match="matches 2 checkpoints"):
        catalog.checkpoint_id("")


def test_a_gap_in_the_records_does_not_hide_the_rest_of_a_lineage(artifacts: Artifacts, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "gaps.duckdb")
    catalog.record_run(artifacts.home / "checkpoints" / "run")
    rows = catalog.lineage(document_id("run2")[:16])
    assert {row["document_id"] for row in rows} == {document_id(text) for text in (NASTY[0], NASTY[2], NASTY[4])}
    assert {(row["seed"], row["path"]) for row in rows} == {(1337, None)}


def test_a_checkpoint_that_was_not_trained_on_text_has_a_lineage(artifacts: Artifacts, tmp_path: Path) -> None:
    run_dir = artifacts.run("untrained", "data", "tok", {NASTY[0]: 3})
    catalog = Catalog(tmp_path / "catalog.duckdb")
    catalog.record_run(run_dir)
    (row,) = catalog.lineage(document_id("untrained2")[:16])
    assert (row["document_id"], row["tokenizer_id"], row["seed"]) == (None, "tok", 1337)


def textmill(*arguments: str, home: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TEXTMILL_HOME"}
    if home is not None:
        environment["TEXTMILL_HOME"] = str(home)
    return subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True, env=environment)


def test_the_command_shows_lineage_usage_and_runs(catalog: Catalog, artifacts: Artifacts) -> None:
    lineage = textmill("lineage", document_id("run2")[:16], "--home", str(artifacts.home))
    assert lineage.returncode == 0, lineage.stderr
    for expected in ("1337", "tok", "snap", "learning_rate", document_id(NASTY[0]), "two\\nlines.txt", "copy.txt"):
        assert expected in lineage.stdout
    usage = textmill("--home", str(artifacts.home), "usage", NASTY[1])
    assert [line.split()[:3] for line in usage.stdout.splitlines()[2:]] == [[document_id("run4")[:16], "run", "4"]]
    assert textmill("usage", NASTY[-1], home=artifacts.home).stdout == f"no checkpoint was trained on {NASTY[-1]}\n"
    runs = textmill("runs", home=artifacts.home)
    (row,) = [line.split() for line in runs.stdout.splitlines()[2:] if "2.2500" in line]
    assert row[row.index("2.2500") + 1] == "data", "the dataset that it was measured on"


def test_the_dataset_beside_bits_per_byte_is_that_of_the_newest_evaluation(catalog: Catalog, artifacts: Artifacts) -> None:
    path = next(artifacts.home.glob("checkpoints/run/evaluation*.json"))
    result = read_json(path)
    for entry in result["metrics"]:
        entry["value"] = 2.5
    later = result | {"evaluation_id": "later", "dataset_id": "0123456789abcdef", "created_at": "2027-01-01T00:00:00+00:00"}
    write_json(path.with_name("evaluation_later.json"), later)
    catalog.record_evaluation(path.with_name("evaluation_later.json"))
    (row,) = [row for row in catalog.runs() if row["run_id"] == "run"]
    assert (row["bits_per_byte"], row["evaluated_on"], row["dataset_id"]) == (2.5, "0123456789abcdef", "data")
    shown = textmill("runs", home=artifacts.home).stdout
    assert "2.5000         01234567 " in shown


def test_the_command_says_of_a_quarantined_file_why_no_checkpoint_has_seen_it(
    catalog: Catalog, artifacts: Artifacts, tmp_path: Path
) -> None:
    fill(tmp_path / "raw")
    (tmp_path / "raw" / "zeros.txt").write_bytes(bytes(9))
    prepared = Home(artifacts.home).prepared
    snapshot = take_snapshot(tmp_path / "raw", prepared.root, HALF)
    set_current(prepared.current_snapshot, prepared.snapshot(snapshot.snapshot_id))
    shown = textmill("usage", "zeros.txt", home=artifacts.home).stdout
    assert shown == "no checkpoint was trained on zeros.txt: the file is quarantined (binary, NUL at byte 0)\n"
    unknown = textmill("usage", "nope.txt", home=artifacts.home)
    assert unknown.returncode == UserError.exit_code
    assert "nope.txt: neither a document id nor the path of a raw file" in unknown.stderr


def test_the_command_rebuilds_the_catalog_and_lists_skipped_files(artifacts: Artifacts) -> None:
    done = textmill("catalog", "rebuild", "--home", str(artifacts.home))
    assert done.returncode == 0, done.stderr
    assert "0 artifact(s) skipped" in done.stdout
    (artifacts.home / "models" / "model" / "textmill.json").write_text("{")
    partly = textmill("catalog", "rebuild", home=artifacts.home)
    assert partly.returncode == DataError.exit_code
    assert "textmill.json" in partly.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("lineage", "nope"), 2, "no such catalog"),
        (("catalog", "rebuild"), 2, "no prepared data, runs or models in it"),
        (("gc",), 2, "no prepared data, runs or models in it"),
        (("usage",), 2, "required"),
    ],
)
def test_a_command_that_cannot_succeed_explains_why(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    done = textmill(*arguments, "--home", str(tmp_path / "nowhere"))
    assert (done.returncode, message in done.stderr) == (code, True)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_the_command_starts_without_dagster_and_torch() -> None:
    program = "import sys, pipeline.cli; print([name for name in ('dagster', 'torch', 'matplotlib') if name in sys.modules])"
    assert python(program).communicate()[0] == "[]\n"
