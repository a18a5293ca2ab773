"""Judges a checkpoint on held-out text and shows what it writes; `python -m llm_core.judge` is the tool."""

from pathlib import Path

import torch
from pydantic import Field

from llm_core.checkpoint import load_model
from llm_core.checkpoint_files import CheckpointRecord, manifest_path
from llm_core.cli import parse_options, run_tool
from llm_core.config import EvaluateConfig
from llm_core.dataset import TokenStream, Windows
from llm_core.distributed import Ranks
from llm_core.errors import UserError
from llm_core.evaluate import evaluate, token_bytes, unigram_baseline
from llm_core.evaluation_file import Evaluation, Sample, evaluation_path
from llm_core.files import write_json
from llm_core.generate import generate
from llm_core.identity import evaluation_id
from llm_core.model import Transformer
from llm_core.parts import kept_runs
from llm_core.runlog import now
from llm_core.shards import load_manifest
from llm_core.tokenizer import Tokenizer

PROG = "python -m llm_core.judge"


class JudgeOptions(EvaluateConfig):
    """Evaluate a checkpoint on the held-out text of a dataset."""

    checkpoint: str = Field(description="A checkpoint_step_<N>.pt file; the result is written beside it.")
    data_dir: str = Field("processed_data", description="Folder written by the data preparation.")


def evaluate_checkpoint(path: Path, data_dir: Path, config: EvaluateConfig) -> Evaluation:
    """Evaluates one checkpoint on the current dataset and writes the result beside it, at `evaluation_path`.

    Raises:
        DataError: the checkpoint or a shard is damaged.
        UserError: the checkpoint was trained with another tokenizer than the dataset has.
    """
    record = CheckpointRecord.read(manifest_path(path))
    manifest = load_manifest(data_dir)
    model, state = load_model(path)
    if state["tokenizer_id"] != manifest.tokenizer.tokenizer_id:
        raise UserError(
            f"{path}: trained with tokenizer {state['tokenizer_id']}, but {data_dir} has {manifest.tokenizer.tokenizer_id}; "
            "prepare the data with the tokenizer of the checkpoint"
        )
    ranks = Ranks.alone()
    torch.set_num_threads(ranks.threads)
    model.to(ranks.device)
    tokenizer = Tokenizer.load(data_dir / manifest.tokenizer.file)
    windows = Windows.open(data_dir, manifest, "val", model.config.max_length, 0)
    sizes = token_bytes(tokenizer, manifest)
    held_out = evaluate(model, windows, sizes, max_tokens=config.max_eval_tokens, batch_size=config.eval_batch_size, ranks=ranks)
    (train,) = kept_runs(data_dir, manifest, "train")
    unigram = unigram_baseline(TokenStream(train), windows, sizes, config.max_eval_tokens)
    values = {
        "loss": held_out.loss,
        "perplexity": held_out.perplexity,
        "bits_per_byte": held_out.bits_per_byte,
        "unigram_bits_per_byte": unigram.bits_per_byte,
        "tokens": held_out.targets,
        "bytes": held_out.text_bytes,
    }
    result: Evaluation = {
        "format_version": 1,
        "evaluation_id": evaluation_id(record.checkpoint_id, manifest.dataset_id, config),
        "checkpoint_id": record.checkpoint_id,
        "run_id": record.run_id,
        "step": record.step,
        "dataset_id": manifest.dataset_id,
        "config": config.model_dump(mode="json"),
        "created_at": now(),
        "metrics": [{"metric": name, "split": "val", "source": "all", "value": value} for name, value in values.items()],
        "samples": _samples(model, tokenizer, config),
    }
    write_json(evaluation_path(record, manifest.dataset_id, config), result)
    return result


def main() -> None:
    options = parse_options(JudgeOptions, PROG)
    result = evaluate_checkpoint(Path(options.checkpoint), Path(options.data_dir), options.part(EvaluateConfig))
    for entry in result["metrics"]:
        print(f"{entry['metric']:<22} {entry['value']:,.4f}")
    for sample in result["samples"]:
        print(f"\n{sample['prompt']}{sample['continuation']}")


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
