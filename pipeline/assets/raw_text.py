"""raw_text: the folder of raw text as a snapshot of documents."""

from pathlib import Path

import dagster as dg

from llm_core.config import CorpusConfig
from llm_core.corpus import take_snapshot
from llm_core.locks import preparing
from pipeline import checks
from pipeline.assets.common import DATA, HOOKS, OWNERS, table, tables
from pipeline.assets.sample_corpus import sample_corpus
from pipeline.current import set_current
from pipeline.resources import CatalogResource, Storage


class RawTextConfig(CorpusConfig, dg.Config):
    """How files become documents."""


@dg.asset(
    deps=[sample_corpus], kinds={"file", "parquet"}, group_name=DATA, owners=OWNERS, hooks=HOOKS, check_specs=checks.RAW_TEXT
)
def raw_text(
    context: dg.AssetExecutionContext, config: RawTextConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """The documents of the raw text folder, found by content: cleaned, deduplicated, split into train and validation.

    Unchanged files are not opened again. Files that are not clean UTF-8 text are set aside with a reason, repaired only if asked.
    """
    place = storage.raw_text
    if isinstance(place, Path) and storage.raw_text_dir is None:  # the one of a new home; a folder that was named must be there
        place.mkdir(parents=True, exist_ok=True)
    with preparing(storage.processed, context.log.info):
        snapshot = take_snapshot(place, storage.processed, config.part(CorpusConfig))
        catalog.open(storage).record_snapshot(storage.processed, snapshot.snapshot_id)
        set_current(storage.current_snapshot, storage.current_snapshot.with_name(f"{snapshot.snapshot_id}.json"))
    summary, dropped = snapshot.summary, snapshot.summary["bytes_dropped"]
    for file in summary["quarantined"]:
        context.log.warning(f"set aside {file['path']}: {file['reason']} ({file['detail']})")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(snapshot.snapshot_id),
        check_results=checks.raw_text(snapshot),
        metadata={
            "snapshot_id": snapshot.snapshot_id,
            "files": summary["files"],
            "documents": summary["documents"],
            "train_bytes": summary["train_bytes"],
            "validation_bytes": summary["val_bytes"],
            "files_added": summary["files_added"],
            "files_changed": summary["files_changed"],
            "files_removed": summary["files_removed"],
            "bytes_dropped": sum(dropped.values()),
            "dropped_by_reason": table([{"reason": why, "bytes": dropped[why]} for why in dropped], reason="string", bytes="int"),
            "quarantined": sum(summary["quarantined_by_reason"].values()),
            **tables(quarantined_files=table(summary["quarantined"], path="string", reason="string", detail="string")),
            "folder": dg.MetadataValue.path(place),
        },
    )
