"""A training is complete once its model is released or rejected; a run that fails before that is reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.storage.tags import RETRY_ON_ASSET_OR_OP_FAILURE_TAG

from pipeline.artifacts.pointers import find_current
from pipeline.artifacts.release import is_decided
from pipeline.assets import checks
from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.evaluation import evaluation
from pipeline.assets.released_model import released_model
from pipeline.definitions import defs
from pipeline.resources import Storage
from tests.pipeline.automation.test_sensors import Watcher
from tests.pipeline.conftest import TINY, Home

ADDED = "\n".join(f"A line about the number {number}, which nobody has written before." for number in range(400))


@pytest.fixture
def watched(trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]]) -> tuple[Home, Watcher]:
    """A home with a model released on all of its text, and the sensor on the same Dagster instance."""
    home, _ = clone(trained_home)
    home.materialize()  # the copied files have new inodes: they are read once more
    return home, Watcher(home.storage)


def config(home: Home) -> dict[str, Any]:
    ops = {name: {"config": dict(options)} for name, options in TINY.items()}
    return {"ops": ops, "resources": {"storage": {"config": {"home": home.storage.home}}}}


def pretrain() -> dg.JobDefinition:
    return defs.resolve_job_def("pretrain")


def test_text_whose_evaluation_failed_is_trained_on_again_and_the_sensor_reports_the_failure(
    watched: tuple[Home, Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, watcher = watched
    (home.storage.raw_text / "added.txt").write_text(ADDED)

    def fail(*_: object) -> checks.Checks:
        raise RuntimeError("no figures today")

    with monkeypatch.context() as broken:
        broken.setattr("pipeline.assets.evaluation.check_evaluation", fail)
        failed = dg.execute_job(dg.reconstructable(pretrain), watcher.instance, run_config=config(home))
    assert not failed.success
    message = str(watcher.tick())
    assert message.startswith("nothing new: all 41 files are unchanged since they were read; ")
    assert f"run {failed.run_id} failed at evaluation: RuntimeError: no figures today" in message
    assert "launch pretrain manually" in message
    assert isinstance(watcher.tonight(), dg.RunRequest), "the schedule retries"

    assert dg.execute_job(dg.reconstructable(pretrain), watcher.instance, run_config=config(home)).success
    assert watcher.tick() == "nothing new: all 41 files are unchanged since they were read"
    assert str(watcher.tonight()).startswith("nothing new")


def test_a_run_that_failed_before_reading_the_text_is_reported_too(
    watched: tuple[Home, Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, watcher = watched
    (home.storage.raw_text / "added.txt").write_text(ADDED)
    watcher.launched()
    with monkeypatch.context() as broken:
        broken.setattr("pipeline.assets.raw_text.take_snapshot", lambda *_: 1 / 0)
        failed = dg.execute_job(dg.reconstructable(pretrain), watcher.instance, run_config=config(home))
    watcher.hours_pass(2)
    message = str(watcher.tick())
    assert message.startswith("a run was already launched for this text (1 new")
    assert f"run {failed.run_id} failed at raw_text" in message


@pytest.mark.slow
def test_a_model_that_is_not_better_is_a_decision_and_each_line_has_its_own(watched: tuple[Home, Watcher]) -> None:
    home, watcher = watched
    (home.storage.raw_text / "added.txt").write_text(ADDED)
    assert not home.metadata(home.materialize(checkpoint={"learning_rate": 1e-6}), "released_model")["promoted"]
    assert is_decided(home.storage)
    assert str(watcher.tonight()).startswith("nothing new")
    other = Storage(home=home.storage.home, release_line="other")
    assert not is_decided(other)
    assert isinstance(Watcher(other).tonight(), dg.RunRequest)
    (home.folders.root / "configs").mkdir()
    (home.folders.root / "configs" / "retrain.yaml").write_text("resources: {storage: {config: {release_line: other}}}\n")
    assert isinstance(watcher.tonight(), dg.RunRequest), "the release line of automatic runs"


def test_a_release_line_with_other_preparation_keeps_the_decisions_of_other_lines(watched: tuple[Home, Watcher]) -> None:
    home, watcher = watched
    other = Home(home.folders.root, watcher.instance, release_line="other")
    other.materialize(trained_tokenizer={"vocab_size": 450})
    for storage in (home.storage, other.storage):
        assert is_decided(storage)
        assert str(Watcher(storage).tick()) == "nothing new: all 40 files are unchanged since they were read"


def test_a_checkpoint_whose_check_failed_is_not_the_current_one(watched: tuple[Home, Watcher], monkeypatch: Any) -> None:
    home, _ = watched
    before = find_current(home.folders.current_checkpoint)
    monkeypatch.setattr(checks, "MAX_SKIPPED_SHARE", -1.0)
    failed = home.materialize(checkpoint, evaluation, expect_success=False, checkpoint={"seed": 3})
    assert "losses_are_finite" in str([event.event_specific_data for event in failed.all_events if event.is_step_failure])
    assert find_current(home.folders.current_checkpoint) == before


def test_a_failed_release_decides_nothing(watched: tuple[Home, Watcher]) -> None:
    home, _ = watched
    home.storage.decision.unlink()
    home.storage.released.unlink()
    home.make_the_evaluation_not_finite()
    home.materialize(released_model, expect_success=False)
    assert not is_decided(home.storage)


def asset_graph(*assets: dg.AssetsDefinition) -> dg.JobDefinition:
    """What "Materialize" in the asset graph launches."""
    return defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={asset.key for asset in assets})


def test_a_training_launched_in_the_asset_graph_is_waited_for(watched: tuple[Home, Watcher]) -> None:
    _, watcher = watched
    started = dg.DagsterRunStatus.STARTED
    other = watcher.instance.create_run_for_job(
        asset_graph(evaluation), asset_selection=frozenset({evaluation.key}), status=started
    )
    assert str(watcher.tick()).startswith("nothing new"), "a run that does not train is not waited for"
    run = watcher.instance.create_run_for_job(
        asset_graph(checkpoint), asset_selection=frozenset({checkpoint.key}), status=started
    )
    assert watcher.tick() == watcher.tonight() == f"waiting for run {run.run_id} of __ASSET_JOB to end"
    watcher.instance.report_run_canceled(run)
    watcher.instance.report_run_canceled(other)
    assert str(watcher.tick()).startswith("nothing new")


def test_a_run_of_the_asset_graph_reports_why_it_failed_and_is_not_retried_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    monkeypatch.setattr("atexit.register", lambda _, *text: printed.extend(text))
    with dg.DagsterInstance.ephemeral() as instance:
        result = asset_graph(evaluation).execute_in_process(
            {"resources": {"storage": {"config": {"home": str(tmp_path)}}}}, instance=instance, raise_on_error=False
        )
        run = instance.get_run_by_id(result.run_id)
    assert run is not None and run.job_name == "__ASSET_JOB" and run.status == dg.DagsterRunStatus.FAILURE
    assert run.tags[RETRY_ON_ASSET_OR_OP_FAILURE_TAG] == "false"
    assert ["materialize the asset 'checkpoint' first" in text for text in printed] == [True]
