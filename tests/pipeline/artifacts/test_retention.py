"""Garbage collection of runs and models: what is kept, what stays of what is removed, and that no moment loses anything else."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_core.checkpoint import RunRecord, find_parent, named_checkpoint, newest_valid
from llm_core.errors import UserError
from llm_core.huggingface import ModelRecord, is_intact
from llm_core.layout import Home as Folders
from llm_core.layout import ModelFolder, RunFolder
from llm_core.system import held, in_use, read_json, sha256_file, write_json
from pipeline.artifacts import retention
from pipeline.artifacts.pointers import set_current
from pipeline.artifacts.retention import Collection, collect_home
from pipeline.assets import checks
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.rebuild import rebuild
from pipeline.processes.training import finished_checkpoint
from tests.pipeline.conftest import Home
from tests.support.artifacts import NASTY, Artifacts, contents, document_id

Copy = Callable[[tuple[Home, Any]], tuple[Home, Any]]


class Runs:
    """A home with hand-written runs and models, each newer than the one before."""

    def __init__(self, root: Path) -> None:
        self.home = Folders(root)
        self.artifacts = Artifacts(root)
        self.artifacts.snapshot("snap", NASTY)
        self.artifacts.tokenizer("tok", "snap")
        self.artifacts.dataset("data", "snap", "tok", NASTY)
        self._day = 0

    def run(self, run_id: str, parent: str | None = None, **fields: Any) -> Path:
        folder = self.artifacts.run(run_id, "data", "tok", {NASTY[0]: 0})
        self._day += 1
        fields |= {"parent_run_id": parent, "parent_step": parent and 4, "started_at": f"2026-01-{self._day:02}T00:00:00+00:00"}
        write_json(RunFolder(folder).record, read_json(RunFolder(folder).record) | fields)
        (folder / "set_aside").mkdir()
        for name in ("set_aside/checkpoint_step_9.pt", "trace_rank0.json", "known_documents.parquet", "evaluation_step_4_e0.bin"):
            (folder / name).write_bytes(b"large")
        return folder

    def model(self, run_id: str) -> Path:
        """The model of a run, with the id of the run and weights."""
        folder = self.artifacts.model(run_id, f"checkpoint of {run_id}", run_id)
        files = {}
        for path in (ModelFolder(folder).weights, ModelFolder(folder).card):
            path.write_bytes(b"large")
            files[path.name] = sha256_file(path)
        update = {"files": files, "released_at": RunRecord.read(self.home.run(run_id).root).started_at}
        ModelRecord.read(folder).model_copy(update=update).write(folder)
        return folder

    def collect(self, keep_runs: int = 1, delete: bool = True) -> Collection:
        return collect_home(self.home, keep_runs, delete, pytest.fail)

    def files(self) -> set[str]:
        """All files but locks and the catalog."""
        found = {str(path.relative_to(self.home.root)) for path in self.home.root.rglob("*") if path.is_file()}
        return {name for name in found if not name.endswith((".lock", ".in_use")) and "catalog" not in name}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "home")


@pytest.fixture
def old_and_new(runs: Runs) -> Runs:
    """Two runs with a model each; the first is removed if only the newest is kept."""
    for name in ("old", "new"):
        runs.run(name)
        runs.model(name)
    runs.artifacts.evaluation(runs.home.run("old").root, document_id("old4")[:16], "data")
    assert rebuild(runs.home.root, runs.home.catalog) == []
    return runs


def test_what_is_needed_is_kept_for_a_reason_and_the_rest_is_removed(runs: Runs) -> None:
    home = runs.home
    for run_id, parent in (
        *(("grandparent", None), ("parent", "grandparent"), ("released", "parent"), ("of_quickstart", None)),
        *(
            ("current", None),
            ("evaluated", None),
            ("training", None),
            ("reused", None),
            ("useless", "grandparent"),
            ("newest", None),
        ),
    ):
        runs.run(run_id, parent)
    for run_id in ("parent", "released", "of_quickstart", "useless", "newest"):
        runs.model(run_id)
    set_current(home.released("small"), home.model("released").root)
    set_current(home.released("quickstart"), home.model("of_quickstart").root)
    set_current(home.current_checkpoint, RunFolder(home.run("current").root).checkpoint(4))
    set_current(home.of_quickstart.current_evaluation, home.run("evaluated").evaluation(4, "e0"))
    with held(home.run("training").root, pytest.fail), in_use(home.run("reused").root):
        found = runs.collect()
    reasons = {(candidate.kind, candidate.identifier): candidate.kept for candidate in found.candidates}
    assert reasons == {
        ("run", "grandparent"): "parent of parent",
        ("run", "parent"): "parent of released",
        ("run", "released"): "released (small)",
        ("run", "of_quickstart"): "released (quickstart)",
        ("run", "current"): "current",
        ("run", "evaluated"): "current",
        ("run", "training"): "in use",
        ("run", "reused"): "in use",
        ("run", "useless"): None,
        ("run", "newest"): "newest",
        ("model", "parent"): None,
        ("model", "released"): "released (small)",
        ("model", "of_quickstart"): "released (quickstart)",
        ("model", "useless"): None,
        ("model", "newest"): "newest",
    }
    for kind, identifier in reasons:
        if kind == "run":
            assert (newest_valid(home.run(identifier).root)[0] is None) == (identifier == "useless")
        else:
            assert is_intact(home.model(identifier).root) == (reasons[kind, identifier] is not None)


def test_a_dry_run_lists_sizes_and_removes_nothing(old_and_new: Runs) -> None:
    before = old_and_new.files()
    found = old_and_new.collect(delete=False)
    assert {(candidate.kind, candidate.identifier) for candidate in found.removed} == {("run", "old"), ("model", "old")}
    manifests = sum(path.stat().st_size for path in old_and_new.home.run("old").checkpoint_manifests())
    assert found.bytes == manifests + 2 * len(b"weights") + 4 * len(b"large") + len(b"large")
    assert old_and_new.files() == before
    assert old_and_new.collect(keep_runs=2, delete=False).removed == []


def test_the_records_of_what_is_removed_stay_and_the_catalog_says_so(old_and_new: Runs) -> None:
    home, catalog = old_and_new.home, Catalog(old_and_new.home.catalog)
    before = contents(catalog)
    old_and_new.collect()
    kept = {name for name in old_and_new.files() if "/old/" in name}
    records = ("run.json", "metrics.jsonl", "document_steps.parquet", "evaluation_step_4_e0.json")
    assert kept == {f"checkpoints/old/{name}" for name in records} | {
        f"models/old/{name}" for name in ("textmill.json", "README.md")
    }
    after = contents(catalog)
    assert {table for table in before if len(before[table]) != len(after[table])} == set(), "no row is lost"
    assert {row["run_id"]: row["removed_at"] is not None for row in catalog.runs()} == {"old": True, "new": False}
    assert {row["model_id"] for row in catalog.query("SELECT * FROM models WHERE removed_at IS NOT NULL")} == {"old"}
    assert {row["removed_at"] is not None for row in catalog.lineage(document_id("old4")[:16])} == {True}
    usage = {row["run_id"]: (row["removed_at"] is not None, row["on_disk"]) for row in catalog.usage(NASTY[0])}
    assert usage == {"old": (True, False), "new": (False, True)}
    assert rebuild(home.root, home.catalog) == []
    assert contents(catalog) == after, "the files know it"
    assert old_and_new.collect().removed == []
    assert contents(catalog) == after


def test_a_removal_interrupted_at_any_file_leaves_everything_readable_and_is_completed_by_the_next(
    old_and_new: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, original, interrupted = old_and_new.home, Path.unlink, 0

    def unlink(path: Path, missing_ok: bool = False) -> None:
        original(path, missing_ok=missing_ok)
        raise KeyboardInterrupt

    while True:  # one file is removed in each round
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            try:
                found = old_and_new.collect()
            except KeyboardInterrupt:
                interrupted += 1
            else:
                break
        assert rebuild(home.root, home.catalog) == []
        assert newest_valid(home.run("new").root)[0] is not None
        assert is_intact(home.model("new").root)
        assert finished_checkpoint(home.run("old").root) is None, "it is not reused half removed"
        model = home.model("old").root
        assert is_intact(model) == (ModelRecord.read(model).removed_at is None)
    assert interrupted > 5
    assert found.removed == []
    assert not home.run("old").removable()
    assert Catalog(home.catalog).not_removed() == {"new"}


def test_what_is_marked_as_removed_is_not_reused_though_its_files_are_still_there(
    old_and_new: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = (folder("old").root for folder in (old_and_new.home.run, old_and_new.home.model))
    write_json(RunFolder(run).record, read_json(RunFolder(run).record) | {"config": {"max_steps": 4}})
    assert finished_checkpoint(run) is not None and is_intact(model)
    with monkeypatch.context() as patch:
        patch.setattr(retention, "_remove_files", lambda _: None)
        old_and_new.collect()
    assert newest_valid(run)[0] is not None
    assert finished_checkpoint(run) is None and not is_intact(model)
    with pytest.raises(UserError, match="were removed"):
        find_parent(str(run))
    old_and_new.collect()
    assert RunFolder(run).removable() == [] and not ModelFolder(model).weights.exists()


def test_a_catalog_that_missed_a_removal_is_corrected_by_the_next(old_and_new: Runs, tmp_path: Path) -> None:
    home = old_and_new.home
    before = home.catalog.read_bytes()
    old_and_new.collect()
    home.catalog.write_bytes(before)
    assert Catalog(home.catalog).not_removed() == {"old", "new"}
    old_and_new.collect()
    assert Catalog(home.catalog).not_removed() == {"new"}


def test_the_snapshot_of_a_run_of_an_older_version_is_recorded_before_its_dataset_goes(old_and_new: Runs) -> None:
    assert RunRecord.read(old_and_new.home.run("old").root).snapshot_id is None
    old_and_new.collect()
    assert RunRecord.read(old_and_new.home.run("old").root).snapshot_id == "snap"


def test_a_removed_run_is_named_where_its_checkpoint_is_asked_for(old_and_new: Runs) -> None:
    old_and_new.collect()
    folder = old_and_new.home.run("old").root
    for path in (folder, RunFolder(folder).checkpoint(4)):
        with pytest.raises(
            UserError, match=r"--init_from .*old.*: the checkpoints of run old were removed on \d{4}-\d\d-\d\d by"
        ):
            find_parent(str(path))
        with pytest.raises(UserError, match=r"--checkpoint .*old.*: the checkpoints of run old were removed"):
            named_checkpoint(str(path))


def test_the_command_lists_first_and_removes_on_request(old_and_new: Runs) -> None:
    def textmill(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pipeline.cli", "--home", str(old_and_new.home.root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    set_current(old_and_new.home.released("small"), old_and_new.home.model("new").root)
    before = old_and_new.files()
    listed = textmill("gc", "--keep_runs", "1")
    assert listed[-1] == "nothing was removed; to remove it, add --delete"
    assert old_and_new.files() == before
    removed = textmill("gc", "--keep_runs", "1", "--delete")
    assert removed[2:6] == listed[2:6]
    kept = {tuple(line.split()[:2]): line.split(maxsplit=6)[-1] for line in removed[2:6]}
    assert kept == {
        ("run", "new"): "released (small)",
        ("run", "old"): "no",
        ("model", "new"): "released (small)",
        ("model", "old"): "no",
    }
    assert old_and_new.home.run("old").removable() == []
    rows = [line.split() for line in textmill("runs")]
    released, removed_at = rows[0].index("released"), rows[0].index("removed_at")
    assert rows[2][0] == "new" and "small" in rows[2] and rows[2][-1] == "-"
    assert released < removed_at and rows[3][0] == "old" and rows[3][-1] == "UTC"


@pytest.mark.slow
def test_a_job_removes_old_runs_at_its_end_keeps_what_others_use_and_trains_a_removed_run_again(
    trained_home: tuple[Home, Any], clone: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, first = clone(trained_home)
    first_id = home.metadata(first, "checkpoint")["run_id"]
    home.storage.released.unlink()  # the next model is released, however good it is
    second = home.materialize(checkpoint={"learning_rate": 2e-2})
    second_id = home.metadata(second, "checkpoint")["run_id"]
    removed: list[list[str]] = []

    def collect_meanwhile(*arguments: Any) -> checks.Checks:
        found = collect_home(home.folders, 1, delete=True, log=pytest.fail)
        removed.append([candidate.identifier for candidate in found.removed if candidate.kind == "run"])
        assert set(found.prepared.values()) == {"in use: nothing is removed from it before the job that uses it has ended"}
        return checks.check_checkpoint(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.assets.checkpoint.check_checkpoint", collect_meanwhile)
        reused = home.materialize()
    assert removed == [[]], "a job had begun to use the first run"
    assert home.metadata(reused, "checkpoint")["reused"]

    again = home.materialize(checkpoint={"learning_rate": 2e-2}, run_comparison={"keep_runs": 1})
    shown = home.metadata(again, "run_comparison")
    assert shown["removed_runs_and_models"] > 0 and shown["removed_bytes"] > 100_000
    assert {row["run_id"]: row["removed_at"] is not None for row in home.catalog.runs()} == {first_id: True, second_id: False}
    before = contents(home.catalog)
    assert rebuild(home.folders.root, home.folders.catalog) == []
    assert contents(home.catalog) == before

    trained = home.metadata(home.materialize(), "checkpoint")
    assert (trained["run_id"], trained["reused"]) == (first_id, False)
    assert [(row["run_id"], row["removed_at"]) for row in home.catalog.runs()] == [(first_id, None), (second_id, None)]
