"""evaluation: how good the checkpoint is on text it has not seen."""

from typing import Any

import dagster as dg
from pydantic import Field

from llm_core.config import EvaluateConfig, TasksConfig
from llm_core.evaluation import by_source, metric, read_evaluation
from llm_core.layout import RunFolder
from llm_core.system import content_id
from pipeline.artifacts.evaluations import evaluate, evaluate_on_tasks
from pipeline.artifacts.pointers import set_current
from pipeline.artifacts.release import Comparison, compare_with_released
from pipeline.artifacts.step import Step
from pipeline.artifacts.upstream import Upstream
from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.checks import EVALUATION_CHECKS, check_evaluation, warned
from pipeline.assets.common import HOOKS, MODEL, OWNERS
from pipeline.assets.plots import picture, plot_bits_per_byte
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.failures import one_line_errors
from pipeline.presentation import literal, rounded, table, tables
from pipeline.resources import CatalogResource, Storage


class EvaluationConfig(EvaluateConfig, TasksConfig, dg.Config):
    """How a checkpoint is evaluated on held-out text, and on lm-eval tasks."""

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
    check_specs=EVALUATION_CHECKS,
)
@one_line_errors
def evaluation(
    context: dg.AssetExecutionContext, config: EvaluationConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """Loss, perplexity and bits per byte on held-out text, in total and by source, beside baselines and the released model.

    The baselines are token frequencies (unigram) and a strong compressor (xz -9e) on the same text; samples show generated text.

    Bits per byte can be compared between tokenizers, loss and perplexity cannot. lm-eval tasks run if some are configured.
    """
    step = Step(context, storage, catalog)
    upstream = Upstream(step)
    record, manifest = upstream.checkpoint(), upstream.dataset()
    path = evaluate(step, record, manifest, config.stage(EvaluateConfig))
    set_current(step.home.current_evaluation, path)
    result = read_evaluation(path)
    comparison = compare_with_released(step, path)
    tasks = evaluate_on_tasks(step, record, config.stage(TasksConfig))

    compared = {
        "this model": metric(result, "bits_per_byte"),
        "unigram baseline": metric(result, "unigram_bits_per_byte"),
        "xz -9e": metric(result, "xz_bits_per_byte"),
    }
    if comparison.released is not None:
        compared["released model"] = metric(comparison.released, "bits_per_byte")
    texts = [sample["prompt"] + sample["continuation"] for sample in result["samples"]]
    samples = "\n\n".join(f"sample {number}:\n\n{literal(text)}" for number, text in enumerate(texts, start=1))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(result["evaluation_id"]),
        check_results=warned(context.log, check_evaluation(result, compared.get("released model"), config.max_regression)),
        metadata={
            "evaluation_id": result["evaluation_id"],
            "comparison": picture(
                RunFolder(path.parent).picture("comparison", content_id(compared)),
                "bits per byte",
                lambda: plot_bits_per_byte(compared),
            ),
            "bits_per_byte": rounded(metric(result, "bits_per_byte")),
            "unigram_bits_per_byte": rounded(metric(result, "unigram_bits_per_byte")),
            "xz_bits_per_byte": rounded(metric(result, "xz_bits_per_byte")),
            **_improvement(comparison),
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
            "precision": result["precision"],
            "checkpoint_id": record.checkpoint_id,
            "run_id": record.run_id,
            "dataset_id": manifest.dataset_id,
            "file": dg.MetadataValue.path(path),
            "samples": dg.MetadataValue.md(samples),
        },
    )


def _improvement(comparison: Comparison) -> dict[str, Any]:
    """The released model on the same text, and by how much this one is better."""
    if comparison.released is None:
        return {}
    value = metric(comparison.released, "bits_per_byte")
    return {"released_bits_per_byte": rounded(value), "improvement": str(comparison.difference)}
