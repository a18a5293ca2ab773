"""New text arrives and training continues from the released model."""

from typing import Any

import pytest

from llm_core.checkpoint import RunRecord
from llm_core.system import read_json, write_json
from pipeline.assets.checkpoint import checkpoint
from pipeline.cli import main as textmill
from tests.pipeline.conftest import Home

CONTINUE = {"init_from": "released", "replay_share": 0.25}


def write_news(home: Home) -> None:
    text = "\n".join(f"A line about the number {number}, written for the first time in this file." for number in range(600))
    (home.storage.raw_text / "news.txt").write_text(text)


def test_training_on_new_text_continues_from_the_released_model_and_replays_old_text(
    trained_home: tuple[Home, Any], clone: Any, capsys: Any
) -> None:
    home, first = clone(trained_home)
    write_news(home)
    result = home.materialize(checkpoint=CONTINUE, released_model={"min_improvement": -100})
    old, new = home.metadata(first, "checkpoint"), home.metadata(result, "checkpoint")
    assert new["parent_run_id"] == old["run_id"]
    shares = {record.data["group"]: record.data["share"] for record in new["mixture"].records}
    assert shares == {"seen before": 0.25, "new": 0.75}

    # One query returns what both runs have read, each from its own dataset.
    lineage = home.catalog.lineage(new["checkpoint_id"])
    runs = {(row["generation"], row["run_id"], row["step"], row["dataset_id"]) for row in lineage}
    assert runs == {(0, new["run_id"], 6, new["dataset_id"]), (1, old["run_id"], 6, old["dataset_id"])}
    assert {row["path"] for row in lineage if row["generation"] == 0} > {"news.txt"}
    assert "news.txt" not in {row["path"] for row in lineage if row["generation"] == 1}
    seen_by_parent = next(row["path"] for row in lineage if row["generation"] == 1)
    assert new["checkpoint_id"] in {row["checkpoint_id"] for row in home.catalog.usage(seen_by_parent)}
    assert old["checkpoint_id"] not in {row["checkpoint_id"] for row in home.catalog.usage("news.txt")}
    textmill(["lineage", new["checkpoint_id"], "--home", str(home.folders.root)])
    assert f"the weights of run {old['run_id']}" in capsys.readouterr().out

    # The new release was already trained on this text: there is nothing to train.
    again = home.metadata(home.materialize(checkpoint, checkpoint=CONTINUE), "checkpoint")
    assert (again["reused"], again["checkpoint_id"]) == (True, new["checkpoint_id"])


def test_another_configuration_continues_from_the_released_model_on_the_same_text(
    trained_home: tuple[Home, Any], clone: Any
) -> None:
    home, first = clone(trained_home)
    old = home.metadata(first, "checkpoint")
    reused = home.metadata(home.materialize(checkpoint, checkpoint=CONTINUE), "checkpoint")
    assert (reused["reused"], reused["run_id"]) == (True, old["run_id"])
    gentler = home.metadata(home.materialize(checkpoint, checkpoint=CONTINUE | {"learning_rate": 1e-4}), "checkpoint")
    assert (gentler["reused"], gentler["parent_run_id"]) == (False, old["run_id"])
    wider = home.materialize(checkpoint, expect_success=False, checkpoint={"init_from": "released", "hidden_size": 64})
    assert "hidden_size" in str([event.event_specific_data for event in wider.all_events if event.is_step_failure])


def test_without_a_released_model_training_starts_from_scratch_and_logs_why(
    trained_home: tuple[Home, Any], clone: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    home, first = clone(trained_home)
    expected = home.metadata(first, "checkpoint")
    released = read_json(home.storage.released)
    home.storage.released.unlink()
    made = home.metadata(home.materialize(checkpoint, checkpoint=CONTINUE), "checkpoint")
    assert made["checkpoint_id"] == expected["checkpoint_id"]
    assert made["started_from"] == "nothing: no model is released yet"
    assert "INFO - " in _line(capfd, "init_from released: training starts from nothing: no model is released yet")

    write_json(home.storage.released, released)
    record = home.folders.model(released["path"]).record
    write_json(record, read_json(record) | {"tokenizer_id": "another"})
    made = home.metadata(home.materialize(checkpoint, checkpoint=CONTINUE), "checkpoint")
    assert made["started_from"].startswith(
        f"nothing: the released model {released['path']} has the tokenizer another, the dataset"
    )
    assert "WARNING - " in _line(capfd, "init_from released: training starts from nothing: the released model")


def _line(capfd: pytest.CaptureFixture[str], text: str) -> str:
    (line,) = [line for line in capfd.readouterr().err.splitlines() if text in line]
    return line


def test_sources_are_weighted_from_the_launchpad(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    options = {"source_weights": {".": 1.0, "more": 1.0}, "max_source_epochs": 1000.0}
    result = home.materialize(checkpoint, checkpoint=options)
    groups = [record.data for record in home.metadata(result, "checkpoint")["mixture"].records]
    assert [(group["group"], group["windows_read"]) for group in groups] == [(".", 12), ("more", 12)]


def test_minutes_are_planned_once_for_each_text_and_parent(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    budget = {"train_minutes": 0.2, "max_steps": None, "batch_size": None, "learning_rate": None, "max_source_epochs": 50}
    first = home.materialize(checkpoint, checkpoint=budget)
    assert any("measuring this machine" in message for message in home.messages(first))
    assert any(message.startswith("machine: ") and "expected quality" in message for message in home.messages(first))
    planned = home.metadata(first, "checkpoint")

    again = home.materialize(checkpoint, checkpoint=budget)
    assert not any("measuring this machine" in message for message in home.messages(again))
    assert home.metadata(again, "checkpoint")["run_id"] == planned["run_id"]
    assert home.metadata(again, "checkpoint")["reused"]

    # From a released model: its shape, and once trained there is nothing left to do.
    open_shape = budget | CONTINUE | {"hidden_size": None, "num_layers": None, "num_heads": None}
    write_news(home)
    continued = home.materialize(checkpoint=open_shape, released_model={"min_improvement": -100})
    config = RunRecord.read(home.folders.run(home.metadata(continued, "checkpoint")["run_id"]).root)
    assert config.train_config(home.folders.run(config.run_id).root)["hidden_size"] == 32
    repeated = home.metadata(home.materialize(checkpoint, checkpoint=open_shape), "checkpoint")
    assert (repeated["reused"], repeated["run_id"]) == (True, config.run_id)
