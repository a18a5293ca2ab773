"""The catalog: one transaction per record, many processes at once, the way from a checkpoint to its raw text and back."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_core.errors import DataError, UserError
from llm_core.files import read_json, sha256_file, write_json
from pipeline.catalog import database
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogBusyError, CatalogError, Database
from pipeline.catalog.rebuild import rebuild

TABLES = [
    *("snapshots", "documents", "snapshot_documents", "tokenizers", "shards", "shard_documents", "datasets", "dataset_shards"),
    *("training_runs", "train_metrics", "run_documents", "checkpoints", "evaluations", "models"),
    *("checkpoint_lineage", "document_usage"),
]
NASTY = ["it's.txt", 'say "hi".txt', "two\nlines.txt", "'); DROP TABLE documents; --.txt", "a*[b]?.txt", "ünïcödé 文.txt"]


def document_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Artifacts:
    """Writes by hand the files of one small lineage, as the stages leave them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.processed = home / "processed_data"

    def snapshot(self, snapshot_id: str, paths: list[str], config: dict[str, Any] | None = None) -> None:
        """One kept document per path, its text the path itself; the first text once more, as a duplicate, in copy.txt."""
        rows = [(path, path, "kept") for path in paths] + [("copy.txt", paths[0], "duplicate")]
        split = ["val" if text == paths[-1] else "train" for _, text, _ in rows]
        table = {
            "document_id": [document_id(text) for _, text, _ in rows],
            "path": [path for path, _, _ in rows],
            "start": [0] * len(rows),
            "end": [len(text) for _, text, _ in rows],
            "text_start": [0] * len(rows),
            "bytes": [len(text.encode()) for _, text, _ in rows],
            "characters": [len(text) for _, text, _ in rows],
            "split": split,
            "status": [status for _, _, status in rows],
        }
        digest = self._parquet(self.processed / "snapshots" / f"{snapshot_id}.documents.parquet", table)
        summary = {
            "format_version": 1,
            "snapshot_id": snapshot_id,
            "parent_snapshot_id": None,
            "config": config or {},
            "files": len(rows),
            "documents": len(paths),
            "bytes_read": 100,
            "bytes_kept": 90,
            "bytes_dropped": {"duplicate": 10},
            "documents_table": {"file": f"{snapshot_id}.documents.parquet", "sha256": digest},
        }
        write_json(self.processed / "snapshots" / f"{snapshot_id}.json", summary)

    def tokenizer(self, tokenizer_id: str, snapshot_id: str) -> None:
        report = {
            "tokenizer_id": tokenizer_id,
            "tokenizer_type": "bpe",
            "vocab_size": 512,
            "sha256": "0" * 64,
            "config": {"vocab_size": 512},
            "snapshot_id": snapshot_id,
            "train_bytes": 90,
            "bytes_per_token": 2.5,
            "tokens_per_word": 1.5,
            "vocab_used": 0.5,
        }
        write_json(self.processed / "tokenizers" / f"{tokenizer_id}.report.json", report)

    def dataset(self, dataset_id: str, snapshot_id: str, tokenizer_id: str, paths: list[str]) -> None:
        """One shard per split; the last path is the validation split."""
        shards = []
        for split, texts in (("train", paths[:-1]), ("val", paths[-1:])):
            shard_id = f"{split}{document_id(''.join(texts))}"[:16]
            facts = {
                "document_id": [document_id(text) for text in texts],
                "token_start": [10 * row for row in range(len(texts))],
                "token_count": [10] * len(texts),
                "bytes": [len(text) for text in texts],
            }
            facts_file = f"dataset/{shard_id}.parquet"
            digest = self._parquet(self.processed / facts_file, facts)
            sizes = {"tokens": 10 * len(texts), "documents": len(texts), "bytes": 20, "file_bytes": 200}
            names = {"shard_id": shard_id, "file": f"dataset/{shard_id}.arrow", "facts_file": facts_file, "split": split}
            shards.append(names | sizes | {"sha256": "1" * 64, "facts_sha256": digest, "removed_rows": []})
        splits = {shard["split"]: {name: shard[name] for name in ("tokens", "documents", "bytes")} for shard in shards}
        manifest = {
            "format_version": 1,
            "dataset_id": dataset_id,
            "snapshot_id": snapshot_id,
            "parent_dataset_id": None,
            "tokenizer": {"tokenizer_id": tokenizer_id},
            "dtype": "uint16",
            "config": {},
            "splits": splits,
            "shards": shards,
        }
        write_json(self.processed / "manifests" / f"{dataset_id}.json", manifest)

    def run(self, run_id: str, dataset_id: str, tokenizer_id: str, first_steps: dict[str, int]) -> Path:
        """A finished run of 4 steps with checkpoints at 2 and 4; first_steps: text of a document -> step that read it first."""
        run_dir = self.home / "checkpoints" / run_id
        digest = self._parquet(
            run_dir / "document_steps.parquet",
            {"document_id": [document_id(text) for text in first_steps], "first_step": list(first_steps.values())},
        )
        state = {
            "format_version": 1,
            "run_id": run_id,
            "dataset_id": dataset_id,
            "tokenizer_id": tokenizer_id,
            "parent_run_id": None,
            "parent_step": None,
            "document_steps_sha256": digest,
            "config": {"learning_rate": 0.001},
            "seed": 1337,
            "code_version": "0.1.0",
            "git_commit": None,
            "status": "finished",
            "error": None,
            "started_at": "2026-01-02T03:04:05.678+00:00",
            "finished_at": "2026-01-02T04:04:05.678+00:00",
            "steps_done": 4,
            "tokens_seen": 400,
            "skipped_steps": 0,
            "parameters": 1000,
            "world_size": 1,
            "threads": 1,
            "device": "cpu",
            "precision": "fp32",
            "attention": "sdpa",
            "torch_version": "2.13.0",
        }
        write_json(run_dir / "run.json", state)
        lines: list[dict[str, Any]] = []
        for step in range(1, 5):
            numbers = {"loss": 5.0 - step, "learning_rate": 0.001, "grad_norm": 1.0, "tokens_per_second": 50.0, "skipped": False}
            lines.append({"kind": "train", "step": step, "tokens": 100 * step} | numbers)
            if step % 2 == 0:
                lines.append({"kind": "eval", "step": step, "tokens": 100 * step, "val_loss": 4.5, "val_bits_per_byte": 2.5})
                lines.append({"kind": "checkpoint"} | self.checkpoint(run_dir, step))
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run_dir

    def checkpoint(self, run_dir: Path, step: int) -> dict[str, Any]:
        path = run_dir / f"checkpoint_step_{step}.pt"
        path.write_bytes(b"weights")
        facts = {
            "checkpoint_id": document_id(f"{run_dir.name}{step}")[:16],
            "run_id": run_dir.name,
            "step": step,
            "tokens_seen": 100 * step,
            "sha256": sha256_file(path),
            "bytes": 7,
            "val_loss": 4.5,
        }
        write_json(path.with_name(path.name + ".json"), facts | {"format_version": 1, "file": path.name})
        return facts

    def evaluation(self, run_dir: Path, checkpoint_id: str, dataset_id: str) -> Path:
        path = run_dir / "evaluation_step_4_e0.json"
        metrics = [{"metric": "bits_per_byte", "split": "val", "source": source, "value": 2.25} for source in ("all", NASTY[3])]
        ids = {"evaluation_id": "e0", "checkpoint_id": checkpoint_id, "run_id": run_dir.name, "dataset_id": dataset_id}
        write_json(path, ids | {"created_at": "2026-01-02T05:00:00+02:00", "metrics": metrics})
        return path

    def model(self, model_id: str, checkpoint_id: str, run_id: str) -> Path:
        facts = {"model_id": model_id, "checkpoint_id": checkpoint_id, "run_id": run_id, "reason": "it's the first"}
        facts |= {"released_at": "2026-01-02T05:00:00+00:00"}
        write_json(self.home / "models" / model_id / "textmill.json", facts | {"metrics": {"bits_per_byte": 2.25}})
        return self.home / "models" / model_id

    def whole_lineage(self, paths: list[str]) -> str:
        """Every kind of artifact once; all training documents are read in steps 0 and 2. Returns the last checkpoint's id."""
        self.snapshot("snap", paths)
        self.tokenizer("tok", "snap")
        self.dataset("data", "snap", "tok", paths)
        run_dir = self.run("run", "data", "tok", {path: 2 * (row % 2) for row, path in enumerate(paths[:-1])})
        last = document_id("run4")[:16]
        self.evaluation(run_dir, last, "data")
        self.model("model", last, "run")
        return last

    def record_all(self, catalog: Catalog) -> None:
        catalog.record_snapshot(self.processed, "snap")
        catalog.record_tokenizer(self.processed, "tok")
        catalog.record_dataset(self.processed, "data")
        catalog.record_run(self.home / "checkpoints" / "run")
        catalog.record_evaluation(self.home / "checkpoints" / "run" / "evaluation_step_4_e0.json")
        catalog.record_model(self.home / "models" / "model")

    def _parquet(self, path: Path, columns: dict[str, Any]) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        return sha256_file(path)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    made = Artifacts(tmp_path / "home")
    made.whole_lineage(NASTY)
    return made


@pytest.fixture
def catalog(artifacts: Artifacts) -> Catalog:
    """A catalog with the whole lineage in it."""
    catalog = Catalog(artifacts.home / "catalog.duckdb", wait_seconds=30)
    artifacts.record_all(catalog)
    return catalog


def contents(catalog: Catalog) -> dict[str, list[str]]:
    """Every row of every table and view, as text, in one order."""
    return {table: sorted(map(repr, catalog.query(f"SELECT * FROM {table}"))) for table in TABLES}


def python(program: str, *arguments: object, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options
    )


def duckdb_command() -> str:
    command = shutil.which("duckdb") or shutil.which("duckdb", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("the duckdb command is not installed")
    return command


def leave_a_log(path: Path) -> None:
    """A commit whose process dies at once: the rows are in the write-ahead log only."""
    program = """
import os, signal, sys
from pathlib import Path
from pipeline.catalog.database import Database
with Database(Path(sys.argv[1])).connect() as connection:
    connection.execute("INSERT INTO dataset_shards VALUES ('d', 's', 0, 0)")
    connection.execute("COMMIT")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    python(program, path).communicate()
    assert path.with_name(path.name + ".wal").exists()


# What is recorded.


def test_every_table_has_the_rows_of_the_files(catalog: Catalog) -> None:
    counts = {table: len(rows) for table, rows in contents(catalog).items()}
    documents = len(NASTY)
    assert counts == {
        "snapshots": 1,
        "documents": documents,
        "snapshot_documents": documents + 1,
        "tokenizers": 1,
        "shards": 2,
        "shard_documents": documents,
        "datasets": 1,
        "dataset_shards": 2,
        "training_runs": 1,
        "train_metrics": 4,
        "run_documents": documents - 1,
        "checkpoints": 2,
        "evaluations": 2,
        "models": 1,
        # The checkpoint at step 2 has seen the documents of step 0 (three, one of them in two files), the last one all.
        "checkpoint_lineage": 4 + documents,
        "document_usage": 3 + documents - 1,
    }


def test_paths_are_data_whatever_they_hold(catalog: Catalog) -> None:
    assert {row["path"] for row in catalog.query("SELECT path FROM documents")} == set(NASTY)
    (used,) = [row for row in catalog.usage(NASTY[3]) if row["step"] == 4]
    assert used["documents"] == 1


@pytest.mark.parametrize("folder", ["it's", "path=elsewhere", "a[1]*b", "two\nlines", "with block in it"])
def test_a_home_may_have_any_name(folder: str, tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / folder)
    artifacts.whole_lineage(["one.txt", "two.txt"])
    catalog = Catalog(artifacts.home / "catalog.duckdb")
    artifacts.record_all(catalog)
    assert {row["path"] for row in catalog.query("SELECT path FROM documents")} == {"one.txt", "two.txt"}


def test_times_are_stored_in_utc(catalog: Catalog) -> None:
    (row,) = catalog.query("SELECT DISTINCT evaluated_at::VARCHAR AS t FROM evaluations")
    assert row["t"] == "2026-01-02 03:00:00"


def test_recording_again_changes_nothing(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    artifacts.record_all(catalog)
    assert contents(catalog) == before


def test_a_document_is_known_by_where_it_was_seen_first_in_whatever_order_it_is_recorded(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    for age, (snapshot_id, split_of_text) in enumerate([("new", ["x.txt", "text"]), ("old", ["text", "y.txt"])]):
        artifacts.snapshot(snapshot_id, split_of_text)
        os.utime(artifacts.processed / "snapshots" / f"{snapshot_id}.json", (1000 - age, 1000 - age))
    found = []
    for order in (["new", "old"], ["old", "new"]):
        catalog = Catalog(tmp_path / f"{order[0]}.duckdb")
        for snapshot_id in order:
            catalog.record_snapshot(artifacts.processed, snapshot_id)
        found.append(catalog.query("SELECT * FROM documents ORDER BY document_id"))
    assert found[0] == found[1]
    (text,) = [row for row in found[0] if row["document_id"] == document_id("text")]
    assert text["split"] == "train", "as in the old snapshot"


def test_a_step_that_was_trained_twice_counts_as_it_was_last_and_a_torn_line_not_at_all(
    catalog: Catalog, artifacts: Artifacts
) -> None:
    run_dir = artifacts.home / "checkpoints" / "run"
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": 3, "tokens": 300, "loss": 0.5}) + "\n")
        file.write('{"kind": "train", "step": 5, "tok')
    catalog.record_run(run_dir)
    rows = catalog.query("SELECT step, loss, val_loss FROM train_metrics ORDER BY step")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 4.0), (2, 3.0), (3, 0.5), (4, 1.0)]
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [2, 4]


def test_a_deleted_checkpoint_stays_known_as_deleted(catalog: Catalog, artifacts: Artifacts) -> None:
    run_dir = artifacts.home / "checkpoints" / "run"
    (run_dir / "checkpoint_step_2.pt.json").unlink()
    (run_dir / "checkpoint_step_2.pt").unlink()
    catalog.record_run(run_dir)
    rows = catalog.query("SELECT step, on_disk FROM checkpoints ORDER BY step")
    assert rows == [{"step": 2, "on_disk": False}, {"step": 4, "on_disk": True}]


def test_a_damaged_checkpoint_manifest_does_not_keep_the_run_out(catalog: Catalog, artifacts: Artifacts) -> None:
    run_dir = artifacts.home / "checkpoints" / "run"
    (run_dir / "checkpoint_step_2.pt.json").write_text('{"format_version": 1}')
    catalog.record_run(run_dir)
    rows = catalog.query("SELECT step, on_disk FROM checkpoints ORDER BY step")
    assert rows == [{"step": 2, "on_disk": False}, {"step": 4, "on_disk": True}]


def test_a_dataset_whose_manifest_was_written_anew_is_as_the_file_says(catalog: Catalog, artifacts: Artifacts) -> None:
    artifacts.dataset("data", "another snapshot", "tok", NASTY)
    catalog.record_dataset(artifacts.processed, "data")
    assert catalog.query("SELECT snapshot_id FROM datasets") == [{"snapshot_id": "another snapshot"}]


def lose_fields(path: Path) -> None:
    write_json(path, {"format_version": 1})


def change_types(path: Path) -> None:
    write_json(path, {name: [] for name in read_json(path)})


def flip_bits(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(byte ^ 0x55 for byte in content[4:]))


MANIFESTS = [
    "processed_data/snapshots/snap.json",
    "processed_data/tokenizers/tok.report.json",
    "processed_data/manifests/data.json",
    "checkpoints/run/evaluation_step_4_e0.json",
    "models/model/textmill.json",
]
RUN_STATE = "checkpoints/run/run.json"
DATA_TABLES = ["processed_data/snapshots/snap.documents.parquet", "processed_data/dataset/train*.parquet"]
RUN_FILES = ["checkpoints/run/metrics.jsonl", "checkpoints/run/document_steps.parquet"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in (*MANIFESTS, RUN_STATE) for damage in (lose_fields, change_types, flip_bits)),
        *((name, flip_bits) for name in (*DATA_TABLES, *RUN_FILES)),
        # A run that has not begun lacks its files: for them that is no damage.
        *((name, Path.unlink) for name in (*MANIFESTS, *DATA_TABLES)),
    ],
)
def test_a_damaged_artifact_is_named_and_leaves_the_catalog_as_it_was(
    name: str, damage: Callable[[Path], None], artifacts: Artifacts
) -> None:
    (path,) = artifacts.home.glob(name)
    damage(path)
    catalog = Catalog(artifacts.home / "catalog.duckdb")
    with pytest.raises(DataError) as caught:
        artifacts.record_all(catalog)
    assert path.name in str(caught.value)
    assert not isinstance(caught.value, CatalogError), "the catalog itself is fine"
    if path.parent.name == "run" and name not in MANIFESTS:
        assert catalog.query("SELECT * FROM checkpoints") == [], "all of a run or nothing of it"


# Rule 35: one transaction.


KILLED_WRITER = """
import sys, time
from pathlib import Path
from pipeline.catalog.catalog import Catalog
catalog, processed, run_dir = Catalog(Path(sys.argv[1]), 30), Path(sys.argv[2]), Path(sys.argv[3])
print("ready", flush=True)
while True:
    catalog.record_run(run_dir)
"""


def test_rule_35_a_writer_killed_at_any_moment_leaves_a_whole_state(artifacts: Artifacts) -> None:
    path = artifacts.home / "catalog.duckdb"
    run_dir = artifacts.home / "checkpoints" / "run"
    catalog = Catalog(path, wait_seconds=30)
    artifacts.record_all(catalog)
    expected = contents(catalog)
    chance = random.Random(35)
    for _ in range(8):
        writer = python(KILLED_WRITER, path, artifacts.processed, run_dir)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.15))
        writer.kill()
        writer.communicate()
        assert contents(catalog) == expected


KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import Database
victim, moment = sys.argv[3], int(sys.argv[4])
calls = 0
class Killer:
    # DuckDB's own connection, but for the end of the process at one of its statements.
    def __init__(self, connection): self.connection = connection
    def __getattr__(self, name): return getattr(self.connection, name)
    def execute(self, *arguments):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.connection.execute(*arguments)
from contextlib import contextmanager
connect = Database.connect
@contextmanager
def killing(self, read_only=False):
    with connect(self, read_only) as connection:
        yield Killer(connection)
Database.connect = killing
catalog = Catalog(Path(sys.argv[1]), 30)
home = Path(sys.argv[2])
if victim == "snapshot": catalog.record_snapshot(home / "processed_data", "snap")
elif victim == "dataset": catalog.record_dataset(home / "processed_data", "data")
else: catalog.record_run(home / "checkpoints" / "run")
"""


@pytest.mark.parametrize("victim", ["snapshot", "dataset", "run"])
def test_rule_35_a_record_killed_before_any_of_its_statements_leaves_the_state_before(victim: str, artifacts: Artifacts) -> None:
    path = artifacts.home / "catalog.duckdb"
    catalog = Catalog(path, wait_seconds=30)
    catalog.create()
    empty = contents(catalog)
    for moment in range(2, 20):
        writer = python(KILLED_IN_THE_MIDDLE, path, artifacts.home, victim, moment)
        writer.communicate()
        if writer.returncode == 0:
            break
        assert writer.returncode == -signal.SIGKILL
        assert contents(catalog) == empty
    assert moment > 3, "it has several statements"
    assert contents(catalog) != empty


def test_a_committed_record_survives_the_death_of_its_process(artifacts: Artifacts) -> None:
    """The rows are then in the write-ahead log only; readers, the next writer and the duckdb command all see them."""
    path = artifacts.home / "catalog.duckdb"
    leave_a_log(path)
    catalog = Catalog(path)
    assert len(catalog.query("SELECT * FROM dataset_shards")) == 1
    catalog.create()
    assert len(catalog.query("SELECT * FROM dataset_shards")) == 1


def test_a_full_disk_is_said_and_leaves_the_state_before(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    artifacts.snapshot("large", [f"file {number} {document_id(str(number))}" for number in range(40_000)])
    program = """
import sys
from pathlib import Path
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogError
try:
    Catalog(Path(sys.argv[1])).record_snapshot(Path(sys.argv[2]), "large")
except CatalogError as error:
    print(error)
"""
    limit = path.stat().st_size + 300_000

    def small_files() -> None:  # the nearest to a full disk that needs no mount
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    said, _ = python(program, path, artifacts.processed, preexec_fn=small_files).communicate()
    assert str(path) in said
    assert "if there is room on the disk" in said
    assert contents(catalog) == before
    problem = python(
        program.replace('Catalog(Path(sys.argv[1])).record_snapshot(Path(sys.argv[2]), "large")', "rebuild_home()").replace(
            "try:",
            "from pipeline.catalog.rebuild import rebuild\nrebuild_home = lambda: rebuild(*map(Path, sys.argv[2:0:-1]))\ntry:",
        ),
        path,
        artifacts.home,
        preexec_fn=small_files,
    ).communicate()[0]
    assert ".rebuild" in problem, "an unfinished new catalog is no reason to give up the old one"
    assert contents(catalog) == before


# Rule 36: several processes.


WRITER = """
import sys
from pathlib import Path
from pipeline.catalog.database import Database
for number in range(int(sys.argv[3])):
    with Database(Path(sys.argv[1]), 60).connect() as connection:
        connection.execute("INSERT INTO dataset_shards VALUES (?, ?, 0, 0)", [sys.argv[2], str(number)])
"""
READER = """
import sys, time
from pathlib import Path
from pipeline.catalog.catalog import Catalog
catalog, last, reads = Catalog(Path(sys.argv[1]), 60), 0, 0
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    (row,) = catalog.query("SELECT count(*) AS n FROM dataset_shards")
    assert row["n"] >= last, "committed rows do not vanish"
    last, reads = row["n"], reads + 1
print(reads, flush=True)
"""


def test_rule_36_writers_at_once_all_succeed_and_readers_keep_none_out(tmp_path: Path) -> None:
    path, end = tmp_path / "catalog.duckdb", tmp_path / "end"
    Catalog(path).create()
    readers = [python(READER, path, end) for _ in range(4)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    started = time.monotonic()
    writers = [python(WRITER, path, number, 8) for number in range(4)]
    for writer in writers:
        writer.communicate()
    waited = time.monotonic() - started
    end.touch()
    reads = [int(reader.communicate()[0]) for reader in readers]
    assert [process.returncode for process in (*writers, *readers)] == [0] * 8
    assert Catalog(path).query("SELECT count(*) AS n FROM dataset_shards") == [{"n": 32}]
    assert waited < 45, "the writers got their turns while the readers went on"
    assert min(reads) > 0


def test_processes_that_make_the_catalog_at_once_make_one(tmp_path: Path) -> None:
    path = tmp_path / "catalog.duckdb"
    writers = [python(WRITER, path, number, 1) for number in range(4)]
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0] * 4
    assert Catalog(path).query("SELECT count(*) AS n FROM dataset_shards") == [{"n": 4}]


HOLDER = """
import sys
from pathlib import Path
from pipeline.catalog.database import Database
with Database(Path(sys.argv[1])).connect() as connection:
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("read_only", [False, True])
def test_waiting_has_an_end_that_names_the_holder(read_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "catalog.duckdb"
    holder = python(HOLDER, path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    started = time.monotonic()
    busy = f"busy for 1 seconds: process {holder.pid} holds"
    with pytest.raises(CatalogBusyError, match=busy) as caught, Database(path, wait_seconds=1).connect(read_only):
        pass
    assert time.monotonic() - started < 10
    assert str(path) in str(caught.value)
    holder.communicate()
    Catalog(path, wait_seconds=1).create()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts the duckdb command on a file and leaves it open there."""
    started = []

    def start(path: Path, *options: str) -> "subprocess.Popen[str]":
        command = [duckdb_command(), *options, "-csv", "-noheader", str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("SELECT 'open';\n")
        process.stdin.flush()
        assert "open" in process.stdout.readline()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("options", [(), ("-readonly",)])
def test_a_writer_waits_for_the_duckdb_command_and_names_it(options: tuple[str, ...], shell: Any, catalog: Catalog) -> None:
    path = catalog._database.path
    process = shell(path, *options)
    with pytest.raises(CatalogBusyError, match=r"duckdb \(PID \d+\) has it open; close it and run again"):
        Catalog(path, wait_seconds=1).create()
    writer = python(WRITER, path, "late", 1)
    time.sleep(1)
    assert writer.poll() is None, "it waits"
    process.communicate()
    writer.communicate()
    assert writer.returncode == 0


def test_an_older_duckdb_command_reads_the_file(catalog: Catalog) -> None:
    command = [duckdb_command(), "-readonly", "-csv", "-noheader", str(catalog._database.path)]
    for table in TABLES:
        found = subprocess.run([*command, f"SELECT count(*) FROM {table}"], capture_output=True, text=True, check=True).stdout
        assert int(found) == len(catalog.query(f"SELECT * FROM {table}"))


# Rule 37: the way back and forth.


def test_rule_37_one_query_tells_all_that_a_checkpoint_was_made_from(catalog: Catalog) -> None:
    rows = catalog.lineage(document_id("run2")[:16])
    seen = [NASTY[0], NASTY[2], NASTY[4]]
    assert {row["document_id"] for row in rows} == {document_id(text) for text in seen}, "not what step 2 reads after it"
    assert {row["path"] for row in rows} == {*seen, "copy.txt"}, "every raw file that holds the text"
    for row in rows:
        assert (row["tokenizer_id"], row["dataset_id"], row["snapshot_id"]) == ("tok", "data", "snap")
        assert (json.loads(row["config"]), row["code_version"], row["seed"]) == ({"learning_rate": 0.001}, "0.1.0", 1337)
    last = catalog.lineage(document_id("run4")[:16])
    assert {row["document_id"] for row in last} == {document_id(text) for text in NASTY[:-1]}, "held-out text was never seen"


def test_rule_37_one_query_tells_which_checkpoints_saw_a_text(catalog: Catalog) -> None:
    steps = {text: [row["step"] for row in catalog.usage(document_id(text))] for text in NASTY}
    assert steps == {text: [2, 4] if row % 2 == 0 else [4] for row, text in enumerate(NASTY[:-1])} | {NASTY[-1]: []}
    assert [row["step"] for row in catalog.usage("copy.txt")] == [2, 4], "a copy stands for the text it repeats"


def test_what_was_never_recorded_is_said_so(catalog: Catalog) -> None:
    with pytest.raises(UserError, match="checkpoint nope: not in the catalog"):
        catalog.lineage("nope")
    with pytest.raises(UserError, match=r"nope\.txt: neither a document id nor the path of a raw file"):
        catalog.usage("nope.txt")


def test_a_gap_in_the_records_does_not_hide_the_rest_of_a_lineage(artifacts: Artifacts, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "gaps.duckdb")
    catalog.record_run(artifacts.home / "checkpoints" / "run")
    rows = catalog.lineage(document_id("run2")[:16])
    assert {row["document_id"] for row in rows} == {document_id(text) for text in (NASTY[0], NASTY[2], NASTY[4])}
    assert {(row["seed"], row["path"]) for row in rows} == {(1337, None)}


def test_a_checkpoint_that_has_seen_nothing_has_a_lineage_too(artifacts: Artifacts, tmp_path: Path) -> None:
    run_dir = artifacts.run("untrained", "data", "tok", {NASTY[0]: 3})
    catalog = Catalog(tmp_path / "catalog.duckdb")
    catalog.record_run(run_dir)
    (row,) = catalog.lineage(document_id("untrained2")[:16])
    assert (row["document_id"], row["tokenizer_id"], row["seed"]) == (None, "tok", 1337)


# Rebuild.


def test_a_rebuilt_catalog_has_the_same_rows(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    assert rebuild(artifacts.home, artifacts.home / "catalog.duckdb") == []
    assert contents(catalog) == before
    assert sorted(path.name for path in artifacts.home.glob("catalog*")) == [
        "catalog.duckdb",
        "catalog.duckdb.lock",
        "catalog.duckdb.queue",
    ]


def test_the_catalog_of_a_real_lineage_is_rebuilt_with_the_same_rows(trained_home: Any, clone: Any) -> None:
    home, _ = clone(trained_home)
    before = contents(home.catalog)
    assert all(before[table] for table in TABLES)
    assert rebuild(home.storage.root, home.storage.root / "catalog.duckdb") == []
    assert contents(home.catalog) == before


@pytest.mark.parametrize("suffix", ["", ".wal"])
def test_a_damaged_file_is_named_with_its_remedy_and_the_remedy_works(
    suffix: str, catalog: Catalog, artifacts: Artifacts
) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    leave_a_log(path)
    damaged = path.with_name(path.name + suffix)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 if suffix else 8] ^= 1  # the middle of the log, the file's magic number
    damaged.write_bytes(content)
    for question in (lambda: catalog.query("SELECT 1"), catalog.create):
        with pytest.raises(CatalogError) as caught:
            question()
        assert str(path) in str(caught.value)
        assert "textmill catalog rebuild" in str(caught.value)
    assert rebuild(artifacts.home, path) == []
    assert contents(catalog) == before


def test_a_flipped_bit_anywhere_is_harmless_or_a_message_of_ours(catalog: Catalog, artifacts: Artifacts) -> None:
    artifacts.snapshot("large", [f"file {number} {document_id(str(number))}" for number in range(5_000)])
    catalog.record_snapshot(artifacts.processed, "large")
    path = artifacts.home / "catalog.duckdb"
    before, sound = contents(catalog), path.read_bytes()
    chance, refused = random.Random(1), []
    for _ in range(25):
        damaged = bytearray(sound)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert contents(catalog) == before
        except CatalogError as error:
            refused.append(str(error))
    assert len(refused) > 2
    assert all("textmill catalog rebuild" in message for message in refused)


def test_rebuild_leaves_out_what_is_damaged_and_names_it(catalog: Catalog, artifacts: Artifacts) -> None:
    (artifacts.home / "models" / "model" / "textmill.json").write_text("{")
    (artifacts.home / "checkpoints" / "run" / "metrics.jsonl").write_text("\0\0\0\n")
    problems = rebuild(artifacts.home, artifacts.home / "catalog.duckdb")
    assert [problem.split(":")[0].split("/")[-1] for problem in problems] == ["metrics.jsonl", "textmill.json"]
    assert len(catalog.query("SELECT * FROM snapshots")) == 1


def test_a_rebuild_killed_at_any_moment_loses_nothing(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    program = """
import sys
from pathlib import Path
from pipeline.catalog.rebuild import rebuild
print("ready", flush=True)
while True:
    rebuild(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    chance = random.Random(8)
    for _ in range(8):
        process = python(program, artifacts.home, path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.6))
        process.kill()
        process.communicate()
        assert contents(catalog) == before
    assert rebuild(artifacts.home, path) == []
    assert not list(artifacts.home.glob("*.rebuild*"))


def test_a_rebuild_that_ends_before_its_last_rename_leaves_the_old_catalog_with_its_log(
    catalog: Catalog, artifacts: Artifacts, monkeypatch: Any
) -> None:
    path = artifacts.home / "catalog.duckdb"
    leave_a_log(path)
    before = contents(catalog)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="power cut"):
        rebuild(artifacts.home, path)
    assert contents(catalog) == before


def test_a_second_rebuild_waits_before_it_touches_anything(catalog: Catalog, artifacts: Artifacts, monkeypatch: Any) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    program = """
import sys
from pathlib import Path
import pipeline.catalog.rebuild as module
print("ready", flush=True)
module.rebuild(*map(Path, sys.argv[1:]))
"""
    record_model = Catalog.record_model

    def record_last(catalog: Catalog, model_dir: Path) -> None:
        second = python(program, artifacts.home, path)
        assert second.stdout is not None
        assert second.stdout.readline() == "ready\n"
        time.sleep(1)
        second.kill()
        second.communicate()
        record_model(catalog, model_dir)

    monkeypatch.setattr(Catalog, "record_model", record_last)
    assert rebuild(artifacts.home, path) == []
    assert contents(catalog) == before


def test_rebuilds_and_records_at_once_do_not_disturb_each_other(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    program = """
import sys
from pathlib import Path
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.rebuild import rebuild
home, path = map(Path, sys.argv[1:])
for _ in range(4):
    assert rebuild(home, path) == []
    Catalog(path).record_run(home / "checkpoints" / "run")
"""
    processes = [python(program, artifacts.home, path) for _ in range(3)]
    while any(process.poll() is None for process in processes):
        assert contents(catalog) == before, "at every moment: a later rebuild would mend what an earlier one broke"
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 3
    assert contents(catalog) == before


def test_rebuild_does_not_pull_the_file_from_under_the_duckdb_command(shell: Any, catalog: Catalog, monkeypatch: Any) -> None:
    path = catalog._database.path
    before = contents(catalog)
    process = shell(path)
    monkeypatch.setattr("pipeline.catalog.rebuild.Database", lambda path: Database(path, wait_seconds=1))
    with pytest.raises(CatalogBusyError, match="has it open"):
        rebuild(path.parent, path)
    process.communicate()
    assert contents(catalog) == before


# Schema versions.


def schema_of(path: Path) -> list[tuple[Any, ...]]:
    with Database(path).connect(read_only=True) as connection:
        columns = "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns ORDER BY ALL"
        views = "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY ALL"
        versions = "SELECT version FROM schema_version ORDER BY ALL"
        return [row for sql in (columns, views, versions) for row in connection.execute(sql).fetchall()]


def test_an_upgraded_catalog_keeps_its_rows_and_ends_like_a_fresh_one(catalog: Catalog, monkeypatch: Any, tmp_path: Path) -> None:
    before = contents(catalog)
    newest = database.schema_versions()[-1][0]
    later = [
        *database.schema_versions(),
        (newest + 1, "ALTER TABLE models ADD COLUMN stars INTEGER; CREATE TABLE extra (a INTEGER);"),
        (newest + 2, "ALTER TABLE extra ADD COLUMN b INTEGER;"),
    ]
    monkeypatch.setattr(database, "schema_versions", lambda: later)
    with pytest.raises(UserError, match="has the older schema version"):
        catalog.query("SELECT * FROM models")
    catalog.create()
    catalog.create()
    Catalog(tmp_path / "fresh.duckdb").create()
    assert schema_of(catalog._database.path) == schema_of(tmp_path / "fresh.duckdb")
    monkeypatch.undo()
    with pytest.raises(UserError, match="use a newer textmill"):
        catalog.create()
    monkeypatch.setattr(database, "schema_versions", lambda: later)
    kept = contents(catalog)
    assert {table: rows for table, rows in kept.items() if table != "models"} == {
        table: rows for table, rows in before.items() if table != "models"
    }


def test_a_migration_that_fails_changes_nothing(catalog: Catalog, monkeypatch: Any) -> None:
    before = schema_of(catalog._database.path)
    newest = database.schema_versions()[-1][0]
    broken = [
        *database.schema_versions(),
        (newest + 1, "CREATE TABLE half (a INTEGER); ALTER TABLE nothing ADD COLUMN b INTEGER;"),
    ]
    monkeypatch.setattr(database, "schema_versions", lambda: broken)
    with pytest.raises(CatalogError):
        catalog.create()
    monkeypatch.undo()
    assert schema_of(catalog._database.path) == before


# The rest.


def test_a_hundred_thousand_documents_take_seconds(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    artifacts.snapshot("snap", [f"folder/file {number}.txt" for number in range(100_000)])
    catalog = Catalog(tmp_path / "catalog.duckdb")
    started = time.monotonic()
    catalog.record_snapshot(artifacts.processed, "snap")
    assert time.monotonic() - started < 20
    assert catalog.query("SELECT count(*) AS n FROM documents") == [{"n": 100_000}]


def test_a_question_cannot_write(catalog: Catalog) -> None:
    with pytest.raises(duckdb.Error, match="read-only"):
        catalog.query("DELETE FROM documents")


def test_no_catalog_is_made_by_asking(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such catalog"):
        Catalog(tmp_path / "home" / "catalog.duckdb").runs()
    assert list(tmp_path.iterdir()) == []


def textmill(*arguments: str, home: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TEXTMILL_HOME"}
    if home is not None:
        environment["TEXTMILL_HOME"] = str(home)
    return subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True, env=environment)


def test_the_command_tells_lineage_usage_and_runs(catalog: Catalog, artifacts: Artifacts) -> None:
    lineage = textmill("lineage", document_id("run2")[:16], "--home", str(artifacts.home))
    assert lineage.returncode == 0, lineage.stderr
    for expected in ("1337", "tok", "snap", "learning_rate", document_id(NASTY[0]), "two\\nlines.txt", "copy.txt"):
        assert expected in lineage.stdout
    usage = textmill("--home", str(artifacts.home), "usage", NASTY[1])
    assert [line.split()[:3] for line in usage.stdout.splitlines()[2:]] == [[document_id("run4")[:16], "run", "4"]]
    assert textmill("usage", NASTY[-1], home=artifacts.home).stdout == f"no checkpoint has seen {NASTY[-1]}\n"
    runs = textmill("runs", home=artifacts.home)
    assert "2.2500" in runs.stdout


def test_the_command_rebuilds_and_says_what_it_left_out(artifacts: Artifacts) -> None:
    done = textmill("catalog", "rebuild", "--home", str(artifacts.home))
    assert done.returncode == 0, done.stderr
    assert "0 artifact(s) left out" in done.stdout
    (artifacts.home / "models" / "model" / "textmill.json").write_text("{")
    partly = textmill("catalog", "rebuild", home=artifacts.home)
    assert partly.returncode == DataError.exit_code
    assert "textmill.json" in partly.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("lineage", "nope"), 2, "no such catalog"),
        (("catalog", "rebuild"), 2, "no such folder"),
        (("usage",), 2, "required"),
    ],
)
def test_a_command_that_cannot_work_says_why(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    done = textmill(*arguments, "--home", str(tmp_path / "nowhere"))
    assert (done.returncode, message in done.stderr) == (code, True)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_the_command_starts_without_dagster_and_torch() -> None:
    program = "import sys, pipeline.cli; print([name for name in ('dagster', 'torch', 'matplotlib') if name in sys.modules])"
    assert python(program).communicate()[0] == "[]\n"
