"""Near duplicates: found by wording, independent of the order of arrival, without reading a document twice."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_core.config import CorpusConfig
from llm_core.corpus import Snapshot, deduplication, take_snapshot
from llm_core.errors import UserError

pytest.importorskip("datasketch", reason="the extra dedup is not installed")

CONFIG = CorpusConfig(val_fraction=0.49, near_duplicates=0.8)
WORDS = [f"word{number}" for number in range(5000)]


def prose(seed: int, count: int = 300) -> list[str]:
    return random.Random(seed).sample(WORDS, count)


def altered(words: list[str], changes: int, seed: int = 0) -> list[str]:
    """The same words except for a few scattered ones, each in five shingles."""
    words = list(words)
    for place in random.Random(seed).sample(range(len(words)), changes):
        words[place] = f"other{place}"
    return words


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    directory = tmp_path / "raw"
    directory.mkdir()
    for number in range(12):
        write(directory, f"f{number:02}.txt", prose(number))
    return directory


@pytest.fixture
def signed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of documents read for comparison by each later snapshot."""
    counts: list[int] = []
    original = deduplication._compute

    def recording(documents: Any, read_texts: Any) -> Any:
        counts.append(documents.num_rows)
        return original(documents, read_texts)

    monkeypatch.setattr(deduplication, "_compute", recording)
    return counts


def write(directory: Path, name: str, words: list[str]) -> None:
    (directory / name).write_text(" ".join(words))


def status_of(snapshot: Snapshot) -> dict[str, str]:
    return dict(zip(snapshot.documents["path"].to_pylist(), snapshot.documents["status"].to_pylist(), strict=True))


def test_only_documents_above_the_threshold_are_dropped_and_counted(raw: Path, tmp_path: Path) -> None:
    write(raw, "g_near.txt", altered(prose(3), 3))  # shingles shared: about 281 of 311
    write(raw, "g_far.txt", altered(prose(4), 40))  # about 140 of 450
    write(raw, "g_shouted.txt", [word.upper() + "!" for word in prose(5)])
    (raw / "g_symbols.txt").write_text("!!! ???")
    (raw / "g_symbols2.txt").write_text("... ---")
    snapshot = take_snapshot(raw, tmp_path / "out", CONFIG)
    status = status_of(snapshot)
    dropped = {path for path in status if status[path] == "near_duplicate"}
    assert dropped == {"g_near.txt", "g_shouted.txt"}
    assert set(status.values()) == {"kept", "near_duplicate"}
    summary = snapshot.summary
    assert summary["bytes_dropped"] == {"near_duplicate": sum((raw / path).stat().st_size for path in dropped)}
    assert summary["bytes_read"] == summary["bytes_kept"] + sum(summary["bytes_dropped"].values())
    assert summary["quarantined"] == []
    without = take_snapshot(raw, tmp_path / "other", CorpusConfig(val_fraction=0.49))
    assert set(status_of(without).values()) == {"kept"}, "the filter is off by default"


def test_a_document_is_compared_only_with_kept_ones(raw: Path, tmp_path: Path) -> None:
    near = altered(prose(3), 5, seed=1)
    write(raw, "g.txt", near)
    write(raw, "h.txt", altered(near, 5, seed=2))  # similar to g.txt (dropped), not to f03.txt
    status = status_of(take_snapshot(raw, tmp_path / "out", CONFIG))
    assert (status["f03.txt"], status["g.txt"], status["h.txt"]) == ("kept", "near_duplicate", "kept")


def test_rule_33_the_first_in_order_is_kept_independent_of_history(raw: Path, tmp_path: Path) -> None:
    write(raw, "m.txt", altered(prose(3), 2, seed=1))
    (raw / "f03.txt").rename(raw / "n.txt")
    first = take_snapshot(raw, tmp_path / "out", CONFIG)
    assert (status_of(first)["m.txt"], status_of(first)["n.txt"]) == ("kept", "near_duplicate")
    write(raw, "a.txt", altered(prose(3), 2, seed=2))
    second = take_snapshot(raw, tmp_path / "out", CONFIG)
    assert [status_of(second)[name] for name in ("a.txt", "m.txt", "n.txt")] == ["kept", "near_duplicate", "near_duplicate"]
    scratch = take_snapshot(raw, tmp_path / "scratch", CONFIG)
    assert scratch.snapshot_id == second.snapshot_id
    assert scratch.documents.equals(second.documents)
    (raw / "a.txt").unlink()
    (tmp_path / "out" / "snapshots" / f"{first.snapshot_id}.json").unlink()  # so that it is taken again
    assert take_snapshot(raw, tmp_path / "out", CONFIG).documents.equals(first.documents)


def test_only_new_documents_are_read_for_comparison(raw: Path, tmp_path: Path, signed: list[int], opened: list[str]) -> None:
    take_snapshot(raw, tmp_path / "out", CONFIG)
    take_snapshot(raw, tmp_path / "out", CONFIG)
    write(raw, "new.txt", prose(100))
    opened.clear()
    take_snapshot(raw, tmp_path / "out", CONFIG)
    assert signed == [12, 1]
    assert set(opened) == {"new.txt"}


@pytest.mark.parametrize("damage", [b"", b"PAR1 nonsense", "a flipped bit", None])
def test_a_lost_or_damaged_signature_cache_only_costs_reading(damage: Any, raw: Path, tmp_path: Path, signed: list[int]) -> None:
    take_snapshot(raw, tmp_path / "out", CONFIG)
    cache = tmp_path / "out" / "snapshots" / "signatures.parquet"
    if damage is None:
        cache.unlink()
    else:
        data = bytearray(cache.read_bytes())
        data[len(data) // 2] ^= 1
        cache.write_bytes(damage if isinstance(damage, bytes) else data)
    write(raw, "new.txt", altered(prose(3), 2))
    assert status_of(take_snapshot(raw, tmp_path / "out", CONFIG))["new.txt"] == "near_duplicate"
    assert signed == [12, 13]


def test_a_missing_package_is_named_with_its_extra(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    monkeypatch.setattr(deduplication.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'--near_duplicates 0.8 needs the package datasketch; .*"\.\[dedup\]"'):
        take_snapshot(raw, tmp_path / "out", CONFIG)
