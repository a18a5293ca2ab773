"""File systems such as network mounts: without flock, without any locks, and without fsync of folders."""

import errno
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.file_systems import without
from tests.support.training import train_arguments

_REMEDY = "mount it with locks (Lustre: -o flock), or use a folder on another file system"

# Prepares data, trains and uses the catalog in one process. The raw text and the folder to write to are its arguments.
_EVERYTHING = """
import sys
from pathlib import Path
from llm_core import data_prep_tool, train
from pipeline.catalog.database import Database

raw, folder = sys.argv[1:3]
data_prep_tool.main(["--input_dir", raw, "--output_dir", f"{folder}/data", "--vocab_size", "512", "--max_length", "64"])
sys.argv[1:] = sys.argv[4:]
train.main()
database = Database(Path(folder) / "catalog.duckdb", wait_seconds=5)
with database.connect() as connection:
    connection.execute("CREATE TABLE written AS SELECT 7 AS number")
with database.connect(read_only=True) as connection:
    assert connection.execute("FROM written").fetchall() == [(7,)]
with database.replaced() as fresh, Database(fresh).connect() as connection:
    connection.execute("CREATE TABLE replaced (number INTEGER)")
with database.connect(read_only=True) as connection:
    assert connection.execute("FROM replaced").fetchall() == []
"""

# Takes the locks named by its arguments: of a folder, or of the catalog in it, for writing.
_LOCK = """
import sys
from pathlib import Path
from llm_core.cli import run_tool
from llm_core.errors import UserError
from llm_core.system import held
from pipeline.catalog.database import Database

def refuse(holder):
    raise UserError(f"process {holder} holds it")

def main():
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    lock = held(folder, refuse) if kind == "folder" else Database(folder / "catalog.duckdb", 0.2).connect(kind == "reader")
    with lock:
        print("locked", flush=True)
        sys.stdin.read()

run_tool(main, "lock")
"""


def take_lock(folder: Path, kind: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _LOCK, str(folder), kind]
    return subprocess.run(command, env=environment, capture_output=True, text=True, input="")


@pytest.mark.slow
@pytest.mark.parametrize(("flock", "fsync"), [(errno.ENOSYS, errno.EINVAL), (errno.EOPNOTSUPP, errno.ENOTSUP)])
def test_everything_works_without_flock_and_without_fsync_of_folders(
    flock: int, fsync: int, corpus_dir: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(tmp_path / "data", tmp_path / "run", max_steps=2, eval_tokens=64)
    done = subprocess.run(
        [sys.executable, "-c", _EVERYTHING, str(corpus_dir), str(tmp_path), *arguments[1:]],
        env=without(tmp_path, flock=flock, fsync=fsync),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint_step_2.pt.json").is_file()


def test_a_failing_disk_is_not_taken_for_a_file_system_without_fsync(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from llm_core.system import fsync_path; fsync_path(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=without(tmp_path, fsync=errno.EIO), capture_output=True, text=True)
    assert done.returncode == 1 and "Input/output error" in done.stderr


@pytest.mark.parametrize("kind", ["folder", "writer"])
def test_without_flock_only_one_process_has_the_lock_until_it_is_killed(kind: str, tmp_path: Path) -> None:
    environment = without(tmp_path, flock=errno.ENOSYS)
    holder = subprocess.Popen(
        [sys.executable, "-c", _LOCK, str(tmp_path), kind],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        refused = take_lock(tmp_path, kind, environment)
        assert refused.returncode and f"process {holder.pid} holds" in refused.stderr
    finally:
        holder.kill()
        holder.wait()
    assert take_lock(tmp_path, kind, environment).stdout == "locked\n"


@pytest.mark.parametrize(
    ("kind", "number"),
    [("folder", errno.ENOSYS), ("writer", errno.EOPNOTSUPP), ("writer", errno.ENOLCK), ("reader", errno.ENOSYS)],
)
def test_without_any_locks_one_line_names_the_folder_and_the_remedy(kind: str, number: int, tmp_path: Path) -> None:
    assert kind == "folder" or take_lock(tmp_path, "writer", without(tmp_path)).returncode == 0
    done = take_lock(tmp_path, kind, without(tmp_path, flock=number, fcntl=number))
    assert done.returncode == 2
    assert done.stderr.startswith(f"lock: error: {tmp_path}: the file system of this folder has no file locks (")
    assert done.stderr.endswith(f"{_REMEDY}\n") and done.stderr.count("\n") == 1


def test_a_catalog_that_duckdb_cannot_lock_is_reported_at_once(tmp_path: Path) -> None:
    done = take_lock(tmp_path, "writer", without(tmp_path, fcntl=errno.ENOSYS))
    assert done.returncode == 2
    message = f"{tmp_path}: the file system of this folder has no file locks (DuckDB needs them); {_REMEDY}"
    assert done.stderr == f"lock: error: {message}\n"
