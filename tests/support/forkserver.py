"""The training tool in forks of a process that has loaded PyTorch, so that loading it takes its seconds only once."""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["llm_core.train"])


def run_in_child(arguments: Sequence[str], environment: Mapping[str, str]) -> CompletedProcess[str]:
    """Runs `python -m llm_core.train` with these arguments and this environment."""
    with tempfile.TemporaryDirectory() as name:
        outputs = Path(name, "stdout"), Path(name, "stderr")
        child = _CONTEXT.Process(target=_train, args=(list(arguments), dict(environment), Path.cwd(), *outputs))
        child.start()
        child.join()
        assert child.exitcode is not None
        stdout, stderr = (path.read_text(errors="replace") if path.exists() else "" for path in outputs)
        return CompletedProcess(list(arguments), child.exitcode, stdout, stderr)


def _train(arguments: list[str], environment: dict[str, str], folder: Path, stdout: Path, stderr: Path) -> None:
    from llm_core.distributed.launch import run_rank
    from llm_core.train import main

    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["llm_core/train.py", *arguments]
    run_rank(main)
