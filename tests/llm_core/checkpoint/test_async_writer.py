"""A checkpoint written in the background has the state of the step at which it was started."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_core.checkpoint import RunRecord, async_writer
from llm_core.checkpoint.async_writer import CheckpointWriter, copied
from llm_core.checkpoint.state import load_checkpoint, save_checkpoint
from llm_core.errors import DataError
from llm_core.training import read_metrics
from llm_core.training.loop import TrainingLoop
from llm_core.training.run_log import RunLog
from llm_core.training.trainer import Trainer
from tests.support.training import make_trainer


@pytest.fixture
def trainer(data_dir: Path) -> Trainer:
    trainer = make_trainer(data_dir, tie_embeddings=True)
    trainer.train_step()
    return trainer


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that blocks writes until the event is set."""
    free = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert free.wait(60)
        return save_checkpoint(*arguments)

    monkeypatch.setattr(async_writer, "save_checkpoint", slow)
    return free


def test_a_background_checkpoint_equals_a_foreground_one_bit_for_bit(
    trainer: Trainer, disk: threading.Event, tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "background").mkdir()
    plain = save_checkpoint(tmp_path / "plain", trainer.state(), None)
    writer = CheckpointWriter(tmp_path / "background")
    writer.start(trainer.state(), None)
    trainer.train_step()
    assert writer.collect() is None
    disk.set()
    record = writer.wait()
    assert record is not None
    assert record.path.read_bytes() == plain.path.read_bytes()
    assert record.checkpoint_id == plain.checkpoint_id


def test_copies_reuse_the_same_memory_and_a_tied_matrix_stays_tied(trainer: Trainer) -> None:
    first = copied(trainer.state())
    addresses = [tensor.data_ptr() for tensor in first["model"].values()]
    weight = first["model"]["head.weight"].clone()
    trainer.train_step()
    second = copied(trainer.state(), first)
    assert [tensor.data_ptr() for tensor in second["model"].values()] == addresses
    assert not torch.equal(second["model"]["head.weight"], weight)
    assert second["model"]["head.weight"].data_ptr() == second["model"]["embedding.weight"].data_ptr()


def test_a_finished_checkpoint_is_reported_once_and_older_ones_are_deleted(data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_dir, save_interval=2, keep_checkpoints=2)
    log = RunLog(tmp_path)
    log.begin(RunRecord.model_construct(), 0)
    assert TrainingLoop(trainer, tmp_path, log).run()
    log.close()
    logged = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "checkpoint"]
    assert logged == [2, 4, 6, 8, 10]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["checkpoint_step_10.pt", "checkpoint_step_8.pt"]
    assert load_checkpoint(tmp_path / "checkpoint_step_8.pt")["step"] == 8


def test_a_failed_background_save_stops_the_run_within_a_few_steps(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise DataError("disk full")

    monkeypatch.setattr(async_writer, "save_checkpoint", refuse)
    trainer = make_trainer(data_dir, save_interval=2, max_steps=100_000)
    with pytest.raises(DataError, match="disk full"):
        TrainingLoop(trainer, tmp_path, RunLog(tmp_path)).run()
    assert trainer.step < 1000


def test_a_checkpoint_in_progress_is_completed_when_training_fails(
    data_dir: Path, tmp_path: Path, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(data_dir, save_interval=1)
    loop = TrainingLoop(trainer, tmp_path, RunLog(tmp_path))

    def fail(*_: Any) -> None:
        disk.set()
        raise ArithmeticError("something else")

    monkeypatch.setattr(loop, "_log_step", lambda *_: fail() if trainer.step == 2 else None)
    with pytest.raises(ArithmeticError):
        loop.run()
    assert load_checkpoint(tmp_path / "checkpoint_step_1.pt")["step"] == 1
