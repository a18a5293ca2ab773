"""The catalog made anew from the files on disk, which are the truth."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from llm_core.checkpoint_files import CheckpointRecord, checkpoint_manifests
from llm_core.errors import DataError
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogError, Database


def rebuild(home: Path, path: Path) -> list[str]:
    """Makes the catalog at `path` anew from the files under `home`; the old one stays until the new one is whole.

    Other processes' records wait meanwhile, so that none is lost.

    Returns:
        What could not be read and is therefore not in the new catalog.

    Raises:
        CatalogError: the new catalog could not be written, or others kept the old one open; the old one is as it was.
    """
    problems = []
    with Database(path).replaced() as fresh_path:
        fresh = Catalog(fresh_path)
        fresh.create()
        for record in _records(home, fresh):
            try:
                record()
            except CatalogError:
                raise
            except (DataError, OSError) as error:
                problems.append(str(error))
    return problems


def _records(home: Path, catalog: Catalog) -> Iterator[Callable[[], object]]:
    """What records each artifact, in the order of the lineage."""
    processed, checkpoints, models = home / "processed_data", home / "checkpoints", home / "models"
    for path in _oldest_first(processed / "snapshots", "*.json"):
        if path.name != "current.json":
            yield partial(catalog.record_snapshot, processed, path.stem)
    for path in _oldest_first(processed / "tokenizers", "*.report.json"):
        yield partial(catalog.record_tokenizer, processed, path.name.removesuffix(".report.json"))
    for path in _oldest_first(processed / "manifests", "*.json"):
        yield partial(catalog.record_dataset, processed, path.stem)
    for path in _oldest_first(checkpoints, "*/run.json"):
        yield partial(catalog.record_run, path.parent)
        for manifest in checkpoint_manifests(path.parent):
            yield partial(CheckpointRecord.read, manifest)  # a damaged one is not in the catalog, and said to be missing
    for path in _oldest_first(checkpoints, "*/evaluation_step_*.json"):
        yield partial(catalog.record_evaluation, path)
    for path in _oldest_first(models, "*/textmill.json"):
        yield partial(catalog.record_model, path.parent)


def _oldest_first(folder: Path, pattern: str) -> list[Path]:
    """Files in the order they were written, so that what was first seen stays first seen."""
    return sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, path))
