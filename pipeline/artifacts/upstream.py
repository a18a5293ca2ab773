"""Inputs of a step: what earlier steps of its own Dagster run made, else what is current on disk.

Concurrent runs thus never take each other's artifacts, and a run of part of the lineage starts from the newest ones.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from llm_core.checkpoint import CheckpointRecord
from llm_core.corpus import Snapshot, load_snapshot
from llm_core.dataset import DatasetManifest, load_manifest
from llm_core.tokenizer import TokenizerArtifact, load_tokenizer
from pipeline.artifacts.pointers import get_current, missing
from pipeline.artifacts.step import Step


class Upstream:
    """The artifacts that one step starts from.

    Raises (every method):
        UserError: the artifact does not exist yet; the message names the asset to materialize.
        DataError: it is damaged.
    """

    def __init__(self, step: Step) -> None:
        self._step = step

    def snapshot(self) -> Snapshot:
        made = self.made("raw_text")
        snapshot_id = made["snapshot_id"] if made else get_current(self._step.home.prepared.current_snapshot, "raw_text").stem
        return load_snapshot(self._step.data_dir, snapshot_id)

    def tokenizer(self) -> TokenizerArtifact:
        made = self.made("trained_tokenizer")
        if made is None and not (path := self._step.home.prepared.tokenizer).is_file():
            raise missing(path, "trained_tokenizer")
        return load_tokenizer(self._step.data_dir, made["tokenizer_id"] if made else None)

    def dataset(self) -> DatasetManifest:
        """With the window length and stride of `tokenized_shards`."""
        made = self.made("tokenized_shards") or self.made("checkpoint")
        if made is None:
            if not (path := self._step.home.prepared.metadata).is_file():
                raise missing(path, "tokenized_shards")
            return load_manifest(self._step.data_dir)
        manifest = load_manifest(self._step.data_dir, made["dataset_id"], made["snapshot_id"])
        return manifest.model_copy(update={name: made[name] for name in ("max_length", "stride") if name in made})

    def checkpoint(self) -> CheckpointRecord:
        made = self.made("checkpoint")
        path = Path(made["file"]) if made else get_current(self._step.home.current_checkpoint, "checkpoint")
        self._step.storage.use(path.parent)
        return CheckpointRecord.of(path)

    def evaluation(self) -> Path:
        """The file of the evaluation."""
        made = self.made("evaluation")
        path = Path(made["file"]) if made else get_current(self._step.home.current_evaluation, "evaluation")
        self._step.storage.use(path.parent)
        return path

    def warnings(self) -> dict[str, str]:
        """Why checks of this run, and of the run that it retries, have failed without ending it: asset and check -> reason."""
        found: dict[str, str | None] = {}
        for event in self._events(dg.DagsterEventType.ASSET_CHECK_EVALUATION):
            check: Any = event.event_specific_data  # the newest first
            found.setdefault(
                f"{check.asset_key.to_user_string()}.{check.check_name}", None if check.passed else check.description
            )
        return {name: reason for name, reason in reversed(found.items()) if reason}

    def made(self, asset: str) -> Mapping[str, Any] | None:
        """Metadata of the asset as made by this run or by the run that it retries; None if neither made it."""
        for event in self._events(dg.DagsterEventType.ASSET_MATERIALIZATION):
            if event.asset_key == dg.AssetKey(asset):
                return {name: value.value for name, value in event.step_materialization_data.materialization.metadata.items()}
        return None

    def _events(self, kind: dg.DagsterEventType) -> Iterator[dg.DagsterEvent]:
        """The events of this run and of those that it retries, the newest first."""
        instance = self._step.context.instance
        run: dg.DagsterRun | None = self._step.context.run
        while run is not None:
            for entry in reversed(instance.all_logs(run.run_id, of_type=kind)):
                if entry.dagster_event is not None:
                    yield entry.dagster_event
            run = instance.get_run_by_id(run.parent_run_id) if run.parent_run_id is not None else None
