"""The disk refuses the catalog: DuckDB's n-th write, sync, cut or deletion fails for every n, by strace."""

import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.catalog.catalog import Catalog
from tests.faults.report import Tally
from tests.faults.steps import catalog_rows

_RECORD = """
import sys
from pathlib import Path
from llm_core.cli import run_tool
from pipeline.catalog.catalog import Catalog
home = Path(sys.argv[1])
run_tool(lambda: Catalog(home / "catalog.duckdb").record_run(home / "checkpoints/run"), "record")
"""
_CALLS = "write,pwrite64,fsync,fdatasync,ftruncate,rename,unlink"


def fail_the_nth_call_of_the_catalog(home: Path, folder: Path, every: int = 1) -> Tally:
    """A run is recorded while the n-th call on the catalog's files fails, and again without a fault.

    every: takes only each `every`-th n, for a quicker run.
    """
    tally = Tally("catalog: n-th write or sync fails", 0)
    start, copy, trace = folder / "start", folder / "home", folder / "trace"
    shutil.copytree(home, start)
    for path in start.glob("catalog.duckdb*"):
        path.unlink()
    Catalog(start / "catalog.duckdb").create()
    before = catalog_rows(start / "catalog.duckdb")
    shutil.copytree(start, copy)
    assert _record(copy).returncode == 0
    expected = catalog_rows(copy / "catalog.duckdb")
    assert expected != before
    n = 1
    while True:
        shutil.rmtree(copy)
        shutil.copytree(start, copy)
        fault = f"inject={_CALLS}:error={'ENOSPC' if n % 2 else 'EIO'}:when={n}"
        files = [option for end in ("", ".wal") for option in ("-P", str(copy / f"catalog.duckdb{end}"))]
        broken = _record(copy, "strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={_CALLS}", "-e", fault, *files)
        if "INJECTED" not in trace.read_text():
            return tally
        between = catalog_rows(copy / "catalog.duckdb")
        mended = _record(copy)
        problem = None
        said = broken.returncode == 0 or (broken.returncode == 3 and "catalog.duckdb" in broken.stderr)
        if not said or "Traceback" in broken.stderr:
            problem = f"ended with {broken.returncode}: {broken.stderr[-600:]}"
        elif n % 2 and broken.returncode and "bytes that are free" not in broken.stderr:
            problem = f"a full disk is not called one: {broken.stderr[-600:]}"
        elif between not in (before, expected) or (broken.returncode == 0 and between != expected):
            problem = "a part of the record is there, or nothing of one that was said to be"
        elif mended.returncode or catalog_rows(copy / "catalog.duckdb") != expected:
            problem = f"recorded again, it ends with {mended.returncode}: {mended.stderr[-600:]}"
        tally.count(problem and f"call {n}: {problem}")
        n += every


def can_trace() -> bool:
    try:
        return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _record(home: Path, *tracer: str) -> "subprocess.CompletedProcess[str]":
    command = [*tracer, sys.executable, "-c", _RECORD, str(home)]
    return subprocess.run(command, capture_output=True, text=True)
