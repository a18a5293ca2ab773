"""Checkpoints written beside the training are those of the step they were begun at, whatever comes meanwhile."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_core import background
from llm_core.background import CheckpointWriter, copied
from llm_core.checkpoint import load_checkpoint, save_checkpoint
from llm_core.errors import DataError
from llm_core.loop import TrainingLoop
from llm_core.runlog import RunLog, read_metrics
from llm_core.trainer import Trainer
from tests.llm_core.training import make_trainer


@pytest.fixture
def trainer(processed_dir: Path) -> Trainer:
    trainer = make_trainer(processed_dir, tie_embeddings=True)
    trainer.train_step()
    return trainer


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that writes nothing before it is told to."""
    free = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert free.wait(60)
        return save_checkpoint(*arguments)

    monkeypatch.setattr(background, "save_checkpoint", slow)
    return free


def test_a_checkpoint_is_the_state_it_was_begun_with_to_the_bit(trainer: Trainer, disk: threading.Event, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "beside").mkdir()
    plain = save_checkpoint(tmp_path / "plain", trainer.state(), None)
    writer = CheckpointWriter(tmp_path / "beside")
    writer.start(trainer.state(), None)
    trainer.train_step()
    assert writer.collect() is None
    disk.set()
    beside = writer.wait()
    assert beside is not None
    assert beside.path.read_bytes() == plain.path.read_bytes()
    assert beside.checkpoint_id == plain.checkpoint_id


def test_the_copies_share_one_piece_of_memory_and_a_tied_matrix_stays_one(trainer: Trainer) -> None:
    first = copied(trainer.state())
    places = [tensor.data_ptr() for tensor in first["model"].values()]
    weight = first["model"]["head.weight"].clone()
    trainer.train_step()
    second = copied(trainer.state(), first)
    assert [tensor.data_ptr() for tensor in second["model"].values()] == places
    assert not torch.equal(second["model"]["head.weight"], weight)
    assert second["model"]["head.weight"].data_ptr() == second["model"]["embedding.weight"].data_ptr()


def test_a_finished_checkpoint_is_told_of_once_and_older_ones_go(processed_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(processed_dir, save_interval=2, keep_checkpoints=2)
    log = RunLog(tmp_path)
    log.begin({}, 0)
    assert TrainingLoop(trainer, tmp_path, log).run()
    log.close()
    told = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "checkpoint"]
    assert told == [2, 4, 6, 8, 10]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["checkpoint_step_10.pt", "checkpoint_step_8.pt"]
    assert load_checkpoint(tmp_path / "checkpoint_step_8.pt")["step"] == 8


def test_what_the_disk_refuses_ends_the_run_at_one_of_the_next_steps(
    processed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise DataError("disk full")

    monkeypatch.setattr(background, "save_checkpoint", refuse)
    trainer = make_trainer(processed_dir, save_interval=2, max_steps=100_000)
    with pytest.raises(DataError, match="disk full"):
        TrainingLoop(trainer, tmp_path, RunLog(tmp_path)).run()
    assert trainer.step < 1000


def test_an_error_elsewhere_lets_the_checkpoint_come_to_its_end(
    processed_dir: Path, tmp_path: Path, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(processed_dir, save_interval=1)
    loop = TrainingLoop(trainer, tmp_path, RunLog(tmp_path))

    def fail(*_: Any) -> None:
        disk.set()
        raise ArithmeticError("something else")

    monkeypatch.setattr(loop, "_report", lambda *_: fail() if trainer.step == 2 else None)
    with pytest.raises(ArithmeticError):
        loop.run()
    assert load_checkpoint(tmp_path / "checkpoint_step_1.pt")["step"] == 1
