"""The store keeps each tokenizer with its report, and freezes one per configuration."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_core.config import CorpusConfig, TokenizerConfig
from llm_core.corpus import Snapshot, take_snapshot
from llm_core.errors import DataError
from llm_core.system import read_json
from llm_core.tokenizer import Tokenizer, TokenizerArtifact, prepare_tokenizer
from llm_core.tokenizer.store import tokenizer_identity
from tests.support.tokenizers import ranks_file


@pytest.fixture
def snapshot(corpus_dir: Path, tmp_path: Path) -> Snapshot:
    return take_snapshot(corpus_dir, tmp_path, CorpusConfig(max_document_bytes=2048))


@pytest.fixture
def make(corpus_dir: Path, tmp_path: Path) -> Callable[..., TokenizerArtifact]:
    def prepare(snapshot: Snapshot, **options: Any) -> TokenizerArtifact:
        return prepare_tokenizer(snapshot, corpus_dir, tmp_path, TokenizerConfig(**{"vocab_size": 300, **options}))

    return prepare


def grown(snapshot: Snapshot) -> Snapshot:
    """The same documents under another snapshot id, as if text had been added."""
    return Snapshot(snapshot.summary | {"snapshot_id": "0" * 16}, snapshot.files, snapshot.documents)


def test_the_store_keeps_every_tokenizer_with_its_report(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    artifact = make(snapshot)
    path = tmp_path / artifact.file
    assert path.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    report = read_json(tmp_path / "tokenizers" / f"{artifact.tokenizer_id}.report.json")
    assert report == artifact.report
    assert report["sha256"] == artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (report["vocab_size"], report["tokenizer_type"], report["snapshot_id"]) == (300, "bpe", snapshot.snapshot_id)
    assert report["train_bytes"] == snapshot.summary["train_bytes"], "validation text is not used for training"
    assert 1 < report["bytes_per_token"] < 4
    assert report["tokens_per_word"] > 1
    assert 0.3 < report["vocab_used"] <= 1


def test_the_tokenizer_is_frozen_until_its_configuration_changes_or_retraining_is_requested(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    assert make(grown(snapshot)).reused
    retrained = make(grown(snapshot), retrain_tokenizer=True)
    assert not retrained.reused
    assert retrained.report["snapshot_id"] == "0" * 16
    other = make(snapshot, vocab_size=310)
    assert not other.reused
    assert Tokenizer.load(tmp_path / "tokenizer.json").tokenizer_id == other.tokenizer_id
    assert Tokenizer.load(tmp_path / first.file).vocab_size == 300
    later = Snapshot(snapshot.summary | {"snapshot_id": "1" * 16}, snapshot.files, snapshot.documents)
    back = make(later)
    assert back.reused, "each configuration has its own frozen tokenizer, whichever was trained last"
    assert back.tokenizer_id == retrained.tokenizer_id == Tokenizer.load(tmp_path / "tokenizer.json").tokenizer_id
    assert make(later, vocab_size=310).tokenizer_id == other.tokenizer_id


def test_the_current_tokenizer_is_kept_when_old_text_returns(make: Callable[..., TokenizerArtifact], snapshot: Snapshot) -> None:
    make(snapshot)
    half = Snapshot(snapshot.summary | {"snapshot_id": "1" * 16}, snapshot.files, snapshot.documents.slice(0, 60))
    current = make(half, retrain_tokenizer=True)
    assert make(snapshot).tokenizer_id == current.tokenizer_id


def test_a_tokenizer_none_of_whose_training_text_remains_is_trained_again(corpus_dir: Path, tmp_path: Path) -> None:
    raw, processed, kept = tmp_path / "raw", tmp_path / "processed", sorted(corpus_dir.glob("*.txt"))

    def prepare(texts: list[Path], max_document_bytes: int = 2048, **options: Any) -> TokenizerArtifact:
        shutil.rmtree(raw, ignore_errors=True)
        raw.mkdir()
        for path in texts:
            shutil.copy(path, raw)
        snapshot = take_snapshot(raw, processed, CorpusConfig(max_document_bytes=max_document_bytes, val_fraction=0.2))
        return prepare_tokenizer(snapshot, raw, processed, TokenizerConfig(vocab_size=300, **options))

    first = prepare(kept[:20])
    assert prepare(kept[5:]).tokenizer_id == first.tokenizer_id, "some of it remains"
    assert prepare(kept[5:], max_document_bytes=1024).reused, "the same text in other documents"
    other = prepare(kept[20:])
    assert (other.reused, other.text_gone) == (False, True)
    assert other.tokenizer_id != first.tokenizer_id
    again = prepare(kept[20:])
    assert (again.tokenizer_id, again.reused, again.text_gone) == (other.tokenizer_id, True, False)
    assert prepare(kept[:20]).tokenizer_id == first.tokenizer_id, "it was trained on this text"
    for path in (processed / "snapshots").glob(f"{first.report['snapshot_id']}*"):
        path.unlink()
    assert prepare(kept[20:30]).tokenizer_id == first.tokenizer_id, "what it was trained on is not known any more"


@pytest.mark.parametrize("lost", ["tokenizer.json", "stored"])
def test_a_lost_copy_of_the_tokenizer_is_restored_from_the_other(
    lost: str, make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    path = tmp_path / (first.file if lost == "stored" else lost)
    path.unlink()
    again = make(snapshot)
    assert again.reused
    assert again.tokenizer_id == first.tokenizer_id == Tokenizer.load(path).tokenizer_id


def test_a_damaged_current_tokenizer_is_not_silently_replaced(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: damaged, or not made by textmill; .*--retrain_tokenizer"):
        make(snapshot)
    assert make(snapshot, retrain_tokenizer=True).tokenizer_id == first.tokenizer_id


def test_a_lost_report_names_the_way_to_the_same_tokenizer(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    (tmp_path / "tokenizers" / f"{first.tokenizer_id}.report.json").unlink()
    with pytest.raises(DataError, match=r"\.report\.json: missing; restore it, or train a tokenizer with --retrain_tokenizer"):
        make(snapshot)
    assert make(snapshot, retrain_tokenizer=True).report == first.report


def test_a_lost_frozen_tokenizer_is_not_silently_trained_again(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, tmp_path: Path
) -> None:
    first = make(snapshot)
    make(snapshot, vocab_size=310)  # from now on tokenizer.json is not a copy of the first one
    path = tmp_path / first.file
    path.write_bytes(path.read_bytes().replace(b"t", b"T", 1))
    with pytest.raises(DataError, match=rf"{first.tokenizer_id}\.json: missing or damaged, .*--retrain_tokenizer"):
        make(grown(snapshot))
    assert make(grown(snapshot), retrain_tokenizer=True).report["snapshot_id"] == "0" * 16


def test_training_uses_a_seeded_sample_of_bounded_size(make: Callable[..., TokenizerArtifact], snapshot: Snapshot) -> None:
    first, second = (make(snapshot, tokenizer_train_bytes=1 << 16, tokenizer_seed=seed) for seed in (0, 1))
    assert (1 << 16) - 4096 < first.report["train_bytes"] <= 1 << 16
    assert first.tokenizer_id != second.tokenizer_id


def test_only_options_of_its_type_are_part_of_the_identity(bpe: Tokenizer, tmp_path: Path) -> None:
    ranks_file(tmp_path / "a.tiktoken", bpe)
    (tmp_path / "b.tiktoken").write_bytes((tmp_path / "a.tiktoken").read_bytes())
    identities = [
        tokenizer_identity(TokenizerConfig(tokenizer_type="tiktoken", vocab_size=size, tiktoken_ranks=str(tmp_path / name)))
        for size, name in ((300, "a.tiktoken"), (400, "b.tiktoken"))
    ]
    assert identities[0] == identities[1]
    assert tokenizer_identity(TokenizerConfig(tiktoken_encoding="o200k_base")) == tokenizer_identity(TokenizerConfig())


def test_the_report_has_a_row_for_each_source(
    make: Callable[..., TokenizerArtifact], snapshot: Snapshot, corpus_dir: Path
) -> None:
    report = make(snapshot).report
    sources = {source["source"]: source for source in report["sources"]}
    assert set(sources) == {".", "more"}
    assert sum(source["measured_bytes"] for source in sources.values()) == report["measured_bytes"]
    tokens = sum(source["measured_bytes"] / source["bytes_per_token"] for source in sources.values())
    assert report["measured_bytes"] / report["bytes_per_token"] == pytest.approx(tokens)
    tokenizer = make(snapshot).tokenizer
    for name, source in sources.items():
        texts = [path.read_text() for path in corpus_dir.glob("more/*" if name == "more" else "*.txt")]
        ids = [tokenizer.encode(text) for text in texts]
        words = sum(len(text.split()) for text in texts)
        assert source["tokens_per_word"] == pytest.approx(sum(map(len, ids)) / words, rel=0.01)
        assert source["vocab_used"] == pytest.approx(len(set(np.concatenate(ids).tolist())) / 300, abs=0.01)
