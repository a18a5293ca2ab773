"""Evaluates a checkpoint on held-out text and generates samples."""

from pathlib import Path

import numpy as np
import torch

from llm_core.artifact_ids import evaluation_id
from llm_core.checkpoint import CheckpointRecord
from llm_core.checkpoint.state import load_model
from llm_core.config import EvaluateConfig
from llm_core.corpus import load_snapshot
from llm_core.dataset import DatasetManifest, groups_by_source, kept_documents, load_manifest, token_slices
from llm_core.dataset.windows import TokenStream, Windows, require_text, token_bytes
from llm_core.distributed.ranks import Ranks
from llm_core.errors import UserError
from llm_core.evaluation.held_out import (
    XZ_BYTES,
    HeldOut,
    evaluate_groups,
    reencoded,
    targets_read,
    unigram_baseline,
    xz_bits_per_byte,
)
from llm_core.evaluation.results import Evaluation, Sample, evaluation_path
from llm_core.model.generation import generate
from llm_core.model.transformer import Transformer
from llm_core.system import now, write_json
from llm_core.tokenizer import Tokenizer


def evaluate_checkpoint(
    path: Path, data_dir: Path, config: EvaluateConfig, dataset_id: str | None = None, snapshot_id: str | None = None
) -> Evaluation:
    """Evaluates a checkpoint on a dataset, the current one by default, and writes the result beside it, at `evaluation_path`.

    A checkpoint with another tokenizer than the dataset reads the same text in its own tokens.

    Raises:
        DataError: the checkpoint, a tokenizer or a shard is missing or damaged.
        UserError: the tokenizers differ, and one of the two is not byte-level.
    """
    record = CheckpointRecord.of(path)
    manifest = load_manifest(data_dir, dataset_id, snapshot_id)
    model, state = load_model(path)
    ranks = Ranks.alone()
    torch.set_num_threads(ranks.threads)
    model.to(ranks.device)
    text = Windows.open(data_dir, manifest, "val", model.config.max_length, 0)
    of_text = Tokenizer.stored(data_dir, manifest.tokenizer.tokenizer_id)
    same = state["tokenizer_id"] == of_text.tokenizer_id
    own = of_text if same else Tokenizer.stored(data_dir, state["tokenizer_id"])
    if not own.can_read(of_text.tokenizer_id, of_text.tokenizer_type):
        raise UserError(
            f"{path}: trained with tokenizer {own.tokenizer_id}, but {data_dir} has {of_text.tokenizer_id}, and WordPiece does"
            " not give the text back; prepare the data with the tokenizer of the checkpoint"
        )
    require_text(text, token_bytes(of_text, manifest))
    metrics = _metrics_by_source(model, own, text, of_text, data_dir, manifest, config, ranks)
    metrics[0][1].update(_baselines(text, of_text, data_dir, manifest, config.max_eval_tokens))
    result: Evaluation = {
        "format_version": 1,
        "evaluation_id": evaluation_id(record.checkpoint_id, manifest, config),
        "checkpoint_id": record.checkpoint_id,
        "run_id": record.run_id,
        "step": record.step,
        "dataset_id": manifest.dataset_id,
        "snapshot_id": manifest.snapshot_id,
        "config": config.model_dump(mode="json"),
        "created_at": now(),
        "metrics": [
            {"metric": name, "split": "val", "source": source, "value": value}
            for source, values in metrics
            for name, value in values.items()
        ],
        "samples": _samples(model, own, config),
    }
    write_json(evaluation_path(record, manifest, config), result)
    return result


def _metrics_by_source(
    model: Transformer,
    own: Tokenizer,
    text: Windows,
    of_text: Tokenizer,
    data_dir: Path,
    manifest: DatasetManifest,
    config: EvaluateConfig,
    ranks: Ranks,
) -> list[tuple[str, dict[str, float]]]:
    """Metrics on all of the text, and on each source if there are several.

    own: the model's tokenizer. text: the windows in the tokens of `of_text`.
    """
    sources = groups_by_source(load_snapshot(data_dir, manifest.snapshot_id).kept_documents())
    ((documents, counts),) = kept_documents(data_dir, manifest, "val")
    windows, max_tokens = text, config.max_eval_tokens
    if own is not of_text:
        (windows, counts), max_tokens = reencoded(text, of_text, own, max_tokens), 0
    held_out, *by_source = evaluate_groups(
        model,
        windows,
        token_bytes(own, manifest),
        np.repeat(sources.group_of(documents)[: len(counts)], counts),
        len(sources.names),
        max_tokens=max_tokens,
        batch_size=config.eval_batch_size,
        ranks=ranks,
    )
    metrics = [("all", _metrics(held_out))]
    if len(sources.names) > 1:
        metrics += [(name, _metrics(each)) for name, each in zip(sources.names, by_source, strict=True) if each.text_bytes]
    return metrics


def _baselines(text: Windows, of_text: Tokenizer, data_dir: Path, manifest: DatasetManifest, max_tokens: int) -> dict[str, float]:
    """Metrics that need no model and are the same for every model on this text."""
    sizes = token_bytes(of_text, manifest)
    targets = targets_read(text, max_tokens)
    (train,) = token_slices(data_dir, manifest, "train")
    beginning = targets[sizes.numpy()[targets] > 0][:XZ_BYTES]  # a token of text has at least one byte
    return {
        "unigram_bits_per_byte": unigram_baseline(TokenStream(train), targets, sizes).bits_per_byte,
        "xz_bits_per_byte": xz_bits_per_byte(of_text.decode(beginning).encode()),
        "share_of_text": len(targets) / (manifest.splits["val"].tokens - 1),
    }


def _metrics(held_out: HeldOut) -> dict[str, float]:
    return {
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": held_out.bits_per_byte,
        "tokens": held_out.targets,
        "bytes": held_out.text_bytes,
    }


def _samples(model: Transformer, tokenizer: Tokenizer, config: EvaluateConfig) -> list[Sample]:
    samples: list[Sample] = []
    for prompt in config.sample_prompts:
        tokens = generate(
            model,
            tokenizer.encode(prompt).tolist(),
            config.sample_tokens,
            temperature=config.sample_temperature,
            top_k=config.sample_top_k,
            seed=config.sample_seed,
        )
        samples.append({"prompt": prompt, "continuation": tokenizer.decode(list(tokens))})
    return samples
