"""Child processes: llm_core's tools, and a torchrun that cannot outlive its parent and ends in good order."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
from dagster import AssetExecutionContext, Failure

from pipeline.interrupts import postponed_interrupts

# The training process gets what it needs to find Python, CUDA and the network, and no secret of the orchestrator's.
_ALLOWED = {
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "TMPDIR",
    "TZ",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "CC",
    "CXX",
}
_ALLOWED_PREFIXES = (
    "LC_",
    "CUDA_",
    "NCCL_",
    "GLOO_",
    "FI_",  # libfabric: the network of AWS
    "UCX_",
    "TORCH_",
    "PYTORCH_",
    "TORCHINDUCTOR_",
    "TRITON_",
    "OMP_",
    "MKL_",
    "NVIDIA_",
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|(^|_)KEY(S|_|$)", re.IGNORECASE)
"""Of the names with these beginnings, those that hold no setting: NVIDIA_API_KEY, say."""

_DOWNLOADS = {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}


def training_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of the training: an allow-list of this process's variables, and `extra`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ALLOWED or (name.startswith(_ALLOWED_PREFIXES) and not _SECRET.search(name))
    }
    # Each worker makes its own store: a killed rank's restart then finds the meeting point free.
    return kept | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | dict(extra)


def download_environment() -> dict[str, str]:
    """What a tool needs beside that to load data from the Hugging Face hub: the way through a proxy, and HF_*.

    HF_TOKEN is among them, the one secret that is passed on: without it no gated data set can be read.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("HF_") or name in _DOWNLOADS or name.lower() in _PROXIES
    }


def option_list(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line that a person would type; None means the default."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, list | dict) else str(value)]
    return arguments


def run_tool(
    context: AssetExecutionContext, module: str, options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> None:
    """Runs one of llm_core's tools in a process that ends with this one: PyTorch's memory stays out of the orchestrator.

    environment: what it gets beside what every training process gets.

    Raises:
        dagster.Failure: the tool failed; the description is what it said. One that was killed may be tried again.
    """
    command = [sys.executable, "-m", "pipeline.child", module, *option_list(options)]
    context.log.info(shlex.join(command))
    done = subprocess.run(command, env=training_environment(environment or {}), capture_output=True, text=True)
    if done.returncode < 0:
        number = -done.returncode
        raise Failure(
            f"{module} was killed by signal {number} ({signal.strsignal(number)}): {done.stderr[-2000:]}\n"
            "Run again; if it is killed again, give the machine more memory."
        )
    if done.returncode:
        raise Failure(f"{module} ended with code {done.returncode}: {done.stderr[-2000:]}", allow_retries=False)
    context.log.info(done.stdout)


def torchrun_arguments(module: str, nproc_per_node: int, meeting_point: Path, options: Sequence[str]) -> list[str]:
    """torchrun on this machine alone: its processes meet in a file of their own, no port is open to the network."""
    return [
        "--nnodes=1",
        f"--nproc_per_node={nproc_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting_point}",
        "--rdzv-conf=store_type=file",
        "--max-restarts=0",  # a retry resumes from the checkpoint, from outside
        "-m",
        module,
        *options,
    ]


class TorchrunProcess:
    """One torchrun with its ranks. Leaving the `with` block ends whatever is still running; an interrupt waits until then."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log_path: Path, grace_seconds: float) -> None:
        self.command = [sys.executable, "-m", "pipeline.child", "torch.distributed.run", *arguments]
        self.log_path = log_path
        self._environment = dict(environment)
        self._grace_seconds = grace_seconds
        self._exit = ExitStack()

    def __enter__(self) -> "TorchrunProcess":
        with ExitStack() as stack:
            self._interrupted = stack.enter_context(postponed_interrupts())
            log = stack.enter_context(open(self.log_path, "ab"))
            self._log_start = log.seek(0, os.SEEK_END)  # what stands before is from earlier attempts
            self._process = subprocess.Popen(
                self.command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
            stack.callback(self.stop)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def wait(self, poll_seconds: float) -> Iterator[None]:
        """Yields about every `poll_seconds` until the training has ended or an interrupt came."""
        due = time.monotonic() + poll_seconds
        while self._process.poll() is None and not self._interrupted():
            # Popen.wait with a timeout would look five times as often, and the cores are the training's.
            time.sleep(min(0.1, poll_seconds))
            if time.monotonic() >= due:
                yield
                due = time.monotonic() + poll_seconds

    @property
    def exit_code(self) -> int:
        code = self._process.poll()
        assert code is not None, "the training still runs"
        return code

    def output(self) -> list[str]:
        """The lines this process and its ranks have printed."""
        with open(self.log_path, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()

    def stop(self) -> None:
        """Asks the ranks to save and end; kills what is left when the grace period is over."""
        if self._process.poll() is not None:
            return
        torchrun = psutil.Process(self._process.pid)
        ranks = torchrun.children(recursive=True)
        # The ranks are asked directly: torchrun itself would give them no more than 30 seconds to save.
        for process in ranks or [torchrun]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self._grace_seconds)
        # Ranks have process groups of their own: killing torchrun's would not reach them.
        for process in [torchrun, *ranks]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
