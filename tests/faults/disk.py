"""Failing disks: the n-th write, sync or rename fails, for every n, and file systems too small for each stage."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_core.config import TrainConfig
from llm_core.evaluation import read_evaluation
from llm_core.huggingface.directory import export_checkpoint
from llm_core.layout import Home, ModelFolder
from llm_core.system.files import HashingWriter
from llm_core.training.run import train
from tests.faults.damage import evaluate, prepare, run_folder
from tests.faults.forks import OPTIONS, outcome, run_forked
from tests.faults.report import Tally

_STEPS = 4
# One checkpoint in the background during training and one at the end.
_CONFIG = TrainConfig(**(OPTIONS | {"max_steps": _STEPS, "num_layers": 1, "save_interval": 2}))
_BYTES_MISSING = re.compile(r"disk full, .*[\d,]+ bytes and [\d,]+ are (free|missing)")


def _stages(home: Path) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """The work of each stage, in the order of the lineage, and a function that reads its result."""
    prepared, run, model = Home(home).prepared, run_folder(home), ModelFolder(home / "model")
    final = run.checkpoint(_STEPS)
    return {
        "prepare": (lambda: prepare(home), lambda: prepared.metadata.read_bytes()),
        "train": (lambda: train(_CONFIG, prepared.root, run.root, resume="auto"), lambda: outcome(run.root, _STEPS)),
        # Read from the file: a parent that has used PyTorch's threads must not fork.
        "evaluate": (
            lambda: evaluate(home, final),
            lambda: [read_evaluation(path)["metrics"] for path in Home(home).evaluations()],
        ),
        "export": (
            lambda: export_checkpoint(final, prepared.root, model.root, None, "test"),
            lambda: [(path.name, path.read_bytes()) for path in sorted(model.root.iterdir()) if path != model.record],
        ),
    }


def fail_the_nth_call(corpus_dir: Path, folder: Path, every: int = 1) -> Tally:
    """The n-th write, fsync or rename of each stage fails, for every n, and the stage is run again without a fault.

    every: tests only each `every`-th n, to save time.
    """
    tally = Tally("n-th write, fsync or rename fails", 0)
    reference = _home(corpus_dir, folder / "reference")
    before = folder / "before"
    shutil.copytree(reference, before)
    for stage, (work, result) in _stages(reference).items():
        ended = run_forked(work, folder / "log")
        assert ended.code == 0, ended.output
        expected = result()
        n, succeeded = 0, False
        while not succeeded:
            n += 1 if n == 0 else every
            home = folder / "home"
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(before, home, copy_function=shutil.copy2)
            work_here, result_here = _stages(home)[stage]
            disturbed = run_forked(lambda n=n, work=work_here: _with_failing_call(n, work), folder / "log")
            succeeded = disturbed.code == 0
            if succeeded:
                continue
            rerun = run_forked(work_here, folder / "log")
            problem = None
            if "Traceback" in disturbed.output:
                problem = f"{stage}, call {n}: {disturbed.output[-600:]}"
            elif rerun.code or result_here() != expected:
                problem = f"{stage}, call {n}: exit code {rerun.code} of the rerun: {rerun.output[-600:]}"
            tally.count(problem)
        shutil.copytree(reference, before, copy_function=shutil.copy2, dirs_exist_ok=True)
    return tally


def fill_the_disk(corpus_dir: Path, folder: Path, shares: Sequence[float] = (0.1, 0.5, 0.9)) -> Tally:
    """Each stage on a file system too small for it, and again after the file system has grown. Needs root to mount one.

    shares: of the space that the stage needs.
    """
    tally = Tally("disk full", 0)
    reference = _home(corpus_dir, folder / "reference")
    before = folder / "before"
    shutil.copytree(reference, before)
    for stage, (work, result) in _stages(reference).items():
        used = _size(reference)
        ended = run_forked(work, folder / "log")
        assert ended.code == 0, ended.output
        growth = _size(reference) - used
        for share in shares:
            what = f"{stage} with {share:.0%} of the space it needs"
            with _small_disk(folder / "disk", 64 << 20) as disk:
                home = disk / "home"
                shutil.copytree(before, home, copy_function=shutil.copy2)
                _resize(disk, _blocks(disk) + int(share * growth))
                work_here, result_here = _stages(home)[stage]
                disturbed = run_forked(work_here, folder / "log")
                _resize(disk, 64 << 20)
                rerun = run_forked(work_here, folder / "log2")
                problem = None
                if disturbed.code != 0 and (not _BYTES_MISSING.search(disturbed.output) or "Traceback" in disturbed.output):
                    problem = f"{what}: exit code {disturbed.code}: {disturbed.output[-600:]}"
                elif rerun.code or result_here() != result():
                    problem = f"{what}: exit code {rerun.code} of the rerun: {rerun.output[-600:]}"
                tally.count(problem)
        shutil.copytree(reference, before, copy_function=shutil.copy2, dirs_exist_ok=True)
    return tally


def can_mount(folder: Path) -> bool:
    try:
        with _small_disk(folder, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _home(corpus_dir: Path, home: Path) -> Path:
    shutil.copytree(corpus_dir, Home(home).raw_text)
    return home


def _with_failing_call(n: int, work: Callable[[], object]) -> None:
    calls = 0

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments)

        return call

    class FailingRaw:
        """A file whose writes count too, below the code that reports errors."""

        def __init__(self, raw: Any) -> None:
            self._raw = raw
            self.write, self.flush = counting(raw.write), raw.flush

    original = HashingWriter.__init__
    HashingWriter.__init__ = lambda self, raw, path: original(self, FailingRaw(raw), path)  # type: ignore[assignment, method-assign]
    os.fsync, os.replace, os.rename = counting(os.fsync), counting(os.replace), counting(os.rename)
    work()


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def _blocks(disk: Path) -> int:
    usage = shutil.disk_usage(disk)
    return usage.total - usage.free


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
