"""Which runs and models are kept, and the removal of all others.

Kept are the newest runs and models, what is released in any line, what a pointer names or a process is using, and the runs that a
kept run started from. The records of a removed run stay (run.json, its options, metrics and results, and the snapshot of its
text), and so do textmill.json and the card of a model: the catalog is rebuilt from them and lists both as removed.

A record says "removed" before the first file is removed. An interrupted removal is completed by the next one, and until then
every file that is left can be read.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Literal, NoReturn

from llm_core.checkpoint import RunRecord
from llm_core.collect_garbage import GarbageOptions, collect
from llm_core.dataset import DatasetVersion
from llm_core.huggingface import ModelRecord
from llm_core.layout import Home, ModelFolder, RunFolder
from llm_core.system import held, inside, now, unused
from pipeline.artifacts.pointers import find_current, released_directories
from pipeline.catalog.catalog import Catalog


@dataclass(frozen=True)
class Candidate:
    """A run or a model, and the files that its removal removes."""

    kind: Literal["run", "model"]
    identifier: str
    run_id: str  # of the run, or of the model's run
    parent_run_id: str | None
    since: str  # when the run started or the model was released
    removed_at: str | None
    folder: Path
    files: list[Path]  # in the order of their removal; some are folders
    bytes: int
    kept: str | None = None  # why it is kept; None if it is removed


@dataclass(frozen=True)
class Collection:
    """What was removed, or would be."""

    candidates: list[Candidate]  # the newest first
    prepared: dict[Path, str]  # what was removed of each folder of prepared data, as a table

    @property
    def removed(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.kept is None]

    @property
    def bytes(self) -> int:
        """Of the removed runs and models."""
        return sum(candidate.bytes for candidate in self.removed)


class _BusyError(Exception):
    """A process is using the folder."""


def collect_home(home: Home, keep_runs: int, delete: bool, log: Callable[[str], object], keep_datasets: int = 1) -> Collection:
    """Finds everything in a home that is not kept, and removes it if `delete`.

    keep_runs: newest runs to keep, and as many models. keep_datasets: newest versions of prepared data to keep. Without `delete`
    nothing is written, so what is in use is not known: it is listed.

    Raises:
        DataError: a record is damaged, so that what it needs is unknown.
    """
    with ExitStack() as lock:
        if delete:  # what is released must not change meanwhile
            lock.enter_context(held(home.models, lambda pid: log(f"{home.models}: process {pid} is releasing; waiting for it")))
        candidates = _find_candidates(home, keep_runs, check_use=delete)
        if delete:
            candidates = [_remove(candidate, home) if candidate.kept is None else candidate for candidate in candidates]
            _record_removed(home)
    collection = Collection(candidates, {})
    run_folders = [home.checkpoints] if home.checkpoints.is_dir() else []
    removed, min_age_hours = {candidate.identifier for candidate in collection.removed}, GarbageOptions().min_age_hours
    for prepared in home.all_prepared():
        if not prepared.metadata.is_file():  # its first preparation has not finished
            continue
        try:
            with ExitStack() as locks:
                if delete:
                    for lock_out in (unused, held):  # jobs, and data preparation without a job
                        locks.enter_context(lock_out(prepared.root, _raise_busy))
                table = collect(prepared.root, run_folders, keep_datasets, min_age_hours, not delete, removed)
        except _BusyError:
            table = "in use: nothing is removed from it before the job that uses it has ended"
        collection.prepared[prepared.root] = table
    return collection


def released_models(home: Home) -> dict[str, list[str]]:
    """The lines in which each model, by its id, is the released one; the line without a name is "default"."""
    lines: dict[str, list[str]] = {}
    for line, directory in released_directories(home):
        lines.setdefault(directory.name, []).append(line)
    return lines


def _find_candidates(home: Home, keep: int, check_use: bool) -> list[Candidate]:
    runs = [_run(folder.root) for folder in home.runs()]
    models = [_model(folder.root) for folder in home.model_folders()]
    kept = _reasons(home, runs, models, keep, check_use)
    # A removed one is listed again if an interrupted removal has left files.
    listed = [candidate for candidate in (*runs, *models) if candidate.files or candidate.removed_at is None]
    listed.sort(key=lambda candidate: (candidate.kind, candidate.since), reverse=True)
    return [replace(candidate, kept=kept.get(candidate.folder)) for candidate in listed]


def _run(folder: Path) -> Candidate:
    run, files = RunRecord.read(folder), RunFolder(folder).removable()
    ids = (run.run_id, run.run_id, run.parent_run_id)
    return Candidate("run", *ids, run.started_at, run.removed_at, folder, files, _size(files))


def _model(folder: Path) -> Candidate:
    model, card = ModelRecord.read(folder), ModelFolder(folder).card
    files = [path for name in sorted(model.files) if (path := inside(folder, name)).is_file() and path != card]
    ids = (model.model_id, model.run_id, model.parent_run_id)
    return Candidate("model", *ids, model.released_at, model.removed_at, folder, files, _size(files))


def _size(files: Iterable[Path]) -> int:
    """Bytes of files and of all files in folders."""
    size = 0
    for file in (file for path in files for file in (path.rglob("*") if path.is_dir() else [path])):
        with suppress(FileNotFoundError):  # a training replaces its checkpoints
            size += file.stat().st_size if file.is_file() else 0
    return size


def _reasons(home: Home, runs: list[Candidate], models: list[Candidate], keep: int, check_use: bool) -> dict[Path, str]:
    """Why a folder is kept, for each that is."""
    reasons: dict[Path, str] = {}
    by_id = {run.identifier: run for run in runs}
    lines = released_models(home)
    for model in models:
        if model.identifier in lines:
            reasons[model.folder] = f"released ({', '.join(lines[model.identifier])})"
            if model.run_id in by_id:
                reasons[by_id[model.run_id].folder] = reasons[model.folder]
    for place in (home, home.of_quickstart):
        for pointer in (place.current_checkpoint, place.current_evaluation):
            if (current := find_current(pointer)) is not None:
                reasons.setdefault(current.parent, "current")
    for candidates in (runs, models):
        present = [candidate for candidate in candidates if candidate.removed_at is None]
        for candidate in sorted(present, key=lambda candidate: candidate.since)[-keep:]:
            reasons.setdefault(candidate.folder, "newest")
    for run in runs:
        if check_use and run.folder not in reasons and _is_in_use(run.folder):
            reasons[run.folder] = "in use"
    for run in [run for run in runs if run.folder in reasons]:
        child = run
        while child.parent_run_id in by_id and (parent := by_id[child.parent_run_id]).folder not in reasons:
            reasons[parent.folder] = f"parent of {child.identifier}"
            child = parent
    # What is gone cannot be kept.
    gone = {candidate.folder for candidate in (*runs, *models) if candidate.removed_at is not None}
    return {folder: reason for folder, reason in reasons.items() if folder not in gone}


def _is_in_use(run_dir: Path) -> bool:
    """Whether a training is writing to a run folder or a job needs its checkpoint."""
    try:
        # In this order: a training that a job is starting must not find the lock taken.
        with unused(run_dir, _raise_busy), held(run_dir, _raise_busy):
            return False
    except _BusyError:
        return True


def _raise_busy(_: str) -> NoReturn:
    raise _BusyError


def _remove(candidate: Candidate, home: Home) -> Candidate:
    """Removes a run or a model, unless a process has begun to use the run."""
    if candidate.kind == "model":
        if (run_dir := home.run(candidate.run_id).root).is_dir() and _is_in_use(run_dir):
            return replace(candidate, kept="in use")
        if candidate.removed_at is None:
            ModelRecord.read(candidate.folder).model_copy(update={"removed_at": now()}).write(candidate.folder)
        _remove_files(candidate)
        return candidate
    try:
        with unused(candidate.folder, _raise_busy), held(candidate.folder, _raise_busy):
            run = RunRecord.read(candidate.folder)
            if (run.started_at, run.removed_at) != (candidate.since, candidate.removed_at):
                raise _BusyError
            if run.removed_at is None:
                RunRecord.mark_removed(candidate.folder, _snapshot_of(run.dataset_id, home))
            _remove_files(candidate)
    except _BusyError:
        return replace(candidate, kept="in use")
    return candidate


def _remove_files(candidate: Candidate) -> None:
    for path in candidate.files:
        if path.is_dir():
            rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _snapshot_of(dataset_id: str, home: Home) -> str | None:
    """The snapshot of a dataset, for runs of older versions, which did not record theirs; the dataset may be removed next."""
    for prepared in home.all_prepared():
        if prepared.manifest(dataset_id).is_file():
            return DatasetVersion.read(prepared.root, dataset_id).snapshot_id
    return None


def _record_removed(home: Home) -> None:
    """Records every removed run and model that the catalog does not list as removed, those of interrupted removals included."""
    if not home.catalog.exists():
        return
    catalog = Catalog(home.catalog)
    catalog.create()  # migrates an older one
    present = catalog.not_removed()
    for run in home.runs():
        if (record := RunRecord.read(run.root)).removed_at is not None and record.run_id in present:
            catalog.record_run(run.root)
    for model in home.model_folders():
        if (exported := ModelRecord.read(model.root)).removed_at is not None and exported.model_id in present:
            catalog.record_model(model.root)
