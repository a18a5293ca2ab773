"""Evaluates a checkpoint on held-out text and generates samples."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from llm_core.artifact_ids import evaluation_id
from llm_core.checkpoint import CheckpointRecord
from llm_core.checkpoint.state import load_model
from llm_core.config import EvaluateConfig
from llm_core.corpus import text_of
from llm_core.dataset import DatasetManifest, Numbers, load_manifest, token_slices
from llm_core.dataset.windows import TokenStream, require_text, token_bytes
from llm_core.distributed.ranks import Ranks
from llm_core.errors import UserError
from llm_core.evaluation.excerpts import HeldOutDocuments, HeldOutText, choose_windows
from llm_core.evaluation.held_out import (
    XZ_BYTES,
    HeldOut,
    Sums,
    evaluate_pieces,
    unigram_baseline,
    xz_bits_per_byte,
)
from llm_core.evaluation.results import Evaluation, Sample, evaluation_path, write_evaluation
from llm_core.model.generation import generate
from llm_core.model.precision import Precision, evaluation_precision
from llm_core.model.transformer import Transformer
from llm_core.system import now
from llm_core.tokenizer import Tokenizer


def evaluate_checkpoint(
    path: Path,
    data_dir: Path,
    config: EvaluateConfig,
    dataset_id: str | None = None,
    snapshot_id: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluates a checkpoint on a dataset, the current one by default, and writes the result beside it, at `evaluation_path`.

    A checkpoint with another tokenizer than the dataset reads the same text in its own tokens. The model computes in the
    precision it was trained in, where the device has it. on_progress: gets the number of windows done and of all windows.

    Raises:
        DataError: the checkpoint, a tokenizer or a shard is missing or damaged.
        UserError: the tokenizers differ, and one of the two is not byte-level.
    """
    record = CheckpointRecord.of(path)
    manifest = load_manifest(data_dir, dataset_id, snapshot_id)
    model, state = load_model(path)
    config = config.resolved(model.config.max_length)
    assert config.eval_window is not None
    ranks = Ranks.alone()
    torch.set_num_threads(ranks.threads)
    model.to(ranks.device)
    of_text = Tokenizer.stored(data_dir, manifest.tokenizer.tokenizer_id)
    same = state["tokenizer_id"] == of_text.tokenizer_id
    own = of_text if same else Tokenizer.stored(data_dir, state["tokenizer_id"])
    if not own.can_read(of_text.tokenizer_id, of_text.tokenizer_type):
        raise UserError(
            f"{path}: trained with tokenizer {own.tokenizer_id}, but {data_dir} has {of_text.tokenizer_id}, and WordPiece does"
            " not give the text back; prepare the data with the tokenizer of the checkpoint"
        )
    documents = HeldOutDocuments.load(data_dir, manifest)
    chosen = choose_windows(data_dir, manifest, config.eval_window, config.max_eval_tokens, documents)
    text = HeldOutText.open(data_dir, manifest, of_text, config.eval_window, chosen)
    precision = evaluation_precision(cast(Precision, state["precision"]), ranks.device)
    reading, sizes = text.read_by(own, model.config.max_length, documents.counts), token_bytes(own, manifest)
    require_text(reading.windows, sizes)
    sums = evaluate_pieces(
        model,
        reading.windows,
        sizes,
        reading.sizes,
        batch_size=config.eval_batch_size,
        ranks=ranks,
        precision=precision,
        on_progress=on_progress,
    )
    counted = reading.documents >= 0
    numbers, row = np.unique(reading.documents[counted], return_inverse=True)
    sums = _grouped(sums[counted], row, len(numbers))
    metrics = _metrics_by_source(sums, documents.source_names, documents.sources[numbers])
    metrics[0][1].update(_baselines(text, data_dir, manifest))
    result: Evaluation = {
        "format_version": 2,
        "evaluation_id": evaluation_id(record.checkpoint_id, manifest, config),
        "checkpoint_id": record.checkpoint_id,
        "run_id": record.run_id,
        "step": record.step,
        "dataset_id": manifest.dataset_id,
        "snapshot_id": manifest.snapshot_id,
        "text_id": text.text_id(manifest),
        "precision": precision,
        "config": config.model_dump(mode="json"),
        "created_at": now(),
        "metrics": [
            {"metric": name, "split": "val", "source": source, "value": value}
            for source, values in metrics
            for name, value in values.items()
        ],
        "samples": _samples(model, own, config),
    }
    ids, paths = (column.take(pa.array(numbers)) for column in (documents.ids, documents.paths))
    texts = list(map(text_of, paths.to_pylist(), ids.to_pylist()))
    table = pa.table({"document_id": ids, "text": texts, "nats": sums[:, 2], "bytes": sums[:, 3]})
    # A document of which only the end-of-text in front was predicted has no text.
    return write_evaluation(evaluation_path(record, manifest, config), result, table.filter(pc.greater(table["bytes"], 0)))


def _grouped(sums: Sums, group: Numbers, groups: int) -> Sums:
    """Sums (rows, 4) added up by the group [rows] of each, (groups, 4)."""
    grouped = np.zeros((groups, 4))
    np.add.at(grouped, group, sums)
    return grouped


def _metrics_by_source(sums: Sums, names: list[str], sources: Numbers) -> list[tuple[str, dict[str, float]]]:
    """Metrics on all of the text, and on each source if there are several.

    sums: (documents, 4). sources: (documents,) the number of the source in `names`.
    """
    metrics = [("all", _metrics(HeldOut.of(sums.sum(axis=0))))]
    if len(names) > 1:
        by_source = map(HeldOut.of, _grouped(sums, sources, len(names)))
        metrics += [(name, _metrics(each)) for name, each in zip(names, by_source, strict=True) if each.text_bytes]
    return metrics


def _baselines(text: HeldOutText, data_dir: Path, manifest: DatasetManifest) -> dict[str, float]:
    """Metrics that need no model and are the same for every model on this text."""
    sizes, targets = token_bytes(text.tokenizer, manifest), text.targets()
    (train,) = token_slices(data_dir, manifest, "train")
    beginning = targets[sizes.numpy()[targets] > 0][:XZ_BYTES]  # a token of text has at least one byte
    return {
        "unigram_bits_per_byte": unigram_baseline(TokenStream(train), targets, sizes).bits_per_byte,
        "xz_bits_per_byte": xz_bits_per_byte(text.tokenizer.decode(beginning).encode()),
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
