"""Judges a checkpoint on held-out text and shows what it writes; `python -m llm_core.judge` is the tool."""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from llm_core.checkpoint import load_model
from llm_core.checkpoint_files import CheckpointRecord, manifest_path
from llm_core.cli import parse_options, printable, run_tool
from llm_core.config import EvaluateConfig
from llm_core.corpus import load_snapshot
from llm_core.dataset import TokenStream, Windows
from llm_core.distributed import Ranks
from llm_core.errors import UserError
from llm_core.evaluate import HeldOut, evaluate_parts, targets_read, token_bytes, unigram_baseline, xz_bits_per_byte
from llm_core.evaluation_file import Evaluation, Sample, by_source, evaluation_path
from llm_core.files import write_json
from llm_core.generate import generate
from llm_core.identity import evaluation_id
from llm_core.model import Transformer
from llm_core.parts import kept_documents, kept_runs, parts_by_source
from llm_core.runlog import now
from llm_core.shards import load_manifest
from llm_core.tokenizer import Tokenizer

PROG = "python -m llm_core.judge"


class JudgeOptions(EvaluateConfig):
    """Evaluate a checkpoint on the held-out text of a dataset."""

    checkpoint: str = Field(description="A checkpoint_step_<N>.pt file; the result is written beside it.")
    data_dir: str = Field("processed_data", description="Folder written by the data preparation.")
    dataset_id: str | None = Field(None, description="Judge on this version of the dataset, of manifests/; default: the current.")


def evaluate_checkpoint(path: Path, data_dir: Path, config: EvaluateConfig, dataset_id: str | None = None) -> Evaluation:
    """Evaluates one checkpoint on a dataset, the current one by default, and writes the result beside it, at `evaluation_path`.

    Raises:
        DataError: the checkpoint or a shard is damaged.
        UserError: the checkpoint was trained with another tokenizer than the dataset has.
    """
    record = CheckpointRecord.read(manifest_path(path))
    manifest = load_manifest(data_dir, dataset_id)
    model, state = load_model(path)
    if state["tokenizer_id"] != manifest.tokenizer.tokenizer_id:
        raise UserError(
            f"{path}: trained with tokenizer {state['tokenizer_id']}, but {data_dir} has {manifest.tokenizer.tokenizer_id}; "
            "prepare the data with the tokenizer of the checkpoint"
        )
    ranks = Ranks.alone()
    torch.set_num_threads(ranks.threads)
    model.to(ranks.device)
    tokenizer = Tokenizer.stored(data_dir, manifest.tokenizer.tokenizer_id)
    windows = Windows.open(data_dir, manifest, "val", model.config.max_length, 0)
    sizes = token_bytes(tokenizer, manifest)
    sources = parts_by_source(load_snapshot(data_dir, manifest.snapshot_id).kept_documents())
    ((documents, tokens),) = kept_documents(data_dir, manifest, "val")
    held_out, *parts = evaluate_parts(
        model,
        windows,
        sizes,
        np.repeat(sources.part_of(documents), tokens),
        len(sources.names),
        max_tokens=config.max_eval_tokens,
        batch_size=config.eval_batch_size,
        ranks=ranks,
    )
    (train,) = kept_runs(data_dir, manifest, "train")
    unigram = unigram_baseline(TokenStream(train), windows, sizes, config.max_eval_tokens)
    targets = targets_read(windows, config.max_eval_tokens)
    text = tokenizer.decode(targets[sizes.numpy()[targets] > 0]).encode()
    baselines = {
        "unigram_bits_per_byte": unigram.bits_per_byte,
        "xz_bits_per_byte": xz_bits_per_byte(text),
        "share_of_text": held_out.targets / (manifest.splits["val"].tokens - 1),
    }
    found = [("all", _figures(held_out) | baselines)]
    if len(sources.names) > 1:
        found += [(name, _figures(part)) for name, part in zip(sources.names, parts, strict=True) if part.text_bytes]
    result: Evaluation = {
        "format_version": 1,
        "evaluation_id": evaluation_id(record.checkpoint_id, manifest.dataset_id, config),
        "checkpoint_id": record.checkpoint_id,
        "run_id": record.run_id,
        "step": record.step,
        "dataset_id": manifest.dataset_id,
        "config": config.model_dump(mode="json"),
        "created_at": now(),
        "metrics": [
            {"metric": name, "split": "val", "source": source, "value": value}
            for source, figures in found
            for name, value in figures.items()
        ],
        "samples": _samples(model, tokenizer, config),
    }
    write_json(evaluation_path(record, manifest.dataset_id, config), result)
    return result


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
    config = options.part(EvaluateConfig)
    result = evaluate_checkpoint(Path(options.checkpoint), Path(options.data_dir), config, options.dataset_id)
    for entry in result["metrics"]:
        if entry["source"] == "all":
            print(f"{entry['metric']:<22} {entry['value']:,.4f}")
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
