"""Two machines simulated on one: two network namespaces, connected by a veth pair. Needs root and iproute2."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.training import train_arguments

ADDRESSES = ("10.231.77.1", "10.231.77.2")
STATIC = ("--master_addr=10.231.77.1", "--master_port=29500")
RENDEZVOUS = ("--rdzv-backend=c10d", "--rdzv-endpoint=10.231.77.1:29500", "--rdzv-id=two-nodes")


class TwoNodes:
    """Two namespaces, connected only to each other."""

    def __init__(self, logs: Path) -> None:
        self.names = tuple(f"textmill-{os.getpid()}-{node}" for node in range(2))
        self.logs = [logs / f"node{node}.log" for node in range(2)]
        self.torchruns: dict[int, subprocess.Popen[bytes]] = {}

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("-n", self.names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self.names[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/30", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")

    def start(self, node: int, rendezvous: tuple[str, ...], data_dir: Path, save_dir: Path, **options: Any) -> None:
        """Starts the README's command on one machine, with one rank. rendezvous: torchrun's options for it."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--nnodes=2", *rendezvous]
        command = ["ip", "netns", "exec", self.names[node], *torchrun, *train_arguments(data_dir, save_dir, **options)]
        environment = {name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name}
        with open(self.logs[node], "wb") as log:
            self.torchruns[node] = subprocess.Popen(command, stdout=log, stderr=log, env=environment | {"OMP_NUM_THREADS": "1"})

    def wait(self, node: int, seconds: float) -> int:
        """The exit code of a machine's torchrun."""
        try:
            return self.torchruns[node].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"node {node} still runs after {seconds:.0f} s:\n{self.logs[node].read_text()}") from None

    def wait_for_steps(self, save_dir: Path) -> None:
        """Returns after the first step of the first machine."""
        metrics = save_dir / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert self.torchruns[0].poll() is None and time.monotonic() < deadline, self.logs[0].read_text()
            time.sleep(0.05)

    def cut_cable(self) -> None:
        ip("-n", self.names[0], "link", "set", "cable", "down")

    def kill(self, node: int) -> None:
        """Kills all processes of one machine."""
        for pid in ip("netns", "pids", self.names[node]).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        present = ip("netns", "list").split()
        for node in (node for node, name in enumerate(self.names) if name in present):
            self.kill(node)
            ip("netns", "del", self.names[node])
        for torchrun in self.torchruns.values():
            torchrun.wait(10)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
