"""tokenized_shards: the text as token ids, ready to train on."""

import dagster as dg

from llm_core.config import ShardConfig
from llm_core.dataset import build_dataset
from llm_core.system import preparing
from pipeline.artifacts.step import Step
from pipeline.artifacts.upstream import Upstream
from pipeline.assets.checks import TOKENIZED_SHARDS_CHECKS, check_tokenized_shards, warned
from pipeline.assets.common import DATA, HOOKS, OWNERS
from pipeline.assets.raw_text import raw_text
from pipeline.assets.trained_tokenizer import trained_tokenizer
from pipeline.failures import one_line_errors
from pipeline.presentation import rounded
from pipeline.resources import CatalogResource, Storage


class TokenizedShardsConfig(ShardConfig, dg.Config):
    """How token ids are stored and cut into windows."""


@dg.asset(
    deps=[raw_text, trained_tokenizer],
    kinds={"arrow"},
    group_name=DATA,
    owners=OWNERS,
    hooks=HOOKS,
    check_specs=TOKENIZED_SHARDS_CHECKS,
)
@one_line_errors
def tokenized_shards(
    context: dg.AssetExecutionContext, config: TokenizedShardsConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """Immutable Arrow shards of token ids, and the manifest that makes them one dataset version.

    Only documents that are in no shard yet are read and encoded. Removed documents are masked, not rewritten.
    """
    step = Step(context, storage, catalog)
    with preparing(step.data_dir, context.log.info):
        upstream = Upstream(step)
        snapshot = upstream.snapshot()
        build = build_dataset(snapshot, upstream.tokenizer(), storage.raw_text, step.data_dir, config.stage(ShardConfig))
        manifest = build.manifest
        step.catalog().record_dataset(step.data_dir, manifest.dataset_id)
    train, val = manifest.splits["train"], manifest.splits["val"]
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest.dataset_id),
        check_results=warned(context.log, check_tokenized_shards(manifest, snapshot)),
        metadata={
            "dataset_id": manifest.dataset_id,
            "snapshot_id": manifest.snapshot_id,
            "train_tokens": train.tokens,
            "validation_tokens": val.tokens,
            "documents": train.documents + val.documents,
            "documents_encoded": build.documents_encoded,
            "documents_reused": build.documents_reused,
            "bytes_encoded": build.bytes_encoded,
            "bytes_per_token": rounded(train.bytes / max(1, train.tokens), 3),
            "unknown_text": rounded(manifest.unknown_text),
            "shards": len(manifest.shards),
            "shards_written": build.shards_written,
            "dtype": manifest.dtype,
            "max_length": config.max_length,
            "stride": config.stride,
            "manifest": dg.MetadataValue.path(step.home.prepared.manifest(manifest.dataset_id)),
        },
    )
