"""Builds encode only new documents, reuse shards, and survive interruption and damage."""

import hashlib
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig
from llm_core.corpus import iter_texts, take_snapshot
from llm_core.dataset import DatasetManifest, DocumentGroups, build_dataset, kept_documents, load_manifest, token_slices
from llm_core.dataset import build as build_module
from llm_core.dataset.shard import open_tokens
from llm_core.dataset.windows import TokenStream, Windows
from llm_core.errors import DataError
from llm_core.system import read_json
from llm_core.tokenizer import Tokenizer, parallel, prepare_tokenizer

CORPUS = CorpusConfig(max_document_bytes=2048, val_fraction=0.2)
TOKENIZER = TokenizerConfig(vocab_size=300)
SHARDS = {"max_length": 64, "num_workers": 1, "shard_bytes": 1 << 16}


@pytest.fixture
def raw(corpus_dir: Path, tmp_path: Path) -> Path:
    """A copy of the corpus that a test may change."""
    return Path(shutil.copytree(corpus_dir, tmp_path / "raw"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "processed"


def prepare(
    raw: Path, out: Path, tokenizer: TokenizerConfig = TOKENIZER, corpus: CorpusConfig = CORPUS, **options: Any
) -> DatasetManifest:
    snapshot = take_snapshot(raw, out, corpus)
    artifact = prepare_tokenizer(snapshot, raw, out, tokenizer)
    return build_dataset(snapshot, artifact, raw, out, ShardConfig(**(SHARDS | options))).manifest


def contents(out: Path) -> dict[str, tuple[int, str]]:
    """Every file below `out` with its time of writing and digest."""
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def decoded(out: Path, manifest: DatasetManifest, split: str) -> list[str]:
    """The documents of a split, decoded from its tokens."""
    tokenizer = Tokenizer.load(out / manifest.tokenizer.file)
    tokens = np.concatenate(token_slices(out, manifest, split)[0])
    assert tokens[0] == tokenizer.eot_id
    return [tokenizer.decode(ids[1:]) for ids in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id))[1:]]


def expected_documents(raw: Path, out: Path, manifest: DatasetManifest, split: str) -> dict[str, str]:
    """The documents that a split should hold, by id."""
    snapshot = take_snapshot(raw, out, CORPUS)
    rows = snapshot.kept_documents()
    rows = rows.filter(pa.compute.equal(rows["split"], split))
    return dict(zip(rows["document_id"].to_pylist(), iter_texts(raw, rows, CorpusConfig()), strict=True))


def assert_holds(raw: Path, out: Path, manifest: DatasetManifest) -> None:
    """The dataset is exactly the text of the folder, and its totals add up."""
    for split in ("train", "val"):
        expected = expected_documents(raw, out, manifest, split)
        ((ids, counts),) = kept_documents(out, manifest, split)
        assert dict(zip(ids.to_pylist(), decoded(out, manifest, split), strict=True)) == expected
        totals = manifest.splits[split]
        assert totals.documents == len(expected) == len(counts)
        assert totals.bytes == sum(len(text.encode()) for text in expected.values())
        assert totals.tokens == counts.sum() == sum(len(tokens) for tokens in token_slices(out, manifest, split)[0])


def test_decoded_shards_are_the_kept_text(raw: Path, out: Path) -> None:
    assert_holds(raw, out, prepare(raw, out))


def test_rule_32_each_token_is_stored_once_whatever_the_stride(raw: Path, out: Path) -> None:
    first = prepare(raw, out)
    files = contents(out / "dataset")
    second = prepare(raw, out, max_length=32, stride=16)
    assert contents(out / "dataset") == files
    assert second.dataset_id == first.dataset_id
    assert (second.max_length, second.stride) == (32, 16) == (load_manifest(out).max_length, load_manifest(out).stride)
    stream = TokenStream(token_slices(out, second, "train")[0])
    assert len(stream) == second.splits["train"].tokens
    assert len(Windows([stream], 32, 16, 0)) > 1.9 * len(Windows([stream], 32, 0, 0))


def test_rule_33_the_same_bytes_at_any_worker_count_and_batch_size(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(raw, out, num_workers=1)
    expected = {name: digest for name, (_, digest) in contents(out).items() if "file_index" not in name}
    for workers, batch_bytes in ((3, 1 << 22), (0, 5000)):
        monkeypatch.setattr(parallel, "_BATCH_CHARACTERS", batch_bytes)
        other = out.with_name(f"workers{workers}")
        prepare(raw, other, num_workers=workers)
        assert {name: digest for name, (_, digest) in contents(other).items() if "file_index" not in name} == expected


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts encoded from here on."""
    texts: list[str] = []
    original = Tokenizer.encode_batch

    def recording(tokenizer: Tokenizer, batch: list[str]) -> Any:
        texts.extend(batch)
        return original(tokenizer, batch)

    monkeypatch.setattr(Tokenizer, "encode_batch", recording)
    return texts


def test_nothing_new_opens_nothing_and_writes_nothing(raw: Path, out: Path, opened: list[str], encoded: list[str]) -> None:
    corpus = CorpusConfig(max_document_bytes=2048, val_fraction=0.49)  # several shards of both splits, filled in turns
    first = prepare(raw, out, corpus=corpus)
    assert all(sum(shard.split == split for shard in first.shards) > 1 for split in ("train", "val"))
    files = contents(out)
    opened.clear()
    encoded.clear()
    assert prepare(raw, out, corpus=corpus) == first
    assert opened == [] == encoded
    assert contents(out) == files


def test_only_an_added_file_is_opened_and_tokenized(raw: Path, out: Path, opened: list[str], encoded: list[str]) -> None:
    first = prepare(raw, out)
    files = contents(out / "dataset")
    opened.clear()
    encoded.clear()
    (raw / "new.txt").write_text("".join(f"Line {number} of the new file.\n" for number in range(500)))
    second = prepare(raw, out)
    assert set(opened) == {"new.txt"}
    assert "".join(encoded) == (raw / "new.txt").read_text()
    opened.clear()
    (raw / "newer.txt").write_text("".join(f"Line {number} of the newer file.\n" for number in range(500)))
    prepare(raw, out)
    assert set(opened) == {"newer.txt"}, "drift is not measured again on text that was already measured"
    opened.clear()
    (raw / "newer.txt").unlink()
    (raw / "new.txt").rename(raw / "renamed.txt")
    prepare(raw, out)
    assert set(opened) == {"renamed.txt"}
    (raw / "renamed.txt").rename(raw / "new.txt")
    second = prepare(raw, out)
    assert [shard for shard in second.shards if shard in first.shards] == first.shards
    assert len(second.shards) > len(first.shards)
    assert second.parent_dataset_id == first.dataset_id
    assert files.items() < contents(out / "dataset").items(), "no shard was written again"
    assert_holds(raw, out, second)


def test_a_removed_file_is_marked_as_removed_and_returns_without_encoding(raw: Path, out: Path, encoded: list[str]) -> None:
    first = prepare(raw, out)
    files = contents(out / "dataset")
    encoded.clear()
    text = (raw / "topic01.txt").read_text()
    (raw / "topic01.txt").unlink()
    second = prepare(raw, out)
    removed = sum(len(shard.removed_rows) for shard in second.shards)
    assert removed > 0
    assert second.dataset_id != first.dataset_id
    assert contents(out / "dataset") == files
    assert_holds(raw, out, second)
    (raw / "again.txt").write_text(text)
    third = prepare(raw, out)
    assert third.dataset_id == first.dataset_id
    assert encoded == []
    assert_holds(raw, out, third)


def test_a_shard_without_wanted_rows_is_dropped(raw: Path, out: Path) -> None:
    prepare(raw, out)
    (raw / "new.txt").write_text("".join(f"Line {number} of the new file.\n" for number in range(500)))
    grown = prepare(raw, out)
    (raw / "new.txt").unlink()
    shrunk = prepare(raw, out)
    assert len(shrunk.shards) < len(grown.shards)
    assert all(not shard.removed_rows for shard in shrunk.shards)


def test_documents_move_when_the_split_changes(raw: Path, out: Path) -> None:
    prepare(raw, out)
    other = CorpusConfig(max_document_bytes=2048, val_fraction=0.4)
    manifest = prepare(raw, out, corpus=other)
    train, val = (set(kept_documents(out, manifest, split)[0][0].to_pylist()) for split in ("train", "val"))
    rows = take_snapshot(raw, out, other).kept_documents().to_pylist()
    assert train == {row["document_id"] for row in rows if row["split"] == "train"}
    assert val == {row["document_id"] for row in rows if row["split"] == "val"}


def test_another_tokenizer_writes_its_own_shards_and_keeps_the_old_ones(raw: Path, out: Path) -> None:
    first = prepare(raw, out)
    second = prepare(raw, out, TokenizerConfig(tokenizer_type="wordpiece", vocab_size=400))
    assert second.tokenizer.tokenizer_type == "wordpiece"
    assert second.parent_dataset_id == first.dataset_id
    assert not {shard.shard_id for shard in first.shards} & {shard.shard_id for shard in second.shards}
    assert load_manifest(out, first.dataset_id).tokenizer == first.tokenizer


def test_switching_vocabularies_repeats_nothing(raw: Path, out: Path) -> None:
    other = TokenizerConfig(vocab_size=310)
    prepare(raw, out)
    (raw / "second.txt").write_text("Text that came after the tokenizer was made.\n" * 40)
    first = prepare(raw, out)
    assert len(first.shards) > 2, "shards of two preparations"
    between = prepare(raw, out, other)
    assert prepare(raw, out) == first
    (raw / "third.txt").write_text("And text that came after both.\n" * 40)
    second = prepare(raw, out)
    assert second.tokenizer == first.tokenizer
    assert {shard.shard_id for shard in first.shards} < {shard.shard_id for shard in second.shards}
    assert {shard.shard_id for shard in between.shards} < {shard.shard_id for shard in prepare(raw, out, other).shards}


def test_rule_30_an_old_manifest_stays_readable(raw: Path, out: Path) -> None:
    first = prepare(raw, out)
    before = decoded(out, first, "train")
    (raw / "topic01.txt").unlink()
    (raw / "topic02.txt").write_text("Replaced.\n" * 300)
    second = prepare(raw, out)
    old = load_manifest(out, first.dataset_id)
    assert old == first != second
    assert decoded(out, old, "train") == before
    stored = read_json(out / "manifests" / f"{second.dataset_id}.json")
    newest = {second.tokenizer.tokenizer_id: second.dataset_id}
    assert stored | {"max_length": 64, "stride": 0, "newest": newest} == read_json(out / "metadata.json")
    assert "stride" not in stored


@pytest.mark.parametrize("grouped", [False, True])
def test_many_shards_are_read_without_memory_maps(grouped: bool, raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may hold 65,530 maps."""
    manifest = prepare(raw, out)
    lookups = []

    def group_of(document_ids: pa.ChunkedArray) -> Any:
        lookups.append(len(document_ids))
        return np.array([int(document_id[0], 16) % 3 - 1 for document_id in document_ids.to_pylist()])

    groups = DocumentGroups(["a", "b"], group_of) if grouped else None
    mapped = Windows.open(out, manifest, "train", 64, 8, groups)
    assert maps_below(out) == sum(shard.split == "train" for shard in manifest.shards) > 2
    expected = mapped.batch(np.arange(len(mapped)))
    del mapped
    monkeypatch.setattr("llm_core.dataset.groups.MAX_MAPPED_SHARDS", 2)
    on_disk = Windows.open(out, manifest, "train", 64, 8, groups)
    for tokens, others in zip(on_disk.batch(np.arange(len(on_disk))), expected, strict=True):
        assert torch.equal(tokens, others)
    assert maps_below(out) == 0
    assert len(lookups) == 2 * grouped, "all documents at once: each lookup hashes all ids"


def maps_below(folder: Path) -> int:
    """Memory maps of this process of the files in a folder."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


def test_a_build_looks_up_the_documents_of_all_shards_at_once(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = prepare(raw, out)
    ((wanted, _),) = kept_documents(out, manifest, "train")
    original, lookups = pa.compute.is_in, count()

    def counting(*arguments: Any, **options: Any) -> Any:
        next(lookups)
        return original(*arguments, **options)

    monkeypatch.setattr(pa.compute, "is_in", counting)
    shards, stored = build_module._reuse(out, manifest, "train", wanted.slice(1))
    assert [shard.removed_rows for shard in shards] == [[0]] + [[]] * (len(shards) - 1)
    assert len(shards) > 2 and len(stored) == len(wanted)
    assert next(lookups) == 1


def test_progress_counts_bytes_of_text(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_PROGRESS_BYTES", 50_000)
    snapshot = take_snapshot(raw, out, CORPUS)
    seen: list[tuple[int, int]] = []
    artifact = prepare_tokenizer(snapshot, raw, out, TOKENIZER)
    build = build_dataset(snapshot, artifact, raw, out, ShardConfig(**SHARDS), lambda done, total: seen.append((done, total)))
    assert (build.documents_encoded, build.bytes_encoded) == (snapshot.summary["documents"], snapshot.summary["bytes_kept"])
    assert (build.documents_reused, build.shards_written) == (0, len(build.manifest.shards))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (snapshot.summary["bytes_kept"],) * 2
    (raw / "new.txt").write_text("Only this is new.")
    added = build_dataset(take_snapshot(raw, out, CORPUS), artifact, raw, out, ShardConfig(**SHARDS))
    assert (added.documents_encoded, added.bytes_encoded, added.shards_written) == (1, 17, 1)
    assert added.documents_reused == build.documents_encoded


def test_an_interrupted_build_leaves_the_old_dataset_valid_and_the_next_build_finishes(
    data_dir: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th fsync or rename fails, for n = 1, 2, 3, ... until the build goes through."""
    before = load_manifest(data_dir)
    (raw / "new.txt").write_text("".join(f"Line {number} of the new file.\n" for number in range(500)))
    (raw / "topic01.txt").unlink()
    countdown = 0

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        return replacement

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    config: Any = {"tokenizer": TokenizerConfig(vocab_size=512), "corpus": CorpusConfig(max_document_bytes=2048)}
    finished = set()
    for call in count(1):
        out = tmp_path / f"out{call}"
        shutil.copytree(data_dir, out)
        countdown = call
        try:
            prepare(raw, out, **config)
            break
        except (OSError, DataError):
            seen = load_manifest(out)
            assert seen == before or seen.parent_dataset_id == before.dataset_id
            assert token_slices(out, seen, "train") != [[]]
            assert token_slices(out, seen, "val") != [[]]
        assert not list(out.rglob("*.tmp"))
        after = prepare(raw, out, **config)
        assert after == load_manifest(out)
        assert token_slices(out, after, "train") != [[]]
        finished.add(after.dataset_id)
        shutil.rmtree(out)
    assert call > 20
    assert len(finished) == 1, "every second try gives the same dataset"


@pytest.mark.parametrize("damage", ["remove", "truncate", "index"])
def test_a_lost_or_truncated_shard_is_rebuilt(damage: str, raw: Path, out: Path) -> None:
    first = prepare(raw, out)
    path = out / (first.shards[0].index_file if damage == "index" else first.shards[0].file)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "index":
        path.write_bytes(b"PAR1")
    else:
        path.unlink()
    again = prepare(raw, out)
    assert {shard.shard_id for shard in again.shards} == {shard.shard_id for shard in first.shards}
    assert_holds(raw, out, again)


def test_a_flipped_bit_is_detected_when_tokens_are_opened(raw: Path, out: Path) -> None:
    manifest = prepare(raw, out)
    path = out / manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: damaged .*; delete it and run python -m llm_core.data_prep_tool again"):
        open_tokens(out, manifest.shards[0])
    assert len(open_tokens(out, manifest.shards[0], verify=False)) == manifest.shards[0].tokens
