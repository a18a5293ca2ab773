"""A folder becomes documents: every byte accounted for, nothing harmful let in, nothing read twice."""

import gzip
import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_core.config import CorpusConfig
from llm_core.corpus import (
    Snapshot,
    content,
    documents,
    folder,
    iter_texts,
    load_snapshot,
    parquet_format,
    readers,
    take_snapshot,
    text_formats,
)
from llm_core.errors import DataError, UserError

# With half of the documents on each side, a handful is enough for both.
HALF = CorpusConfig(val_fraction=0.49, max_document_bytes=256)


# One name for each way of reading.
NAMES = ["a.txt", "b.jsonl", "c.md.gz", "d.jsonl.zst", "e.parquet", "f.parquet.gz"]


def fill(directory: Path, count: int = 16) -> None:
    """Small files, enough that both splits have some."""
    directory.mkdir(exist_ok=True)
    for number in range(count):
        (directory / f"plain{number:02}.txt").write_text(f"This is text number {number}.\n" * 3)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    fill(tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the corpus files opened from here on."""
    names: list[str] = []
    original = folder._open_regular

    def recording(path: Path) -> Any:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(folder, "_open_regular", recording)
    return names


def statuses(snapshot: Snapshot) -> dict[str, str]:
    return dict(zip(snapshot.files["path"].to_pylist(), snapshot.files["status"].to_pylist(), strict=True))


def texts_of(snapshot: Snapshot, raw: Path) -> list[str]:
    return list(iter_texts(raw, snapshot.kept_documents(), snapshot.config))


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def write_parquet(path: Path, values: list[Any], kind: pa.DataType | None = None, **options: Any) -> None:
    """A file with an `id` column beside the `text` column."""
    table = pa.table({"id": pa.array(range(len(values))), "text": pa.array(values, kind or pa.string())})
    pq.write_table(table, path, **options)


def write_jsonl(path: Path, *values: Any) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


# What is read


def test_reads_every_format_in_sorted_order_through_nested_folders(raw: Path, out: Path) -> None:
    deep = raw / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "one.md").write_text("markdown")
    with gzip.open(deep / "two.txt.gz", "wt") as file:
        file.write("squeezed")
    write_jsonl(raw / "z.jsonl", {"text": "line one", "id": 1}, {"id": 2, "text": "line two, né"})
    with gzip.open(raw / "z.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "squeezed line"}))
    (deep / "two.txt.zst").write_bytes(zstd(b"squeezed more"))
    (raw / "z.jsonl.zst").write_bytes(zstd(json.dumps({"text": "line squeezed more"}).encode()))
    (raw / "picture.png").write_bytes(b"\x89PNG")
    snapshot = take_snapshot(raw, out, HALF)
    paths = snapshot.files["path"].to_pylist()
    assert paths == sorted(paths)
    assert paths[:3] == ["a/b/one.md", "a/b/two.txt.gz", "a/b/two.txt.zst"]
    assert snapshot.summary["files_ignored"] == 1
    texts = texts_of(snapshot, raw)
    assert texts[:3] == ["markdown", "squeezed", "squeezed more"]
    assert texts[-4:] == ["line one", "line two, né", "squeezed line", "line squeezed more"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("pack", [None, gzip.compress, zstd])
def test_a_parquet_file_is_read_by_rows_and_each_row_is_found_again(kind: Any, pack: Any, raw: Path, out: Path) -> None:
    long = "".join(f"Line {n} of a long row, ü.\n" for n in range(50))
    values = [f"row {n}" for n in range(20)] + [long, "last"]
    write_parquet(raw / "a.parquet", values, kind, row_group_size=7)
    if pack:
        (raw / f"a.parquet.{'gz' if pack is gzip.compress else 'zst'}").write_bytes(pack((raw / "a.parquet").read_bytes()))
        (raw / "a.parquet").unlink()
    snapshot = take_snapshot(raw, out, HALF)
    rows = snapshot.kept_documents()
    rows = rows.filter(pa.compute.match_substring(rows["path"], "parquet"))
    assert "".join(iter_texts(raw, rows, HALF)) == "".join(values)
    assert rows["start"].to_pylist() == [*range(20), *[20] * (rows.num_rows - 21), 21]
    assert rows["text_start"].to_pylist()[-3] > 0, "the long row is divided"
    backwards = rows.take(list(reversed(range(20))))
    assert list(iter_texts(raw, backwards, HALF)) == values[19::-1]
    assert_bytes_add_up(snapshot)


def test_rows_without_text_are_set_aside_alone_and_counted(raw: Path, out: Path) -> None:
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers())
    column = pa.chunked_array([["good", None, ""], not_utf8])
    pq.write_table(pa.table({"text": column}), raw / "a.parquet")
    snapshot = take_snapshot(raw, out, HALF)
    rows = [row for row in snapshot.documents.to_pylist() if row["path"] == "a.parquet"]
    assert [(row["status"], row["bytes"]) for row in rows] == [("kept", 4), ("no_text_field", 0), ("blank", 0), ("not_utf8", 4)]
    assert {"path": "a.parquet", "reason": "not_utf8", "detail": "row 3"} in snapshot.summary["quarantined"]
    assert_bytes_add_up(snapshot)


def test_a_parquet_file_without_the_column_or_with_numbers_in_it_is_quarantined(raw: Path, out: Path) -> None:
    pq.write_table(pa.table({"body": ["no such column"], "id": [1]}), raw / "a.parquet")
    write_parquet(raw / "b.parquet", [1, 2], pa.int64())
    write_parquet(raw / "c.parquet", [], pa.string())
    quarantined = {entry["path"]: entry for entry in take_snapshot(raw, out, HALF).summary["quarantined"]}
    assert quarantined["a.parquet"]["detail"] == "no column 'text' among body, id"
    assert quarantined["b.parquet"]["detail"] == "the column 'text' holds int64, not strings"
    assert [quarantined[f"{name}.parquet"]["reason"] for name in "abc"] == ["no_text_field", "no_text_field", "empty"]


def test_the_same_rows_written_with_another_compression_are_the_same_snapshot(raw: Path, out: Path) -> None:
    write_parquet(raw / "a.parquet", ["one", None, "two"], compression="snappy")
    first = take_snapshot(raw, out, HALF)
    write_parquet(raw / "a.parquet", ["one", None, "two"], compression="zstd", row_group_size=1)
    assert take_snapshot(raw, out, HALF).snapshot_id == first.snapshot_id
    write_parquet(raw / "a.parquet", ["onet", None, "wo"])
    assert take_snapshot(raw, out, HALF).snapshot_id != first.snapshot_id


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_parquet_file_can_only_be_quarantined(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("damaged")
    fill(base / "raw")
    path = base / "raw" / "a.parquet"
    write_parquet(path, [f"row {n}" * 20 for n in range(40)], row_group_size=15)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    assert_bytes_add_up(take_snapshot(base / "raw", base / "out", HALF))


def test_what_a_parquet_file_can_expand_to_is_bounded(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MAX_COMPRESSION_FREE", 1 << 20)
    write_parquet(raw / "a.parquet", ["boom " * 10_000] * 1000)  # one entry of a dictionary, a thousand times
    snapshot = take_snapshot(raw, out, HALF)
    assert statuses(snapshot)["a.parquet"] == "too_compressed"
    assert snapshot.summary["bytes_read"] < 2 << 20
    assert_bytes_add_up(snapshot)
    monkeypatch.setattr(parquet_format, "MAX_ROW_GROUP_BYTES", 1000)
    write_parquet(raw / "a.parquet", ["large " * 1000])
    assert statuses(take_snapshot(raw, out, HALF))["a.parquet"] == "row_group_too_large"


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_compressed_files_of_many_parts_are_one_stream_read_in_any_order(
    pack: Callable[[bytes], bytes], raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"Line {n}: {'ü' * n}"}).encode() + b"\n" for n in range(200)]
    suffix = "gz" if pack is gzip.compress else "zst"
    (raw / f"a.jsonl.{suffix}").write_bytes(b"".join(pack(b"".join(lines[n : n + 70])) for n in range(0, 200, 70)))
    monkeypatch.setattr(content, "BLOCK", 500)
    snapshot = take_snapshot(raw, out, CorpusConfig(val_fraction=0.49))
    rows = snapshot.kept_documents().slice(0, 200)
    backwards = rows.take(list(reversed(range(200))))
    assert list(iter_texts(raw, backwards, HALF)) == [f"Line {n}: {'ü' * n}" for n in reversed(range(200))]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-7], lambda data: data + b"more", lambda data: b"plain", lambda data: data[:30] + b"\0" * 9 + data[39:]],
    ids=["truncated", "followed by something else", "not compressed at all", "overwritten"],
)
def test_a_damaged_zst_file_is_quarantined_and_its_bytes_are_counted(damage: Any, raw: Path, out: Path) -> None:
    (raw / "a.txt.zst").write_bytes(damage(zstd(os.urandom(3000).hex().encode())))
    snapshot = take_snapshot(raw, out, HALF)
    assert statuses(snapshot)["a.txt.zst"] == "unreadable_zstd"
    assert_bytes_add_up(snapshot)


def test_text_field_names_the_field_of_jsonl_lines(raw: Path, out: Path) -> None:
    write_jsonl(raw / "z.jsonl", {"body": "from the body", "text": "not this"})
    snapshot = take_snapshot(raw, out, CorpusConfig(text_field="body", val_fraction=0.49))
    assert texts_of(snapshot, raw)[-1] == "from the body"


def test_hidden_files_links_out_of_the_folder_and_special_files_are_skipped(raw: Path, out: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("outside")
    (tmp_path / "elsewhere").mkdir()
    (raw / "leaves.txt").symlink_to(secret)
    (raw / "leaves_too").symlink_to(tmp_path / "elsewhere")
    (raw / "stays.txt").symlink_to("plain00.txt")
    (raw / "dangling.txt").symlink_to("nowhere.txt")
    (raw / ".hidden.txt").write_text("hidden")
    os.mkfifo(raw / "fifo.txt")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(raw / "socket.txt"))
    listener.close()
    summary = take_snapshot(raw, out, HALF).summary
    assert summary["files_skipped"] == {
        "link_out_of_folder": 1,
        "link_to_folder": 1,
        "vanished": 1,
        "hidden": 1,
        "not_a_regular_file": 2,
    }
    assert summary["bytes_dropped"] == {"duplicate": (raw / "plain00.txt").stat().st_size}  # the link that stays inside


# Long texts


@given(text=st.text(alphabet="ab\n é中🙂", max_size=2000), limit=st.integers(256, 300))
def test_long_text_is_divided_without_losing_a_byte(text: str, limit: int) -> None:
    data, start, pieces = text.encode(), 0, []
    while start < len(data):
        end = documents.piece_end(data, start, limit)
        pieces.append(data[start:end])
        start = end
    assert b"".join(pieces) == data
    assert all(len(piece) <= limit and piece.decode() for piece in pieces)
    assert all(piece.endswith(b"\n") or b"\n" not in piece for piece in pieces[:-1])


def test_division_does_not_depend_on_how_much_is_read_at_once(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (raw / "long.txt").write_text("".join(f"Zeile {n}: Größe\n" for n in range(500)) + "ü" * 1000)
    whole = take_snapshot(raw, out, HALF)
    monkeypatch.setattr(text_formats, "BLOCK", 7)
    assert take_snapshot(raw, out.with_name("out2"), HALF).documents.equals(whole.documents)
    assert max(whole.documents["bytes"].to_pylist()) <= 256
    pieces = [text for text in texts_of(whole, raw) if "Zeile" in text or "ü" in text]
    assert "".join(pieces).startswith("Zeile 0: Größe\n")


def test_a_long_jsonl_text_is_divided_and_found_again(raw: Path, out: Path) -> None:
    text = "".join(f'Line {n} with "quotes" and ü.\n' for n in range(100))
    write_jsonl(raw / "a.jsonl", {"text": "short"}, {"text": text}, {"text": "last"})
    assert "".join(texts_of(take_snapshot(raw, out, HALF), raw)).startswith("short" + text + "last")


# Rule 34


def assert_bytes_add_up(snapshot: Snapshot) -> None:
    summary = snapshot.summary
    assert summary["bytes_read"] == summary["bytes_kept"] + sum(summary["bytes_dropped"].values())
    assert summary["bytes_kept"] == summary["train_bytes"] + summary["val_bytes"]


def test_rule_34_bytes_read_are_kept_or_dropped_by_reason(raw: Path, out: Path) -> None:
    (raw / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (raw / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "marked line"}\n\n')
    (raw / "blank.txt").write_text(" \n\t\n")
    (raw / "empty.txt").write_text("")
    (raw / "latin1.txt").write_bytes("fine at first, then: é".encode("latin-1"))
    (raw / "copy.txt").write_bytes((raw / "plain03.txt").read_bytes())
    bad_lines = ["{not json", '{"text": 5}', '["text"]', '{"text": "half \\ud800 of a character"}', "[" * 100_000]
    (raw / "lines.jsonl").write_text("\n".join([*bad_lines, '{"text": "good"}', '{"text": ""}']))
    with gzip.open(raw / "cut.txt.gz", "wb", compresslevel=1) as file:
        file.write(os.urandom(3000).hex().encode())
    (raw / "cut.txt.gz").write_bytes((raw / "cut.txt.gz").read_bytes()[:-1000])
    (raw / "nogzip.txt.gz").write_bytes(b"plain text")
    snapshot = take_snapshot(raw, out, HALF)
    assert_bytes_add_up(snapshot)
    dropped = snapshot.summary["bytes_dropped"]
    assert dropped["byte_order_mark"] == 6
    assert dropped["jsonl_envelope"] == len('{"text": ""}\n\n') + 2 * len('{"text": ""}') + 1
    assert dropped["blank"] == 4
    assert dropped["not_utf8"] == 22
    assert dropped["duplicate"] == (raw / "copy.txt").stat().st_size
    assert dropped["unreadable_json"] == len("{not json\n") + 100_001
    assert dropped["no_text_field"] == len('{"text": 5}\n["text"]\n')
    assert dropped["lone_surrogate"] == len(bad_lines[3]) + 1
    assert snapshot.summary["quarantined_by_reason"] == {
        "empty": 1, "not_utf8": 1, "unreadable_gzip": 2, "unreadable_json": 2, "no_text_field": 2, "lone_surrogate": 1,
    }  # fmt: skip
    assert {"path": "latin1.txt", "reason": "not_utf8", "detail": "unexpected end of data at byte 21"} in snapshot.summary[
        "quarantined"
    ]
    assert statuses(snapshot)["lines.jsonl"] == "kept"


# Encoding

BAD = b"fine, then \xe9\xff and \xc3 end"
"""Three bad sequences."""


@pytest.mark.parametrize("block", [1 << 20, 5])
def test_bytes_that_are_not_utf8_are_replaced_only_if_asked(block: int, raw: Path, out: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(content, "BLOCK", block)
    (raw / "a.txt").write_bytes(BAD * 30)
    (raw / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + BAD + b'1"}\n{"text": "fine \xef\xbf\xbd"}\n'))
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([BAD + b"2"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": bad}), raw / "c.parquet")
    untouched = take_snapshot(raw, out, HALF)
    assert untouched.summary["quarantined_by_reason"] == {"not_utf8": 3}
    assert untouched.summary["sequences_replaced"] == 0
    config = HALF.model_copy(update={"invalid_utf8": "replace"})
    snapshot = take_snapshot(raw, out, config)
    repaired = "fine, then \ufffd\ufffd and \ufffd end"
    texts = texts_of(snapshot, raw)
    assert "".join(texts[:-19]) == repaired * 30
    assert texts[-19:-16] == [repaired + "1", "fine \ufffd", repaired + "2"]
    assert snapshot.summary["sequences_replaced"] == 32 * 3, "the one that was in the text is not counted"
    assert snapshot.summary["quarantined_by_reason"] == {}
    assert_bytes_add_up(snapshot)
    assert list(iter_texts(raw, snapshot.kept_documents().slice(1, 2), config)) == texts[1:3]


@pytest.mark.parametrize("invalid_utf8", ["quarantine", "replace"])
def test_binary_content_is_quarantined_and_never_repaired(invalid_utf8: Any, raw: Path, out: Path) -> None:
    (raw / "a.txt").write_bytes("UTF-16, say".encode("utf-16"))
    (raw / "b.md").write_text("text with \0 in the middle")
    (raw / "c.jsonl").write_bytes(b'{"text": "a\\u0000b"}\n{"text": "good"}\n\0\0\0{"text": "torn"}\n')
    write_parquet(raw / "d.parquet", ["a\0b", "good too"])
    snapshot = take_snapshot(raw, out, HALF.model_copy(update={"invalid_utf8": invalid_utf8}))
    assert {path: status for path, status in statuses(snapshot).items() if "plain" not in path} == {
        "a.txt": "binary",
        "b.md": "binary",
        "c.jsonl": "kept",
        "d.parquet": "kept",
    }
    assert snapshot.summary["quarantined_by_reason"] == {"binary": 5}
    assert {"path": "b.md", "reason": "binary", "detail": "NUL at byte 10"} in snapshot.summary["quarantined"]
    assert_bytes_add_up(snapshot)


@settings(max_examples=30, deadline=None)
@given(
    invalid_utf8=st.sampled_from(["quarantine", "replace"]),
    files=st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=600)), max_size=3),
)
def test_rule_34_holds_for_any_bytes(
    invalid_utf8: Any, files: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("any")
    fill(base / "raw")
    for name, data in files:
        (base / "raw" / name).write_bytes(data)
    snapshot = take_snapshot(base / "raw", base / "out", HALF.model_copy(update={"invalid_utf8": invalid_utf8}))
    assert_bytes_add_up(snapshot)
    assert len(texts_of(snapshot, base / "raw")) == snapshot.summary["documents"]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_a_decompression_bomb_is_quarantined_early(
    suffix: str, pack: Callable[[bytes], bytes], raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "MAX_COMPRESSION_FREE", 1 << 20)
    (raw / f"bomb.txt.{suffix}").write_bytes(pack(b"boom\n" * (16 << 20)))
    snapshot = take_snapshot(raw, out, HALF)
    assert statuses(snapshot)[f"bomb.txt.{suffix}"] == "too_compressed"
    assert snapshot.summary["bytes_read"] < 32 << 20
    assert_bytes_add_up(snapshot)


def test_an_endless_jsonl_line_is_quarantined(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "MAX_LINE_BYTES", 1000)
    write_jsonl(raw / "a.jsonl", {"text": "fine"}, {"text": "x" * 2000})
    snapshot = take_snapshot(raw, out, HALF)
    assert statuses(snapshot)["a.jsonl"] == "line_too_long"
    assert_bytes_add_up(snapshot)


# Identity, duplicates, split


def test_documents_are_keyed_by_the_hash_of_their_text_and_the_first_of_equal_ones_is_kept(raw: Path, out: Path) -> None:
    write_jsonl(raw / "a.jsonl", {"text": "This is text number 5.\n" * 3})
    snapshot = take_snapshot(raw, out, HALF)
    rows = [row for row in snapshot.documents.to_pylist() if row["path"] in ("a.jsonl", "plain05.txt")]
    assert [row["status"] for row in rows] == ["kept", "duplicate"]
    assert rows[0]["document_id"] == rows[1]["document_id"] == hashlib.sha256((raw / "plain05.txt").read_bytes()).hexdigest()
    (raw / "a.jsonl").unlink()
    again = take_snapshot(raw, out, HALF)
    assert "duplicate" not in again.documents["status"].to_pylist(), "the copy takes the place of the removed original"


def test_rule_29_split_is_a_pure_function_of_the_content(raw: Path, out: Path) -> None:
    before = take_snapshot(raw, out, HALF)
    fill(raw, 40)
    (raw / "plain01.txt").rename(raw / "zz.txt")
    after = take_snapshot(raw, out, HALF)
    side = dict(zip(after.documents["document_id"].to_pylist(), after.documents["split"].to_pylist(), strict=True))
    for row in before.documents.to_pylist():
        assert side[row["document_id"]] == row["split"] == documents.split_of(row["document_id"], 0.49)


def test_rule_29_val_fraction_is_the_share_of_documents_and_growing_it_only_moves_documents_to_val() -> None:
    ids = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(4000)]
    small = {i for i in ids if documents.split_of(i, 0.05) == "val"}
    large = {i for i in ids if documents.split_of(i, 0.2) == "val"}
    assert small < large
    assert 140 < len(small) < 260
    assert 700 < len(large) < 900


# Incremental


def test_same_content_gives_the_same_snapshot_and_nothing_is_opened_or_written(raw: Path, out: Path, opened: list[str]) -> None:
    first = take_snapshot(raw, out, HALF)
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    opened.clear()
    second = take_snapshot(raw, out, HALF)
    assert opened == []
    assert second.snapshot_id == first.snapshot_id
    assert second.documents.equals(first.documents)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == files


def test_only_new_and_changed_files_are_opened(raw: Path, out: Path, opened: list[str]) -> None:
    first = take_snapshot(raw, out, HALF)
    opened.clear()
    (raw / "new.txt").write_text("something new")
    (raw / "plain02.txt").write_text("This is text number X.\n" * 3)  # one byte less
    (raw / "plain03.txt").unlink()
    second = take_snapshot(raw, out, HALF)
    assert sorted(opened) == ["new.txt", "plain02.txt"]
    changes = {name: second.summary[f"files_{name}"] for name in ("added", "changed", "removed", "unchanged")}
    assert changes == {"added": 1, "changed": 1, "removed": 1, "unchanged": 14}
    assert second.summary["parent_snapshot_id"] == first.snapshot_id
    scratch = take_snapshot(raw, out.with_name("scratch"), HALF)
    assert scratch.snapshot_id == second.snapshot_id
    assert scratch.documents.equals(second.documents)


def test_a_change_of_content_that_keeps_the_size_is_seen(raw: Path, out: Path) -> None:
    first = take_snapshot(raw, out, HALF)
    (raw / "plain02.txt").write_text("That is text number 2.\n" * 3)
    assert take_snapshot(raw, out, HALF).snapshot_id != first.snapshot_id


def test_another_configuration_reads_again(raw: Path, out: Path, opened: list[str]) -> None:
    take_snapshot(raw, out, HALF)
    opened.clear()
    take_snapshot(raw, out, CorpusConfig(val_fraction=0.4))
    assert len(opened) == 16


def test_a_lost_or_damaged_file_index_only_costs_reading(raw: Path, out: Path) -> None:
    first = take_snapshot(raw, out, HALF)
    for damage in (b"", b"PAR1 nonsense", None):
        index = out / "snapshots" / "file_index.parquet"
        index.unlink() if damage is None else index.write_bytes(damage)
        assert take_snapshot(raw, out, HALF).snapshot_id == first.snapshot_id


def test_a_damaged_snapshot_is_noticed_and_written_again(raw: Path, out: Path) -> None:
    first = take_snapshot(raw, out, HALF)
    table = out / "snapshots" / first.summary["documents_table"]["file"]
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    with pytest.raises(DataError, match=f"{table.name}: damaged"):
        load_snapshot(out, first.snapshot_id)
    take_snapshot(raw, out, HALF)
    assert load_snapshot(out, first.snapshot_id).documents.equals(first.documents)


def test_progress_counts_files(raw: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    take_snapshot(raw, out, HALF, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 16) for n in range(1, 17)]


# Files that move


def test_a_file_that_changes_while_it_is_read_is_read_again(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, changes = readers._read_open_file, Counter({"plain04.txt": 1})

    def changing(*arguments: Any) -> Any:
        result = original(*arguments)
        path = arguments[2]
        if changes[path]:
            changes[path] -= 1
            with open(raw / path, "a") as file:
                file.write("and more")
        return result

    monkeypatch.setattr(readers, "_read_open_file", changing)
    assert any(text.endswith("and more") for text in texts_of(take_snapshot(raw, out, HALF), raw))
    changes["plain05.txt"] = 1000
    shutil.rmtree(out)
    with pytest.raises(DataError, match=r"plain05\.txt: changed 3 times while it was read; run again when it is at rest"):
        take_snapshot(raw, out, HALF)


def test_a_file_that_cannot_be_read_is_quarantined_and_tried_again(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("plain06.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(os, "open", refusing)
        snapshot = take_snapshot(raw, out, HALF)
    assert {"path": "plain06.txt", "reason": "unreadable", "detail": "Permission denied"} in snapshot.summary["quarantined"]
    assert statuses(take_snapshot(raw, out, HALF))["plain06.txt"] == "kept"


@pytest.mark.parametrize("change", ["edit", "remove", "replace by a folder"])
def test_text_that_changed_since_the_snapshot_is_refused(change: str, raw: Path, out: Path) -> None:
    snapshot = take_snapshot(raw, out, HALF)
    path = raw / "plain07.txt"
    path.unlink()
    if change == "edit":
        path.write_text("Other words, of any length, that are not what the snapshot has seen here.")
    elif change == "replace by a folder":
        path.mkdir()
    with pytest.raises(DataError, match=r"plain07\.txt: changed since the snapshot was taken; run again"):
        texts_of(snapshot, raw)


def test_each_file_is_opened_once_to_read_its_documents(raw: Path, out: Path, opened: list[str]) -> None:
    (raw / "long.txt").write_text("".join(f"line {n}\n" for n in range(1000)))
    snapshot = take_snapshot(raw, out, HALF)
    opened.clear()
    texts_of(snapshot, raw)
    assert Counter(opened) == Counter({row["path"]: 1 for row in snapshot.kept_documents().to_pylist()})


# Bad input


def test_a_missing_folder_names_the_option(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UserError, match=r"--input_dir .*/nowhere: no such folder; create it and put"):
        take_snapshot(tmp_path / "nowhere", out, HALF)


def test_a_folder_without_text_files_names_the_option(tmp_path: Path, out: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.pdf").write_bytes(b"")
    with pytest.raises(UserError, match=r"--input_dir .*/raw: no \.txt.* or \.parquet file in it, nor .* \.zst \(1 other files"):
        take_snapshot(tmp_path / "raw", out, HALF)


def test_a_folder_without_usable_text_says_why(tmp_path: Path, out: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"no usable text in its 1 files \(not_utf8 2 bytes\).*--text_field 'text'"):
        take_snapshot(tmp_path / "raw", out, HALF)
    assert not out.exists()


def test_a_side_of_the_split_without_documents_says_what_to_change(tmp_path: Path, out: Path) -> None:
    fill(tmp_path / "raw", 1)
    expected = (
        r"--val_fraction 0.0001: none of the 1 documents \(69 bytes\) falls to val; .*--max_document_bytes \(32768 now; 256"
    )
    with pytest.raises(UserError, match=expected):
        take_snapshot(tmp_path / "raw", out, CorpusConfig(val_fraction=0.0001))


def test_format_is_told_by_the_name() -> None:
    names = {"a.txt": "text", "a.MD": "text", "a.jsonl.gz": "jsonl", "a.txt.ZST": "text"}
    names |= dict.fromkeys(["a.json", "a.gz", "txt", "a.txt.bz2", "a.txt.gz.zst"])
    assert {name: folder.format_of(name) for name in names} == names
