"""The files of a small hand-written lineage, and helpers of the catalog tests."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_core.system import sha256_file, write_json
from pipeline.catalog.catalog import Catalog
from tests.support.records import model_record

TABLES = [
    *("snapshots", "documents", "snapshot_documents", "tokenizers", "shards", "shard_documents", "datasets", "dataset_shards"),
    *("training_runs", "train_metrics", "run_documents", "checkpoints", "evaluations", "models"),
    *("checkpoint_lineage", "document_usage"),
]
NASTY = ["it's.txt", 'say "hi".txt', "two\nlines.txt", "'); DROP TABLE documents; --.txt", "a*[b]?.txt", "ünïcödé 文.txt"]


def document_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Artifacts:
    """Writes the files of a small lineage as the stages write them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.processed = home / "processed_data"

    def snapshot(self, snapshot_id: str, paths: list[str], config: dict[str, Any] | None = None) -> None:
        """One kept document per path, with the path as its text, and a duplicate of the first text in copy.txt."""
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
            "documents_dropped": {"duplicate": 1},
            "ignored_by_extension": {".pdf": 2},
            "files_skipped": {"link_to_folder": 3},
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
            index = {
                "document_id": [document_id(text) for text in texts],
                "token_start": [10 * row for row in range(len(texts))],
                "token_count": [10] * len(texts),
                "bytes": [len(text) for text in texts],
            }
            index_file = f"dataset/{shard_id}.parquet"
            digest = self._parquet(self.processed / index_file, index)
            sizes = {"tokens": 10 * len(texts), "documents": len(texts), "bytes": 20, "file_bytes": 200}
            names = {"shard_id": shard_id, "file": f"dataset/{shard_id}.arrow", "facts_file": index_file, "split": split}
            shards.append(names | sizes | {"sha256": "1" * 64, "facts_sha256": digest, "removed_rows": []})
        splits = {shard["split"]: {name: shard[name] for name in ("tokens", "documents", "bytes")} for shard in shards}
        manifest = {
            "format_version": 1,
            "dataset_id": dataset_id,
            "snapshot_id": snapshot_id,
            "parent_dataset_id": None,
            "tokenizer": {
                "tokenizer_id": tokenizer_id,
                "file": f"tokenizers/{tokenizer_id}.json",
                "sha256": "1" * 64,
                "tokenizer_type": "bpe",
                "vocab_size": 512,
                "eot_id": 0,
            },
            "dtype": "uint16",
            "config": {},
            "splits": splits,
            "shards": shards,
            "unknown_text": 0.25,
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
        record = {
            "checkpoint_id": document_id(f"{run_dir.name}{step}")[:16],
            "run_id": run_dir.name,
            "step": step,
            "tokens_seen": 100 * step,
            "sha256": sha256_file(path),
            "bytes": 7,
            "val_loss": 4.5,
        }
        write_json(path.with_name(path.name + ".json"), record | {"format_version": 1, "file": path.name})
        return record

    def evaluation(self, run_dir: Path, checkpoint_id: str, dataset_id: str) -> Path:
        path = run_dir / "evaluation_step_4_e0.json"
        metrics = [{"metric": "bits_per_byte", "split": "val", "source": source, "value": 2.25} for source in ("all", NASTY[3])]
        ids = {"evaluation_id": "e0", "checkpoint_id": checkpoint_id, "run_id": run_dir.name, "dataset_id": dataset_id}
        write_json(path, ids | {"created_at": "2026-01-02T05:00:00+02:00", "metrics": metrics})
        return path

    def model(self, model_id: str, checkpoint_id: str, run_id: str) -> Path:
        ids = {"model_id": model_id, "checkpoint_id": checkpoint_id, "run_id": run_id, "reason": "it's the first"}
        record = model_record(**ids, released_at="2026-01-02T05:00:00+00:00", metrics={"bits_per_byte": 2.25})
        directory = self.home / "models" / model_id
        record.write(directory)
        return directory

    def full_lineage(self, paths: list[str]) -> str:
        """One artifact of each kind; the training documents are read in steps 0 and 2. Returns the id of the last checkpoint."""
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


def contents(catalog: Catalog) -> dict[str, list[str]]:
    """Every row of every table and view as text, sorted."""
    return {table: sorted(map(repr, catalog.query(f"SELECT * FROM {table}"))) for table in TABLES}


def python(program: str, *arguments: object, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options
    )


def python_ready(program: str, *arguments: object) -> "subprocess.Popen[str]":
    """Starts a program and waits until it prints that it is ready."""
    process = python(program, *arguments)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def killed_at_random(program: str, *arguments: object, seed: int, within: float) -> Iterator[None]:
    """Eight times: starts a program and kills it at most `within` seconds after it is ready."""
    chance = random.Random(seed)
    for _ in range(8):
        process = python_ready(program, *arguments)
        time.sleep(chance.uniform(0.0, within))
        process.kill()
        process.communicate()
        yield


def duckdb_command() -> str:
    command = shutil.which("duckdb") or shutil.which("duckdb", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("the duckdb command is not installed")
    return command


def leave_a_log(path: Path) -> None:
    """Commits in a process that dies immediately, so that the rows are only in the write-ahead log."""
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
