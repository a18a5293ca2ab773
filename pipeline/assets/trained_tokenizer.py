"""trained_tokenizer: text to token ids."""

from typing import Any

import dagster as dg

from llm_core.config import TokenizerConfig
from llm_core.locks import preparing
from llm_core.tokenizer_store import prepare_tokenizer
from pipeline import checks
from pipeline.assets.common import DATA, HOOKS, OWNERS, rounded, table, tables
from pipeline.assets.raw_text import raw_text
from pipeline.handover import Upstream
from pipeline.resources import CatalogResource, Storage


class TrainedTokenizerConfig(TokenizerConfig, dg.Config):
    """How text becomes token ids."""


@dg.asset(
    deps=[raw_text], kinds={"huggingface"}, group_name=DATA, owners=OWNERS, hooks=HOOKS, check_specs=checks.TRAINED_TOKENIZER
)
def trained_tokenizer(
    context: dg.AssetExecutionContext, config: TrainedTokenizerConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """A byte-level BPE or WordPiece vocabulary trained on the text, or a ready tiktoken encoding, as one tokenizer.json.

    Frozen when new text lands: it is trained again when its configuration changes or when asked to (`retrain_tokenizer`).
    """
    with preparing(storage.processed, context.log.info):
        snapshot = Upstream(context, storage).snapshot()
        artifact = prepare_tokenizer(snapshot, storage.raw_text, storage.processed, config.part(TokenizerConfig))
        catalog.open(storage).record_tokenizer(storage.processed, artifact.tokenizer_id)
    report = artifact.report
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.tokenizer_id),
        check_results=checks.trained_tokenizer(artifact, config.retrain_on_drift),
        metadata={
            "tokenizer_id": artifact.tokenizer_id,
            "tokenizer_type": report["tokenizer_type"],
            "vocab_size": report["vocab_size"],
            "bytes_per_token": rounded(report["bytes_per_token"], 3),
            "tokens_per_word": rounded(report["tokens_per_word"], 3),
            "vocabulary_used": rounded(report["vocab_used"]),
            "fertility_drift": checks.drift_of(artifact),
            "sources": _by_source(report["sources"]),
            **tables(sources_of_new_text=_by_source(artifact.trial.sources)),
            "file": dg.MetadataValue.path(storage.processed / artifact.file),
        },
    )


_COLUMNS = {"measured_bytes": "bytes", "bytes_per_token": "bytes/token", "tokens_per_word": "tokens/word", "vocab_used": "used"}
"""Short names: the page has no room for longer ones."""


def _by_source(sources: list[dict[str, Any]]) -> dg.TableMetadataValue:
    """What is known of each source; of new text less is."""
    shown = {name: short for name, short in _COLUMNS.items() if sources and name in sources[0]}
    rows = [{"source": row["source"]} | {short: row[name] for name, short in shown.items()} for row in sources]
    return table(rows, source="string", **{short: "int" if short == "bytes" else "float" for short in shown.values()})
