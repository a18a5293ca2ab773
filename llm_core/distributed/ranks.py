"""The ranks of a training, and what they exchange."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llm_core.errors import TextmillError, UserError
from llm_core.system import available_cores

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all ranks. Without torchrun it is rank 0 of 1, and there is no process group."""

    rank: int
    world_size: int
    device: torch.device
    threads: int  # of this process

    @classmethod
    def alone(cls, device: str = "auto", threads: int = 0, world_size: int = 1) -> "Ranks":
        """Rank 0 without a process group. threads: 0 for this process's share of the machine's cores."""
        return cls(0, world_size, choose_device(device), threads or cores_per_rank())

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files and logs."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0 and returns its result on every rank; if it raises, every rank fails.

        Ranks read files this way, since other machines may see other files, or none. The other ranks receive tensors without
        content, on the meta device; `sharding.scatter_from_rank0` transfers the content.
        """
        if self.world_size == 1:
            return make()
        value: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                value = make()
            except Exception as failure:
                error = failure
        self.raise_on_all_ranks(error)
        received = [_without_content(value)]
        dist.broadcast_object_list(received, device=self.device)
        return value if self.is_main else cast(T, received[0])

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Checks that all ranks have the same `values`: machines that differ would train wrongly, or wait for each other.

        Raises:
            UserError: on every rank; the message names the first value that differs.
        """
        if self.world_size == 1:
            return
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, dict(values))
        for rank, others in enumerate(gathered):
            for name, value in gathered[0].items():
                if others[name] != value:
                    raise UserError(
                        f"{name} is {value} on rank 0 and {others[name]} on rank {rank}; "
                        "start every machine with the same flags and data"
                    )

    def raise_on_all_ranks(self, error: Exception | None) -> None:
        """Raises the `error` of the first rank that has one on every rank: the others would wait for that rank forever.

        All raise one, as torchrun kills them when the first one exits, perhaps before that rank has printed its message.
        """
        failed = self.sum(torch.tensor(float(error is not None), device=self.device))
        if not failed.item():
            return
        if self.world_size > 1:
            shared: list[Exception | None] = [None] * self.world_size
            readable = error is None or isinstance(error, TextmillError)
            dist.all_gather_object(shared, error if readable else RuntimeError(f"rank {self.rank} failed: {error!r}"))
            error = error or next(other for other in shared if other is not None)
        assert error is not None
        raise error


def _without_content(value: Any) -> Any:
    """The value with its tensors on the meta device: shape and dtype stay."""
    if isinstance(value, dict):
        return {name: _without_content(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_without_content(item) for item in value])
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def choose_device(requested: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """The device of one of this machine's ranks.

    Raises:
        UserError: CUDA is requested and missing, or the machine has fewer GPUs than ranks; on every rank.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; use --device auto or cpu")
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_world_size > (gpus := torch.cuda.device_count()):
        raise UserError(f"--nproc_per_node {local_world_size}: this machine has {gpus} GPUs; start at most one process per GPU")
    return torch.device("cuda", local_rank)


def cores_per_rank() -> int:
    """The share of this machine's cores for each of its ranks."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
