"""Where a run goes on, and what becomes of what lies in its folder."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from llm_core.checkpoint_files import checkpoint_manifests, newest_valid
from llm_core.files import read_json, write_json
from llm_core.runlog import read_metrics
from tests.llm_core.training import assert_same_state, make_trainer, run_train, train_lines

SAVING: dict[str, Any] = {"save_interval": 2, "keep_checkpoints": 5}


def steps(run_dir: Path) -> list[int]:
    return [int(path.name.split("_")[2].split(".")[0]) for path in checkpoint_manifests(run_dir)]


def killed_at_the_end(run_dir: Path) -> None:
    """As a kill leaves it that comes after the last save, but before the run is said to have finished."""
    write_json(run_dir / "run.json", read_json(run_dir / "run.json") | {"status": "running"})


def test_damaged_newer_checkpoints_are_set_aside_and_do_not_outlive_the_new_ones(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path / "whole", **SAVING)
    run_train(processed_dir, tmp_path / "run", **SAVING)
    for step in (8, 10):
        os.truncate(tmp_path / f"run/checkpoint_step_{step}.pt", 100)
    done = run_train(processed_dir, tmp_path / "run", resume="auto", save_interval=2, keep_checkpoints=2)
    assert "resumed from" in done.stderr and "at step 6" in done.stderr
    assert "set aside, being of a later step" in done.stderr
    assert {path.name for path in (tmp_path / "run/set_aside").glob("*.pt")} == {"checkpoint_step_8.pt", "checkpoint_step_10.pt"}
    assert steps(tmp_path / "run") == [10, 8], "the newest two are those that were just saved"
    assert newest_valid(tmp_path / "run")[1] == []
    assert_same_state(tmp_path / "whole/checkpoint_step_10.pt", tmp_path / "run/checkpoint_step_10.pt")


def test_going_back_to_an_older_checkpoint_repeats_what_came_after_it(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path, **SAVING)
    before = train_lines(tmp_path)
    run_train(processed_dir, tmp_path, checkpoint=tmp_path / "checkpoint_step_4.pt", **SAVING)
    assert train_lines(tmp_path) == before
    assert steps(tmp_path) == [10, 8, 6, 4, 2]


def test_the_folder_of_another_run_is_left_alone(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path / "one", **SAVING)
    run_train(processed_dir, tmp_path / "other", seed=7, **SAVING)
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.is_file()}
    done = run_train(
        processed_dir, tmp_path / "one", check=False, seed=7, checkpoint=tmp_path / "other/checkpoint_step_2.pt", **SAVING
    )
    assert done.returncode == 2
    assert "holds the checkpoints of run" in done.stderr
    after = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.is_file()}
    assert after.keys() - {".lock"} == before.keys() - {".lock"}
    assert all(after[name] == before[name] for name in before if name != ".lock")


def test_a_kill_between_a_checkpoint_and_its_line_loses_neither(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path, **SAVING)
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [json.dumps(line) + "\n" for line in lines if (line["kind"], line["step"]) != ("checkpoint", 10)]
    path.write_text("".join(kept))
    killed_at_the_end(tmp_path)
    (tmp_path / ".checkpoint_step_12.pt.1234.tmp").write_bytes(b"half a checkpoint")
    run_train(processed_dir, tmp_path, resume="auto", **SAVING)
    told = [line["step"] for line in read_metrics(path) if line["kind"] == "checkpoint"]
    assert sorted(told) == [2, 4, 6, 8, 10]
    assert not list(tmp_path.glob(".*.tmp")), "what a killed process left half written is cleared away"


def test_a_continued_run_resumes_after_its_parent_is_gone(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path / "parent", max_steps=2)
    options: dict[str, Any] = {"init_from": tmp_path / "parent", **SAVING}
    run_train(processed_dir, tmp_path / "whole", **options)
    (tmp_path / "parent").rename(tmp_path / "moved")
    run_train(processed_dir, tmp_path / "other", checkpoint=tmp_path / "whole/checkpoint_step_6.pt", **options)
    assert_same_state(tmp_path / "whole/checkpoint_step_10.pt", tmp_path / "other/checkpoint_step_10.pt")


@pytest.mark.filterwarnings("ignore:--precision")
def test_rule_17_the_loss_scale_is_restored(processed_dir: Path, tmp_path: Path) -> None:
    saved = make_trainer(processed_dir, precision="fp16", batch_size=4)
    saved.train_step()
    saved.scaler.update(1024.0)
    resumed = make_trainer(processed_dir, precision="fp16", batch_size=4)
    resumed.restore(tmp_path, saved.state())
    assert resumed.scaler.state_dict() == saved.scaler.state_dict()
    assert resumed.scaler.get_scale() == 1024.0


def test_rule_18_the_rate_after_a_resume_is_that_of_the_step(processed_dir: Path, tmp_path: Path) -> None:
    saved = make_trainer(processed_dir)
    for _ in range(4):
        saved.train_step()
    resumed = make_trainer(processed_dir)
    resumed.restore(tmp_path, saved.state())
    expected = saved.train_step()
    assert resumed.train_step() == expected
    assert {group["lr"] for group in resumed.optimizers[0].param_groups} == {expected.learning_rate}


def test_a_checkpoint_without_its_manifest_is_refused_with_a_remedy(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path / "run", max_steps=1)
    (tmp_path / "run/checkpoint_step_1.pt.json").unlink()
    for name, reason in (("checkpoint_step_1.pt", "it has no manifest (.json)"), ("checkpoint_step_7.pt", "no such file")):
        done = run_train(processed_dir, tmp_path / "else", check=False, checkpoint=tmp_path / "run" / name)
        assert done.returncode == 2
        assert reason in done.stderr


def test_a_damaged_line_of_the_log_is_named_and_a_lost_one_is_told_of(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path, **SAVING)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    killed_at_the_end(tmp_path)
    for damaged in (whole.replace(b'"step": 3', b'"step": 7', 1), whole.replace(b'"kind"', b'"ki\xffd"', 1)):
        path.write_bytes(damaged)
        done = run_train(processed_dir, tmp_path, check=False, resume="auto", **SAVING)
        assert done.returncode == 3
        assert re.search(r"metrics\.jsonl: line \d+ is damaged", done.stderr) and "Traceback" not in done.stderr
    path.write_bytes(b"".join(line for line in whole.splitlines(keepends=True) if b'"step": 3' not in line))
    done = run_train(processed_dir, tmp_path, resume="auto", **SAVING)
    assert "1 of the steps before this one have no line in it, the first of them is step 3" in done.stderr


def test_a_log_of_an_older_version_is_read_without_its_checksums(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.5}\n{"kind": "tr')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 1, "loss": 2.5}]


def test_a_finished_run_that_is_started_again_keeps_its_record(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path, max_steps=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != ".lock"}
    again = run_train(processed_dir, tmp_path, max_steps=2, resume="auto")
    assert "has finished, all 2 steps of it: nothing left to do" in again.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != ".lock"} == before


def test_a_run_that_was_killed_after_its_last_save_is_finished_by_the_next_start(processed_dir: Path, tmp_path: Path) -> None:
    run_train(processed_dir, tmp_path, max_steps=2)
    killed_at_the_end(tmp_path)
    run_train(processed_dir, tmp_path, max_steps=2, resume="auto")
    assert read_json(tmp_path / "run.json")["status"] == "finished"
