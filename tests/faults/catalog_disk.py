"""The disk fails the catalog: strace makes DuckDB's n-th write, sync, truncation or deletion fail, for every n."""

import shutil
import subprocess
import sys
from pathlib import Path

from llm_core.layout import Home
from pipeline.catalog.catalog import Catalog
from tests.faults.report import Tally
from tests.faults.steps import catalog_rows

_RECORD = """
import sys
from pathlib import Path
from llm_core.cli import run_tool
from llm_core.layout import Home
from pipeline.catalog.catalog import Catalog
home = Home(Path(sys.argv[1]))
run_tool(lambda: Catalog(home.catalog).record_run(home.run("run").root), "record")
"""
_CALLS = "write,pwrite64,fsync,fdatasync,ftruncate,rename,unlink"


def fail_the_nth_call_of_the_catalog(home: Path, folder: Path, every: int = 1) -> Tally:
    """Records a run while the n-th call on the catalog's files fails, then again without a fault.

    every: tests only each `every`-th n, to save time.
    """
    tally = Tally("catalog: n-th write or sync fails", 0)
    start, copy, trace = folder / "start", folder / "home", folder / "trace"
    shutil.copytree(home, start)
    for path in start.glob(f"{Home(start).catalog.name}*"):
        path.unlink()
    Catalog(Home(start).catalog).create()
    before = catalog_rows(Home(start).catalog)
    catalog = Home(copy).catalog
    shutil.copytree(start, copy)
    assert _record(copy).returncode == 0
    expected = catalog_rows(catalog)
    assert expected != before
    n = 1
    while True:
        shutil.rmtree(copy)
        shutil.copytree(start, copy)
        fault = f"inject={_CALLS}:error={'ENOSPC' if n % 2 else 'EIO'}:when={n}"
        files = [option for end in ("", ".wal") for option in ("-P", f"{catalog}{end}")]
        disturbed = _record(copy, "strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={_CALLS}", "-e", fault, *files)
        if "INJECTED" not in trace.read_text():
            return tally
        between = catalog_rows(catalog)
        rerun = _record(copy)
        problem = None
        reported = disturbed.returncode == 3 and catalog.name in disturbed.stderr
        if (disturbed.returncode and not reported) or "Traceback" in disturbed.stderr:
            problem = f"exit code {disturbed.returncode}: {disturbed.stderr[-600:]}"
        elif n % 2 and disturbed.returncode and "bytes that are free" not in disturbed.stderr:
            problem = f"a full disk is not reported as one: {disturbed.stderr[-600:]}"
        elif between not in (before, expected) or (disturbed.returncode == 0 and between != expected):
            problem = "the record is incomplete, or missing although the exit code is 0"
        elif rerun.returncode or catalog_rows(catalog) != expected:
            problem = f"exit code {rerun.returncode} of the rerun: {rerun.stderr[-600:]}"
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
