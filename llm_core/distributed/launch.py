"""Starts and ends this process as one of the ranks: device, threads, process group and signals."""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from llm_core.system import abandoned, delete_marks, die_with_parent, keep_freed_memory, leave_pandas_out, mark_in_use

# Keeps process groups alive until `run_rank` ends the process: dropping the last reference to a group joins its threads. DDP's
# reducer would do so while holding the GIL, and deadlock if one of the threads is waiting for it.
_groups: list[Any] = []

# The folder that torchrun makes in the temporary directory, and the file in it where the ranks of one machine meet.
_TORCHRUN_FOLDER, _RENDEZVOUS = "torchelastic_", "rendezvous"

# Seconds within which two SIGINTs count as one: a key held down, or a signal to both the process and its group.
_SAME_INTERRUPT = 2.0


@contextmanager
def join_ranks(config: TrainConfig) -> Iterator[Ranks]:
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
    folder = _torchrun_folder()
    if folder is not None:
        _mark_torchrun_folder(folder)
    if world_size > 1:
        timeout = timedelta(seconds=config.collective_timeout)
        store = None  # torchrun's
        if world_size > local_world_size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_to(os.environ["MASTER_ADDR"]))
        elif sys.platform == "linux" and folder is not None:
            store = _store_on_this_machine(folder, world_size)
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
    leave_pandas_out()
    faulthandler.enable()  # a crash in native code prints where; torchrun's `record` does too, but leaves a file behind
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
    finally:
        _leave_torchrun_folder()
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


def _store_on_this_machine(folder: Path, world_size: int) -> FileStore:
    """The store of ranks of one machine: they meet in a file and use loopback, so no port is open to the network.

    The file is in a folder that torchrun makes for each attempt, in the temporary directory: the file system of the run folder
    may lack flock, which PyTorch's file store needs. It is not given as a file:// URL, since PyTorch does not decode URLs.
    """
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    return FileStore(str(folder / _RENDEZVOUS), world_size)


def _torchrun_folder() -> Path | None:
    """The private folder in which torchrun collects the error files of this attempt's ranks on this machine, if it has one."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if error_file else None


def _mark_torchrun_folder(folder: Path) -> None:
    """Marks a folder that torchrun made in the temporary directory, and empties those of ranks that were killed.

    Raises:
        UserError: the temporary directory has no flock.
    """
    for left in abandoned(_TORCHRUN_FOLDER):
        with suppress(OSError):  # another rank may be deleting it too
            _remove_torchrun_folder(left)
    if (made_by_torchrun := _in_temporary_directory(folder)) is not None:
        mark_in_use(made_by_torchrun)


def _in_temporary_directory(folder: Path) -> Path | None:
    """The part of `folder` that torchrun made in the temporary directory; None if the user chose the folder (`--log-dir`)."""
    temporary = Path(tempfile.gettempdir())
    return next((path for path in folder.parents if path.parent == temporary and path.name.startswith(_TORCHRUN_FOLDER)), None)


def _leave_torchrun_folder() -> None:
    """Deletes what torchrun, which never does, and this rank have put in the temporary directory. The last rank ends this."""
    folder = _torchrun_folder()
    made_by_torchrun = _in_temporary_directory(folder) if folder is not None else None
    if folder is None or made_by_torchrun is None:
        return
    with suppress(OSError):
        folder.joinpath(os.environ.get("LOCAL_RANK", "0")).rmdir()
        if not any(path.is_dir() for path in folder.iterdir()):
            _remove_torchrun_folder(made_by_torchrun)


def _remove_torchrun_folder(folder: Path) -> None:
    """Deletes the rendezvous files and marks in a folder of torchrun, and the folder unless it has logs that the user wanted."""
    delete_marks(folder)
    for file in folder.glob(f"*/*/{_RENDEZVOUS}"):
        file.unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):  # children before their folder
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()


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
