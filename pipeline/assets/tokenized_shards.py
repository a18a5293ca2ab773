"""tokenized_shards: the text as token ids, ready to train on."""

import dagster as dg

from llm_core.config import ShardConfig
from llm_core.locks import preparing
from llm_core.shards import build_dataset
from pipeline import checks
from pipeline.assets.common import DATA, HOOKS, OWNERS, rounded
from pipeline.assets.raw_text import raw_text
from pipeline.assets.trained_tokenizer import trained_tokenizer
from pipeline.handover import Upstream
from pipeline.resources import CatalogResource, Storage


class TokenizedShardsConfig(ShardConfig, dg.Config):
    """How token ids are stored and cut into windows."""


@dg.asset(
    deps=[raw_text, trained_tokenizer],
    kinds={"arrow"},
    group_name=DATA,
    owners=OWNERS,
    hooks=HOOKS,
    check_specs=checks.TOKENIZED_SHARDS,
)
def tokenized_shards(
    context: dg.AssetExecutionContext, config: TokenizedShardsConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """Immutable Arrow shards of token ids and the manifest that makes them one dataset version.

    Only documents that no shard holds yet are read and encoded; removed documents are masked, not rewritten.
    """
    with preparing(storage.processed, context.log.info):
        upstream = Upstream(context, storage)
        snapshot = upstream.snapshot()
        manifest = build_dataset(snapshot, upstream.tokenizer(), storage.raw_text, storage.processed, config.part(ShardConfig))
        catalog.open(storage).record_dataset(storage.processed, manifest.dataset_id)
    train, val = manifest.splits["train"], manifest.splits["val"]
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest.dataset_id),
        check_results=checks.tokenized_shards(manifest, snapshot),
        metadata={
            "dataset_id": manifest.dataset_id,
            "snapshot_id": manifest.snapshot_id,
            "train_tokens": train.tokens,
            "validation_tokens": val.tokens,
            "documents": train.documents + val.documents,
            "bytes_per_token": rounded(train.bytes / train.tokens, 3),
            "shards": len(manifest.shards),
            "dtype": manifest.dtype,
            "max_length": config.max_length,
            "stride": config.stride,
            "manifest": dg.MetadataValue.path(storage.processed / "manifests" / f"{manifest.dataset_id}.json"),
        },
    )
