"""Text that WordPiece cannot spell is measured by source, recorded, and refused where there is too much of it."""

import random
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig
from llm_core.corpus import take_snapshot
from llm_core.dataset import load_manifest
from llm_core.dataset.build import build_dataset
from llm_core.errors import UserError
from llm_core.system import read_json, write_json
from llm_core.tokenizer import Tokenizer, TokenizerArtifact, coverage, prepare_tokenizer

# 300 different characters: those that a small vocabulary lacks make nearly every word unknown.
HANGUL = "".join(random.Random(0).choices([chr(0xAC00 + number) for number in range(300)], k=6000))
ENGLISH = "\n".join(islice(topics.values(), 60)).encode("ascii", "ignore").decode()

Prepare = Callable[..., TokenizerArtifact]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    def run(files: dict[str, str], **options: Any) -> TokenizerArtifact:
        """Adds files and prepares a tokenizer of all text."""
        for name, text in files.items():
            (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "raw" / name).write_text(text)
        snapshot = take_snapshot(tmp_path / "raw", tmp_path / "out", CorpusConfig(max_document_bytes=512, val_fraction=0.3))
        config = TokenizerConfig(**{"tokenizer_type": "wordpiece", "vocab_size": 400, **options})
        return prepare_tokenizer(snapshot, tmp_path / "raw", tmp_path / "out", config)

    return run


def english(size: int, start: int = 0) -> str:
    return ENGLISH[start : start + size]


def korean(characters: int, word: int = 20) -> str:
    """Words of `word` characters, one in a line."""
    return "".join(HANGUL[start : start + word] + "\n" for start in range(0, characters, word))


@pytest.mark.parametrize(
    ("text", "spelled"),
    [("the name", 7), ("the żółw name", 7), ("\u00ad\ue000", 0), ("a" * 101 + " the", 3), ("", 0), (" \n", 0)],
)
def test_spelled_bytes_are_those_of_known_words(text: str, spelled: int, prepare: Prepare) -> None:
    tokenizer = prepare({"a.txt": english(24000)}).tokenizer
    assert tokenizer.spelled_bytes(text) == spelled


def test_unknown_text_is_measured_by_source_and_recorded_with_the_dataset(prepare: Prepare, tmp_path: Path) -> None:
    artifact = prepare({"en/a.txt": english(160000), "ko/b.txt": korean(2000), "c.txt": english(8000, 165_000)})
    found = artifact.drift_report.coverage
    shares = {source["source"]: source["unknown"] for source in found.sources}
    assert max(shares["en"], shares["."]) < 0.01
    assert shares["ko"] > 0.5
    sizes = {source["source"]: source["bytes"] for source in found.sources}
    assert sizes["ko"] == len(korean(2000).encode())
    assert found.unknown == pytest.approx(sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values()))
    assert found.is_low
    snapshot = take_snapshot(tmp_path / "raw", tmp_path / "out", CorpusConfig(max_document_bytes=512, val_fraction=0.3))
    build_dataset(snapshot, artifact, tmp_path / "raw", tmp_path / "out", ShardConfig(max_length=64, num_workers=1))
    assert load_manifest(tmp_path / "out").unknown_text == found.unknown
    again = prepare({})
    assert again.reused and again.drift_report.coverage == found, "reused data warns again"


def test_a_byte_level_tokenizer_spells_everything(prepare: Prepare, opened: list[str]) -> None:
    artifact = prepare({"en/a.txt": english(8000), "ko/b.txt": korean(2000)}, tokenizer_type="bpe", vocab_size=300)
    assert artifact.drift_report.coverage == coverage.Coverage()


@pytest.mark.parametrize(("word", "larger"), [(20, True), (150, False)], ids=["rare characters", "long words"])
def test_too_much_unknown_text_is_refused_with_options_that_work(
    word: int, larger: bool, prepare: Prepare, tmp_path: Path
) -> None:
    files = {"en/a.txt": english(24000), "ko/b.txt": korean(5000, word)}
    with pytest.raises(UserError, match=r"^--tokenizer_type wordpiece: .* cannot spell \d\d\.\d% .*\(ko ") as caught:
        prepare(files)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert not list((tmp_path / "out" / "tokenizers").glob("*.report.json"))
    advice = str(caught.value).partition("; use ")[2]
    assert advice.startswith("--tokenizer_type bpe")
    assert not prepare({}, tokenizer_type="bpe").drift_report.coverage.is_low
    sizes = re.findall(r" or --vocab_size (\d+)$", advice)
    assert bool(sizes) == larger, "a larger vocabulary does not help with words of more than 100 characters"
    for size in sizes:
        assert not prepare({}, vocab_size=int(size)).drift_report.coverage.is_low


def test_a_kept_tokenizer_is_measured_on_text_that_was_added(prepare: Prepare, tmp_path: Path) -> None:
    first = prepare({"en/a.txt": english(32000)})
    assert not first.drift_report.coverage.is_low
    added = prepare({"ko/b.txt": korean(600)})
    assert added.reused and added.drift_report.coverage.is_low
    with pytest.raises(UserError, match=r"use --tokenizer_type bpe"):
        prepare({"ko/c.txt": korean(6000)})


def test_a_measurement_of_a_version_without_coverage_is_completed(prepare: Prepare, tmp_path: Path, opened: list[str]) -> None:
    files = {"en/a.txt": english(160000), "ko/b.txt": korean(2000)}
    found = prepare(files).drift_report
    (cache,) = (tmp_path / "out" / "tokenizers").glob("*.tried.json")
    older = {name: value for name, value in read_json(cache).items() if name not in ("coverage", "sha256_of_the_rest")}
    write_json(cache, older)
    assert prepare({}).drift_report == found


def test_each_source_is_sampled_and_small_ones_are_joined(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_SAMPLED_BYTES", 4000)
    monkeypatch.setattr(coverage, "_LISTED_SOURCES", 2)
    read: list[int] = []
    monkeypatch.setattr(Tokenizer, "spelled_bytes", lambda tokenizer, text: read.append(len(text)) or len("".join(text.split())))
    files = {"big/a.txt": english(160000), "mid/b.txt": english(8000, 170_000)}
    files |= {"x/c.txt": english(1600, 180_000), "y/d.txt": english(2400, 185_000)}
    sources = prepare(files).drift_report.coverage.sources
    assert [source["source"] for source in sources] == ["big", "mid", "(others)"]
    assert 3 <= len(read) <= 12 and sum(read) < 4000 + 3 * 512
