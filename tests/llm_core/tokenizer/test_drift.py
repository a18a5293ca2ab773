"""A tokenizer on newer text: the result, and which files are read for it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_core.config import CorpusConfig, TokenizerConfig
from llm_core.corpus import take_snapshot
from llm_core.system import read_json
from llm_core.tokenizer import Tokenizer, TokenizerArtifact, prepare_tokenizer
from llm_core.tokenizer import drift as drift_module
from llm_core.tokenizer.drift import DriftReport
from tests.support.tokenizers import ranks_file


@dataclass
class Growing:
    """A folder of text that grows, and its tokenizer."""

    raw: Path
    processed: Path

    def add(self, name: str, text: str) -> None:
        (self.raw / name).parent.mkdir(exist_ok=True)
        (self.raw / name).write_text(text)

    def prepare(self, **options: Any) -> TokenizerArtifact:
        snapshot = take_snapshot(self.raw, self.processed, CorpusConfig(max_document_bytes=2048))
        return prepare_tokenizer(snapshot, self.raw, self.processed, TokenizerConfig(**{"vocab_size": 600} | options))

    def drift_report(self, **options: Any) -> DriftReport:
        return self.prepare(**options).drift_report

    @property
    def cache(self) -> Path:
        (cache,) = (self.processed / "tokenizers").glob("*.tried.json")
        return cache


@pytest.fixture
def growing(corpus_dir: Path, tmp_path: Path) -> Growing:
    shutil.copytree(corpus_dir, tmp_path / "raw")
    return Growing(tmp_path / "raw", tmp_path / "processed")


JAPANESE = "".join(f"これは別の言葉の文で、番号は {n} です。" for n in range(200))


def test_an_unchanged_snapshot_is_not_measured_again(growing: Growing, opened: list[str]) -> None:
    first = growing.drift_report()
    assert (first.drift, first.round_trips, first.changed) == (None, 100, {})
    growing.add("added.txt", "A text that the tokenizer has not seen. " * 60)
    found = growing.drift_report()
    assert found.drift is not None and found.round_trips > 100
    opened.clear()
    assert growing.drift_report() == found
    assert opened == []
    growing.cache.write_text("{")
    again = growing.drift_report()
    assert (again.drift, again.sources) == (found.drift, found.sources), "a damaged cache is written again"


def test_drift_covers_all_newer_text_and_reads_only_the_latest(growing: Growing, opened: list[str]) -> None:
    growing.prepare()
    growing.add("web/a.txt", JAPANESE)
    foreign = growing.drift_report()
    opened.clear()
    growing.add("books/b.txt", "The value of the expression is the name of the object. " * 400)
    both = growing.drift_report()
    assert set(opened) == {"books/b.txt"}
    assert foreign.drift is not None and both.drift is not None
    assert both.drift < foreign.drift
    sources = {source["source"]: source for source in both.sources}
    assert sources["web"] == foreign.sources[0]
    assert sources["web"]["measured_bytes"] == len(JAPANESE.encode())
    assert sources["books"]["bytes_per_token"] > sources["web"]["bytes_per_token"]
    opened.clear()
    (growing.raw / "books/b.txt").unlink()
    assert growing.drift_report().drift == foreign.drift, "removed text does not count"
    assert opened == []


def test_drift_is_measured_on_a_stable_sample(growing: Growing, opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_module, "_SAMPLED_BYTES", 20_000)
    growing.prepare()
    for number in range(30):
        growing.add(f"new/{number}.txt", f"Text number {number} of the newer ones. " * 40)
    growing.drift_report()
    measured = len(read_json(growing.cache)["tokens"])
    assert 5 < measured < 15
    again = growing.cache.read_bytes()
    growing.cache.unlink()
    full = growing.drift_report()
    sample = sorted(read_json(growing.cache)["tokens"])
    growing.cache.write_bytes(again)
    assert sample == sorted(read_json(growing.cache)["tokens"]), "the cache saves reading and changes no result"
    for source in range(10):
        (growing.raw / f"new/{source}.txt").unlink()
    fewer = growing.drift_report()
    assert sum(source["measured_bytes"] for source in fewer.sources) == pytest.approx(20_000, abs=4_000), (
        "others take their place"
    )
    assert full.drift is not None and fewer.drift == pytest.approx(full.drift, abs=0.05)
    opened.clear()
    growing.add("new/last.txt", JAPANESE[:500])
    drift_report = growing.drift_report()
    assert set(opened) == {"new/last.txt"}
    assert abs(len(read_json(growing.cache)["tokens"]) - measured) <= 1
    assert sum(source["measured_bytes"] for source in drift_report.sources) <= 20_000


def test_text_that_changes_in_a_round_trip_is_reported_until_it_is_removed(
    growing: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.prepare()
    growing.add("lost.txt", "This text is lost.")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "decode", lambda self, ids: "something else")
        assert [*growing.drift_report().changed.values()] == ["This text is lost."]
    growing.add("intact.txt", "This text is intact.")
    assert [*growing.drift_report().changed.values()] == ["This text is lost."]
    (growing.raw / "lost.txt").unlink()
    assert growing.drift_report().changed == {}


def test_text_that_wordpiece_drops_is_not_a_failure(growing: Growing) -> None:
    options: dict[str, Any] = {"tokenizer_type": "wordpiece", "vocab_size": 600}
    growing.prepare(**options)
    growing.add("zero_width.txt", "\u200b")
    drift_report = growing.drift_report(**options)
    assert drift_report.drift is None
    assert drift_report.changed == {}


def test_different_text_is_a_drift_and_retrains_the_tokenizer_only_on_request(growing: Growing) -> None:
    first = growing.prepare()
    growing.add("same.txt", "The value of the expression is the name of the object. " * 40)
    assert growing.drift_report().drift < 0.2  # type: ignore[operator]
    growing.add("japanese.txt", JAPANESE)
    kept = growing.prepare()
    assert kept.reused and kept.tokenizer_id == first.tokenizer_id, "frozen by default"
    assert kept.drift_report.drift is not None and kept.drift_report.drift > 0.3
    assert growing.prepare(retrain_on_drift=0.9).reused
    retrained = growing.prepare(retrain_on_drift=0.3)
    assert not retrained.reused and retrained.tokenizer_id != first.tokenizer_id
    assert retrained.replaced_drift == kept.drift_report.drift
    again = growing.prepare(retrain_on_drift=0.3)
    assert again.reused and again.tokenizer_id == retrained.tokenizer_id


def test_a_drift_that_a_new_tokenizer_does_not_reduce_trains_one_once(growing: Growing, bpe: Tokenizer) -> None:
    ranks_file(growing.raw.parent / "own.tiktoken", bpe)
    options = {"tokenizer_type": "tiktoken", "tiktoken_ranks": str(growing.raw.parent / "own.tiktoken"), "retrain_on_drift": 0.05}
    growing.prepare(**options)
    growing.add("japanese.txt", JAPANESE)
    retrained = growing.prepare(**options)
    assert not retrained.reused and retrained.replaced_drift is not None
    assert growing.prepare(**options).reused, "it was trained on this text"
