"""What a step goes on from: what the steps before it made in its own Dagster run, else what is current on disk.

Runs at once thus never take each other's artifacts, and a run of a part of the lineage starts from the newest ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from llm_core.checkpoint_files import CheckpointRecord, manifest_path
from llm_core.corpus import Snapshot, load_snapshot
from llm_core.shards import DatasetManifest, load_manifest
from llm_core.tokenizer_store import TokenizerArtifact, load_tokenizer
from pipeline.current import get_current
from pipeline.resources import Storage


class Upstream:
    """The artifacts that one step goes on from.

    Raises (every method):
        UserError: nobody has made one yet; the message names the asset to materialize.
        DataError: it is damaged.
    """

    def __init__(self, context: dg.AssetExecutionContext, storage: Storage) -> None:
        self._context = context
        self._storage = storage

    def snapshot(self) -> Snapshot:
        made = self._made("raw_text")
        snapshot_id = made["snapshot_id"] if made else get_current(self._storage.current_snapshot, "raw_text").stem
        return load_snapshot(self._storage.processed, snapshot_id)

    def tokenizer(self) -> TokenizerArtifact:
        made = self._made("trained_tokenizer")
        return load_tokenizer(self._storage.processed, made["tokenizer_id"] if made else None)

    def dataset(self) -> DatasetManifest:
        """With the window length and stride that `tokenized_shards` was given."""
        made = self._made("tokenized_shards") or self._made("checkpoint")
        if made is None:
            return load_manifest(self._storage.processed)
        manifest = load_manifest(self._storage.processed, made["dataset_id"], made["snapshot_id"])
        return manifest.model_copy(update={name: made[name] for name in ("max_length", "stride") if name in made})

    def checkpoint(self) -> CheckpointRecord:
        made = self._made("checkpoint")
        path = Path(made["file"]) if made else get_current(self._storage.current_checkpoint, "checkpoint")
        return CheckpointRecord.read(manifest_path(path))

    def evaluation(self) -> Path:
        """The file of the judgement."""
        made = self._made("evaluation")
        return Path(made["file"]) if made else get_current(self._storage.current_evaluation, "evaluation")

    def _made(self, asset: str) -> Mapping[str, Any] | None:
        """Metadata of the asset as this run made it, or a run of which this one is a retry; None if none of them did."""
        instance, run = self._context.instance, self._context.run
        while True:
            for entry in reversed(instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)):
                event = entry.dagster_event
                if event is not None and event.asset_key == dg.AssetKey(asset):
                    return {name: value.value for name, value in event.step_materialization_data.materialization.metadata.items()}
            parent = instance.get_run_by_id(run.parent_run_id) if run.parent_run_id is not None else None
            if parent is None:
                return None
            run = parent
