"""`dagster job execute` from raw text to a released model, as in the README: killed at any moment and run again."""

import random
import re
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llm_core.errors import TextmillError
from llm_core.layout import Home
from pipeline.catalog.catalog import Catalog
from tests.faults.forks import outcome
from tests.faults.processes import Command
from tests.faults.report import Tally
from tests.pipeline.conftest import TINY

STEPS = 200
_ROOT = Path(__file__).parent.parent.parent
_TIMED = {"tokens_per_second", "mfu"}


class DagsterHome:
    """A textmill home and a Dagster instance configured by the repository's dagster.yaml."""

    def __init__(self, corpus_dir: Path, folder: Path, **training: Any) -> None:
        """training: options of the training to override."""
        self.root, self.dagster_home, self._folder = folder / "home", folder / "dagster", folder
        folder.mkdir(exist_ok=True)
        shutil.copytree(corpus_dir, Home(self.root).raw_text)
        self.dagster_home.mkdir()
        shutil.copy(_ROOT / "dagster.yaml", self.dagster_home)
        self.configure("run", **training)

    def configure(self, name: str, **training: Any) -> None:
        """Writes a run configuration; training: options of the training to override."""
        ops = {asset: {"config": dict(config)} for asset, config in TINY.items()}
        options = {"save_interval": 20, "eval_interval": 50, "keep_checkpoints": 3, "threads_per_process": 1}
        ops["checkpoint"]["config"] |= {"max_steps": STEPS, "nproc_per_node": 2} | options | training
        (self._folder / f"{name}.yaml").write_text(yaml.safe_dump({"ops": ops}))

    def execute(self, name: str = "run", job: str = "pretrain", **environment: str) -> Command:
        """Starts the command with one of the run configurations."""
        homes = {"TEXTMILL_HOME": str(self.root), "DAGSTER_HOME": str(self.dagster_home)}
        configuration = self._folder / f"{name}.yaml"
        arguments = ["dagster", "job", "execute", "-m", "pipeline.definitions", "-j", job, "-c", str(configuration)]
        return Command(arguments, configuration.with_suffix(".log"), homes | environment)

    def run_dirs(self) -> list[Path]:
        return sorted(run.root for run in Home(self.root).runs())

    def outcome(self) -> list[object]:
        """The last checkpoint's bytes and the metrics of each run, and every row of the catalog, without times."""
        try:
            trained = [outcome(run_dir, STEPS) for run_dir in self.run_dirs()]
            return [*trained, catalog_rows(Home(self.root).catalog)]
        except (TextmillError, OSError) as error:
            return [str(error)]


@dataclass(frozen=True)
class Undisturbed:
    """The outcome of the undisturbed command, and how many seconds it takes."""

    outcome: list[object]
    run_id: str
    seconds: float


@cache
def undisturbed_home(corpus_dir: Path) -> Undisturbed:
    with tempfile.TemporaryDirectory() as folder:
        home = DagsterHome(corpus_dir, Path(folder))
        began = time.monotonic()
        with home.execute() as command:
            assert command.wait() == 0, command.output()[-3000:]
        seconds = time.monotonic() - began
        return Undisturbed(home.outcome(), home.run_dirs()[0].name, seconds)


def catalog_rows(path: Path) -> dict[str, list[str]]:
    """The rows of every table, without times and rates, which differ between runs."""
    catalog, rows = Catalog(path), {}
    columns = catalog.query(
        "SELECT table_name, column_name, data_type FROM information_schema.columns "
        "JOIN information_schema.tables USING (table_catalog, table_schema, table_name) "
        "WHERE table_catalog = 'catalog' AND table_type = 'BASE TABLE' ORDER BY ALL"
    )
    for table in {column["table_name"] for column in columns}:
        kept = [
            column["column_name"]
            for column in columns
            if column["table_name"] == table and column["data_type"] != "TIMESTAMP" and column["column_name"] not in _TIMED
        ]
        rows[table] = sorted(map(str, catalog.query(f"SELECT {', '.join(kept)} FROM {table}")))
    return rows


def kill_dagster_steps(corpus_dir: Path, folder: Path, kills: int, seed: int) -> Tally:
    """The command, torchrun, a rank or all processes are killed, and the command is run again until it ends."""
    tally = Tally("dagster job execute, SIGKILL", seed)
    chosen = random.Random(seed)
    expected = undisturbed_home(corpus_dir)
    while tally.injected < kills:
        trial = folder / f"trial{tally.injected}"
        home = DagsterHome(corpus_dir, trial)
        pending: list[str | None] = []
        while True:
            target, moment = (
                chosen.choice(["command", "torchrun", "rank 0", "rank 1", "all"]),
                chosen.uniform(0.15, 1) * expected.seconds,
            )
            with home.execute() as command:
                code = command.wait(moment)
                if code is None:
                    command.signal(signal.SIGKILL, target)
                    ended, left = command.wait(), command.left()
                    left += ["the command itself"] if ended is None else []
                    pending.append(f"{target} killed after {moment:.2f} s: left behind {left}" if left else None)
                    continue
                problem = f"exit code {code}: {command.output()[-2000:]}" if code else None
            if code == 0:
                problem = differences(expected.outcome, home.outcome())
            for orphaned in pending:
                tally.count(orphaned or problem)
            break
        shutil.rmtree(trial)
    return tally


def differences(expected: list[object], found: list[object]) -> str | None:
    """What differs between two outcomes, None if nothing does."""
    if found == expected:
        return None
    if len(found) != len(expected) or not isinstance(found[-1], dict) or not isinstance(expected[-1], dict):
        return f"not an outcome of {len(expected) - 1} runs and a catalog: {str(found)[:500]}"
    if found[:-1] != expected[:-1]:
        return "the weights or the logged losses differ"
    compared = {table: _differing_rows(table, rows, found[-1].get(table, [])) for table, rows in expected[-1].items()}
    differing = {table: rows for table, rows in compared.items() if rows}
    return f"the catalog's rows differ: {differing}" if differing else None


def _differing_rows(table: str, expected: list[str], found: list[str]) -> list[str]:
    if table == "checkpoints":
        # A stopped training, or one whose command was killed, saves once more, and an older checkpoint is deleted for that.
        saved, saved_here = ({re.sub("'on_disk': (True|False), ", "", row) for row in rows} for rows in (expected, found))
        return sorted(saved - saved_here)[:4]
    return sorted(set(expected) ^ set(found))[:4]
