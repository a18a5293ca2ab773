"""Disks that refuse: the n-th write, sync or rename fails for every n, and a file system that is too small for each stage."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_core.config import TrainConfig
from llm_core.export import export_checkpoint
from llm_core.files import HashingWriter, read_json
from llm_core.train import train
from tests.faults.damage import judge, prepare
from tests.faults.forks import OPTIONS, outcome, run_forked
from tests.faults.report import Tally

_STEPS = 4
# A checkpoint while it trains, in the background, and one at the end.
_CONFIG = TrainConfig(**(OPTIONS | {"max_steps": _STEPS, "num_layers": 1, "save_interval": 2}))
_BYTES_MISSING = re.compile(r"disk full, .*[\d,]+ bytes and [\d,]+ are (free|missing)")


def _stages(home: Path) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """For each stage what does it, in the order of the lineage, and what is then to be seen of it."""
    processed, run_dir, model = home / "processed_data", home / "checkpoints/run", home / "model"
    final = run_dir / f"checkpoint_step_{_STEPS}.pt"
    return {
        "prepare": (lambda: prepare(home), lambda: (processed / "metadata.json").read_bytes()),
        "train": (lambda: train(_CONFIG, processed, run_dir, resume="auto"), lambda: outcome(run_dir, _STEPS)),
        # Looked at in its file: a parent that has used PyTorch's threads must not fork any more.
        "judge": (lambda: judge(home, final), lambda: [read_json(path)["metrics"] for path in run_dir.glob("evaluation_*.json")]),
        "export": (
            lambda: export_checkpoint(final, processed, model, None, "test"),
            lambda: [(path.name, path.read_bytes()) for path in sorted(model.iterdir()) if path.name != "textmill.json"],
        ),
    }


def fail_the_nth_call(corpus_dir: Path, folder: Path, every: int = 1) -> Tally:
    """For every stage and every n: the n-th write, fsync or rename fails, and the stage is run again without a fault.

    every: takes only each `every`-th n, for a quicker run.
    """
    tally = Tally("n-th write, fsync or rename fails", 0)
    reference = _home(corpus_dir, folder / "reference")
    before = folder / "before"
    shutil.copytree(reference, before)
    for stage, (work, look) in _stages(reference).items():
        ended = run_forked(work, folder / "log")
        assert ended.code == 0, ended.output
        expected = look()
        n, succeeded = 0, False
        while not succeeded:
            n += 1 if n == 0 else every
            home = folder / "home"
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(before, home, copy_function=shutil.copy2)
            again, look_there = _stages(home)[stage]
            broken = run_forked(lambda n=n, again=again: _with_failing_call(n, again), folder / "log")
            succeeded = broken.code == 0
            if succeeded:
                continue
            mended = run_forked(again, folder / "log")
            problem = None
            if "Traceback" in broken.output:
                problem = f"{stage}, call {n}: {broken.output[-600:]}"
            elif mended.code or look_there() != expected:
                problem = f"{stage}, call {n}: run again, it ends with {mended.code}: {mended.output[-600:]}"
            tally.count(problem)
        shutil.copytree(reference, before, copy_function=shutil.copy2, dirs_exist_ok=True)
    return tally


def fill_the_disk(corpus_dir: Path, folder: Path) -> Tally:
    """Every stage on a file system that is too small for it, and again after it has grown. Needs root, to mount one."""
    tally = Tally("disk full", 0)
    reference = _home(corpus_dir, folder / "reference")
    for stage, (work, look) in _stages(reference).items():
        used = _size(reference)
        ended = run_forked(work, folder / "log")
        assert ended.code == 0, ended.output
        growth = _size(reference) - used
        for share in (0.1, 0.5, 0.9):
            what = f"{stage} with {share:.0%} of its space"
            with _small_disk(folder / "disk", 64 << 20) as disk:
                before = disk / "home"
                _replay(corpus_dir, before, stage, folder / "log")
                _resize(disk, _blocks(disk) + int(share * growth))
                again, look_there = _stages(before)[stage]
                broken = run_forked(again, folder / "log")
                _resize(disk, 64 << 20)
                mended = run_forked(again, folder / "log2")
                problem = None
                if broken.code != 0 and (not _BYTES_MISSING.search(broken.output) or "Traceback" in broken.output):
                    problem = f"{what}: {broken.code} {broken.output[-600:]}"
                elif mended.code or look_there() != look():
                    problem = f"{what}: run again, it ends with {mended.code}: {mended.output[-600:]}"
                tally.count(problem)
    return tally


def can_mount(folder: Path) -> bool:
    try:
        with _small_disk(folder, 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _home(corpus_dir: Path, home: Path) -> Path:
    shutil.copytree(corpus_dir, home / "raw_text_data")
    return home


def _replay(corpus_dir: Path, home: Path, until: str, log: Path) -> None:
    """A home in which every stage before `until` has been done."""
    _home(corpus_dir, home)
    for stage, (work, _) in _stages(home).items():
        if stage == until:
            return
        ended = run_forked(work, log)
        assert ended.code == 0, ended.output


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
        """A file whose writes are counted too, below the place where errors are told."""

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
