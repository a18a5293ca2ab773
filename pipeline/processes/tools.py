"""Runs llm_core's tools as child processes, with an environment without secrets."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dagster import AssetExecutionContext, Failure

from llm_core.errors import UserError

# What child processes need to find Python, CUDA and the network. The orchestrator's secrets are not passed on.
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
    "ONEDNN_",
    "DNNL_",
    "NVIDIA_",
)
# Names with an allowed prefix that are secrets, such as NVIDIA_API_KEY.
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|(^|_)KEY(S|_|$)", re.IGNORECASE)

# Bytes: Linux's MAX_ARG_STRLEN, without the closing NUL.
_MAX_ARGUMENT = 32 * 4096 - 1

# Seconds between two lines of a tool in Dagster's log.
_LOG_SECONDS = 4.0

_DOWNLOADS = {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}


def training_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of child processes: allowed variables of this process, and `extra`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ALLOWED or (name.startswith(_ALLOWED_PREFIXES) and not _SECRET.search(name))
    }
    # Each worker creates its own store, so that a restarted rank finds the rendezvous free.
    return kept | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | dict(extra)


def download_environment() -> dict[str, str]:
    """Variables for downloads from the Hugging Face hub: proxies, certificates and HF_*.

    HF_TOKEN is the only secret that is passed on: gated data sets need it.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("HF_") or name in _DOWNLOADS or name.lower() in _PROXIES
    }


def option_list(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line arguments, which `llm_core.cli.parse_options` reads back unchanged; None means the default.

    Raises:
        UserError: a value is too long for a command line.
    """
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            # One argument, so that a value that begins with "-" is not taken for a flag.
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, list | dict) else value}")
            if (size := len(os.fsencode(arguments[-1]))) > _MAX_ARGUMENT:
                raise UserError(f"{name}: {size:,} bytes are too long for a command line, at most {_MAX_ARGUMENT:,}; shorten it")
    return arguments


def run_tool(
    context: AssetExecutionContext, module: str, options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> None:
    """Runs one of llm_core's tools in a child process that dies with this one, so that the orchestrator does not load PyTorch.

    The newest line of its stderr is logged every few seconds. environment: additional variables.

    Raises:
        dagster.Failure: the tool failed; the description has its error output. Only a killed tool may be retried.
    """
    command = [sys.executable, "-m", "pipeline.processes.child", module, *option_list(options)]
    context.log.info(shlex.join(command))
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            env=training_environment(environment or {}),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        with process:
            try:
                errors = _follow(process.stderr or (), context.log.info)
            except BaseException:  # such as a cancelled run
                process.kill()
                raise
        output.seek(0)
        printed = output.read()
    if process.returncode < 0:
        number = -process.returncode
        raise Failure(
            f"{module} was killed by signal {number} ({signal.strsignal(number)}): {errors[-2000:]}\n"
            "Run again; if it is killed again, give the machine more memory."
        )
    if process.returncode:
        raise Failure(f"{module} ended with code {process.returncode}: {errors[-2000:]}", allow_retries=False)
    context.log.info(printed)


def _follow(lines: Iterable[str], log: Callable[[str], object]) -> str:
    """Logs the newest of the lines every few seconds, and returns the last lines."""
    last: deque[str] = deque(maxlen=200)
    logged = time.monotonic()
    for line in lines:
        last.append(line)
        if time.monotonic() - logged >= _LOG_SECONDS and line.strip():
            log(line.strip())
            logged = time.monotonic()
    return "".join(last)
