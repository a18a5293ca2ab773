"""What test_ranks.py runs under torchrun: two real ranks, looked at from inside. Each writes what it saw into its own file."""

import atexit
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard

from llm_core import background, train
from llm_core import trainer as trainer_module
from llm_core.checkpoint import load_checkpoint
from llm_core.checkpoint_files import checkpoint_path, manifest_path
from llm_core.config import TrainConfig
from llm_core.distributed import Ranks, StopRequest, join_ranks, run_rank
from llm_core.errors import UserError
from llm_core.loop import TrainingLoop
from llm_core.runlog import RunLog
from llm_core.shards import load_manifest
from llm_core.trainer import Trainer
from llm_core.training_data import TrainingData
from tests.llm_core.training import SMALL


def look_at_steps(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """Two steps of four micro-batches: what is sent, with which seeds, and how DDP was set up."""
    module = trainer.module
    sent: list[int] = []

    def counting(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.index())
        return allreduce_hook(state, bucket)

    module.register_comm_hook(None, counting)  # type: ignore[operator]
    seeds = []
    for _ in range(2):
        seeds.append(trainer_module._step_seed(trainer.config.seed, trainer.step, trainer.ranks.rank))
        drawn = torch.get_rng_state()
        trainer.train_step()
        assert not torch.equal(drawn, torch.get_rng_state())
        seeds.append(torch.initial_seed())
    return {
        "buckets_sent": len(sent),
        "buckets": len(set(sent)),
        "seeds": seeds,
        "gradient_as_bucket_view": module.gradient_as_bucket_view,
        "find_unused_parameters": module.find_unused_parameters,
        "buffers_sent": bool(module.will_sync_module_buffers()),  # type: ignore[operator]
        "windows": trainer.data.order.windows_of_step(0, trainer.config.batch_size).tolist(),
    }


def look_at_a_save(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """A slow save: whether the file is there when `save` returns that was to wait for it, or for the one before."""
    original = background.save_checkpoint

    def slow(*arguments: Any) -> Any:
        time.sleep(1)
        return original(*arguments)

    background.save_checkpoint = slow
    loop = TrainingLoop(trainer, run_dir, RunLog(run_dir) if trainer.ranks.is_main else None)
    on_disk = []
    for wait in (True, False, False):
        trainer.train_step()
        loop.save(wait)
        on_disk.append([manifest_path(checkpoint_path(run_dir, step)).exists() for step in range(1, trainer.step + 1)])
    return {"on_disk": on_disk}


def fail_on_rank_1(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    trainer.train_step()
    if trainer.ranks.rank == 1:
        raise ArithmeticError("something that only rank 1 knows of")
    trainer.train_step()
    return {}


def lose_a_share(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """A gradient that overflows on rank 1 alone: what each rank makes of it."""
    trainer.train_step()
    if trainer.ranks.rank == 1:

        def overflow(module: Any, inputs: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: gradient * float("inf"))

        trainer.model.norm.register_forward_hook(overflow)
    before = trainer.scaler.get_scale()
    result = trainer.train_step()
    return {"skipped": result.skipped, "lowered": trainer.scaler.get_scale() < before, "scale": trainer.scaler.get_scale()}


grown_by: dict[str, int] = {}


@contextmanager
def peak_memory(phase: str) -> Iterator[None]:
    """Keeps by how many bytes this process grew at its largest; 0 where the system does not tell."""
    if sys.platform != "linux":
        grown_by[phase] = 0
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = psutil.Process().memory_info().rss
    yield
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    grown_by[phase] = int(peak.split()[1]) * 1024 - before


def resume(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """How much memory it took to start, and takes to take over a state."""
    path = checkpoint_path(run_dir, 1)
    with peak_memory("resume"):
        trainer.restore(path, trainer.ranks.from_main(lambda: load_checkpoint(path)))
    return grown_by | {"weights": 4 * trainer.model.config.num_parameters}


def notice_a_shutdown(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """Whether Python shuts down at the end of a rank is told by a file that only its shutdown writes."""
    trainer.train_step()
    atexit.register((run_dir / f"shutdown{trainer.ranks.rank}").touch)
    return {}


def refuse_on_rank_1(data_dir: Path, run_dir: Path) -> None:
    """The tool itself, where only rank 1 finds something wrong and rank 0 waits for it."""

    def refuse(*_: Any, **__: Any) -> None:
        if os.environ["RANK"] == "1":
            raise UserError("something that only rank 1 cannot do")
        time.sleep(60)

    train.train = refuse
    sys.argv = ["train", "--data_dir", str(data_dir), "--save_dir", str(run_dir)]
    train.main()


@record
def main() -> None:
    scenario, data_dir, run_dir, options = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    if scenario == "refuse_on_rank_1":
        return refuse_on_rank_1(data_dir, run_dir)
    manifest = load_manifest(data_dir)
    config = TrainConfig(**(SMALL | {"threads_per_process": 1, "device": "cpu"} | options)).resolved(64, 0)
    with join_ranks(config, run_dir) as ranks, StopRequest() as stop:
        assert isinstance(ranks, Ranks)
        data = TrainingData.open(data_dir, manifest, config, None)
        if config.sharding == "fsdp":  # what PyTorch loads for it first is not counted
            fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh("cpu", (ranks.world_size,)))
        with peak_memory("start"):
            trainer = Trainer(config, data, ranks, stop)
        seen = globals()[scenario](trainer, run_dir)
        (run_dir / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    run_rank(main)
