"""The process's place among the ranks that torchrun started, and its device, threads and signals."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from llm_core.config import TrainConfig
from llm_core.errors import TextmillError, UserError
from llm_core.processes import available_cores, die_with_parent, keep_freed_memory

T = TypeVar("T")

_groups: list[Any] = []

_SAME_INTERRUPT = 2.0
"""Seconds in which a second SIGINT is the first one: a key held down, or sent to the process and to its group."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is. A plain `python -m llm_core.train` is rank 0 of 1, without a process group."""

    rank: int
    world_size: int
    device: torch.device
    threads: int

    @classmethod
    def alone(cls, device: str = "auto", threads: int = 0, world_size: int = 1) -> "Ranks":
        """A process by itself, with its share of the machine's cores unless `threads` says otherwise."""
        return cls(0, world_size, choose_device(device), threads or _cores_of_each())

    @property
    def is_main(self) -> bool:
        """Only the main rank writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds `tensor` over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, on every rank; where it raises there, every rank fails.

        What is read from the disk is read once: ranks of other machines may see other files, or none. Tensors stay where they
        are: the other ranks get outlines of them, on the meta device, and their parts by `sharding.share_of`.
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
        self.main_first_error(error)
        received = [_outline(value)]
        dist.broadcast_object_list(received, device=self.device)
        return value if self.is_main else cast(T, received[0])

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Compares `facts` with those of the main rank: machines that differ would train on, wrongly, or wait for each other.

        Raises:
            UserError: on every rank; the message names the first fact that differs and both values.
        """
        if self.world_size == 1:
            return
        of_rank: list[Any] = [None] * self.world_size
        dist.all_gather_object(of_rank, dict(facts))
        for rank, others in enumerate(of_rank):
            for name, value in of_rank[0].items():
                if others[name] != value:
                    raise UserError(
                        f"{name} is {value} on rank 0 and {others[name]} on rank {rank}; "
                        "start every machine with the same flags and data"
                    )

    def main_first_error(self, error: Exception | None) -> None:
        """Lets every rank fail when the main rank failed at what it does alone, so that none waits for it forever."""
        failed = torch.tensor(float(error is not None), device=self.device)
        if self.sum(failed).item():
            raise error if error is not None else TextmillError("rank 0 failed; its own message says why")


def _outline(value: Any) -> Any:
    """The same value with tensors that have a shape and a dtype and no content."""
    if isinstance(value, dict):
        return {name: _outline(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_outline(item) for item in value])
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def choose_device(requested: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """The device of one of this machine's ranks.

    Raises:
        UserError: CUDA was asked for by name and there is none, or there are more ranks than GPUs; then on every rank.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; use --device auto or cpu")
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_world_size > (gpus := torch.cuda.device_count()):
        raise UserError(f"--nproc_per_node {local_world_size}: this machine has {gpus} GPUs; start one process for each at most")
    return torch.device("cuda", local_rank)


@contextmanager
def join_ranks(config: TrainConfig, run_dir: Path) -> Iterator[Ranks]:
    """Sets up device, threads and, under torchrun, the process group; leaves the group at the end."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = choose_device(config.device, local_rank, local_world_size)
    # torchrun forces one thread per process; without a number of our own a machine's cores are shared evenly.
    threads = config.threads_per_process or _cores_of_each()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if world_size > 1:
        init_method = "env://"
        if world_size > local_world_size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(os.environ["MASTER_ADDR"]))
        elif sys.platform == "linux":
            init_method = _meet_on_this_machine(run_dir)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=config.collective_timeout),
        )
        # Whoever lets go of the group last ends its threads. DDP's reducer would do so holding Python's lock, for which one of
        # them may be waiting: the process would hang. This reference outlives it; `run_rank` ends the process with it in hand.
        _groups.append(dist.group.WORLD)
    try:
        yield Ranks(rank, world_size, device, threads)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_rank(main: Callable[[], object]) -> None:
    """Runs the main function of a process that may be one of several ranks, and ends the process if it was one.

    Gloo's threads still hold tensors when the work is done. One that lets go of them while Python shuts down asks for a lock that
    is no more, and the whole process aborts, long after everything is on disk. So there is no such shutdown: what was printed
    is flushed, and the process ends.
    """
    try:
        main()
        code = 0
    except BaseException as error:
        if not _groups:
            raise
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            traceback.print_exc()
            code = 1
    if _groups:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _cores_of_each() -> int:
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def interface_towards(host: str) -> str:
    """The network interface from which this machine reaches `host`.

    Gloo by itself takes the interface of the address that this machine's name stands for, which is often 127.0.1.1.

    Raises:
        UserError: no route leads to the host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: the kernel only looks up the route
            source = probe.getsockname()[0].split("%")[0]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {host}: cannot be reached from this machine ({error}); torchrun's --master_addr, or with a rendezvous "
            "the first machine's --local-addr, must be an address that every machine can reach"
        ) from error
    return next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(entry.address.split("%")[0] == source for entry in addresses)
    )


def _meet_on_this_machine(run_dir: Path) -> str:
    """Ranks of one machine meet in a file and talk over loopback: no port is open to the network.

    The file's name is their torchrun's, by process id and start time, so that it is never one that a killed run left behind.
    """
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    run_dir.mkdir(parents=True, exist_ok=True)
    for left_behind in run_dir.glob(".ranks-*"):
        if not Path(f"/proc/{left_behind.name.split('-')[1]}").exists():
            left_behind.unlink(missing_ok=True)
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return (run_dir.resolve() / f".ranks-{parent}-{started}-{attempt}").as_uri()


class StopRequest:
    """Notices SIGINT and SIGTERM without interrupting the step; the loop asks at the end of each step.

    The first rank says at once that it did: a step may take a minute. Whoever does not want to wait for it presses Ctrl-C again.
    Under torchrun, which hands on the first one only, there is no such way; it kills its ranks after 30 seconds.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_interrupt = 0.0
        self._tells = int(os.environ.get("RANK", 0)) == 0

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._notice) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # Not printed: the signal may have come in the middle of a print, whose buffer may not be entered twice.
        if self._tells and not self.requested:
            again = b"" if "TORCHELASTIC_RUN_ID" in os.environ else b" (Ctrl-C again: stop without)"
            os.write(2, b"\nstop requested: finishing this step and saving it" + again + b"\n")
        self.requested = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_interrupt and now - self._first_interrupt > _SAME_INTERRUPT:
            if self._tells:
                os.write(2, b"\nstopped without saving; --resume auto goes on from the last checkpoint, if there is one\n")
            os._exit(128 + signal.SIGINT)
        self._first_interrupt = self._first_interrupt or now
