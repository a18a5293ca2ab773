"""released_model: the best model so far, as a Hugging Face directory."""

import dagster as dg

from llm_core.checkpoint_files import CheckpointRecord, checkpoint_path, manifest_path
from llm_core.cli import printable
from llm_core.config import ReleaseConfig
from llm_core.evaluation_file import metric, read_evaluation
from llm_core.files import inside, read_json
from llm_core.shards import load_manifest
from pipeline.assets.common import HOOKS, MODEL, OWNERS, rounded
from pipeline.assets.evaluation import evaluation
from pipeline.handover import Upstream
from pipeline.new_text import remember_decision
from pipeline.release import decide, judge_released, one_at_a_time, release
from pipeline.release import released_model as find_released_model
from pipeline.report import locations, report_table
from pipeline.resources import CatalogResource, Storage


class ReleasedModelConfig(ReleaseConfig, dg.Config):
    """When a checkpoint becomes the released model."""


@dg.asset(deps=[evaluation], kinds={"huggingface"}, group_name=MODEL, owners=OWNERS, hooks=HOOKS)
def released_model(
    context: dg.AssetExecutionContext, config: ReleasedModelConfig, storage: Storage, catalog: CatalogResource
) -> dg.MaterializeResult:
    """The checkpoint as a Hugging Face Llama, if it beats the released one on the same text; otherwise the old release stays.

    The directory loads with `transformers`: `AutoModelForCausalLM.from_pretrained(directory)`.
    """
    evaluation_file = Upstream(context, storage).evaluation()
    result = read_evaluation(evaluation_file)
    record = CheckpointRecord.read(manifest_path(checkpoint_path(inside(storage.checkpoints, result["run_id"]), result["step"])))
    run, manifest = read_json(record.path.parent / "run.json"), load_manifest(storage.processed, result["dataset_id"])
    with one_at_a_time(context, storage):
        before = judge_released(context, storage, catalog, result)
        verdict = decide(find_released_model(storage), result, before, config.part(ReleaseConfig))
        if verdict.promoted:
            directory = release(context, storage, record, evaluation_file, verdict.reason)
            catalog.open(storage).record_model(directory)
    if not verdict.promoted:
        context.log.warning(f"not released: {verdict.reason}")

    released = find_released_model(storage)
    if released is None:
        raise dg.Failure(f"nothing is released: {verdict.reason}", allow_retries=False)
    sample = result["samples"][0]
    rows: dict[str, object] = {
        "documents": sum(split.documents for split in manifest.splits.values()),
        "tokens to train on": manifest.splits["train"].tokens,
        "tokens trained on": record.tokens_seen,
        "parameters": run["parameters"],
        "steps": record.step,
        "bits per byte": metric(result, "bits_per_byte"),
        "unigram bits per byte": metric(result, "unigram_bits_per_byte"),
        "released": f"{'yes' if verdict.promoted else 'no'}: {verdict.reason}",
        "sample": printable((sample["prompt"] + sample["continuation"]).replace("\n", " "))[:100],
        **locations(storage),
        "released model": storage.models / released["model_id"],
    }
    remember_decision(storage, result["snapshot_id"])
    print(report_table(f"textmill: run {record.run_id}", rows), flush=True)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(released["model_id"]),
        metadata={
            "model_id": released["model_id"],
            "promoted": verdict.promoted,
            "reason": verdict.reason,
            "checkpoint_id": released["checkpoint_id"],
            "bits_per_byte": rounded(released["metrics"]["bits_per_byte"]),
            "directory": dg.MetadataValue.path(storage.models / released["model_id"]),
        },
    )
