"""Two real ranks, observed from inside by tests/support/probe.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_core.distributed.ranks import choose_device
from llm_core.errors import UserError
from tests.support.training import run_train

pytestmark = pytest.mark.slow


def two_ranks(scenario: str, data_dir: Path, run_dir: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    run_dir.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "tests.support.probe"]
    arguments = [scenario, str(data_dir), str(run_dir), json.dumps(options)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def observed_by_each(scenario: str, data_dir: Path, run_dir: Path, **options: Any) -> list[dict[str, Any]]:
    done = two_ranks(scenario, data_dir, run_dir, **options)
    assert done.returncode == 0, done.stderr
    return [json.loads((run_dir / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_rule_2_16_and_26_for_a_step_of_two_ranks(data_dir: Path, tmp_path: Path) -> None:
    ranks = observed_by_each("observe_steps", data_dir, tmp_path, micro_batch_size=1, dropout=0.1)
    for rank in ranks:
        assert rank["buckets_sent"] == 2 * rank["buckets"], "gradients are sent once per step, not once per micro-batch"
        assert rank["gradient_as_bucket_view"]
        assert not rank["find_unused_parameters"]
        assert not rank["buffers_sent"]
        assert rank["seeds"][0] == rank["seeds"][1] and rank["seeds"][2] == rank["seeds"][3], "dropout uses the step's seed"
    seeds = {seed for rank in ranks for seed in rank["seeds"]}
    assert len(seeds) == 4, "each step and each rank has its own seed"
    assert ranks[0]["windows"] == ranks[1]["windows"], "both take their share of one global batch"


def test_rule_27_a_save_waits_for_its_checkpoint_or_in_the_background_for_the_previous_one(
    data_dir: Path, tmp_path: Path
) -> None:
    on_disk = [[True], [True, False], [True, True, False]]
    assert observed_by_each("observe_saves", data_dir, tmp_path) == [{"on_disk": on_disk}] * 2


def test_rule_27_an_unexpected_error_on_another_rank_than_0_ends_the_job_with_its_traceback(
    data_dir: Path, tmp_path: Path
) -> None:
    done = two_ranks("fail_on_rank_1", data_dir, tmp_path)
    assert done.returncode != 0
    assert "a failure of rank 1 alone" in done.stderr


def test_rule_27_an_error_of_one_rank_is_reported_by_that_rank(data_dir: Path, tmp_path: Path) -> None:
    done = two_ranks("refuse_on_rank_1", data_dir, tmp_path)
    assert done.returncode != 0
    assert "[rank 1] python -m llm_core.train: error: a refusal of rank 1 alone" in done.stderr


def test_rule_27_every_rank_fails_with_the_error_of_rank_0(data_dir: Path, tmp_path: Path) -> None:
    assert observed_by_each("fail_on_rank_0", data_dir, tmp_path) == [
        {"refused": "UserError('no such folder')", "unexpected": "KeyError('step')"},
        {"refused": "UserError('no such folder')", "unexpected": """RuntimeError("rank 0 failed: KeyError('step')")"""},
    ]


def test_rule_27_more_ranks_than_gpus_are_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", local_rank=1, local_world_size=2) == torch.device("cuda", 1)
    for local_rank in range(3):
        with pytest.raises(UserError, match="--nproc_per_node 3: this machine has 2 GPUs"):
            choose_device("auto", local_rank, local_world_size=3)


def test_a_rank_exits_without_the_shutdown_that_threads_of_its_group_could_abort(data_dir: Path, tmp_path: Path) -> None:
    assert observed_by_each("detect_shutdown", data_dir, tmp_path) == [{}, {}]
    assert not list(tmp_path.glob("shutdown*"))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_rule_3_an_overflow_on_one_rank_skips_the_step_on_all(sharding: str, data_dir: Path, tmp_path: Path) -> None:
    ranks = observed_by_each("overflow_on_rank_1", data_dir, tmp_path, precision="fp16", sharding=sharding)
    assert [rank["skipped"] for rank in ranks] == [True, True]
    assert [rank["lowered"] for rank in ranks] == [True, True]
    assert ranks[0]["scale"] == ranks[1]["scale"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak memory of a process")
def test_fsdp_starts_and_resumes_in_the_memory_of_a_shard(data_dir: Path, tmp_path: Path) -> None:
    """Each of two ranks holds half, and one full tensor at a time. Only the rank that reads the checkpoint holds all of it."""
    options = {"hidden_size": 256, "num_layers": 16, "max_steps": 1}
    run_train(data_dir, tmp_path, **options)
    main, other = observed_by_each("resume", data_dir, tmp_path, sharding="fsdp", **options)
    weights, checkpoint = main["weights"], (tmp_path / "checkpoint_step_1.pt").stat().st_size
    assert max(main["start"], other["start"]) < 0.8 * weights
    assert other["resume"] < 0.5 * checkpoint, "the shards of the moments take a third of it"
    assert main["resume"] > checkpoint, "otherwise nothing was measured"
