"""A checkpoint as a Hugging Face directory: a plain LlamaForCausalLM. `python -m llm_core.export` is the tool."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from llm_core.checkpoint import load_model
from llm_core.checkpoint_files import CheckpointRecord, manifest_path, named_checkpoint
from llm_core.cli import parse_options, run_tool
from llm_core.config import ModelConfig, StageConfig
from llm_core.errors import UserError
from llm_core.evaluation_file import read_evaluation
from llm_core.files import atomic_writer, fsync_path, inside, read_json, says_when_the_disk_is_full, sha256_file, write_json
from llm_core.identity import model_id
from llm_core.model import Transformer
from llm_core.model_card import model_card
from llm_core.runlog import now
from llm_core.tokenizer import Tokenizer

PROG = "python -m llm_core.export"


def llama_config(config: ModelConfig, eot_id: int) -> dict[str, Any]:
    """The config.json of transformers' LlamaForCausalLM; padded vocabulary rows are not exported."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def llama_weights(model: Transformer) -> dict[str, Tensor]:
    """Our weights under Llama's names: the fused query-key-value and gate-up matrices are taken apart."""
    config = model.config
    weights = {
        "model.embed_tokens.weight": model.embedding.weight[: config.vocab_size],
        "model.norm.weight": model.norm.weight,
    }
    if not config.tie_embeddings:
        weights["lm_head.weight"] = model.head.weight[: config.vocab_size]
    state = model.state_dict()
    heads = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        q, k, v = state[ours + "attention.qkv.weight"].split(heads)
        gate, up = state[ours + "mlp.gate_up.weight"].chunk(2)
        weights |= {
            theirs + "input_layernorm.weight": state[ours + "attention_norm.weight"],
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": state[ours + "attention.out.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "mlp_norm.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "mlp.down.weight"],
        }
    return {name: weight.detach().to(torch.float32).contiguous() for name, weight in weights.items()}


class ExportOptions(StageConfig):
    """Write a checkpoint as a Hugging Face directory."""

    checkpoint: str = Field(description="A checkpoint_step_<N>.pt file, in the folder of its run, or that folder for its newest.")
    data_dir: str = Field("processed_data", description="Folder of the data preparation, which holds the tokenizers.")
    output_dir: str = Field(description="Directory to write; an exported model in it is replaced when the new one is whole.")
    evaluation: str | None = Field(None, description="An evaluation_step_<N>_*.json, to be shown in the model card.")
    reason: str = Field("exported by hand", description="Why this checkpoint is released; kept in textmill.json.")


def export_checkpoint(checkpoint: Path, data_dir: Path, output_dir: Path, evaluation: Path | None, reason: str) -> None:
    """Exports a checkpoint with a model card and a textmill.json that tell what it was made from.

    Raises:
        DataError: the checkpoint, its run.json, its tokenizer or the evaluation is missing or damaged.
        UserError: the output directory holds something else than an exported model; the evaluation is of another checkpoint.
    """
    model, state = load_model(checkpoint)
    record = CheckpointRecord.read(manifest_path(checkpoint))
    run = read_json(checkpoint.parent / "run.json")
    tokenizer = Tokenizer.stored(data_dir, state["tokenizer_id"])
    judged = read_evaluation(evaluation) if evaluation is not None else None
    if judged is not None and judged["checkpoint_id"] != record.checkpoint_id:
        raise UserError(
            f"--evaluation {evaluation}: judges checkpoint {judged['checkpoint_id']}, not {record.checkpoint_id} of --checkpoint;"
            " `python -m llm_core.judge` makes one"
        )
    metrics = {m["metric"]: m["value"] for m in judged["metrics"] if m["source"] == "all"} if judged else {}
    identifier = model_id(record.checkpoint_id)
    lineage = {
        "run_id": record.run_id,
        "checkpoint_id": record.checkpoint_id,
        "step": record.step,
        "tokens_seen": record.tokens_seen,
    }
    lineage |= {name: run[name] for name in ("dataset_id", "tokenizer_id", "code_version", "git_commit", "seed")}
    lineage |= {"parent_run_id": run["parent_run_id"]} if run["parent_run_id"] is not None else {}
    manifest = inside(data_dir / "manifests", f"{run['dataset_id']}.json")
    if manifest.is_file():  # a model can be exported after its data is gone
        dataset = read_json(manifest)
        lineage |= {"snapshot_id": dataset["snapshot_id"], "dataset_tokens": dataset["splits"]["train"]["tokens"]}
    facts = {
        "format_version": 1,
        "model_id": identifier,
        "checkpoint_file": checkpoint.name,
        "released_at": now(),
        "reason": reason,
        "metrics": metrics,
    }
    sample = judged["samples"][0] if judged and judged["samples"] else None
    card = model_card(identifier, model.config.num_parameters, metrics, lineage, run["config"], sample)
    with says_when_the_disk_is_full(output_dir / "model.safetensors", 4 * model.config.num_parameters):
        _write_directory(model, tokenizer, output_dir, card, lineage | facts)


def _write_directory(model: Transformer, tokenizer: Tokenizer, directory: Path, card: str, facts: Mapping[str, Any]) -> None:
    """Writes the files that transformers and the hub expect; `directory` appears whole or not at all.

    card: text of README.md, the model card. facts: go into textmill.json, with the SHA-256 of every file.
    """
    directory = directory.absolute()
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output_dir {directory}: is a file; name a folder")
    if directory.exists() and not (directory / "textmill.json").is_file() and any(directory.iterdir()):
        raise UserError(f"--output_dir {directory}: holds files that are not an exported model; name a new or an empty folder")
    temporary, replaced = (directory.with_name(f".{directory.name}.{end}") for end in ("tmp", "old"))
    if replaced.exists() and not directory.exists():  # an earlier export was killed between its two renames
        replaced.rename(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    special = {"bos_token": tokenizer.special_tokens[0], "eos_token": tokenizer.special_tokens[0]}
    special_ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    write_json(temporary / "config.json", llama_config(model.config, tokenizer.eot_id), sealed=False)
    write_json(temporary / "generation_config.json", special_ids, sealed=False)
    write_json(temporary / "special_tokens_map.json", special, sealed=False)
    write_json(
        temporary / "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.max_length,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": False,
        },
        sealed=False,
    )
    tokenizer.save(temporary / "tokenizer.json")
    with atomic_writer(temporary / "model.safetensors") as file:
        file.write(save(llama_weights(model), metadata={"format": "pt"}))
    with atomic_writer(temporary / "README.md") as file:
        file.write(card.encode())
    files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / "textmill.json", dict(facts) | {"files": files})
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    temporary.rename(directory)
    fsync_path(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def main() -> None:
    options = parse_options(ExportOptions, PROG)
    evaluation = None if options.evaluation is None else Path(options.evaluation)
    export_checkpoint(
        named_checkpoint(options.checkpoint), Path(options.data_dir), Path(options.output_dir), evaluation, options.reason
    )
    print(options.output_dir)


if __name__ == "__main__":
    run_tool(main, PROG)
