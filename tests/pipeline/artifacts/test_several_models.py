"""Models of several sizes in one home: concurrent runs use their own artifacts, and each size has its own release line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from llm_core.errors import UserError
from llm_core.system import read_json
from pipeline.artifacts.release import released_model as find_released_model
from pipeline.assets import checks
from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.evaluation import evaluation
from pipeline.assets.released_model import released_model
from pipeline.definitions import defs
from pipeline.resources import Storage
from tests.pipeline.assets.test_lineage import LINEAGE_TO_CHECKPOINT, ids
from tests.pipeline.conftest import TINY, Home

OTHER: dict[str, dict[str, Any]] = {
    "raw_text": {"val_fraction": 0.3},
    "trained_tokenizer": {"vocab_size": 350},
    "tokenized_shards": {"max_length": 64},
    "checkpoint": {"hidden_size": 48},
}

STAGES = ["raw_text", "trained_tokenizer", "tokenized_shards", "checkpoint", "evaluation"]

# Runs the lineage in a separate process, with the model's width and the window length on the command line.
_RUN = """
import sys
from pathlib import Path
import dagster as dg
from tests.pipeline.conftest import Home
root, dagster_home, width, length = sys.argv[1:]
with dg.DagsterInstance.local_temp(dagster_home) as instance:
    home = Home(Path(root), instance, release_line=f"width{width}")
    home.materialize(tokenized_shards={"max_length": int(length)}, checkpoint={"hidden_size": int(width), "max_steps": 60})
"""


def instance(folder: Path) -> dg.DagsterInstance:
    folder.mkdir(exist_ok=True)
    return dg.DagsterInstance.local_temp(str(folder))


@pytest.mark.slow
def test_a_run_overtaken_at_every_step_makes_the_same_artifacts_as_alone(
    make_home: Callable[[], Home],
    trained_home: tuple[Home, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    home = make_home()
    other = Home(home.folders.root, instance(tmp_path / "other"), release_line="other")
    overtaking: list[str] = []
    overtaken: list[str] = []

    def overtake(stage: str) -> None:
        """Runs the whole lineage with other options while the stage is being checked."""
        original = getattr(checks, f"check_{stage}")

        def check(*arguments: Any) -> checks.Checks:
            if not overtaking:
                overtaking.append(stage)
                other.materialize(**OTHER)
                overtaken.append(overtaking.pop())
            return original(*arguments)

        monkeypatch.setattr(f"pipeline.assets.{stage}.check_{stage}", check)

    for stage in STAGES:
        overtake(stage)
    result = home.materialize()
    assert overtaken == STAGES
    alone, expected = trained_home
    assert ids(home, result) == ids(alone, expected)
    assert home.metadata(result, "evaluation")["evaluation_id"] == alone.metadata(expected, "evaluation")["evaluation_id"]
    config = read_json(home.folders.run(home.metadata(result, "checkpoint")["run_id"]).config)
    assert (config["max_length"], config["hidden_size"]) == (32, 32)
    assert len(home.catalog.query("SELECT * FROM training_runs")) == 2


@pytest.mark.slow
def test_two_concurrent_runs_train_two_sizes_from_one_dataset(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]], tmp_path: Path
) -> None:
    home, first = clone(trained_home)
    (tmp_path / "dagster").mkdir()
    with instance(tmp_path / "dagster") as made:  # two processes cannot create the same instance at once
        assert not made.get_run_records() and not made.all_asset_keys()
    sizes = {64: 32, 48: 64}
    started = [
        subprocess.Popen([sys.executable, "-c", _RUN, str(home.folders.root), str(tmp_path / "dagster"), str(width), str(length)])
        for width, length in sizes.items()
    ]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    with instance(tmp_path / "dagster") as shared:
        runs = shared.get_run_records()
        assert [record.dagster_run.status for record in runs] == [dg.DagsterRunStatus.SUCCESS] * 2
        assert max(r.start_time for r in runs if r.start_time) < min(r.end_time for r in runs if r.end_time), "at the same time"
    rows = home.catalog.query(
        "SELECT run_id, dataset_id, config->>'hidden_size' AS width, config->>'max_length' AS length FROM training_runs "
        "WHERE steps_done = 60"
    )
    assert {(int(row["width"]), int(row["length"])) for row in rows} == set(sizes.items())
    assert {row["dataset_id"] for row in rows} == {ids(home, first)["tokenized_shards"]}, "both use the existing dataset"
    for row in rows:
        run_dir = home.folders.checkpoints / row["run_id"]
        (evaluated,) = [read_json(path) for path in run_dir.glob("evaluation_step_60_*.json")]
        released = find_released_model(Storage(home=home.storage.home, release_line=f"width{row['width']}"))
        assert released is not None
        assert {evaluated["run_id"], released.run_id, read_json(run_dir / "run.json")["run_id"]} == {row["run_id"]}
        assert released.metrics["bits_per_byte"] == next(
            m["value"] for m in evaluated["metrics"] if m["metric"] == "bits_per_byte"
        )
        assert {entry["run_id"] for entry in home.catalog.lineage(evaluated["checkpoint_id"])} == {row["run_id"]}


def pretrain() -> dg.JobDefinition:
    return defs.resolve_job_def("pretrain")


@pytest.mark.slow
def test_a_retry_continues_from_the_artifacts_of_the_failed_run(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, first = clone(trained_home)
    config = {
        "ops": {name: {"config": options} for name, options in TINY.items()},
        "resources": {"storage": {"config": {"home": home.storage.home}}},
    }
    with instance(tmp_path / "dagster") as shared:
        with monkeypatch.context() as broken:
            broken.setattr("pipeline.assets.evaluation.check_evaluation", lambda *_: 1 / 0)
            failed = dg.execute_job(dg.reconstructable(pretrain), shared, run_config=config)
        assert not failed.success
        home.materialize(checkpoint, evaluation, checkpoint={"hidden_size": 48})
        options = dg.ReexecutionOptions.from_failure(failed.run_id, shared)
        retried = dg.execute_job(dg.reconstructable(pretrain), shared, run_config=config, reexecution_options=options)
        assert retried.success
        (evaluated,) = [event for event in retried.all_events if event.is_step_materialization and event.step_key == "evaluation"]
        assert evaluated.materialization.metadata["checkpoint_id"].value == home.metadata(first, "checkpoint")["checkpoint_id"]
        assert not [event for event in retried.all_events if event.is_step_materialization and event.step_key == "checkpoint"]


@pytest.mark.slow
def test_a_run_of_part_of_the_lineage_uses_its_own_artifacts(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, first = clone(trained_home)
    target, original = "pipeline.assets.checkpoint.check_checkpoint", checks.check_checkpoint

    def overtaken(*arguments: Any) -> checks.Checks:
        monkeypatch.setattr(target, original)
        home.materialize(*LINEAGE_TO_CHECKPOINT, **OTHER)
        return original(*arguments)

    monkeypatch.setattr(target, overtaken)
    part = home.materialize(checkpoint, evaluation, checkpoint={"seed": 7})
    trained, evaluated = (home.metadata(part, asset) for asset in ("checkpoint", "evaluation"))
    assert evaluated["run_id"] == trained["run_id"]
    assert evaluated["dataset_id"] == trained["dataset_id"] == ids(home, first)["tokenized_shards"]


@pytest.mark.slow
def test_each_release_line_is_compared_only_with_its_own_release(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]]
) -> None:
    home, first = clone(trained_home)
    worse = {"checkpoint": {"learning_rate": 1e-6}}
    assert not home.metadata(home.materialize(**worse), "released_model")["promoted"], "the default line has a better model"
    home.storage = Storage(home=home.storage.home, release_line="slow")
    slow = home.materialize(**worse)
    verdict = home.metadata(slow, "released_model")
    assert verdict["promoted"]
    assert verdict["reason"].startswith("first release")
    assert read_json(home.folders.models / "released_slow.json")["path"] == verdict["model_id"]
    assert read_json(home.folders.models / "released.json")["path"] == ids(home, first)["released_model"]
    continued = home.materialize(checkpoint, checkpoint=worse["checkpoint"] | {"init_from": "released"})
    assert home.metadata(continued, "checkpoint")["run_id"] == home.metadata(slow, "checkpoint")["run_id"]
    better = home.materialize(checkpoint, evaluation, released_model)
    assert home.metadata(better, "released_model")["promoted"], "better than the release of this line"
    with pytest.raises(UserError, match="release_line"):
        Storage(release_line="../elsewhere").released  # noqa: B018
