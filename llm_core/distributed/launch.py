"""Starts and ends this process as one of the ranks: device, threads, process group and signals."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore  # torch.distributed exports it without its type

from llm_core.config import TrainConfig
from llm_core.distributed.ranks import Ranks, choose_device, cores_per_rank
from llm_core.errors import UserError
from llm_core.layout import RunFolder
from llm_core.system import die_with_parent, keep_freed_memory

# Keeps process groups alive until `run_rank` ends the process: dropping the last reference to a group joins its threads. DDP's
# reducer would do so while holding the GIL, and deadlock if one of the threads is waiting for it.
_groups: list[Any] = []

# Seconds within which two SIGINTs count as one: a key held down, or a signal to both the process and its group.
_SAME_INTERRUPT = 2.0


@contextmanager
def join_ranks(config: TrainConfig, run_dir: Path) -> Iterator[Ranks]:
    """Sets up device, threads and, under torchrun, the process group, which ends with the context."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = choose_device(config.device, local_rank, local_world_size)
    threads = config.threads_per_process or cores_per_rank()
    torch.set_num_threads(threads)  # torchrun sets OMP_NUM_THREADS=1
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if world_size > 1:
        timeout = timedelta(seconds=config.collective_timeout)
        store = None  # torchrun's
        if world_size > local_world_size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_to(os.environ["MASTER_ADDR"]))
        elif sys.platform == "linux":
            store = _store_on_this_machine(run_dir, world_size)
            store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        _groups.append(dist.group.WORLD)
    try:
        yield Ranks(rank, world_size, device, threads)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_rank(main: Callable[[], object]) -> None:
    """Runs `main` in a process that may be one of several ranks; such a process ends without Python's shutdown.

    Gloo's threads still hold tensors when `main` returns. A thread that frees one while Python shuts down needs the GIL, which no
    longer exists, and the process aborts. So the output is flushed and the process exits directly.
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


def interface_to(host: str) -> str:
    """The network interface through which this machine reaches `host`.

    Gloo's default is the interface of the address that this machine's name resolves to, often 127.0.1.1.

    Raises:
        UserError: the host is unreachable.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: the kernel only chooses a route
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


def _store_on_this_machine(run_dir: Path, world_size: int) -> FileStore:
    """The store of ranks of one machine: they meet in a file and use loopback, so no port is open to the network.

    The file is named after the process id and start time of torchrun: a file left by a killed run is never reused. It is not
    given as a file:// URL, since PyTorch does not decode URLs.
    """
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(run_dir.resolve())
    for file in folder.rendezvous_files():
        if not psutil.pid_exists(int(file.name.split("-")[1])):
            file.unlink(missing_ok=True)
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    path = folder.rendezvous(f"{parent}-{started}-{attempt}")
    return FileStore(str(path), world_size)


class StopRequest:
    """Records SIGINT and SIGTERM without interrupting the step; the training loop checks `requested` after each step.

    Rank 0 confirms the request at once, since a step may take a minute. A second Ctrl-C stops without waiting, except under
    torchrun, which forwards only the first and kills its ranks after 30 seconds.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_interrupt = 0.0
        self._is_main = int(os.environ.get("RANK", 0)) == 0

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # os.write, since the signal may interrupt a print, whose buffer is not reentrant.
        if self._is_main and not self.requested:
            again = b"" if "TORCHELASTIC_RUN_ID" in os.environ else b" (Ctrl-C again: stop without)"
            os.write(2, b"\nstop requested: finishing this step and saving it" + again + b"\n")
        self.requested = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_interrupt and now - self._first_interrupt > _SAME_INTERRUPT:
            if self._is_main:
                os.write(2, b"\nstopped without saving; --resume auto resumes from the last checkpoint, if there is one\n")
            os._exit(128 + signal.SIGINT)
        self._first_interrupt = self._first_interrupt or now
