"""The sensor and the schedule that train automatically, on a real Dagster instance and real folders."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from pipeline.assets.raw_text import raw_text
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.assets.trained_tokenizer import trained_tokenizer
from pipeline.automation.retraining import Retraining
from pipeline.automation.sensors import new_raw_text, nightly_retraining
from pipeline.resources import Storage
from tests.pipeline.conftest import Home

HOUR = 3600.0


class Watcher:
    """Evaluates the sensor and the schedule as the daemon does, and keeps the cursor between ticks."""

    def __init__(self, storage: Storage, **options: Any) -> None:
        self.storage = storage
        self.retraining = Retraining(**options)
        (storage.folders.root / "dagster").mkdir(exist_ok=True)
        self.instance = dg.DagsterInstance.local_temp(str(storage.folders.root / "dagster"))
        self.cursor: str | None = None

    def tick(self) -> dg.RunRequest | str:
        """The run that a tick launches, or the reason why it skips."""
        resources = {"storage": self.storage, "retraining": self.retraining}
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursor, resources=resources) as context:
            (result,) = new_raw_text(context)
            self.cursor = context.cursor
        return result if isinstance(result, dg.RunRequest) else result.skip_message

    def launched(self) -> dg.RunRequest:
        """The run launched by two ticks."""
        self.tick()
        request = self.tick()
        assert isinstance(request, dg.RunRequest), request
        return request

    def hours_pass(self, hours: float) -> None:
        cursor = json.loads(self.cursor or "{}")
        self.cursor = json.dumps(cursor | {"launched_at": cursor["launched_at"] - hours * HOUR})

    def tonight(self) -> dg.RunRequest | str:
        resources = {"storage": self.storage, "retraining": self.retraining}
        with dg.build_schedule_context(instance=self.instance, resources=resources) as context:
            result = nightly_retraining(context)
        return result if isinstance(result, dg.RunRequest) else result.skip_message


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A textmill home with one raw file; the working directory is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "raw_text_data").mkdir()
    (tmp_path / "raw_text_data" / "first.txt").write_text("one")
    return tmp_path


@pytest.fixture
def watcher(home: Path) -> Watcher:
    return Watcher(Storage(home=str(home)))


def drop(home: Path, name: str, text: str = "more") -> None:
    (home / "raw_text_data" / name).write_text(text)


def test_text_that_is_unchanged_for_two_ticks_launches_one_run(watcher: Watcher) -> None:
    assert watcher.tick() == "1 new or changed files (3 bytes), 0 removed: waiting until they stop changing"
    assert isinstance(watcher.tick(), dg.RunRequest)
    watcher.hours_pass(2)
    assert str(watcher.tick()).startswith("a run was already launched for this text")


def test_a_growing_file_is_waited_for(watcher: Watcher, home: Path) -> None:
    for size in range(1, 4):
        drop(home, "growing.txt", "x" * size)
        assert str(watcher.tick()).endswith("waiting until they stop changing")
    assert isinstance(watcher.tick(), dg.RunRequest)


@pytest.mark.parametrize("change", ["added", "changed", "removed", "reverted"])
def test_each_change_launches_its_own_run(change: str, watcher: Watcher, home: Path) -> None:
    drop(home, "second.txt")
    second = home / "raw_text_data" / "second.txt"
    keys = {watcher.launched().run_key}
    watcher.hours_pass(2)
    if change == "added":
        drop(home, "third.txt")
    elif change == "changed":
        second.write_text("other")
    else:
        second.rename(home / "aside.txt")
    keys.add(watcher.launched().run_key)
    if change == "reverted":
        watcher.hours_pass(2)
        (home / "aside.txt").rename(second)
        keys.add(watcher.launched().run_key)
    assert len(keys) == (3 if change == "reverted" else 2), "Dagster drops a run whose key it knows"


def test_the_cursor_alone_survives_a_restart(watcher: Watcher, home: Path) -> None:
    watcher.launched()
    restarted = Watcher(watcher.storage)
    restarted.cursor = watcher.cursor
    assert "the next run may start in 60 minutes" in str(restarted.tick())
    restarted.hours_pass(1.01)
    assert str(restarted.tick()).startswith("a run was already launched for this text")


def test_a_broken_cursor_is_replaced(watcher: Watcher) -> None:
    watcher.cursor = "not json"
    assert isinstance(watcher.launched(), dg.RunRequest)


def test_the_minimum_interval_passes_between_two_runs(home: Path) -> None:
    watcher = Watcher(Storage(home=str(home)), min_hours_between_runs=3)
    watcher.launched()
    drop(home, "second.txt")
    watcher.hours_pass(2.5)
    assert watcher.tick() == "the next run may start in 30 minutes (min_hours_between_runs 3)"
    watcher.hours_pass(0.6)
    assert isinstance(watcher.launched(), dg.RunRequest)


def test_more_new_bytes_than_the_cap_launch_nothing_and_report_what_to_do(home: Path) -> None:
    watcher = Watcher(Storage(home=str(home)), max_new_bytes=1000)
    drop(home, "huge.txt", "x" * 998)
    for reason in (str((watcher.tick(), watcher.tick())[1]), str(watcher.tonight())):
        assert reason.startswith("2 new or changed files (1,001 bytes), 0 removed, more than max_new_bytes 1,000")
        assert "launch the job pretrain manually" in reason
    drop(home, "huge.txt", "x" * 997)
    assert isinstance(watcher.launched(), dg.RunRequest)


def test_a_training_in_progress_is_waited_for(watcher: Watcher) -> None:
    job = dg.GraphDefinition(name="pretrain").to_job()
    run = watcher.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    for reason in (watcher.tick(), watcher.tick(), watcher.tonight()):
        assert reason == f"waiting for run {run.run_id} of pretrain to end"
    watcher.instance.report_run_canceled(run)
    assert isinstance(watcher.launched(), dg.RunRequest)


def test_a_missing_or_empty_folder_is_reported_with_the_place_for_text(tmp_path: Path) -> None:
    watcher = Watcher(Storage(home=str(tmp_path)))
    folder = tmp_path / "raw_text_data"
    assert f"{folder}: no such folder; create it" in str(watcher.tick())
    folder.mkdir()
    assert watcher.tick() == watcher.tonight() == f"{folder}: no text in it yet; put text files there"


@pytest.mark.parametrize("place", ["home", "working directory"])
def test_runs_take_their_configuration_from_a_file(place: str, watcher: Watcher, home: Path) -> None:
    folder = (home if place == "home" else Path.cwd()) / "configs"
    folder.mkdir()
    (folder / "retrain.yaml").write_text("ops: {checkpoint: {config: {init_from: released, replay_share: 0.05}}}\n")
    expected = {"ops": {"checkpoint": {"config": {"init_from": "released", "replay_share": 0.05}}}}
    request = watcher.tonight()
    assert isinstance(request, dg.RunRequest)
    assert request.run_config == watcher.launched().run_config == expected


def test_the_sensor_watches_the_folder_that_the_run_will_read(watcher: Watcher, home: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (home / "configs").mkdir()
    (home / "configs" / "retrain.yaml").write_text(
        f"resources: {{storage: {{config: {{raw_text_dir: {elsewhere.as_uri()}}}}}}}\n"
    )
    assert "no text in it yet" in str(watcher.tick())
    (elsewhere / "text.txt").write_text("found")
    assert "1 new or changed files (5 bytes)" in str(watcher.tick())


def test_the_configuration_may_refer_to_environment_variables(
    watcher: Watcher, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "text.txt").write_text("found")
    (home / "configs").mkdir()
    (home / "configs" / "retrain.yaml").write_text("resources: {storage: {config: {raw_text_dir: {env: RAW_TEXT}}}}\n")
    monkeypatch.setenv("RAW_TEXT", str(elsewhere))
    assert "1 new or changed files (5 bytes)" in str(watcher.tick())
    monkeypatch.delenv("RAW_TEXT")
    with pytest.raises(
        Exception, match=r"storage\.config\.raw_text_dir of the run configuration refers to the environment variable RAW_TEXT"
    ):
        watcher.tick()


def test_a_configuration_that_is_not_yaml_is_reported(watcher: Watcher, home: Path) -> None:
    (home / "configs").mkdir()
    (home / "configs" / "retrain.yaml").write_text("ops: [")
    with pytest.raises(Exception, match=r"retrain\.yaml: not a run configuration in YAML"):
        watcher.tick()


def test_nothing_is_new_once_a_run_has_trained_on_it(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    home.materialize()  # the copied files have new inodes: they are read once more
    watcher = Watcher(home.storage)
    assert watcher.tick() == watcher.tick() == "nothing new: all 40 files are unchanged since they were read"
    assert watcher.tonight() == "nothing new: all 40 files are in the dataset that was trained on last"
    text = "\n".join(f"A line about the number {number}, which nobody has written before." for number in range(400))
    (home.storage.raw_text / "added.txt").write_text(text)
    assert isinstance(watcher.launched(), dg.RunRequest)
    assert isinstance(watcher.tonight(), dg.RunRequest)

    # Text that is prepared but not trained on is left to the schedule.
    home.materialize(raw_text, trained_tokenizer, tokenized_shards)
    watcher.hours_pass(2)
    assert str(watcher.tick()).startswith("nothing new")
    assert isinstance(watcher.tonight(), dg.RunRequest)
    home.materialize()
    assert str(watcher.tonight()).startswith("nothing new")
