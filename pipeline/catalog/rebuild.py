"""Rebuilds the catalog from the files on disk."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from llm_core.checkpoint import CheckpointRecord
from llm_core.errors import DataError
from llm_core.layout import Home, RunFolder
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogError, Database


def rebuild(home: Path, path: Path) -> list[str]:
    """Rebuilds the catalog at `path` from the files under `home`; the old one stays until the new one is complete.

    Other processes wait to record until it is done, so that no record is lost.

    Returns:
        A message for each file that could not be read and was skipped.

    Raises:
        CatalogError: the new catalog could not be written, or another program kept the old one open; the old one is unchanged.
    """
    problems = []
    with Database(path).replaced() as fresh_path:
        fresh = Catalog(fresh_path)
        fresh.create()
        for record in _records(Home(home), fresh):
            try:
                record()
            except CatalogError:
                raise
            except (DataError, OSError) as error:
                problems.append(str(error))
    return problems


def _records(home: Home, catalog: Catalog) -> Iterator[Callable[[], object]]:
    """A call that records each artifact, in the order of the lineage."""
    for prepared in home.all_prepared():
        for path in _oldest_first(prepared.snapshots()):
            yield partial(catalog.record_snapshot, prepared.root, path.stem)
        for path in _oldest_first(prepared.tokenizer_reports()):
            yield partial(catalog.record_tokenizer, prepared.root, path.name.removesuffix(".report.json"))
        for path in _oldest_first(prepared.manifests()):
            yield partial(catalog.record_dataset, prepared.root, path.stem)
    for path in _oldest_first([run.record for run in home.runs()]):
        yield partial(catalog.record_run, path.parent)
        for manifest in RunFolder(path.parent).checkpoint_manifests():
            yield partial(CheckpointRecord.read, manifest)  # fails if it is damaged
    for path in _oldest_first(home.evaluations()):
        yield partial(catalog.record_evaluation, path)
    for path in _oldest_first([model.record for model in home.model_folders()]):
        yield partial(catalog.record_model, path.parent)


def _oldest_first(paths: Iterable[Path]) -> list[Path]:
    """Files in the order they were written, so that first_seen stays the same."""
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path))
