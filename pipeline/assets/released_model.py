"""released_model: the best model so far, as a Hugging Face directory."""

import dagster as dg

from llm_core.checkpoint import CheckpointRecord, RunRecord
from llm_core.cli import printable
from llm_core.config import ReleaseConfig
from llm_core.dataset import load_manifest
from llm_core.evaluation import Evaluation, metric, read_evaluation
from llm_core.huggingface import ModelRecord
from pipeline.artifacts.evaluations import up_to_date
from pipeline.artifacts.release import Verdict, release_if_better, remember_decision
from pipeline.artifacts.release import released_model as find_released_model
from pipeline.artifacts.step import Step
from pipeline.artifacts.upstream import Upstream
from pipeline.assets.common import HOOKS, MODEL, OWNERS
from pipeline.assets.evaluation import evaluation
from pipeline.assets.left_out import NOTHING
from pipeline.failures import one_line_errors
from pipeline.presentation import locations, report_table, rounded
from pipeline.resources import CatalogResource, Storage


class ReleasedModelConfig(ReleaseConfig, dg.Config):
    """When a checkpoint becomes the released model."""


@dg.asset(deps=[evaluation], kinds={"huggingface"}, group_name=MODEL, owners=OWNERS, hooks=HOOKS)
@one_line_errors
def released_model(
    context: dg.AssetExecutionContext, config: ReleasedModelConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """The checkpoint as a Hugging Face Llama, if it is better than the released one on the same held-out text.

    Better means that the 95 % interval of their difference, with documents as the units, excludes 0. A tie goes to the model that
    was trained on newer text.

    The directory loads with `transformers`: `AutoModelForCausalLM.from_pretrained(directory)`.
    """
    step = Step(context, storage, catalog)
    upstream = Upstream(step)
    path = up_to_date(step, upstream.evaluation())
    result = read_evaluation(path)
    record = CheckpointRecord.of(step.home.run(result["run_id"]).checkpoint(result["step"]))
    verdict = release_if_better(step, record, path, config.stage(ReleaseConfig))
    released = find_released_model(storage)
    if released is None:
        raise dg.Failure(f"nothing is released: {verdict.reason}", allow_retries=False)
    remember_decision(storage, result["snapshot_id"])
    print(_overview(step, record, result, verdict, released, _not_read(upstream)), flush=True)
    for check, reason in upstream.warnings().items():
        print(f"warning: {printable(f'{check}: {reason}')}", flush=True)
    directory = step.home.model(released.model_id).root
    return dg.MaterializeResult(
        data_version=dg.DataVersion(released.model_id),
        metadata={
            "model_id": released.model_id,
            "release_line": storage.line or "default",
            "promoted": verdict.promoted,
            "reason": verdict.reason,
            "checkpoint_id": released.checkpoint_id,
            "bits_per_byte": rounded(released.metrics["bits_per_byte"]),
            "directory": dg.MetadataValue.path(directory),
        },
    )


def _not_read(upstream: Upstream) -> dict[str, object]:
    """A row with what this run has left out of the raw text folder; none if it has read all of it, or not looked."""
    line = (upstream.made("raw_text") or {}).get("not_read", NOTHING)
    return {} if line == NOTHING else {"not read": printable(line)}


def _overview(
    step: Step,
    record: CheckpointRecord,
    result: Evaluation,
    verdict: Verdict,
    released: ModelRecord,
    not_read: dict[str, object],
) -> str:
    """The table that a run of the lineage ends with on the terminal."""
    run, manifest = RunRecord.read(record.path.parent), load_manifest(step.data_dir, result["dataset_id"])
    sample = result["samples"][0]
    rows: dict[str, object] = {
        **not_read,
        "documents": sum(split.documents for split in manifest.splits.values()),
        "tokens to train on": manifest.splits["train"].tokens,
        "tokens trained on": record.tokens_seen,
        "parameters": run.parameters,
        "steps": record.step,
        "bits per byte": metric(result, "bits_per_byte"),
        "unigram bits per byte": metric(result, "unigram_bits_per_byte"),
        "released": f"{'yes' if verdict.promoted else 'no'}: {verdict.reason}",
        "release line": step.storage.line or "default",
        "sample": printable((sample["prompt"] + sample["continuation"]).replace("\n", " "))[:100],
        **locations(step.home),
        "released model": step.home.model(released.model_id).root,
    }
    return report_table(f"textmill: run {record.run_id}", rows)
