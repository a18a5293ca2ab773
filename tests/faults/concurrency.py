"""Processes that work on the same files at once: each does what it would do alone, waits, or names the process in its way."""

import random
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import dagster as dg

from llm_core.corpus import load_snapshot
from llm_core.dataset import load_manifest
from llm_core.layout import Home, PreparedData
from llm_core.system import verify_file
from pipeline.automation.retraining import Retraining
from pipeline.automation.sensors import new_raw_text
from pipeline.catalog.catalog import Catalog
from pipeline.resources import Storage
from tests.faults.forks import outcome
from tests.faults.kills import RANKS_OPTIONS, torchrun, undisturbed
from tests.faults.processes import Command, wait_until
from tests.faults.report import Tally
from tests.faults.steps import DagsterHome, catalog_rows

_WRITER = """
import sys
from pathlib import Path
from pipeline.catalog.database import Database
for number in range(10):
    with Database(Path(sys.argv[1])).connect() as connection:
        connection.execute("INSERT INTO dataset_shards VALUES (?, ?, 0, 0)", [sys.argv[2], str(number)])
"""
_READER = """
import sys, time, duckdb
from pathlib import Path
while not Path(sys.argv[2]).exists():
    try:
        with duckdb.connect(sys.argv[1], read_only=True) as connection:
            connection.execute("SELECT count(*) FROM dataset_shards").fetchall()
            time.sleep(0.5)
    except duckdb.Error:  # not created yet, or locked by a writer: an outside reader does not wait
        pass
    time.sleep(0.5)
"""


def two_trainings_in_one_folder(data_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """One trains; the other names the folder and the process that holds it, or starts after the training has finished."""
    tally = Tally("two trainings, one folder", seed)
    chosen = random.Random(seed)
    expected, _ = undisturbed(data_dir)
    for trial in range(trials):
        run_dir = folder / f"run{trial}"
        with torchrun(data_dir, run_dir, log=folder / "first.log") as first:
            time.sleep(chosen.uniform(0, 6))
            with torchrun(data_dir, run_dir, log=folder / "second.log") as second:
                codes = [first.wait(), second.wait()]
                left = [*first.left(), *second.left()]
        failed = [command.output() for command, code in zip((first, second), codes, strict=True) if code != 0]
        problem = None
        if len(failed) > 1 or left:
            problem = f"exit codes {codes}, left behind {left}: {[output[-600:] for output in failed]}"
        elif not all(f"--save_dir {run_dir}: another training (process " in output for output in failed):
            problem = f"refused without a reason: {failed[0][-1000:]}"
        elif outcome(run_dir, RANKS_OPTIONS["max_steps"]) != expected:
            problem = "the weights or the logged losses differ"
        tally.count(problem)
    return tally


def two_preparations(corpus_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """Two preparations of one folder, and a garbage collection without a minimum age."""
    tally = Tally("two preparations and a garbage collection", seed)
    chosen = random.Random(seed)
    for trial in range(trials):
        raw, processed, alone = (folder / f"{name}{trial}" for name in ("raw", "processed", "alone"))
        shutil.copytree(corpus_dir, raw)
        _prepared(raw, processed, folder / "log")
        for number in range(3):
            (raw / f"new{number}.txt").write_text(f"Of the number {number} and the trial {trial}.\n" * 400)
        garbage = ["llm_core.collect_garbage", "--data_dir", str(processed), "--runs", "[]", "--min_age_hours", "0"]
        with ExitStack() as stack:
            commands = []
            for name, arguments in (("one", _prepare(raw, processed)), ("gc", garbage), ("two", _prepare(raw, processed))):
                commands.append(stack.enter_context(Command(arguments, folder / f"{name}{trial}.log")))
                time.sleep(chosen.uniform(0, 1.5))
            codes = [command.wait() for command in commands]
        _prepared(raw, alone, folder / "log")
        problem = None
        if codes != [0, 0, 0]:
            problem = f"exit codes {codes}: {[command.output()[-600:] for command in commands]}"
        elif _documents(processed) != _documents(alone):
            problem = "the documents differ from those of a single preparation"
        tally.count(problem)
    return tally


def file_that_grows(corpus_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """Text is appended to a file during a preparation; the next one reads every byte of it."""
    tally = Tally("a file that grows while it is read", seed)
    chosen = random.Random(seed)
    for trial in range(trials):
        raw, processed, alone = (folder / f"{name}{trial}" for name in ("raw", "processed", "alone"))
        shutil.copytree(corpus_dir, raw)
        growing, log = raw / "growing.txt", folder / f"grow{trial}.log"
        growing.write_text("The first line.\n")
        with Command(_prepare(raw, processed), log) as command:
            number = 0
            while (code := command.process.poll()) is None:
                with open(growing, "a") as file:
                    file.write(f"Line {number} of trial {trial}, of no fixed length: {'x' * (number % 50)}\n")
                number += 1
                time.sleep(chosen.uniform(0, 0.004))
        output = command.output()
        _prepared(raw, processed, log)
        _prepared(raw, alone, log)
        problem = None
        if code not in (0, 3) or (code == 3 and growing.name not in output) or "Traceback" in output:
            problem = f"exit code {code}: {output[-1000:]}"
        elif _documents(processed) != _documents(alone):
            problem = "the documents differ from those of a preparation without changes"
        tally.count(problem)
    return tally


def two_dagster_runs(corpus_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """Two Dagster runs in one home, alternately of one training and of two, while four processes write the catalog and one reads.

    Meanwhile the sensor ticks and must launch nothing.
    """
    tally = Tally("two Dagster runs, four writers, a reader, the sensor", seed)
    chosen = random.Random(seed)
    for trial in range(trials):
        home = DagsterHome(corpus_dir, folder / f"trial{trial}")
        same = trial % 2 == 0
        home.configure("other", **({} if same else {"seed": 7}))
        problem = _run_concurrently(home, folder, chosen.uniform(0, 3), 1 if same else 2)
        tally.count(problem)
    return tally


def _run_concurrently(home: DagsterHome, folder: Path, pause: float, trainings: int) -> str | None:
    catalog, end = Home(home.root).catalog, folder / "end"
    end.unlink(missing_ok=True)
    Catalog(catalog).create()
    with ExitStack() as stack:
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(home.dagster_home)))
        instance.get_runs()  # creates Dagster's database, which two processes cannot do at once
        runs = [stack.enter_context(home.execute("run"))]
        time.sleep(pause)
        runs.append(stack.enter_context(home.execute("other")))
        helpers = [
            subprocess.Popen([sys.executable, "-c", program, str(catalog), argument], stderr=subprocess.PIPE, text=True)
            for program, argument in [(_READER, str(end)), *((_WRITER, f"writer {number}") for number in range(4))]
        ]
        reader, *writers = helpers
        ticks: list[dg.RunRequest | str] = []
        cursor: str | None = None
        wait_until(lambda: bool(instance.get_runs()), runs[0])
        while any(run.process.poll() is None for run in runs):
            result, cursor = _tick(home, instance, cursor)
            ticks.append(result)
            time.sleep(0.5)
        codes = [run.wait() for run in runs]
        errors = [writer.communicate()[1] for writer in writers]
        end.touch()
        errors.append(reader.communicate()[1])
        left = [process for run in runs for process in run.left()]
    refused = [run.output() for run, code in zip(runs, codes, strict=True) if code != 0]
    # If both runs are of the same training, the folder's lock may refuse the one that starts while the other's ranks load.
    allowed = len(refused) <= 2 - trainings and all("another training (process " in output for output in refused)
    if not allowed or any(helper.returncode for helper in helpers) or left:
        return f"exit codes {codes}, left behind {left}: {[run.output()[-1500:] for run in runs]} {errors}"
    if any(isinstance(result, dg.RunRequest) for result in ticks):
        return "the sensor launched a run while another was in progress"
    if not ticks or "waiting for run" not in str(ticks[0]):
        return f"the sensor did not report what it waits for: {ticks[:1]}"
    rows = catalog_rows(catalog)
    written = sum("writer " in row for row in rows["dataset_shards"])
    if written != 40 or len(rows["training_runs"]) != trainings or "finished" not in rows["training_runs"][-1]:
        return f"rows are missing: {written} of 40, runs {rows['training_runs']}"
    return None


def _tick(home: DagsterHome, instance: dg.DagsterInstance, cursor: str | None) -> tuple[dg.RunRequest | str, str | None]:
    """One tick of the sensor: the run it requests or why it was skipped, and the next cursor."""
    resources = {"storage": Storage(home=str(home.root)), "retraining": Retraining()}
    with dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources) as context:
        (result,) = new_raw_text(context)
        return result if isinstance(result, dg.RunRequest) else str(result.skip_message), context.cursor


def _prepare(raw: Path, processed: Path) -> list[str]:
    sizes = ["--vocab_size", "512", "--max_length", "64", "--max_document_bytes", "2048", "--num_workers", "1"]
    return ["llm_core.data_prep_tool", "--input_dir", str(raw), "--output_dir", str(processed), *sizes]


def _prepared(raw: Path, processed: Path, log: Path) -> None:
    with Command(_prepare(raw, processed), log) as command:
        assert command.wait() == 0, command.output()


def _documents(processed: Path) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The documents of the current dataset, and the documents and bytes of each split; verifies every shard."""
    manifest, prepared = load_manifest(processed), PreparedData(processed)
    for shard in manifest.shards:
        verify_file(prepared.named(shard.file), shard.sha256)
        verify_file(prepared.named(shard.index_file), shard.index_sha256)
    documents = load_snapshot(processed, manifest.snapshot_id).kept_documents()["document_id"].to_pylist()
    return sorted(documents), {name: (split.documents, split.bytes) for name, split in manifest.splits.items()}
