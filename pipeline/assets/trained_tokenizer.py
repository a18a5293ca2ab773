"""trained_tokenizer: text to token ids."""

from typing import Any

import dagster as dg

from llm_core.config import TokenizerConfig
from llm_core.system import preparing
from llm_core.tokenizer import prepare_tokenizer
from pipeline.artifacts.step import Step
from pipeline.artifacts.upstream import Upstream
from pipeline.assets.checks import TRAINED_TOKENIZER_CHECKS, check_trained_tokenizer, drift_of, warned
from pipeline.assets.common import DATA, HOOKS, OWNERS
from pipeline.assets.raw_text import raw_text
from pipeline.failures import one_line_errors
from pipeline.presentation import rounded, table, tables
from pipeline.resources import CatalogResource, Storage


class TrainedTokenizerConfig(TokenizerConfig, dg.Config):
    """How text becomes token ids."""


@dg.asset(
    deps=[raw_text], kinds={"huggingface"}, group_name=DATA, owners=OWNERS, hooks=HOOKS, check_specs=TRAINED_TOKENIZER_CHECKS
)
@one_line_errors
def trained_tokenizer(
    context: dg.AssetExecutionContext, config: TrainedTokenizerConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """A byte-level BPE or WordPiece vocabulary trained on the text, or a tiktoken encoding, as one tokenizer.json.

    It is kept when new text arrives, and trained again when its configuration changes, when none of the text that it was trained
    on remains, or when asked to (`retrain_tokenizer`).
    """
    step = Step(context, storage, catalog)
    with preparing(step.data_dir, context.log.info):
        snapshot = Upstream(step).snapshot()
        artifact = prepare_tokenizer(snapshot, storage.raw_text, step.data_dir, config.stage(TokenizerConfig))
        step.catalog().record_tokenizer(step.data_dir, artifact.tokenizer_id)
    report = artifact.report
    if artifact.text_gone:
        context.log.warning(f"tokenizer: {drift_of(artifact)}")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.tokenizer_id),
        check_results=warned(context.log, check_trained_tokenizer(artifact, config.retrain_on_drift)),
        metadata={
            "tokenizer_id": artifact.tokenizer_id,
            "tokenizer_type": report["tokenizer_type"],
            "vocab_size": report["vocab_size"],
            "bytes_per_token": rounded(report["bytes_per_token"], 3),
            "tokens_per_word": rounded(report["tokens_per_word"], 3),
            "vocabulary_used": rounded(report["vocab_used"]),
            "unknown_text": rounded(artifact.drift_report.coverage.unknown),
            "fertility_drift": drift_of(artifact),
            "sources": _by_source(report["sources"]),
            **tables(
                sources_of_new_text=_by_source(artifact.drift_report.sources),
                unknown_by_source=table(artifact.drift_report.coverage.sources, source="string", bytes="int", unknown="float"),
            ),
            "file": dg.MetadataValue.path(step.data_dir / artifact.file),
        },
    )


# Short names fit the page.
_COLUMNS = {"measured_bytes": "bytes", "bytes_per_token": "bytes/token", "tokens_per_word": "tokens/word", "vocab_used": "used"}


def _by_source(sources: list[dict[str, Any]]) -> dg.TableMetadataValue:
    """A row per source; there are fewer columns for new text."""
    shown = {name: short for name, short in _COLUMNS.items() if sources and name in sources[0]}
    rows = [{"source": row["source"]} | {short: row[name] for name, short in shown.items()} for row in sources]
    return table(rows, source="string", **{short: "int" if short == "bytes" else "float" for short in shown.values()})
