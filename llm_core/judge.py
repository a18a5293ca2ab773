"""Judges a checkpoint on held-out text and shows what it writes; `python -m llm_core.judge` is the tool."""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from llm_core.checkpoint import load_model
from llm_core.checkpoint_files import CheckpointRecord, manifest_path, named_checkpoint
from llm_core.cli import parse_options, printable, run_tool
from llm_core.config import EvaluateConfig
from llm_core.corpus import load_snapshot
from llm_core.dataset import TokenStream, Windows
from llm_core.distributed import Ranks
from llm_core.errors import UserError
from llm_core.evaluate import (
    XZ_BYTES,
    HeldOut,
    evaluate_parts,
    reencoded,
    targets_read,
    token_bytes,
    unigram_baseline,
    xz_bits_per_byte,
)
from llm_core.evaluation_file import Evaluation, Sample, by_source, evaluation_path
from llm_core.files import write_json
from llm_core.generate import generate
from llm_core.identity import evaluation_id
from llm_core.model import Transformer
from llm_core.parts import kept_documents, kept_runs, parts_by_source
from llm_core.runlog import now
from llm_core.shards import DatasetManifest, load_manifest
from llm_core.tokenizer import Tokenizer

PROG = "python -m llm_core.judge"


class JudgeOptions(EvaluateConfig):
    """Evaluate a checkpoint on the held-out text of a dataset."""

    checkpoint: str = Field(
        description="A checkpoint_step_<N>.pt file, or a run's folder for its newest; the result is written beside it."
    )
    data_dir: str = Field("processed_data", description="Folder written by the data preparation.")
    dataset_id: str | None = Field(None, description="Judge on this version of the dataset, of manifests/; default: the current.")
    snapshot_id: str | None = Field(
        None, description="With dataset_id: the snapshot that tells the source of its documents; default: the one it was made of."
    )


def evaluate_checkpoint(
    path: Path, data_dir: Path, config: EvaluateConfig, dataset_id: str | None = None, snapshot_id: str | None = None
) -> Evaluation:
    """Evaluates one checkpoint on a dataset, the current one by default, and writes the result beside it, at `evaluation_path`.

    A checkpoint with another tokenizer than the dataset's reads the same text in its own tokens.

    Raises:
        DataError: the checkpoint, a tokenizer or a shard is missing or damaged.
        UserError: the tokenizers differ, and one of the two is not byte-level.
    """
    record = CheckpointRecord.read(manifest_path(path))
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
    figures = _judged(model, own, text, of_text, data_dir, manifest, config, ranks)
    figures[0][1].update(_baselines(text, of_text, data_dir, manifest, config.max_eval_tokens))
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
            for source, found in figures
            for name, value in found.items()
        ],
        "samples": _samples(model, own, config),
    }
    write_json(evaluation_path(record, manifest, config), result)
    return result


def _judged(
    model: Transformer,
    own: Tokenizer,
    text: Windows,
    of_text: Tokenizer,
    data_dir: Path,
    manifest: DatasetManifest,
    config: EvaluateConfig,
    ranks: Ranks,
) -> list[tuple[str, dict[str, float]]]:
    """The figures of the whole text, and where it has several sources those of each.

    own: the model's tokenizer. text: the windows in the tokens of `of_text`.
    """
    sources = parts_by_source(load_snapshot(data_dir, manifest.snapshot_id).kept_documents())
    ((documents, counts),) = kept_documents(data_dir, manifest, "val")
    windows, max_tokens = text, config.max_eval_tokens
    if own is not of_text:
        (windows, counts), max_tokens = reencoded(text, of_text, own, max_tokens), 0
    held_out, *parts = evaluate_parts(
        model,
        windows,
        token_bytes(own, manifest),
        np.repeat(sources.part_of(documents)[: len(counts)], counts),
        len(sources.names),
        max_tokens=max_tokens,
        batch_size=config.eval_batch_size,
        ranks=ranks,
    )
    figures = [("all", _figures(held_out))]
    if len(sources.names) > 1:
        figures += [(name, _figures(part)) for name, part in zip(sources.names, parts, strict=True) if part.text_bytes]
    return figures


def _baselines(text: Windows, of_text: Tokenizer, data_dir: Path, manifest: DatasetManifest, max_tokens: int) -> dict[str, float]:
    """What needs no model: the same for every one that is judged on this text."""
    sizes = token_bytes(of_text, manifest)
    targets = targets_read(text, max_tokens)
    (train,) = kept_runs(data_dir, manifest, "train")
    beginning = targets[sizes.numpy()[targets] > 0][:XZ_BYTES]  # no token of text has less than a byte
    return {
        "unigram_bits_per_byte": unigram_baseline(TokenStream(train), targets, sizes).bits_per_byte,
        "xz_bits_per_byte": xz_bits_per_byte(of_text.decode(beginning).encode()),
        "share_of_text": len(targets) / (manifest.splits["val"].tokens - 1),
    }


def _figures(held_out: HeldOut) -> dict[str, float]:
    return {
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": held_out.bits_per_byte,
        "tokens": held_out.targets,
        "bytes": held_out.text_bytes,
    }


def main() -> None:
    options = parse_options(JudgeOptions, PROG)
    result = evaluate_checkpoint(
        named_checkpoint(options.checkpoint),
        Path(options.data_dir),
        options.part(EvaluateConfig),
        options.dataset_id,
        options.snapshot_id,
    )
    for entry in result["metrics"]:
        if entry["source"] == "all":
            counts = entry["metric"] in ("tokens", "bytes")
            print(f"{entry['metric']:<22} {entry['value']:,.{0 if counts else 4}f}")
    if table := by_source(result):
        print(f"\n{'source':<22} {'bits per byte':>13} {'loss':>8} {'bytes':>14}")
        for row in table:
            print(f"{printable(row['source']):<22} {row['bits_per_byte']:13.4f} {row['loss']:8.4f} {row['bytes']:14,.0f}")
    for sample in result["samples"]:
        print("\n" + printable(sample["prompt"] + sample["continuation"], keep="\n\t"))


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


if __name__ == "__main__":
    run_tool(main, PROG)
