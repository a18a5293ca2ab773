"""Writes a checkpoint as a Hugging Face directory."""

import shutil
from pathlib import Path

from safetensors.torch import save

from llm_core.artifact_ids import model_id
from llm_core.checkpoint import CheckpointRecord, RunRecord
from llm_core.checkpoint.state import load_model
from llm_core.dataset import DatasetVersion
from llm_core.errors import UserError
from llm_core.evaluation import read_evaluation
from llm_core.huggingface.llama import llama_config, llama_weights
from llm_core.huggingface.model_card import model_card
from llm_core.huggingface.record import ModelRecord
from llm_core.layout import ModelFolder, PreparedData
from llm_core.model.transformer import Transformer
from llm_core.system import atomic_writer, explain_disk_full, fsync_path, now, sha256_file, write_json
from llm_core.tokenizer import Tokenizer, with_known_pattern


def export_checkpoint(checkpoint: Path, data_dir: Path, output_dir: Path, evaluation: Path | None, reason: str) -> None:
    """Exports a checkpoint with a model card and a textmill.json that describe its lineage.

    Raises:
        DataError: the checkpoint, its run.json, its tokenizer or the evaluation is missing or damaged.
        UserError: the output directory is not an exported model, or the evaluation is of another checkpoint.
    """
    model, state = load_model(checkpoint)
    record, run_dir = CheckpointRecord.of(checkpoint), checkpoint.parent
    run = RunRecord.read(run_dir)
    tokenizer = Tokenizer.stored(data_dir, state["tokenizer_id"])
    results = read_evaluation(evaluation) if evaluation is not None else None
    if results is not None and results["checkpoint_id"] != record.checkpoint_id:
        raise UserError(
            f"--evaluation {evaluation}: evaluates checkpoint {results['checkpoint_id']}, not {record.checkpoint_id} of"
            " --checkpoint; `python -m llm_core.evaluate_text` makes one"
        )
    # A model can be exported after its data is gone.
    known = PreparedData(data_dir).manifest(run.dataset_id).is_file()
    manifest = DatasetVersion.read(data_dir, run.dataset_id) if known else None
    exported = ModelRecord(
        model_id=model_id(record.checkpoint_id),
        run_id=record.run_id,
        parent_run_id=run.parent_run_id,
        checkpoint_id=record.checkpoint_id,
        checkpoint_file=checkpoint.name,
        step=record.step,
        tokens_seen=record.tokens_seen,
        dataset_id=run.dataset_id,
        snapshot_id=manifest.snapshot_id if manifest is not None else None,
        dataset_tokens=manifest.splits["train"].tokens if manifest is not None else None,
        tokenizer_id=run.tokenizer_id,
        code_version=run.code_version,
        git_commit=run.git_commit,
        seed=run.seed,
        released_at=now(),
        reason=reason,
        metrics={m["metric"]: m["value"] for m in results["metrics"] if m["source"] == "all"} if results else {},
    )
    sample = results["samples"][0] if results and results["samples"] else None
    card = model_card(exported, model.config.num_parameters, run.train_config(run_dir), sample)
    try:
        with explain_disk_full(ModelFolder(output_dir).weights, 4 * model.config.num_parameters):
            _write_directory(model, tokenizer, output_dir, card, exported)
    finally:
        shutil.rmtree(_beside(output_dir.absolute(), "tmp"), ignore_errors=True)  # if it was interrupted


def _beside(directory: Path, suffix: str) -> Path:
    return directory.with_name(f".{directory.name}.{suffix}")


def _write_directory(model: Transformer, tokenizer: Tokenizer, directory: Path, card: str, record: ModelRecord) -> None:
    """Writes the files that transformers and the hub expect; `directory` appears whole or not at all.

    card: text of README.md, the model card. record: written as textmill.json, with the SHA-256 of every file.
    """
    directory = directory.absolute()
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output_dir {directory}: is a file; name a folder")
    if directory.exists() and not ModelFolder(directory).record.is_file() and any(directory.iterdir()):
        raise UserError(f"--output_dir {directory}: has files that are not an exported model; name a new or empty folder")
    temporary, replaced = _beside(directory, "tmp"), _beside(directory, "old")
    if replaced.exists() and not directory.exists():  # an earlier export was killed between its two renames
        replaced.rename(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = ModelFolder(temporary)
    names, end = ("bos_token", "eos_token", "pad_token"), tokenizer.special_tokens[0]
    special = dict.fromkeys(names, end)
    # A padding token in config.json would be one that fine-tuning never trains.
    write_json(files.config, llama_config(model.config, tokenizer.eot_id), sealed=False)
    write_json(files.generation_config, {f"{name}_id": tokenizer.eot_id for name in names}, sealed=False)
    write_json(files.special_tokens_map, special, sealed=False)
    write_json(
        files.tokenizer_config,
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.max_length,
            # Without this, transformers 4 also returns token_type_ids, which Llama's generate refuses.
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",  # text is generated at the right
            # For llama.cpp and Ollama; transformers does not add the token.
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": False,
        },
        sealed=False,
    )
    with atomic_writer(files.tokenizer) as file:
        file.write(with_known_pattern(tokenizer.serialized))
    with atomic_writer(files.weights) as file:
        file.write(save(llama_weights(model), metadata={"format": "pt"}))
    with atomic_writer(files.card) as file:
        file.write(card.encode())
    digests = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
    record.model_copy(update={"files": digests}).write(temporary)
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    temporary.rename(directory)
    fsync_path(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)
