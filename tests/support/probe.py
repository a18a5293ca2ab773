"""The program that test_ranks.py runs under torchrun: each rank writes what a scenario observes to its own file."""

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

from llm_core import train
from llm_core.checkpoint import RunRecord, async_writer
from llm_core.checkpoint.state import load_checkpoint
from llm_core.config import TrainConfig
from llm_core.dataset import load_manifest
from llm_core.distributed.launch import StopRequest, join_ranks, run_rank
from llm_core.distributed.ranks import Ranks
from llm_core.errors import UserError
from llm_core.layout import RunFolder, checkpoint_manifest
from llm_core.training import trainer as trainer_module
from llm_core.training.loop import TrainingLoop
from llm_core.training.run_data import TrainingData
from llm_core.training.run_log import RunLog
from llm_core.training.trainer import Trainer
from tests.support.training import SMALL


def observe_steps(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """Two steps of four micro-batches: the buckets sent, the seeds, and the settings of DDP."""
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


def observe_saves(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """Slow saves: which checkpoints are on disk when each `save` returns."""
    original = async_writer.save_checkpoint

    def slow(*arguments: Any) -> Any:
        time.sleep(1)
        return original(*arguments)

    async_writer.save_checkpoint = slow
    run_log = RunLog(run_dir) if trainer.ranks.is_main else None
    if run_log is not None:
        run_log.begin(RunRecord.model_construct(), step=0)
    loop = TrainingLoop(trainer, run_dir, run_log)
    on_disk = []
    for wait in (True, False, False):
        trainer.train_step()
        loop.save(wait)
        on_disk.append([checkpoint_manifest(RunFolder(run_dir).checkpoint(step)).exists() for step in range(1, trainer.step + 1)])
    return {"on_disk": on_disk}


def fail_on_rank_1(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    trainer.train_step()
    if trainer.ranks.rank == 1:
        raise ArithmeticError("a failure of rank 1 alone")
    trainer.train_step()
    return {}


def fail_on_rank_0(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """The errors that each rank raises when rank 0 has failed, expectedly or not."""
    raised = {}
    for kind, error in (("refused", UserError("no such folder")), ("unexpected", KeyError("step"))):
        try:
            trainer.ranks.raise_on_all_ranks(error if trainer.ranks.is_main else None)
        except Exception as failure:
            raised[kind] = repr(failure)
    return raised


def overflow_on_rank_1(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """A gradient that overflows on rank 1 alone: how each rank reacts."""
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
    """Records in `grown_by` by how many bytes the process grew at its peak; 0 where the system cannot measure that."""
    if sys.platform != "linux":
        grown_by[phase] = 0
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = psutil.Process().memory_info().rss
    yield
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    grown_by[phase] = int(peak.split()[1]) * 1024 - before


def resume(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """The memory needed to start and to load a state."""
    path = RunFolder(run_dir).checkpoint(1)
    with peak_memory("resume"):
        trainer.restore(path, trainer.ranks.broadcast_from_main(lambda: load_checkpoint(path)))
    return grown_by | {"weights": 4 * trainer.model.config.num_parameters}


def detect_shutdown(trainer: Trainer, run_dir: Path) -> dict[str, Any]:
    """Registers a file that only Python's shutdown writes."""
    trainer.train_step()
    atexit.register((run_dir / f"shutdown{trainer.ranks.rank}").touch)
    return {}


def refuse_on_rank_1(data_dir: Path, run_dir: Path) -> None:
    """The tool itself: only rank 1 finds an error, and rank 0 waits."""

    def refuse(*_: Any, **__: Any) -> None:
        if os.environ["RANK"] == "1":
            raise UserError("a refusal of rank 1 alone")
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
    with join_ranks(config) as ranks, StopRequest() as stop:
        assert isinstance(ranks, Ranks)
        data = TrainingData.open(data_dir, manifest, config, None)
        if config.sharding == "fsdp":  # so that the modules it loads on first use are not measured
            fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh("cpu", (ranks.world_size,)))
        with peak_memory("start"):
            trainer = Trainer(config, data, ranks, stop)
        observed = globals()[scenario](trainer, run_dir)
        (run_dir / f"rank{os.environ['RANK']}.json").write_text(json.dumps(observed))


if __name__ == "__main__":
    run_rank(main)
