"""Two real ranks, looked at from inside."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_core.distributed import choose_device
from llm_core.errors import UserError
from tests.llm_core.training import run_train

pytestmark = pytest.mark.slow


def two_ranks(scenario: str, data_dir: Path, run_dir: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    run_dir.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "tests.llm_core.probe"]
    arguments = [scenario, str(data_dir), str(run_dir), json.dumps(options)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def seen_by_each(scenario: str, data_dir: Path, run_dir: Path, **options: Any) -> list[dict[str, Any]]:
    done = two_ranks(scenario, data_dir, run_dir, **options)
    assert done.returncode == 0, done.stderr
    return [json.loads((run_dir / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_rule_2_16_and_26_of_a_step_on_two_ranks(processed_dir: Path, tmp_path: Path) -> None:
    ranks = seen_by_each("look_at_steps", processed_dir, tmp_path, micro_batch_size=1, dropout=0.1)
    for rank in ranks:
        assert rank["buckets_sent"] == 2 * rank["buckets"], "gradients travel once per step, not once per micro-batch"
        assert rank["gradient_as_bucket_view"]
        assert not rank["find_unused_parameters"]
        assert not rank["buffers_sent"]
        assert rank["seeds"][0] == rank["seeds"][1] and rank["seeds"][2] == rank["seeds"][3], "dropout draws from the step's seed"
    seeds = {seed for rank in ranks for seed in rank["seeds"]}
    assert len(seeds) == 4, "each step and each rank has a seed of its own"
    assert ranks[0]["windows"] == ranks[1]["windows"], "both take their share of one global batch"


def test_rule_27_ranks_that_wait_for_a_checkpoint_go_on_when_it_is_on_disk_and_others_wait_for_the_one_before(
    processed_dir: Path, tmp_path: Path
) -> None:
    on_disk = [[True], [True, False], [True, True, False]]
    assert seen_by_each("look_at_a_save", processed_dir, tmp_path) == [{"on_disk": on_disk}] * 2


def test_rule_27_an_error_on_another_rank_than_the_main_one_ends_the_job_with_its_traceback(
    processed_dir: Path, tmp_path: Path
) -> None:
    done = two_ranks("fail_on_rank_1", processed_dir, tmp_path)
    assert done.returncode != 0
    assert "something that only rank 1 knows of" in done.stderr


def test_rule_27_what_only_another_rank_of_a_machine_refuses_is_said_by_that_rank(processed_dir: Path, tmp_path: Path) -> None:
    done = two_ranks("refuse_on_rank_1", processed_dir, tmp_path)
    assert done.returncode != 0
    assert "error: something that only rank 1 cannot do" in done.stderr


def test_rule_27_more_ranks_than_gpus_are_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", local_rank=1, local_world_size=2) == torch.device("cuda", 1)
    for local_rank in range(3):
        with pytest.raises(UserError, match="--nproc_per_node 3: this machine has 2 GPUs"):
            choose_device("auto", local_rank, local_world_size=3)


def test_a_rank_ends_without_a_shutdown_that_its_groups_threads_could_abort(processed_dir: Path, tmp_path: Path) -> None:
    assert seen_by_each("notice_a_shutdown", processed_dir, tmp_path) == [{}, {}]
    assert not list(tmp_path.glob("shutdown*"))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_rule_3_an_overflow_on_one_rank_skips_the_step_on_all(sharding: str, processed_dir: Path, tmp_path: Path) -> None:
    ranks = seen_by_each("lose_a_share", processed_dir, tmp_path, precision="fp16", sharding=sharding)
    assert [rank["skipped"] for rank in ranks] == [True, True]
    assert [rank["lowered"] for rank in ranks] == [True, True]
    assert ranks[0]["scale"] == ranks[1]["scale"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process's memory anew")
def test_fsdp_starts_and_resumes_in_the_memory_of_a_share(processed_dir: Path, tmp_path: Path) -> None:
    """Of two ranks each has half, and one whole tensor at a time. Only the rank that reads the checkpoint holds all of it."""
    options = {"hidden_size": 256, "num_layers": 16, "max_steps": 1}
    run_train(processed_dir, tmp_path, **options)
    main, other = seen_by_each("resume", processed_dir, tmp_path, sharding="fsdp", **options)
    weights, checkpoint = main["weights"], (tmp_path / "checkpoint_step_1.pt").stat().st_size
    assert max(main["start"], other["start"]) < 0.8 * weights
    assert other["resume"] < 0.5 * checkpoint, "the moments' share is a third of it"
    assert main["resume"] > checkpoint, "or nothing was measured"
