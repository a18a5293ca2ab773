"""evaluation: how good the checkpoint is on text it has not seen."""

from pathlib import Path

import dagster as dg
from pydantic import Field

from llm_core.checkpoint_files import CheckpointRecord, manifest_path
from llm_core.config import EvaluateConfig
from llm_core.evaluation_file import Evaluation, by_source, evaluation_path, metric, read_evaluation
from llm_core.shards import DatasetManifest, load_manifest
from pipeline import checks
from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.common import MODEL, OWNERS, literal, rounded, table
from pipeline.current import get_current, set_current
from pipeline.launcher import run_tool
from pipeline.plots import bits_per_byte_bars
from pipeline.release import released_checkpoint
from pipeline.resources import CatalogResource, Storage


class EvaluationConfig(EvaluateConfig, dg.Config):
    """How a checkpoint is judged on the held-out text."""

    max_regression: float = Field(
        0.1,
        ge=0,
        description="Bits per byte by which a model may be worse than the released one before a check warns.",
    )


@dg.asset(deps=[checkpoint], kinds={"pytorch"}, group_name=MODEL, owners=OWNERS, check_specs=checks.EVALUATION)
def evaluation(
    context: dg.AssetExecutionContext, config: EvaluationConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """Loss, perplexity and bits per byte of held-out text, in all and by source, beside baselines and the released model.

    The baselines are token frequencies (unigram) and a strong compressor (xz -9e) on the same text; samples show what it writes.

    Bits per byte can be compared between tokenizers, loss and perplexity cannot.
    """
    record = CheckpointRecord.read(manifest_path(get_current(storage.current_checkpoint, "checkpoint")))
    manifest = load_manifest(storage.processed)
    path, result = _judge(context, record, manifest, storage, config.part(EvaluateConfig), catalog)
    set_current(storage.current_evaluation, path)

    compared = {
        "this model": metric(result, "bits_per_byte"),
        "unigram baseline": metric(result, "unigram_bits_per_byte"),
        "xz -9e": metric(result, "xz_bits_per_byte"),
    }
    released = released_checkpoint(storage, manifest.tokenizer.tokenizer_id)
    if released is not None and released.checkpoint_id != record.checkpoint_id:
        _, released_result = _judge(context, released, manifest, storage, config.part(EvaluateConfig), catalog)
        compared["released model"] = metric(released_result, "bits_per_byte")
    texts = [sample["prompt"] + sample["continuation"] for sample in result["samples"]]
    samples = "\n\n".join(f"sample {number}:\n\n{literal(text)}" for number, text in enumerate(texts, start=1))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(result["evaluation_id"]),
        check_results=checks.evaluation(result, compared.get("released model"), config.max_regression),
        metadata={
            "evaluation_id": result["evaluation_id"],
            "comparison": bits_per_byte_bars(compared),
            "bits_per_byte": rounded(metric(result, "bits_per_byte")),
            "unigram_bits_per_byte": rounded(metric(result, "unigram_bits_per_byte")),
            "xz_bits_per_byte": rounded(metric(result, "xz_bits_per_byte")),
            "share_of_text": rounded(metric(result, "share_of_text")),
            "by_source": table(
                [{name: value for name, value in row.items() if name != "perplexity"} for row in by_source(result)],
                source="string",
                loss="float",
                bits_per_byte="float",
                tokens="float",
                bytes="float",
            ),
            "loss": rounded(metric(result, "loss")),
            "perplexity": rounded(metric(result, "perplexity"), 2),
            "tokens": int(metric(result, "tokens")),
            "checkpoint_id": record.checkpoint_id,
            "samples": dg.MetadataValue.md(samples),
        },
    )


def _judge(
    context: dg.AssetExecutionContext,
    record: CheckpointRecord,
    manifest: DatasetManifest,
    storage: Storage,
    config: EvaluateConfig,
    catalog: CatalogResource,
) -> tuple[Path, Evaluation]:
    """Evaluates a checkpoint on the current dataset, or reads what was found before."""
    path = evaluation_path(record, manifest.dataset_id, config)
    if not path.exists():
        options = {"checkpoint": record.path, "data_dir": storage.processed}
        run_tool(context, "llm_core.judge", options | config.model_dump(exclude_defaults=True))
    catalog.open().record_evaluation(path)
    return path, read_evaluation(path)
