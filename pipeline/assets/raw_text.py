"""raw_text: the folder of raw text as a snapshot of documents."""

from pathlib import Path

import dagster as dg

from llm_core.config import CorpusConfig
from llm_core.corpus import LISTED_QUARANTINES, dropped_text, take_snapshot
from llm_core.layout import SAMPLE_CORPUS
from llm_core.system import preparing
from pipeline.artifacts.pointers import find_current, set_current
from pipeline.artifacts.step import Step
from pipeline.assets.checks import RAW_TEXT_CHECKS, check_raw_text, warned
from pipeline.assets.common import DATA, HOOKS, OWNERS
from pipeline.assets.left_out import NOTHING, folder_warnings, not_read, quarantine_lines
from pipeline.assets.sample_corpus import sample_corpus
from pipeline.failures import one_line_errors
from pipeline.presentation import table, tables
from pipeline.resources import CatalogResource, Storage


class RawTextConfig(CorpusConfig, dg.Config):
    """How files become documents."""


@dg.asset(
    deps=[sample_corpus], kinds={"file", "parquet"}, group_name=DATA, owners=OWNERS, hooks=HOOKS, check_specs=RAW_TEXT_CHECKS
)
@one_line_errors
def raw_text(
    context: dg.AssetExecutionContext, config: RawTextConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """The documents of the raw text folder, identified by content: cleaned, deduplicated, split into train and validation.

    Unchanged files are not opened again. Files that are not clean UTF-8 text are quarantined with a reason, repaired only if
    asked.
    """
    step, place = Step(context, storage, catalog), storage.raw_text
    if isinstance(place, Path) and storage.raw_text_dir is None:  # of a new home; a configured folder must exist
        place.mkdir(parents=True, exist_ok=True)
    if isinstance(place, Path) and not step.home.quickstart and (sample := place / SAMPLE_CORPUS).is_dir():
        context.log.warning(
            f"{sample}: this counts as your own text; if it is from the quickstart of an earlier version, which now has a "
            "folder of its own, delete it"
        )
    previous = find_current(step.home.prepared.current_snapshot)
    with preparing(step.data_dir, context.log.info):
        snapshot = take_snapshot(place, step.data_dir, config.stage(CorpusConfig))
        step.catalog().record_snapshot(step.data_dir, snapshot.snapshot_id)
        set_current(step.home.prepared.current_snapshot, step.home.prepared.snapshot(snapshot.snapshot_id))
    summary, dropped = snapshot.summary, dropped_text(snapshot.summary)
    known = previous is not None and previous.stem == snapshot.snapshot_id
    losses = snapshot.quarantined()
    for line in [*folder_warnings(snapshot), *quarantine_lines(snapshot, losses, known)]:
        context.log.warning(line)
    ignored = [{"extension": name, "files": count} for name, count in summary["ignored_by_extension"].items()]
    skipped = [{"reason": reason, "entries": count} for reason, count in summary["files_skipped"].items()]
    return dg.MaterializeResult(
        data_version=dg.DataVersion(snapshot.snapshot_id),
        check_results=warned(context.log, check_raw_text(snapshot)),
        metadata={
            "snapshot_id": snapshot.snapshot_id,
            "files": summary["files"],
            "documents": summary["documents"],
            "train_bytes": summary["train_bytes"],
            "validation_bytes": summary["val_bytes"],
            "files_added": summary["files_added"],
            "files_changed": summary["files_changed"],
            "files_removed": summary["files_removed"],
            "files_unchanged": summary["files_unchanged"],
            "files_ignored": summary["files_ignored"],
            "files_skipped": sum(summary["files_skipped"].values()),
            "not_read": not_read(snapshot) or NOTHING,
            "bytes_dropped": sum(summary["bytes_dropped"].values()),
            "share_dropped": round(sum(each["share"] for each in dropped), 4),
            **tables(
                dropped_by_reason=table(dropped, reason="string", documents="int", bytes="int", share="float"),
                ignored_files=table(ignored, extension="string", files="int"),
                skipped_entries=table(skipped, reason="string", entries="int"),
            ),
            "quarantined": sum(summary["quarantined_by_reason"].values()),
            **tables(quarantined_files=table(losses[:LISTED_QUARANTINES], path="string", reason="string", detail="string")),
            "folder": dg.MetadataValue.path(place),
        },
    )
