"""FSDP2: the ranks share the model, and checkpoints are those of DDP."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import assert_same_state, run_train, train_lines

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"micro_batch_size": 2, "max_steps": 6, "save_interval": 3, "keep_checkpoints": 5, "adam_eps": 1e-3}


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in train_lines(run_dir)]


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of two ranks with DDP and with FSDP."""
    folder = tmp_path_factory.mktemp("runs")
    for sharding in ("ddp", "fsdp"):
        run_train(data_dir, folder / sharding, ranks=2, sharding=sharding, eval_interval=3, eval_tokens=300, **OPTIONS)
    return folder


def test_fsdp_trains_like_ddp(runs: Path) -> None:
    assert losses(runs / "fsdp") == pytest.approx(losses(runs / "ddp"), rel=1e-5)
    assert_same_state(runs / "ddp/checkpoint_step_6.pt", runs / "fsdp/checkpoint_step_6.pt", rtol=1e-3, atol=1e-5)
    norms = [[line["grad_norm"] for line in train_lines(runs / run)] for run in ("ddp", "fsdp")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4), "the norm is of the full gradient, not of a shard"
    ids = [json.loads((runs / run / "run.json").read_text())["run_id"] for run in ("ddp", "fsdp")]
    assert ids[0] == ids[1], "sharding is not part of the run id"


def test_validation_with_fsdp_ends_when_ranks_have_unequal_shares(runs: Path) -> None:
    """300 tokens are 5 windows: 3 for one rank in 2 passes, 2 for the other in 1."""
    held_out = [
        [json.loads(line)["val_loss"] for line in (runs / run / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
        for run in ("ddp", "fsdp")
    ]
    assert len(held_out[1]) == 2
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)


@pytest.mark.parametrize(
    ("saved_by", "ranks", "sharding"), [("fsdp", 0, "ddp"), ("fsdp", 2, "ddp"), ("ddp", 2, "fsdp"), ("fsdp", 2, "fsdp")]
)
def test_a_checkpoint_resumes_with_any_sharding(
    saved_by: str, ranks: int, sharding: str, runs: Path, data_dir: Path, tmp_path: Path
) -> None:
    checkpoint = runs / saved_by / "checkpoint_step_3.pt"
    run_train(data_dir, tmp_path, ranks=ranks, sharding=sharding, checkpoint=checkpoint, **OPTIONS)
    exact = {} if saved_by == sharding == "fsdp" else {"rtol": 1e-3, "atol": 1e-5}
    assert_same_state(runs / saved_by / "checkpoint_step_6.pt", tmp_path / "checkpoint_step_6.pt", **exact)


@pytest.mark.parametrize(
    "options", [{"optimizer": "muon", "tie_embeddings": True, "gradient_checkpointing": True}, {"precision": "bf16"}]
)
def test_fsdp_works_with(options: dict[str, Any], data_dir: Path, tmp_path: Path) -> None:
    for sharding in ("ddp", "fsdp"):
        run_train(data_dir, tmp_path / sharding, ranks=2, sharding=sharding, max_steps=4, adam_eps=1e-3, **options)
    ddp, fsdp = ((tmp_path / sharding / "checkpoint_step_4.pt").stat().st_size for sharding in ("ddp", "fsdp"))
    assert fsdp == pytest.approx(ddp, rel=0.01), "a tied matrix is stored once"
    tolerance = 2e-2 if "precision" in options else 1e-4
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=tolerance)
