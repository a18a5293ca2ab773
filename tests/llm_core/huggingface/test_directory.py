"""An exported model loads in Hugging Face's transformers and gives the same results."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_core.config import END_OF_TEXT, EvaluateConfig
from llm_core.dataset import load_manifest
from llm_core.errors import DataError, UserError
from llm_core.evaluation.evaluator import evaluate_checkpoint
from llm_core.huggingface import ModelRecord
from llm_core.huggingface.directory import _write_directory, export_checkpoint
from llm_core.model.transformer import Transformer
from llm_core.system import sha256_file
from llm_core.tokenizer import Tokenizer
from llm_core.tokenizer.tokenizer import _CONTRACTION, _FORMER_CONTRACTION
from tests.llm_core.model.test_transformer import build
from tests.support.records import model_record
from tests.support.training import run_train

transformers: Any = pytest.importorskip("transformers")

TEXTS = ["Hello, world!", "  spaces\n\nand\ttabs ", "naïve café 東京 🙂", "x = {'a': [1, 2.5e-3]}", ""]


@pytest.fixture
def tokenizer(data_dir: Path) -> Tokenizer:
    return Tokenizer.load(data_dir / load_manifest(data_dir).tokenizer.file)


def export(model: Transformer, tokenizer: Tokenizer, directory: Path) -> Path:
    _write_directory(model, tokenizer, directory, "# A card", model_record(model_id="m"))
    return directory


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"tie_embeddings": True}, {"rope_theta": 5e5, "norm_eps": 1e-6}])
def test_logits_equal_those_of_transformers(options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(vocab_size=tokenizer.vocab_size, **options).eval()
    directory = export(model, tokenizer, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens = torch.randint(0, tokenizer.vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (theirs(tokens).logits - model.logits(tokens)).abs().max().item()
    assert difference < 1e-4


def test_the_exported_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = export(build(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(tokenizer.encode(text).tolist()) == text
    assert theirs.eos_token_id == tokenizer.eot_id


def test_other_programs_learn_how_a_document_begins_and_how_text_is_padded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = export(build(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model")
    config, generation, tokenization = (
        json.loads((directory / f"{name}.json").read_text()) for name in ("config", "generation_config", "tokenizer_config")
    )
    assert {tokenization[name] for name in ("bos_token", "eos_token", "pad_token")} == {END_OF_TEXT}
    assert tokenization["add_bos_token"] is True
    assert tokenization["model_input_names"] == ["input_ids", "attention_mask"]
    assert generation["pad_token_id"] == tokenizer.eot_id
    assert "pad_token_id" not in config, "transformers would never train the end-of-text token"


def test_ollama_knows_the_pattern_of_an_exported_tokenizer_new_or_old(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Ollama's convert/tokenizer.go names the pre-tokenizer by the SHA-256 of the patterns: this one is `llama-bpe`."""
    former = tokenizer.serialized.replace(_CONTRACTION.encode(), _FORMER_CONTRACTION.encode())
    assert former != tokenizer.serialized
    for number, stored in enumerate((tokenizer, Tokenizer(former))):
        directory = export(build(vocab_size=tokenizer.vocab_size), stored, tmp_path / str(number))
        exported = json.loads((directory / "tokenizer.json").read_text())
        pattern = exported["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        assert hashlib.sha256(pattern.encode()).hexdigest() == "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f"
    assert (tmp_path / "0" / "tokenizer.json").read_bytes() == tokenizer.serialized, "its id is that of the file"


def test_the_record_has_the_digest_of_every_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = export(build(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model")
    record = json.loads((directory / "textmill.json").read_text())
    assert record["model_id"] == "m"
    assert record["files"] == {path.name: sha256_file(path) for path in directory.iterdir() if path.name != "textmill.json"}


def test_unknown_fields_are_absent_from_a_record_and_an_unknown_commit_is_null(tmp_path: Path) -> None:
    record = model_record(model_id="m")
    record.write(tmp_path)
    written = json.loads((tmp_path / "textmill.json").read_text())
    assert written["git_commit"] is None
    assert written.keys().isdisjoint({"parent_run_id", "snapshot_id", "dataset_tokens"})
    assert ModelRecord.read(tmp_path) == record


def test_a_failed_export_leaves_nothing_that_resembles_a_model(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_core.huggingface.directory.save", full_disk)
    with pytest.raises(DataError, match="disk full"):
        export(build(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_with_other_files_is_not_replaced(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "run", max_steps=1)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    checkpoint = tmp_path / "run/checkpoint_step_1.pt"
    with pytest.raises(UserError, match=r"--output_dir .*mine: has files that are not an exported model"):
        export_checkpoint(checkpoint, data_dir, folder, None, "test")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    # An empty folder and an earlier export are replaced.
    (folder / "thesis.txt").unlink()
    for _ in range(2):
        export_checkpoint(checkpoint, data_dir, folder, None, "test")
        assert (folder / "textmill.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


def test_a_model_that_a_killed_export_moved_away_is_restored(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = export(build(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    directory.rename(tmp_path / ".model.old")  # killed between its two renames
    monkeypatch.setattr("llm_core.huggingface.directory.save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(build(vocab_size=tokenizer.vocab_size), tokenizer, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_the_model_card_shows_only_an_evaluation_of_its_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, max_steps=2, save_interval=1, keep_checkpoints=2)
    one, two = (tmp_path / f"checkpoint_step_{step}.pt" for step in (1, 2))
    evaluate_checkpoint(one, data_dir, EvaluateConfig(max_eval_tokens=512, sample_tokens=2))
    (evaluation,) = tmp_path.glob("evaluation_step_1_*.json")
    with pytest.raises(UserError, match=r"evaluation_step_1_.*evaluates checkpoint .* not "):
        export_checkpoint(two, data_dir, tmp_path / "model", evaluation, "a test")
    export_checkpoint(one, data_dir, tmp_path / "model", evaluation, "a test")
    assert "| bits_per_byte |" in (tmp_path / "model/README.md").read_text()
