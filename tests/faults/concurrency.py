"""Processes at work on the same files at once: each does what it would have done alone, waits, or says who is in its way."""

import random
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import dagster as dg

from llm_core.corpus import load_snapshot
from llm_core.files import verify_file
from llm_core.shards import load_manifest
from pipeline.catalog.catalog import Catalog
from pipeline.new_text import Retraining
from pipeline.resources import Storage
from pipeline.sensors import new_raw_text
from tests.faults.forks import outcome
from tests.faults.kills import RANKS_OPTIONS, torchrun, uninterrupted
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
    except duckdb.Error:  # nothing there yet, or a writer has it: readers from outside wait for nobody
        pass
    time.sleep(0.5)
"""


def two_trainings_in_one_folder(data_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """One trains; the other refuses with the folder and the process that has it, or comes so late that all is done."""
    tally = Tally("two trainings, one folder", seed)
    chosen = random.Random(seed)
    whole, _ = uninterrupted(data_dir)
    for trial in range(trials):
        run_dir = folder / f"run{trial}"
        with torchrun(data_dir, run_dir, log=folder / "first.log") as first:
            time.sleep(chosen.uniform(0, 6))
            with torchrun(data_dir, run_dir, log=folder / "second.log") as second:
                codes = [first.wait(), second.wait()]
                left = [*first.left(), *second.left()]
        said = [command.output() for command, code in zip((first, second), codes, strict=True) if code != 0]
        problem = None
        if len(said) > 1 or left:
            problem = f"they ended with {codes}, left {left}: {[text[-600:] for text in said]}"
        elif not all(f"--save_dir {run_dir}: another training (process " in text for text in said):
            problem = f"refused without a reason: {said[0][-1000:]}"
        elif outcome(run_dir, RANKS_OPTIONS["max_steps"]) != whole:
            problem = "the weights or the logged losses differ"
        tally.count(problem)
    return tally


def two_preparations(corpus_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """Two preparations of one folder, and a garbage collection that spares no file for its youth."""
    tally = Tally("two preparations and a garbage collection", seed)
    chosen = random.Random(seed)
    for trial in range(trials):
        raw, processed, alone = (folder / f"{name}{trial}" for name in ("raw", "processed", "alone"))
        shutil.copytree(corpus_dir, raw)
        _prepared(raw, processed, folder / "log")
        for number in range(3):
            (raw / f"new{number}.txt").write_text(f"Of the number {number} and the trial {trial}.\n" * 400)
        garbage = ["llm_core.garbage", "--data_dir", str(processed), "--runs", "[]", "--min_age_hours", "0"]
        with ExitStack() as stack:
            commands = []
            for name, arguments in (("one", _prepare(raw, processed)), ("gc", garbage), ("two", _prepare(raw, processed))):
                commands.append(stack.enter_context(Command(arguments, folder / f"{name}{trial}.log")))
                time.sleep(chosen.uniform(0, 1.5))
            codes = [command.wait() for command in commands]
        _prepared(raw, alone, folder / "log")
        problem = None
        if codes != [0, 0, 0]:
            problem = f"they ended with {codes}: {[command.output()[-600:] for command in commands]}"
        elif _documents(processed) != _documents(alone):
            problem = "the documents differ from those of one preparation alone"
        tally.count(problem)
    return tally


def file_that_grows(corpus_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """Text is added to a file all the while; once it rests, the next preparation has every byte of it."""
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
        said = command.output()
        _prepared(raw, processed, log)
        _prepared(raw, alone, log)
        problem = None
        if code not in (0, 3) or (code == 3 and growing.name not in said) or "Traceback" in said:
            problem = f"ended with {code}: {said[-1000:]}"
        elif _documents(processed) != _documents(alone):
            problem = "the documents differ from those of the file at rest"
        tally.count(problem)
    return tally


def two_dagster_runs(corpus_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """Two runs of one home, in turn of the same training and of two, while four processes write the catalog and others read it.

    Meanwhile the sensor looks again and again, and must launch nothing.
    """
    tally = Tally("two Dagster runs, four writers, a reader, the sensor", seed)
    chosen = random.Random(seed)
    for trial in range(trials):
        home = DagsterHome(corpus_dir, folder / f"trial{trial}")
        same = trial % 2 == 0
        home.configure("other", **({} if same else {"seed": 7}))
        problem = _run_at_once(home, folder, chosen.uniform(0, 3), 1 if same else 2)
        tally.count(problem)
    return tally


def _run_at_once(home: DagsterHome, folder: Path, pause: float, trainings: int) -> str | None:
    catalog, end = home.root / "catalog.duckdb", folder / "end"
    end.unlink(missing_ok=True)
    Catalog(catalog).create()
    with ExitStack() as stack:
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(home.dagster_home)))
        instance.get_runs()  # makes Dagster's own database, which two processes at once cannot
        runs = [stack.enter_context(home.execute("run"))]
        time.sleep(pause)
        runs.append(stack.enter_context(home.execute("other")))
        helpers = [
            subprocess.Popen([sys.executable, "-c", program, str(catalog), last], stderr=subprocess.PIPE, text=True)
            for program, last in [(_READER, str(end)), *((_WRITER, f"writer {number}") for number in range(4))]
        ]
        reader, *writers = helpers
        answers: list[dg.RunRequest | str] = []
        cursor: str | None = None
        wait_until(lambda: bool(instance.get_runs()), runs[0])
        while any(run.process.poll() is None for run in runs):
            answer, cursor = _look(home, instance, cursor)
            answers.append(answer)
            time.sleep(0.5)
        codes = [run.wait() for run in runs]
        said = [writer.communicate()[1] for writer in writers]
        end.touch()
        said.append(reader.communicate()[1])
        left = [process for run in runs for process in run.left()]
    refused = [run.output() for run, code in zip(runs, codes, strict=True) if code != 0]
    # Of one training there is one: a second that begins while the first one's ranks still load is refused by the folder's lock.
    allowed = len(refused) <= 2 - trainings and all("another training (process " in text for text in refused)
    if not allowed or any(helper.returncode for helper in helpers) or left:
        return f"they ended with {codes}, left {left}: {[run.output()[-1500:] for run in runs]} {said}"
    if any(isinstance(answer, dg.RunRequest) for answer in answers):
        return "the sensor launched a run beside the one that was there"
    if not answers or "waiting for run" not in str(answers[0]):
        return f"the sensor did not say what it waits for: {answers[:1]}"
    rows = catalog_rows(catalog)
    written = sum("writer " in row for row in rows["dataset_shards"])
    if written != 40 or len(rows["training_runs"]) != trainings or "finished" not in rows["training_runs"][-1]:
        return f"rows are missing: {written} of 40, runs {rows['training_runs']}"
    return None


def _look(home: DagsterHome, instance: dg.DagsterInstance, cursor: str | None) -> tuple[dg.RunRequest | str, str | None]:
    """What the sensor says, and what it remembers for the next look."""
    resources = {"storage": Storage(home=str(home.root)), "retraining": Retraining()}
    with dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources) as context:
        (answer,) = new_raw_text(context)
        return answer if isinstance(answer, dg.RunRequest) else str(answer.skip_message), context.cursor


def _prepare(raw: Path, processed: Path) -> list[str]:
    sizes = ["--vocab_size", "512", "--max_length", "64", "--max_document_bytes", "2048", "--num_workers", "1"]
    return ["llm_core.data_prep_tool", "--input_dir", str(raw), "--output_dir", str(processed), *sizes]


def _prepared(raw: Path, processed: Path, log: Path) -> None:
    with Command(_prepare(raw, processed), log) as command:
        assert command.wait() == 0, command.output()


def _documents(processed: Path) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The documents of the current dataset and how many of them and of their bytes each split has; every shard is verified."""
    manifest = load_manifest(processed)
    for shard in manifest.shards:
        verify_file(processed / shard.file, shard.sha256)
        verify_file(processed / shard.facts_file, shard.facts_sha256)
    documents = load_snapshot(processed, manifest.snapshot_id).kept_documents()["document_id"].to_pylist()
    return sorted(documents), {name: (split.documents, split.bytes) for name, split in manifest.splits.items()}
