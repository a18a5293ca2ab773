"""Where a run resumes, and what happens to the other files in its folder."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from llm_core.checkpoint import newest_valid
from llm_core.layout import RunFolder
from llm_core.system import read_json, write_json
from llm_core.training import read_metrics
from tests.support.training import assert_same_state, make_trainer, run_train, train_lines

SAVING: dict[str, Any] = {"save_interval": 2, "keep_checkpoints": 5}


def steps(run_dir: Path) -> list[int]:
    return [int(path.name.split("_")[2].split(".")[0]) for path in RunFolder(run_dir).checkpoint_manifests()]


def mark_as_running(run_dir: Path) -> None:
    """Leaves the folder as a kill does between the last save and the run's end."""
    write_json(run_dir / "run.json", read_json(run_dir / "run.json") | {"status": "running"})


def test_damaged_newer_checkpoints_are_moved_away_and_do_not_outlive_the_new_ones(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "uninterrupted", **SAVING)
    run_train(data_dir, tmp_path / "run", **SAVING)
    for step in (8, 10):
        os.truncate(tmp_path / f"run/checkpoint_step_{step}.pt", 100)
    done = run_train(data_dir, tmp_path / "run", resume="auto", save_interval=2, keep_checkpoints=2)
    assert "resumed from" in done.stderr and "at step 6" in done.stderr
    assert "moved a later checkpoint out of the way" in done.stderr
    assert {path.name for path in (tmp_path / "run/set_aside").glob("*.pt")} == {"checkpoint_step_8.pt", "checkpoint_step_10.pt"}
    assert steps(tmp_path / "run") == [10, 8], "the two checkpoints of this run"
    assert newest_valid(tmp_path / "run")[1] == []
    assert_same_state(tmp_path / "uninterrupted/checkpoint_step_10.pt", tmp_path / "run/checkpoint_step_10.pt")


def test_resuming_from_an_older_checkpoint_repeats_the_later_steps(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, **SAVING)
    before = train_lines(tmp_path)
    run_train(data_dir, tmp_path, checkpoint=tmp_path / "checkpoint_step_4.pt", **SAVING)
    assert train_lines(tmp_path) == before
    assert steps(tmp_path) == [10, 8, 6, 4, 2]


def test_the_folder_of_another_run_is_left_alone(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "one", **SAVING)
    run_train(data_dir, tmp_path / "other", seed=7, **SAVING)
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.is_file()}
    done = run_train(
        data_dir, tmp_path / "one", check=False, seed=7, checkpoint=tmp_path / "other/checkpoint_step_2.pt", **SAVING
    )
    assert done.returncode == 2
    assert "has the checkpoints of run" in done.stderr
    after = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.is_file()}
    assert after.keys() - {".lock"} == before.keys() - {".lock"}
    assert all(after[name] == before[name] for name in before if name != ".lock")


def test_a_kill_between_a_checkpoint_and_its_metrics_line_loses_neither(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, **SAVING)
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [json.dumps(line) + "\n" for line in lines if (line["kind"], line["step"]) != ("checkpoint", 10)]
    path.write_text("".join(kept))
    mark_as_running(tmp_path)
    (tmp_path / ".checkpoint_step_12.pt.1234.tmp").write_bytes(b"half a checkpoint")
    run_train(data_dir, tmp_path, resume="auto", **SAVING)
    logged = [line["step"] for line in read_metrics(path) if line["kind"] == "checkpoint"]
    assert sorted(logged) == [2, 4, 6, 8, 10]
    assert not list(tmp_path.glob(".*.tmp")), "half-written files of a killed process are deleted"


def test_a_continued_run_resumes_after_its_parent_is_gone(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "parent", max_steps=2)
    options: dict[str, Any] = {"init_from": tmp_path / "parent", **SAVING}
    run_train(data_dir, tmp_path / "uninterrupted", **options)
    (tmp_path / "parent").rename(tmp_path / "moved")
    run_train(data_dir, tmp_path / "other", checkpoint=tmp_path / "uninterrupted/checkpoint_step_6.pt", **options)
    assert_same_state(tmp_path / "uninterrupted/checkpoint_step_10.pt", tmp_path / "other/checkpoint_step_10.pt")


@pytest.mark.filterwarnings("ignore:--precision")
def test_rule_17_the_loss_scale_is_restored(data_dir: Path, tmp_path: Path) -> None:
    saved = make_trainer(data_dir, precision="fp16", batch_size=4)
    saved.train_step()
    saved.scaler.update(1024.0)
    resumed = make_trainer(data_dir, precision="fp16", batch_size=4)
    resumed.restore(tmp_path, saved.state())
    assert resumed.scaler.state_dict() == saved.scaler.state_dict()
    assert resumed.scaler.get_scale() == 1024.0


def test_rule_18_the_learning_rate_after_a_resume_is_that_of_the_step(data_dir: Path, tmp_path: Path) -> None:
    saved = make_trainer(data_dir)
    for _ in range(4):
        saved.train_step()
    resumed = make_trainer(data_dir)
    resumed.restore(tmp_path, saved.state())
    expected = saved.train_step()
    assert resumed.train_step() == expected
    assert {group["lr"] for group in resumed.optimizers[0].param_groups} == {expected.learning_rate}


def test_a_checkpoint_without_its_manifest_is_refused_with_a_remedy(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "run", max_steps=1)
    (tmp_path / "run/checkpoint_step_1.pt.json").unlink()
    for name, reason in (("checkpoint_step_1.pt", "it has no manifest (.json)"), ("checkpoint_step_7.pt", "no such file")):
        done = run_train(data_dir, tmp_path / "else", check=False, checkpoint=tmp_path / "run" / name)
        assert done.returncode == 2
        assert reason in done.stderr


def test_a_damaged_metrics_line_is_refused_and_a_missing_one_is_reported(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, **SAVING)
    path = tmp_path / "metrics.jsonl"
    intact = path.read_bytes()
    mark_as_running(tmp_path)
    for damaged in (intact.replace(b'"step": 3', b'"step": 7', 1), intact.replace(b'"kind"', b'"ki\xffd"', 1)):
        path.write_bytes(damaged)
        done = run_train(data_dir, tmp_path, check=False, resume="auto", **SAVING)
        assert done.returncode == 3
        assert re.search(r"metrics\.jsonl: line \d+ is damaged", done.stderr) and "Traceback" not in done.stderr
    path.write_bytes(b"".join(line for line in intact.splitlines(keepends=True) if b'"step": 3' not in line))
    done = run_train(data_dir, tmp_path, resume="auto", **SAVING)
    assert "the metrics of 1 earlier steps are missing, the first of them is step 3" in done.stderr


def test_metrics_of_an_older_version_are_read_without_checksums(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.5}\n{"kind": "tr')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 1, "loss": 2.5}]


def test_starting_a_finished_run_changes_no_file(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, max_steps=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != ".lock"}
    again = run_train(data_dir, tmp_path, max_steps=2, resume="auto")
    assert "has finished all 2 steps: nothing left to do" in again.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != ".lock"} == before


def test_a_run_killed_after_its_last_save_is_finished_by_the_next_start(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, max_steps=2)
    mark_as_running(tmp_path)
    run_train(data_dir, tmp_path, max_steps=2, resume="auto")
    assert read_json(tmp_path / "run.json")["status"] == "finished"
