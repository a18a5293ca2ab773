"""Removes what no kept dataset needs: old manifests, shards, snapshots and tokenizers. `python -m llm_core.garbage` is the tool.

Kept are the current dataset, every dataset that a training run was made from, so that it can be resumed and traced, and the
newest ones. Manifests go first and what they name after them: a removal that is interrupted leaves files that nobody names,
which the next one takes. The catalog keeps its rows: they are history.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import AliasChoices, Field

from llm_core.cli import parse_options, run_tool
from llm_core.config import StageConfig
from llm_core.corpus.file_index import last_look
from llm_core.errors import UserError
from llm_core.files import ID_LENGTH, read_json, sha256_file
from llm_core.locks import preparing
from llm_core.shards import DatasetManifest, load_manifest

PROG = "python -m llm_core.garbage"


class GarbageOptions(StageConfig):
    """Remove prepared data that no kept dataset needs."""

    data_dir: str = Field("processed_data", description="Folder written by the data preparation.")
    runs: list[str] = Field(
        ["checkpoints"], description="Folders that hold training runs, themselves or one level below; their datasets are kept."
    )
    keep: int = Field(1, ge=1, description="Newest datasets to keep, the current one among them; those of the runs stay anyway.")
    min_age_hours: float = Field(
        1.0, ge=0, description="Younger files stay: they may belong to a preparation that is going on now."
    )
    dry_run: bool = Field(
        False, validation_alias=AliasChoices("dry_run", "dry-run"), description="Only tell what would be removed."
    )


@dataclass(frozen=True)
class Garbage:
    """Files that nothing needs, by kind and in the order in which they can be removed; and files that are not ours."""

    by_kind: dict[str, list[Path]]
    unknown: list[Path]


def find_garbage(processed_dir: Path, run_folders: list[Path], keep: int, min_age_hours: float) -> Garbage:
    """Looks for what no kept dataset needs, and removes nothing.

    Raises:
        UserError: there is no prepared data.
        DataError: a manifest or a run's state is damaged, so that nobody can say what it needs.
    """
    needed = {path for manifest in _kept(processed_dir, run_folders, keep) for path in _files_of(processed_dir, manifest)}
    for snapshot_id in _current_snapshots(processed_dir):
        needed |= set(_snapshot_files(processed_dir, snapshot_id))
    current = processed_dir / "tokenizer.json"  # it may be newer than the dataset: none was made with it yet
    if current.is_file():
        needed |= set(_tokenizer_needs(processed_dir, sha256_file(current)[:ID_LENGTH]))
    patterns = {
        "manifests": ["manifests/*.json"],
        # What says that an artifact exists before what it consists of.
        "snapshots": ["snapshots/*.json", "snapshots/*.files.parquet", "snapshots/*.documents.parquet"],
        "tokenizers": ["tokenizers/*.report.json", "tokenizers/*.json"],
        "shards": ["dataset/*.arrow", "dataset/*.parquet"],
        "half-written files": ["**/.*.tmp"],
    }
    names = ("snapshots/current.json", "snapshots/file_index.parquet", "snapshots/signatures.parquet", "tokenizers/frozen.json")
    pointers = {processed_dir / name for name in names}
    found = {
        kind: [path for pattern in several for path in sorted(processed_dir.glob(pattern))] for kind, several in patterns.items()
    }
    ours = pointers | {path for paths in found.values() for path in paths}
    latest = time.time() - min_age_hours * 3600
    by_kind = {}
    for kind, paths in found.items():
        unneeded = [path for path in dict.fromkeys(paths) if path not in needed | pointers]
        by_kind[kind] = [path for path in unneeded if path.stat().st_mtime <= latest]
    folders = ("manifests", "snapshots", "tokenizers", "dataset")
    inside = (path for folder in folders for path in (processed_dir / folder).rglob("*") if path.is_file())
    return Garbage(by_kind, sorted(path for path in inside if path not in ours))


def remove(garbage: Garbage) -> None:
    """Removes it, manifests first."""
    for paths in garbage.by_kind.values():
        for path in paths:
            path.unlink(missing_ok=True)


def report(garbage: Garbage, processed_dir: Path) -> str:
    """A table of what is removed, and the files that stay because nobody here wrote them."""
    rows = [("kind", "files", "bytes")]
    for kind, paths in garbage.by_kind.items():
        rows.append((kind, f"{len(paths):,}", f"{sum(path.stat().st_size for path in paths):,}"))
    lines = [f"{kind:<20} {files:>8} {size:>16}" for kind, files, size in rows]
    return "\n".join([*lines, *(f"not ours, left alone: {path.relative_to(processed_dir)}" for path in garbage.unknown)])


def collect(processed_dir: Path, run_folders: list[Path], keep: int, min_age_hours: float, dry_run: bool) -> str:
    """Removes what no kept dataset needs, unless `dry_run`; returns the table of it."""
    load_manifest(processed_dir)  # a folder without prepared data is not made one by a lock file in it
    with preparing(processed_dir, lambda text: print(text, file=sys.stderr, flush=True)):
        garbage = find_garbage(processed_dir, run_folders, keep, min_age_hours)
        text = report(garbage, processed_dir)
        if not dry_run:
            remove(garbage)
    return text


def _kept(processed_dir: Path, run_folders: list[Path], keep: int) -> Iterator[DatasetManifest]:
    yield load_manifest(processed_dir)
    manifests = sorted((processed_dir / "manifests").glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    wanted: set[tuple[str, str | None]] = {(path.stem, None) for path in manifests[:keep]}
    for folder in run_folders:
        if not folder.is_dir():
            raise UserError(f"--runs {folder}: no such folder; name the ones that hold training runs, or [] if there are none")
        for state in [folder / "run.json", *folder.glob("*/run.json")]:
            if state.is_file():
                run = read_json(state)
                # The same documents can lie in other files than when the dataset was made; older versions did not record it.
                wanted |= {(run["dataset_id"], None), (run["dataset_id"], run.get("snapshot_id"))}
    present = {path.stem for path in manifests}
    for dataset_id, snapshot_id in wanted:
        if dataset_id in present:
            yield load_manifest(processed_dir, dataset_id, snapshot_id)


def _files_of(processed_dir: Path, manifest: DatasetManifest) -> Iterator[Path]:
    yield processed_dir / "manifests" / f"{manifest.dataset_id}.json"
    for shard in manifest.shards:
        yield processed_dir / shard.file
        yield processed_dir / shard.facts_file
    yield from _snapshot_files(processed_dir, manifest.snapshot_id)
    yield from _tokenizer_needs(processed_dir, manifest.tokenizer.tokenizer_id)


def _tokenizer_needs(processed_dir: Path, tokenizer_id: str) -> Iterator[Path]:
    files = [processed_dir / "tokenizers" / f"{tokenizer_id}.{end}" for end in ("json", "report.json", "tried.json")]
    yield from files
    if (report := files[1]).is_file():  # the text it was made for tells how far new text has drifted from it
        yield from _snapshot_files(processed_dir, read_json(report)["snapshot_id"])


def _snapshot_files(processed_dir: Path, snapshot_id: str) -> list[Path]:
    return [processed_dir / "snapshots" / f"{snapshot_id}.{end}" for end in ("json", "files.parquet", "documents.parquet")]


def _current_snapshots(processed_dir: Path) -> Iterator[str]:
    """The snapshot that the next look compares with, and the one that the pipeline goes on from."""
    last, _ = last_look(processed_dir)
    if last is not None:
        yield last
    pointer = processed_dir / "snapshots" / "current.json"
    if pointer.is_file():
        yield Path(read_json(pointer)["path"]).stem


def main() -> None:
    options = parse_options(GarbageOptions, PROG)
    folders = [Path(folder) for folder in options.runs]
    print(collect(Path(options.data_dir), folders, options.keep, options.min_age_hours, options.dry_run))
    if options.dry_run:
        print("nothing was removed (--dry_run)")


if __name__ == "__main__":
    run_tool(main, PROG)
