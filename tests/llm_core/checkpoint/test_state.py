"""A checkpoint is complete and verified, or it does not exist."""

import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm_core.checkpoint import newest_valid, prune_checkpoints
from llm_core.checkpoint import state as checkpoint_module
from llm_core.checkpoint.resume import find_resume_state
from llm_core.checkpoint.state import load_checkpoint, save_checkpoint
from llm_core.errors import DataError
from llm_core.layout import RunFolder, checkpoint_manifest
from llm_core.system import read_json, sha256_file, write_json
from llm_core.training.trainer import Trainer
from tests.support.training import make_trainer


@pytest.fixture
def trainer(data_dir: Path) -> Trainer:
    trainer = make_trainer(data_dir)
    trainer.train_step()
    return trainer


def save(trainer: Trainer, run_dir: Path, step: int, val_loss: float | None = None) -> Path:
    trainer.step = step
    return save_checkpoint(run_dir, trainer.state(), val_loss).path


def test_equal_states_are_saved_as_equal_bytes_and_load_unchanged(trainer: Trainer, tmp_path: Path) -> None:
    path = save(trainer, tmp_path, 1)
    digest = sha256_file(path)
    assert sha256_file(save(trainer, tmp_path, 1)) == digest
    state = load_checkpoint(path)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(state["model"][name], weight)
    assert (state["step"], state["tokens_seen"]) == (1, trainer.tokens_seen)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_used(damage: str, trainer: Trainer, tmp_path: Path) -> None:
    older, newer = save(trainer, tmp_path, 1), save(trainer, tmp_path, 2)
    if damage == "flip":
        content = bytearray(newer.read_bytes())
        content[len(content) // 2] ^= 1
        newer.write_bytes(content)
    elif damage == "truncate":
        os.truncate(newer, 1000)
    elif damage == "delete":
        newer.unlink()
    else:
        checkpoint_manifest(newer).write_text('{"format_version": 1')
    with pytest.raises(DataError, match=newer.name):
        load_checkpoint(newer)
    record, damaged = newest_valid(tmp_path)
    assert record is not None
    assert record.path == older
    assert len(damaged) == 1
    assert newer.name in damaged[0]


def test_a_checkpoint_without_a_manifest_does_not_exist(trainer: Trainer, tmp_path: Path) -> None:
    path = save(trainer, tmp_path, 1)
    checkpoint_manifest(path).unlink()
    assert newest_valid(tmp_path) == (None, [])
    with pytest.raises(DataError, match="no such file"):
        load_checkpoint(path)


def test_resume_refuses_when_every_checkpoint_is_damaged(trainer: Trainer, tmp_path: Path) -> None:
    os.truncate(save(trainer, tmp_path, 1), 10)
    with pytest.raises(DataError, match=r"no checkpoint in .* is intact"):
        find_resume_state(tmp_path, None, "auto")


def test_a_failed_write_keeps_the_previous_checkpoint(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th fsync or rename fails, for every n until the save succeeds."""
    older = save(trainer, tmp_path, 1)
    attempt, failures = 0, 0
    while True:
        attempt += 1
        calls = SimpleNamespace(count=0)

        def failing(original, calls=calls, attempt=attempt):
            def call(*arguments):
                calls.count += 1
                if calls.count == attempt:
                    raise OSError(28, "No space left on device")
                return original(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync))
            patch.setattr(os, "replace", failing(os.replace))
            try:
                newer = save(trainer, tmp_path, 2)
            except (OSError, DataError):
                failures += 1
                record, _ = newest_valid(tmp_path)
                assert record is not None
                assert record.path == older or load_checkpoint(record.path)["step"] == 2
                assert not list(tmp_path.glob("*.tmp"))
                continue
        break
    assert failures >= 6, "checkpoint and manifest: an fsync, a rename and an fsync of the folder each"
    assert newest_valid(tmp_path)[0].path == newer  # type: ignore[union-attr]


def test_a_full_disk_is_detected_before_the_write_with_the_missing_bytes(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(trainer, tmp_path, 1)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"disk full, a checkpoint needs [\d,]+ bytes and [\d,]+ are missing"):
        save(trainer, tmp_path, 2)
    assert newest_valid(tmp_path)[0].path == older  # type: ignore[union-attr]


def test_retention_keeps_the_newest_and_the_best(trainer: Trainer, tmp_path: Path) -> None:
    for step, val_loss in enumerate([3.0, 1.0, 2.0, None, 2.5], start=1):
        save(trainer, tmp_path, step, val_loss)
    deleted = prune_checkpoints(tmp_path, keep=2)
    assert {path.name for path in deleted} == {"checkpoint_step_1.pt", "checkpoint_step_3.pt"}
    assert [path.name.split("_")[2] for path in RunFolder(tmp_path).checkpoint_manifests()] == [
        "5.pt.json",
        "4.pt.json",
        "2.pt.json",
    ]


def test_a_validation_loss_that_is_not_finite_is_never_the_best(trainer: Trainer, tmp_path: Path) -> None:
    for step, val_loss in enumerate([1.0, 2.0, math.inf, math.nan], start=1):
        save(trainer, tmp_path, step, val_loss)
        prune_checkpoints(tmp_path, keep=2)
    assert [path.name.split("_")[2] for path in RunFolder(tmp_path).checkpoint_manifests()] == [
        "4.pt.json",
        "3.pt.json",
        "1.pt.json",
    ]


def test_leftovers_of_a_killed_deletion_are_removed_by_the_next_one(trainer: Trainer, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(trainer, tmp_path, step)
    for step in (1, 4):
        (tmp_path / f"checkpoint_step_{step}.pt.json").unlink()
    prune_checkpoints(tmp_path, keep=2)
    left = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert left == ["checkpoint_step_2.pt", "checkpoint_step_3.pt", "checkpoint_step_4.pt"], (
        "the newest may be a save in progress"
    )


def test_a_malicious_pickle_is_refused_and_runs_no_code(trainer: Trainer, tmp_path: Path) -> None:
    path = save(trainer, tmp_path, 1)

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "attacked"),)

    path.write_bytes(pickle.dumps(Attack()))
    manifest = checkpoint_manifest(path)
    record, _ = newest_valid(path.parent)
    assert record is None
    write_json(manifest, read_json(manifest) | {"sha256": sha256_file(path)})  # an attacker can write manifests too
    with pytest.raises(DataError, match="not a readable checkpoint"):
        load_checkpoint(path)
    assert not (path.parent / "attacked").exists()
