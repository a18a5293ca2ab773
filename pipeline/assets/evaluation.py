"""evaluation: how good the checkpoint is on text it has not seen."""

import dagster as dg
from pydantic import Field

from llm_core.config import EvaluateConfig, HarnessConfig
from llm_core.evaluation_file import by_source, metric, read_evaluation
from llm_core.files import content_id
from pipeline import checks
from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.common import HOOKS, MODEL, OWNERS, literal, rounded, table, tables
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.current import set_current
from pipeline.handover import Upstream
from pipeline.harness import try_tasks
from pipeline.judging import judge
from pipeline.plots import bits_per_byte_bars, picture
from pipeline.release import judge_released
from pipeline.resources import CatalogResource, Storage


class EvaluationConfig(EvaluateConfig, HarnessConfig, dg.Config):
    """How a checkpoint is judged on the held-out text, and by tasks of lm-eval."""

    max_regression: float = Field(
        0.1,
        ge=0,
        description="Bits per byte by which a model may be worse than the released one before a check warns.",
    )


@dg.asset(
    deps=[tokenized_shards, checkpoint],
    kinds={"pytorch"},
    group_name=MODEL,
    owners=OWNERS,
    hooks=HOOKS,
    pool="device",
    check_specs=checks.EVALUATION,
)
def evaluation(
    context: dg.AssetExecutionContext, config: EvaluationConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """Loss, perplexity and bits per byte of held-out text, in all and by source, beside baselines and the released model.

    The baselines are token frequencies (unigram) and a strong compressor (xz -9e) on the same text; samples show what it writes.

    Bits per byte can be compared between tokenizers, loss and perplexity cannot. Tasks of lm-eval are tried where some are named.
    """
    upstream = Upstream(context, storage)
    record, manifest = upstream.checkpoint(), upstream.dataset()
    path = judge(context, storage, catalog, record, manifest, config.part(EvaluateConfig))
    set_current(storage.current_evaluation, path)
    result = read_evaluation(path)

    compared = {
        "this model": metric(result, "bits_per_byte"),
        "unigram baseline": metric(result, "unigram_bits_per_byte"),
        "xz -9e": metric(result, "xz_bits_per_byte"),
    }
    released = judge_released(context, storage, catalog, result)
    if released is not None:
        compared["released model"] = metric(released, "bits_per_byte")
    tasks = try_tasks(context, storage, catalog, record, config.part(HarnessConfig))
    texts = [sample["prompt"] + sample["continuation"] for sample in result["samples"]]
    samples = "\n\n".join(f"sample {number}:\n\n{literal(text)}" for number, text in enumerate(texts, start=1))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(result["evaluation_id"]),
        check_results=checks.evaluation(result, compared.get("released model"), config.max_regression),
        metadata={
            "evaluation_id": result["evaluation_id"],
            "comparison": picture(
                path.with_name(f"comparison_{content_id(compared)}.png"), "bits per byte", lambda: bits_per_byte_bars(compared)
            ),
            "bits_per_byte": rounded(metric(result, "bits_per_byte")),
            "unigram_bits_per_byte": rounded(metric(result, "unigram_bits_per_byte")),
            "xz_bits_per_byte": rounded(metric(result, "xz_bits_per_byte")),
            **({"released_bits_per_byte": rounded(metric(released, "bits_per_byte"))} if released is not None else {}),
            "share_of_text": rounded(metric(result, "share_of_text")),
            **tables(
                by_source=table(
                    [{name: value for name, value in row.items() if name != "perplexity"} for row in by_source(result)],
                    source="string",
                    loss="float",
                    bits_per_byte="float",
                    tokens="float",
                    bytes="float",
                ),
                lm_eval=table(tasks, task="string", metric="string", value="float", standard_error="float", examples="float"),
            ),
            "loss": rounded(metric(result, "loss")),
            "perplexity": rounded(metric(result, "perplexity"), 2),
            "tokens": int(metric(result, "tokens")),
            "checkpoint_id": record.checkpoint_id,
            "run_id": record.run_id,
            "dataset_id": manifest.dataset_id,
            "file": dg.MetadataValue.path(path),
            "samples": dg.MetadataValue.md(samples),
        },
    )
