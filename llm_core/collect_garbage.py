"""`python -m llm_core.collect_garbage`: removes the manifests, shards, snapshots and tokenizers that no kept dataset needs.

Kept are the current dataset, the datasets of training runs, so that these can be resumed and traced, and the newest datasets.
Manifests are removed before the files they name: an interrupted removal leaves files that the next one finds. The catalog keeps
its rows as history.
"""

from llm_core.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

import sys
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import AliasChoices, Field

from llm_core.checkpoint import RunRecord
from llm_core.cli import parse_options, run_tool
from llm_core.config import StageConfig
from llm_core.corpus import load_scan
from llm_core.dataset import DatasetManifest, load_manifest
from llm_core.errors import UserError
from llm_core.layout import PreparedData
from llm_core.system import ID_LENGTH, preparing, read_pointer, sha256_file
from llm_core.tokenizer import read_report

PROG = "python -m llm_core.collect_garbage"


class GarbageOptions(StageConfig):
    """Remove prepared data that no kept dataset needs."""

    data_dir: str = Field("processed_data", description="Folder written by the data preparation.")
    runs: list[str] = Field(
        ["checkpoints"], description="Folders that hold training runs, themselves or one level below; their datasets are kept."
    )
    keep: int = Field(
        1, ge=1, description="Newest datasets to keep, the current one included; those of the runs are kept as well."
    )
    min_age_hours: float = Field(1.0, ge=0, description="Younger files are kept: they may belong to a preparation in progress.")
    dry_run: bool = Field(
        False, validation_alias=AliasChoices("dry_run", "dry-run"), description="Only report what would be removed."
    )


@dataclass(frozen=True)
class Garbage:
    """Files that nothing needs, by kind, in the order in which they can be removed; and files that textmill did not write."""

    by_kind: dict[str, list[Path]]
    unknown: list[Path]


def find_garbage(
    data_dir: Path, run_folders: list[Path], keep: int, min_age_hours: float, removed_runs: Container[str] = ()
) -> Garbage:
    """Finds what no kept dataset needs; removes nothing.

    removed_runs: ids of runs that are about to be removed. The snapshot of a removed run is kept: its lineage stays known.

    Raises:
        UserError: there is no prepared data.
        DataError: a manifest or a run's record is damaged, so that what it needs is unknown.
    """
    folder = PreparedData(data_dir)
    runs = list(_runs(run_folders))
    kept_runs = [run for run in runs if run.removed_at is None and run.run_id not in removed_runs]
    needed = {path for manifest in _kept(folder, kept_runs, keep) for path in _files_of(folder, manifest)}
    for snapshot_id in (*_current_snapshots(folder), *_snapshots_of(runs, folder)):
        needed |= set(_snapshot_files(folder, snapshot_id))
    if folder.tokenizer.is_file():  # it may be newer than the dataset
        needed |= set(_files_of_tokenizer(folder, sha256_file(folder.tokenizer)[:ID_LENGTH]))
    artifacts, latest = folder.artifacts(), time.time() - min_age_hours * 3600
    by_kind = {
        kind: [path for path in paths if path not in needed and path.stat().st_mtime <= latest]
        for kind, paths in artifacts.items()
    }
    known = folder.pointers_and_caches().union(*artifacts.values())
    return Garbage(by_kind, [path for path in folder.all_files() if path not in known])


def remove(garbage: Garbage) -> None:
    """Removes the files, manifests first."""
    for paths in garbage.by_kind.values():
        for path in paths:
            path.unlink(missing_ok=True)


def report(garbage: Garbage, data_dir: Path) -> str:
    """A table of what is removed, and the files that are kept because textmill did not write them."""
    rows = [("kind", "files", "bytes")]
    for kind, paths in garbage.by_kind.items():
        rows.append((kind, f"{len(paths):,}", f"{sum(path.stat().st_size for path in paths):,}"))
    lines = [f"{kind:<20} {files:>8} {size:>16}" for kind, files, size in rows]
    return "\n".join([*lines, *(f"not written by textmill, kept: {path.relative_to(data_dir)}" for path in garbage.unknown)])


def collect(
    data_dir: Path,
    run_folders: list[Path],
    keep: int,
    min_age_hours: float,
    dry_run: bool,
    removed_runs: Container[str] = (),
) -> str:
    """Removes what no kept dataset needs, unless `dry_run`; returns a table of it. removed_runs: as for `find_garbage`.

    The caller has locked the prepared data.
    """
    garbage = find_garbage(data_dir, run_folders, keep, min_age_hours, removed_runs)
    text = report(garbage, data_dir)
    if not dry_run:
        remove(garbage)
    return text


def _runs(run_folders: list[Path]) -> Iterator[RunRecord]:
    for runs in run_folders:
        if not runs.is_dir():
            raise UserError(f"--runs {runs}: no such folder; name the ones that hold training runs, or [] if there are none")
        for run_dir in [runs, *(path for path in runs.iterdir() if path.is_dir())]:
            if (run := RunRecord.find(run_dir)) is not None:
                yield run


def _snapshots_of(runs: list[RunRecord], folder: PreparedData) -> Iterator[str]:
    """The snapshots that the raw text of runs is found in."""
    for run in runs:
        if run.snapshot_id is not None:
            yield run.snapshot_id
        elif folder.manifest(run.dataset_id).is_file():
            yield load_manifest(folder.root, run.dataset_id).snapshot_id


def _kept(folder: PreparedData, runs: list[RunRecord], keep: int) -> Iterator[DatasetManifest]:
    yield load_manifest(folder.root)
    manifests = sorted(folder.manifests(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    wanted: set[tuple[str, str | None]] = {(path.stem, None) for path in manifests[:keep]}
    for run in runs:
        # The same documents can be in other files than when the dataset was made. Older versions did not record it.
        wanted |= {(run.dataset_id, None), (run.dataset_id, run.snapshot_id)}
    present = {path.stem for path in manifests}
    for dataset_id, snapshot_id in wanted:
        if dataset_id in present:
            yield load_manifest(folder.root, dataset_id, snapshot_id)


def _files_of(folder: PreparedData, manifest: DatasetManifest) -> Iterator[Path]:
    yield folder.manifest(manifest.dataset_id)
    for shard in manifest.shards:
        yield folder.named(shard.file)
        yield folder.named(shard.index_file)
    yield from _snapshot_files(folder, manifest.snapshot_id)
    yield from _files_of_tokenizer(folder, manifest.tokenizer.tokenizer_id)


def _files_of_tokenizer(folder: PreparedData, tokenizer_id: str) -> Iterator[Path]:
    report = folder.tokenizer_report(tokenizer_id)
    yield from (folder.tokenizer_file(tokenizer_id), report, folder.drift_report(tokenizer_id))
    if report.is_file():  # drift is measured against its training text
        yield from _snapshot_files(folder, read_report(folder.root, tokenizer_id)["snapshot_id"])


def _snapshot_files(folder: PreparedData, snapshot_id: str) -> tuple[Path, ...]:
    return folder.snapshot(snapshot_id), folder.snapshot_files(snapshot_id), folder.snapshot_documents(snapshot_id)


def _current_snapshots(folder: PreparedData) -> Iterator[str]:
    """The snapshot that the next scan is compared with, and the one that the pipeline continues from."""
    last, _ = load_scan(folder.root)
    if last is not None:
        yield last
    if folder.current_snapshot.is_file():
        yield read_pointer(folder.current_snapshot).stem


def main() -> None:
    options = parse_options(GarbageOptions, PROG)
    folders = [Path(folder) for folder in options.runs]
    data_dir = Path(options.data_dir)
    load_manifest(data_dir)  # before the lock file is created: this must be a folder of prepared data
    with preparing(data_dir, lambda text: print(text, file=sys.stderr, flush=True)):
        print(collect(data_dir, folders, options.keep, options.min_age_hours, options.dry_run))
    if options.dry_run:
        print("nothing was removed (--dry_run)")


if __name__ == "__main__":
    run_tool(main, PROG, "what it removed so far was not needed; run it again to remove the rest")
