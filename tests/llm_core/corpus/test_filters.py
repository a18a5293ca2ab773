"""Filters drop well-formed but unwanted text: off by default, counted by reason, functions of the text only."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llm_core.config import CorpusConfig
from llm_core.corpus import Snapshot, filters, take_snapshot

WORDS = [f"word{number}" for number in range(1000)]


def prose(seed: int, count: int = 60) -> str:
    return " ".join(random.Random(seed).sample(WORDS, count))


def snapshot_of(tmp_path: Path, files: dict[str, str], **options: object) -> Snapshot:
    """A snapshot of the files, with enough other text for both splits."""
    raw = tmp_path / "raw"
    raw.mkdir(exist_ok=True)
    for name, text in ({f"other{number:02}.txt": prose(number, 20) for number in range(20)} | files).items():
        (raw / name).write_text(text)
    return take_snapshot(raw, tmp_path / "out", CorpusConfig.model_validate({"val_fraction": 0.49, **options}))


def status_of(snapshot: Snapshot, path: str) -> list[str]:
    return [row["status"] for row in snapshot.documents.to_pylist() if row["path"] == path]


FILES = {
    "short.txt": "Too little.",
    "long.txt": "\n".join(prose(1000 + number) for number in range(40)),
    "spam.txt": "buy cheap pills online now " * 20,
    "table.txt": "\n".join(f"{number} | {number * number} | {number % 7}" for number in range(100)),
}


@pytest.mark.parametrize(
    ("option", "value", "path", "reason"),
    [
        ("min_characters", 12, "short.txt", "too_short"),
        ("max_characters", 5000, "long.txt", "too_long"),
        ("max_repetition", 0.15, "spam.txt", "repetitive"),
        ("min_letter_share", 0.5, "table.txt", "few_letters"),
    ],
)
def test_each_filter_drops_only_its_kind_of_text(option: str, value: float, path: str, reason: str, tmp_path: Path) -> None:
    everything = snapshot_of(tmp_path, FILES)
    assert set(everything.documents["status"].to_pylist()) == {"kept"}, "filters are off by default"
    summary = snapshot_of(tmp_path, FILES, **{option: value}).summary
    assert summary["bytes_dropped"] == {reason: len(FILES[path])}
    assert summary["bytes_read"] == summary["bytes_kept"] + sum(summary["bytes_dropped"].values())
    assert summary["quarantined"] == [], "unwanted text causes no warning"
    assert everything.snapshot_id != summary["snapshot_id"]


def test_length_filters_see_the_complete_text_before_it_is_split(tmp_path: Path) -> None:
    text = "x" * 300 + "\n" + "tail"
    files = {"a.txt": text, "b.jsonl": json.dumps({"text": text + "!"}) + "\n" + json.dumps({"text": "tail?"})}
    shorter = snapshot_of(tmp_path, files, max_document_bytes=301, min_characters=50)
    assert status_of(shorter, "a.txt") == ["kept", "kept"], "the tail of a long text is no short text"
    assert status_of(shorter, "b.jsonl") == ["duplicate", "kept", "too_short"]
    longer = snapshot_of(tmp_path, files, max_document_bytes=301, max_characters=304)
    assert status_of(longer, "a.txt") == ["too_long", "too_long"]
    assert status_of(longer, "b.jsonl") == ["too_long", "too_long", "kept"]


def test_min_characters_must_not_exceed_max_characters() -> None:
    with pytest.raises(ValidationError, match="min_characters 10 must not exceed max_characters 9"):
        CorpusConfig(min_characters=10, max_characters=9)


@pytest.mark.parametrize(
    ("text", "share"),
    [("abc d", 1.0), ("ab12", 0.5), ("1 2 3", 0.0), ("हिन्दी", 1.0), ("中文。", 2 / 3), (" \n", 0.0)],
)
def test_letters_and_combining_marks_count_in_every_script(text: str, share: float) -> None:
    assert filters.letter_share(text) == pytest.approx(share)


def test_repetition_is_the_share_of_characters_in_repeated_five_word_sequences() -> None:
    assert filters.repetition("one two three four five six seven") == 0
    assert filters.repetition("a b c d e " * 2) == 0.5
    assert filters.repetition("Zeile eins ist ganz neu\n" + "Zeile zwei ist auch neu\n" * 3) == pytest.approx(0.5, abs=0.01)
    assert filters.repetition("word " * 1000) > 0.95
    assert filters.repetition("") == filters.repetition("word") == 0


@given(st.text(alphabet="ab \n", max_size=300))
def test_the_measures_are_between_0_and_1(text: str) -> None:
    assert 0 <= filters.repetition(text) <= 1
    assert 0 <= filters.letter_share(text) <= 1
