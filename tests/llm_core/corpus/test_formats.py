"""Every format becomes documents that can be read back; every byte of any file is accounted for."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_core.config import CorpusConfig
from llm_core.corpus import (
    documents,
    drop_warning,
    iter_texts,
    local_folder,
    parquet_format,
    streams,
    take_snapshot,
    text_formats,
)
from llm_core.corpus.types import CONVERT
from tests.support.corpora import HALF, assert_bytes_add_up, fill, statuses, texts_of, write_jsonl, write_parquet, zstd

# One name for each reader.
NAMES = ["a.txt", "b.jsonl", "c.md.gz", "d.jsonl.zst", "e.parquet", "f.parquet.gz"]


# Reading


def test_the_number_of_pieces_of_a_text_is_not_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration sets the length of pieces; only the file sets that of lines and rows."""
    monkeypatch.setattr("llm_core.corpus.readers.MAX_TEXTS_FREE", 3)
    monkeypatch.setattr("llm_core.corpus.readers.BYTES_PER_TEXT", 1 << 20)
    lines = [f"Line number {number} of a text that is divided." for number in range(60)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "text.txt").write_text("\n".join(lines))
    (tmp_path / "raw" / "lines.jsonl").write_text("".join(json.dumps({"text": line + "."}) + "\n" for line in lines))
    snapshot = take_snapshot(tmp_path / "raw", tmp_path / "out", CorpusConfig(max_document_bytes=256, val_fraction=0.4))
    assert statuses(snapshot) == {"text.txt": "kept", "lines.jsonl": "too_many_texts"}


def test_many_short_texts_that_compress_well_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit applies to decompressed bytes; a file with fewer bytes than lines is still quarantined."""
    monkeypatch.setattr("llm_core.corpus.readers.MAX_TEXTS_FREE", 100)
    (tmp_path / "raw").mkdir()
    comments = [f"comment {number:x} {number % 7} ok" for number in range(5000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in comments).encode()
    (tmp_path / "raw" / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    assert len(lines) > 16 * 5000 > (tmp_path / "raw" / "lines.jsonl.gz").stat().st_size
    pq.write_table(pa.table({"text": comments}), tmp_path / "raw" / "rows.parquet", compression="zstd")
    (tmp_path / "raw" / "same.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one and the same"}\n' * 200_000))
    snapshot = take_snapshot(tmp_path / "raw", tmp_path / "out", HALF)
    assert statuses(snapshot) == {"lines.jsonl.gz": "kept", "rows.parquet": "kept", "same.jsonl.gz": "too_many_texts"}


def test_only_the_line_in_another_encoding_is_quarantined(raw: Path, out: Path) -> None:
    (raw / "lines.jsonl").write_bytes(b'{"text": "before"}\n{"text": "caf\xe9"}\n{"text": "after"}\n')
    snapshot = take_snapshot(raw, out, HALF)
    rows = [row for row in snapshot.documents.to_pylist() if row["path"] == "lines.jsonl"]
    assert [row["status"] for row in rows] == ["kept", "not_utf8", "kept"]
    assert snapshot.summary["bytes_dropped"]["not_utf8"] == len(b'{"text": "caf\xe9"}\n')
    assert_bytes_add_up(snapshot)


def test_the_text_beside_an_integer_of_any_length_is_kept(raw: Path, out: Path) -> None:
    """Python converts at most 4,300 digits."""
    number = "9" * 5000
    lines = [f'{{"text": "kept", "n": {number}, "m": 5}}\n', f'{{"text": {number}}}\n', f'{{"n": {number}, "text": "torn"\n']
    (raw / "a.jsonl").write_text("".join(lines))
    snapshot = take_snapshot(raw, out, HALF)
    rows = [row for row in snapshot.documents.to_pylist() if row["path"] == "a.jsonl"]
    assert [row["status"] for row in rows] == ["kept", "no_text_field", "unreadable_json"]
    assert texts_of(snapshot, raw)[0] == "kept"
    content = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert snapshot.files["sha256"][0].as_py() != content, "a snapshot of an earlier version, without the line, is another one"


def test_commas_inside_a_long_text_do_not_count_as_values(raw: Path, out: Path) -> None:
    table = "1,2,3,4,5,6,7,8\n" * 300_000
    write_jsonl(raw / "table.jsonl", {"text": table})
    write_jsonl(raw / "values.jsonl", {"text": "few", "values": [0] * 2_500_000})
    snapshot = take_snapshot(raw, out, HALF)
    assert statuses(snapshot)["table.jsonl"] == "kept"
    assert statuses(snapshot)["values.jsonl"] == "too_many_values"


def test_every_format_is_read_in_sorted_order_from_nested_folders(raw: Path, out: Path) -> None:
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
def test_each_row_of_a_parquet_file_can_be_read_back(kind: Any, pack: Any, raw: Path, out: Path) -> None:
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
    assert rows["text_start"].to_pylist()[-3] > 0, "the long row is split"
    backwards = rows.take(list(reversed(range(20))))
    assert list(iter_texts(raw, backwards, HALF)) == values[19::-1]
    assert_bytes_add_up(snapshot)


def test_rows_without_text_are_quarantined_one_by_one_and_counted(raw: Path, out: Path) -> None:
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers())
    column = pa.chunked_array([["good", None, ""], not_utf8])
    pq.write_table(pa.table({"text": column}), raw / "a.parquet")
    snapshot = take_snapshot(raw, out, HALF)
    rows = [row for row in snapshot.documents.to_pylist() if row["path"] == "a.parquet"]
    assert [(row["status"], row["bytes"]) for row in rows] == [("kept", 4), ("no_text_field", 0), ("blank", 0), ("not_utf8", 4)]
    assert {"path": "a.parquet", "reason": "not_utf8", "detail": "row 3"} in snapshot.summary["quarantined"]
    assert_bytes_add_up(snapshot)


def test_a_parquet_file_without_a_text_column_is_quarantined(raw: Path, out: Path) -> None:
    pq.write_table(pa.table({"body": ["no such column"], "id": [1]}), raw / "a.parquet")
    write_parquet(raw / "b.parquet", [1, 2], pa.int64())
    write_parquet(raw / "c.parquet", [], pa.string())
    quarantined = {entry["path"]: entry for entry in take_snapshot(raw, out, HALF).summary["quarantined"]}
    assert quarantined["a.parquet"]["detail"] == "no column 'text' among body, id"
    assert quarantined["b.parquet"]["detail"] == "the column 'text' holds int64, not strings"
    assert [quarantined[f"{name}.parquet"]["reason"] for name in "abc"] == ["no_text_field", "no_text_field", "empty"]


def test_the_compression_of_a_parquet_file_does_not_change_the_snapshot(raw: Path, out: Path) -> None:
    write_parquet(raw / "a.parquet", ["one", None, "two"], compression="snappy")
    first = take_snapshot(raw, out, HALF)
    write_parquet(raw / "a.parquet", ["one", None, "two"], compression="zstd", row_group_size=1)
    assert take_snapshot(raw, out, HALF).snapshot_id == first.snapshot_id
    write_parquet(raw / "a.parquet", ["onet", None, "wo"])
    assert take_snapshot(raw, out, HALF).snapshot_id != first.snapshot_id


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_parquet_file_is_at_worst_quarantined(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("damaged")
    fill(base / "raw")
    path = base / "raw" / "a.parquet"
    write_parquet(path, [f"row {n}" * 20 for n in range(40)], row_group_size=15)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    assert_bytes_add_up(take_snapshot(base / "raw", base / "out", HALF))


def test_the_expansion_of_a_parquet_file_is_limited(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_COMPRESSION_FREE", 1 << 20)
    write_parquet(raw / "a.parquet", ["boom " * 10_000] * 1000)  # one dictionary entry, a thousand times
    snapshot = take_snapshot(raw, out, HALF)
    assert statuses(snapshot)["a.parquet"] == "too_compressed"
    assert snapshot.summary["bytes_read"] < 2 << 20
    assert_bytes_add_up(snapshot)
    monkeypatch.setattr(parquet_format, "MAX_ROW_GROUP_BYTES", 1000)
    write_parquet(raw / "a.parquet", ["large " * 1000])
    assert statuses(take_snapshot(raw, out, HALF))["a.parquet"] == "row_group_too_large"


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_multi_member_compressed_files_are_read_as_one_stream_in_any_order(
    pack: Callable[[bytes], bytes], raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"Line {n}: {'ü' * n}"}).encode() + b"\n" for n in range(200)]
    suffix = "gz" if pack is gzip.compress else "zst"
    (raw / f"a.jsonl.{suffix}").write_bytes(b"".join(pack(b"".join(lines[n : n + 70])) for n in range(0, 200, 70)))
    monkeypatch.setattr(streams, "BLOCK", 500)
    snapshot = take_snapshot(raw, out, CorpusConfig(val_fraction=0.49))
    rows = snapshot.kept_documents().slice(0, 200)
    backwards = rows.take(list(reversed(range(200))))
    assert list(iter_texts(raw, backwards, HALF)) == [f"Line {n}: {'ü' * n}" for n in reversed(range(200))]


def _pack(suffix: str, data: bytes) -> bytes:
    return gzip.compress(data) if suffix == "gz" else zstd(data)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("members", [[b"ok\n"], [b"\n", b"\n", b"text\n"], [b"#\n", b"text\n" * 9]])
def test_members_of_a_few_bytes_do_not_end_a_compressed_file(members: list[bytes], suffix: str, raw: Path, out: Path) -> None:
    (raw / f"small.txt.{suffix}").write_bytes(b"".join(_pack(suffix, member) for member in members))
    snapshot = take_snapshot(raw, out, HALF)
    rows = snapshot.kept_documents()
    small = rows.filter(pa.compute.equal(rows["path"], f"small.txt.{suffix}"))
    assert list(iter_texts(raw, small, HALF)) == [b"".join(members).decode()]


def test_a_parquet_file_of_empty_rows_is_quarantined(raw: Path, out: Path) -> None:
    is_null = np.random.default_rng(0).random(1 << 20) < 0.5  # an irregular pattern does not compress
    texts = pa.array(np.full(len(is_null), "", dtype=object), pa.string(), mask=is_null)
    pq.write_table(pa.table({"text": texts}), raw / "empty.parquet", row_group_size=1 << 20)
    assert take_snapshot(raw, out, HALF).summary["quarantined_by_reason"] == {"mostly_unusable": 1}


# Several blocks of the decoders, with characters of two bytes at every odd place.
_LINES = "".join(f"{os.urandom(20).hex()}é{'ü' * (number % 3)}\n" for number in range(12_000))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize(
    ("damage", "all_of_it"),
    [
        (lambda packed: packed[: len(packed) * 3 // 4], False),
        (lambda packed: packed[:-3], False),
        (lambda packed: packed + packed[: len(packed) // 2], True),
        (lambda packed: packed + b"<html>not found</html>", True),
        (lambda packed: packed + b"\0" * 5000 + b"x", True),
    ],
    ids=["cut short", "cut in its end", "second member cut short", "followed by text", "padded, followed by text"],
)
def test_a_compressed_file_is_used_up_to_where_it_is_damaged(
    suffix: str, damage: Callable[[bytes], bytes], all_of_it: bool, raw: Path, out: Path
) -> None:
    path = raw / f"a.txt.{suffix}"
    path.write_bytes(damage(_pack(suffix, _LINES.encode())))
    snapshot = take_snapshot(raw, out, HALF)
    text = "".join(iter_texts(raw, snapshot.documents.slice(0, snapshot.files["documents"][0].as_py()), HALF))
    assert (_LINES * 2).startswith(text)
    assert len(text) >= (len(_LINES) if all_of_it else len(_LINES) // 2)
    assert statuses(snapshot)[path.name] == "kept"
    assert snapshot.summary["quarantined_by_reason"] == {"rest_unreadable": 1}
    (entry,) = snapshot.summary["quarantined"]
    assert entry["path"] == path.name
    assert str(snapshot.files["bytes"][0]) in entry["detail"] or not all_of_it
    assert_bytes_add_up(snapshot)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_what_follows_a_compressed_parquet_file_is_left_out(suffix: str, raw: Path, out: Path) -> None:
    write_parquet(raw / "a.parquet", ["one", "two"])
    (raw / f"a.parquet.{suffix}").write_bytes(_pack(suffix, (raw / "a.parquet").read_bytes()) + b"more")
    (raw / "a.parquet").unlink()
    snapshot = take_snapshot(raw, out, HALF)
    assert texts_of(snapshot, raw)[:2] == ["one", "two"]
    assert snapshot.summary["quarantined_by_reason"] == {"rest_unreadable": 1}


def test_zeros_after_a_gzip_file_are_padding(raw: Path, out: Path) -> None:
    (raw / "a.txt.gz").write_bytes(gzip.compress(b"padded ") + bytes(9000) + gzip.compress(b"twice") + bytes(100))
    snapshot = take_snapshot(raw, out, HALF)
    assert texts_of(snapshot, raw)[0] == "padded twice"
    assert snapshot.summary["quarantined_by_reason"] == {}


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("gz", lambda packed: packed[:-8] + b"crc!" + packed[-4:]),
        ("gz", lambda packed: packed[:3000] + bytes(9) + packed[3009:]),
        ("gz", lambda packed: b"plain"),
        ("zst", lambda packed: b"plain"),
        ("zst", lambda packed: packed[:30] + bytes(9) + packed[39:]),
    ],
    ids=["checksum", "overwritten", "not gzip", "not Zstandard", "overwritten frame"],
)
def test_compressed_data_with_wrong_bytes_is_quarantined_as_a_whole(suffix: str, damage: Any, raw: Path, out: Path) -> None:
    (raw / f"a.txt.{suffix}").write_bytes(damage(_pack(suffix, os.urandom(3000).hex().encode())))
    snapshot = take_snapshot(raw, out, HALF)
    reason = "unreadable_gzip" if suffix == "gz" else "unreadable_zstd"
    assert statuses(snapshot)[f"a.txt.{suffix}"] == reason
    assert snapshot.summary["quarantined_by_reason"] == {reason: 1}
    assert_bytes_add_up(snapshot)


def test_a_byte_order_mark_before_any_jsonl_line_is_left_out(raw: Path, out: Path) -> None:
    mark = b"\xef\xbb\xbf"
    lines = [mark + b'{"text": "first"}\r\n', mark + b'{"text": "second"}\n', mark + b"\n", b'{"text": "\xef\xbb\xbfkept"}']
    (raw / "a.jsonl").write_bytes(b"".join(lines))
    snapshot = take_snapshot(raw, out, HALF)
    assert texts_of(snapshot, raw)[:3] == ["first", "second", "\ufeffkept"]
    assert snapshot.summary["quarantined_by_reason"] == {}
    assert_bytes_add_up(snapshot)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Rows and bytes of each batch of each time that the reader of Parquet files is started."""
    started: list[list[tuple[int, int]]] = []
    original = pq.ParquetFile.iter_batches

    def recording(self: Any, *arguments: Any, **options: Any) -> Any:
        read: list[tuple[int, int]] = []
        started.append(read)
        for batch in original(self, *arguments, **options):
            read.append((len(batch), batch.get_total_buffer_size()))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recording)
    return started


def test_small_row_groups_are_read_together(raw: Path, out: Path, batches: list[list[tuple[int, int]]]) -> None:
    values = [f"row {number}" for number in range(3000)]
    write_parquet(raw / "a.parquet", values, row_group_size=1)
    snapshot = take_snapshot(raw, out, HALF)
    rows = snapshot.documents.slice(0, 3000)
    assert list(iter_texts(raw, rows, HALF)) == values
    assert list(iter_texts(raw, rows.take([2999, 5, 1500]), HALF)) == [values[2999], values[5], values[1500]]
    assert len(batches) <= 10, "a few per pass, not one per row group"


@pytest.mark.parametrize(
    "options",
    [{}, {"store_schema": False}]
    + [{"use_dictionary": False, "column_encoding": {"text": name}} for name in ("PLAIN", "DELTA_LENGTH_BYTE_ARRAY")],
    ids=str,
)
def test_batches_of_a_large_row_group_fit_into_memory_and_are_few(
    options: dict[str, Any], raw: Path, out: Path, batches: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_format, "_BATCH_BYTES", 1 << 20)
    rows = [f"row {number:4}, {'short' * 20}" for number in range(20_000)]
    pq.write_table(pa.table({"text": pa.array(rows, pa.large_string())}), raw / "a.parquet", **options)
    snapshot = take_snapshot(raw, out, HALF)
    assert snapshot.files["documents"][0].as_py() == 20_000
    read = [batch for batches_read in batches for batch in batches_read]
    assert max(size for _, size in read) <= 3 << 20
    assert len(read) <= 100


def test_a_long_value_in_a_dictionary_is_repeated_in_few_rows_at_a_time(
    raw: Path, out: Path, batches: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_format, "_BATCH_BYTES", 1 << 20)
    monkeypatch.setattr("llm_core.corpus.readers.MAX_TEXTS_FREE", 1 << 30)
    write_parquet(raw / "a.parquet", ["short"] * 4000 + ["long " * 20_000] * 300)  # 100 kB, 300 times
    snapshot = take_snapshot(raw, out, HALF.model_copy(update={"max_document_bytes": 1 << 20}))
    assert snapshot.summary["bytes_read"] > 30_000_000
    assert max(size for read in batches for _, size in read) <= 3 << 20


def test_text_field_names_the_field_of_jsonl_lines(raw: Path, out: Path) -> None:
    write_jsonl(raw / "z.jsonl", {"body": "from the body", "text": "not this"})
    snapshot = take_snapshot(raw, out, CorpusConfig(text_field="body", val_fraction=0.49))
    assert texts_of(snapshot, raw)[-1] == "from the body"


def test_the_format_follows_from_the_name() -> None:
    names = {"a.txt": "text", "a.MD": "text", "a.jsonl.gz": "jsonl", "a.txt.ZST": "text"}
    names |= dict.fromkeys(["a.json", "a.gz", "txt", "a.txt.bz2", "a.txt.gz.zst"])
    assert {name: local_folder.format_of(name) for name in names} == names


# Long texts


@given(text=st.text(alphabet="ab\n é中🙂", max_size=2000), limit=st.integers(256, 300))
def test_long_text_is_split_without_losing_a_byte(text: str, limit: int) -> None:
    data, start, pieces = text.encode(), 0, []
    while start < len(data):
        end = documents.piece_end(data, start, limit)
        pieces.append(data[start:end])
        start = end
    assert b"".join(pieces) == data
    assert all(len(piece) <= limit and piece.decode() for piece in pieces)
    assert all(piece.endswith(b"\n") or b"\n" not in piece for piece in pieces[:-1])


def test_splitting_does_not_depend_on_the_block_size(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (raw / "long.txt").write_text("".join(f"Zeile {n}: Größe\n" for n in range(500)) + "ü" * 1000)
    expected = take_snapshot(raw, out, HALF)
    monkeypatch.setattr(text_formats, "BLOCK", 7)
    assert take_snapshot(raw, out.with_name("out2"), HALF).documents.equals(expected.documents)
    assert max(expected.documents["bytes"].to_pylist()) <= 256
    pieces = [text for text in texts_of(expected, raw) if "Zeile" in text or "ü" in text]
    assert "".join(pieces).startswith("Zeile 0: Größe\n")


def test_a_long_jsonl_text_is_split_and_can_be_read_back(raw: Path, out: Path) -> None:
    text = "".join(f'Line {n} with "quotes" and ü.\n' for n in range(100))
    write_jsonl(raw / "a.jsonl", {"text": "short"}, {"text": text}, {"text": "last"})
    assert "".join(texts_of(take_snapshot(raw, out, HALF), raw)).startswith("short" + text + "last")


# Rule 34


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
        "empty": 1, "not_utf8": 1, "unreadable_gzip": 1, "rest_unreadable": 1, "unreadable_json": 2, "no_text_field": 2,
        "lone_surrogate": 1,
    }  # fmt: skip
    assert "latin1.txt" in {entry["path"] for entry in snapshot.summary["quarantined"] if entry["reason"] == "not_utf8"}
    assert statuses(snapshot)["lines.jsonl"] == "kept"


def test_text_that_cannot_be_read_counts_as_dropped_with_the_size_of_its_file(raw: Path, out: Path) -> None:
    """Otherwise a folder of files with another column would lose all of its text without a warning."""
    text = [os.urandom(500).hex() for _ in range(20)]
    pq.write_table(pa.table({"content": text}), raw / "column.parquet")
    write_parquet(raw / "type.parquet", list(range(5000)), pa.int64())
    write_parquet(raw / "cut.parquet", text)
    os.truncate(raw / "cut.parquet", (raw / "cut.parquet").stat().st_size // 2)
    (raw / "packed.parquet.gz").write_bytes(gzip.compress((raw / "column.parquet").read_bytes()))
    (raw / "plain.txt.gz").write_bytes(b"not compressed at all")
    (raw / "start.txt.zst").write_bytes(zstd(b"cut in its header")[:7])
    snapshot = take_snapshot(raw, out, HALF)
    assert_bytes_add_up(snapshot)
    unusable = {row["path"]: row["bytes"] for row in snapshot.files.to_pylist() if row["documents"] == 0}
    assert unusable == {path: (raw / path).stat().st_size for path in unusable}
    assert len(unusable) == 6
    warning = drop_warning(snapshot.summary) or ""
    assert "no_text_field (another --text_field keeps it)" in warning, "as for .jsonl"
    first = snapshot.snapshot_id
    pq.write_table(pa.table({"content": text * 2}), raw / "column.parquet")
    grown = take_snapshot(raw, out, HALF)
    assert grown.snapshot_id != first
    assert grown.summary["bytes_dropped"]["no_text_field"] > snapshot.summary["bytes_dropped"]["no_text_field"]


@pytest.mark.parametrize("size", [3000, 3 << 20])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_all_that_is_read_of_a_damaged_compressed_file_is_counted(name: str, size: int, raw: Path, out: Path) -> None:
    """Also the part that does not fill a block."""
    packed = gzip.compress(b'{"text": "a line of text"}\n' * (size // 27))
    (raw / f"{name}.gz").write_bytes(packed[:-8] + b"crc!" + packed[-4:])
    snapshot = take_snapshot(raw, out, HALF)
    assert snapshot.summary["bytes_dropped"] == {"unreadable_gzip": size // 27 * 27}
    assert_bytes_add_up(snapshot)


# Encoding

# Three invalid sequences.
BAD = b"f\xc3\xbcr, then \xe9\xff and \xc3 end"


@pytest.mark.parametrize("block", [1 << 20, 5])
def test_invalid_utf8_is_replaced_only_if_configured(block: int, raw: Path, out: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "BLOCK", block)
    (raw / "a.txt").write_bytes(BAD * 30)
    (raw / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + BAD + b'1"}\n{"text": "fine \xef\xbf\xbd"}\n'))
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([BAD + b"2"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": bad}), raw / "c.parquet")
    untouched = take_snapshot(raw, out, HALF)
    assert untouched.summary["quarantined_by_reason"] == {"not_utf8": 3}
    assert untouched.summary["sequences_replaced"] == 0
    config = HALF.model_copy(update={"invalid_utf8": "replace"})
    snapshot = take_snapshot(raw, out, config)
    repaired = "für, then \ufffd\ufffd and \ufffd end"
    texts = texts_of(snapshot, raw)
    assert "".join(texts[:-19]) == repaired * 30
    assert texts[-19:-16] == [repaired + "1", "fine \ufffd", repaired + "2"]
    assert snapshot.summary["sequences_replaced"] == 32 * 3, "U+FFFD already in the text is not counted"
    assert snapshot.summary["quarantined_by_reason"] == {}
    assert_bytes_add_up(snapshot)
    assert list(iter_texts(raw, snapshot.kept_documents().slice(1, 2), config)) == texts[1:3]


def test_a_file_that_is_not_utf8_states_what_replacing_would_keep_and_cost(raw: Path, out: Path) -> None:
    (raw / "one.txt").write_bytes(b"A line of text.\n" * 500 + b"\xff" + b"More of it.\n" * 500)
    (raw / "many.txt.gz").write_bytes(gzip.compress(BAD * 30))
    (raw / "binary.txt").write_bytes(b"\xff" + b"a line\n" * 50 + b"\0")
    summary = take_snapshot(raw, out, HALF).summary
    details = {entry["path"]: entry["detail"].partition("; ")[2] for entry in summary["quarantined"]}
    assert details == {
        "one.txt": "--invalid_utf8 replace would keep its 14,001 bytes, with 1 bad sequences replaced",
        "many.txt.gz": f"90 bad sequences in {30 * len(BAD)} bytes, probably another encoding; {CONVERT}",
        "binary.txt": "--invalid_utf8 replace would not keep it (binary)",
    }
    assert list(details) == ["one.txt", "many.txt.gz", "binary.txt"], "the largest file is listed first"
    kept = take_snapshot(raw, out, HALF.model_copy(update={"invalid_utf8": "replace"})).summary
    assert kept["sequences_replaced"] == 91, "as stated"
    assert kept["quarantined_by_reason"] == {"binary": 1}


@pytest.mark.parametrize("invalid_utf8", ["quarantine", "replace"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz"])
def test_text_with_the_byte_order_mark_of_another_encoding_is_named_and_never_repaired(
    name: str, invalid_utf8: Any, raw: Path, out: Path
) -> None:
    text, detail = '{"text": "漢字"}\n' * 50, {}
    for encoding in ("utf-16", "utf-32"):
        data = text.encode(encoding)
        (raw / f"{encoding}.{name}").write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        detail[f"{encoding}.{name}"] = f"{encoding.upper()}; convert it to UTF-8, for instance with iconv"
    summary = take_snapshot(raw, out, HALF.model_copy(update={"invalid_utf8": invalid_utf8})).summary
    assert {entry["path"]: entry["detail"] for entry in summary["quarantined"]} == detail
    assert summary["bytes_dropped"] == {"not_utf8": len(text.encode("utf-16")) + len(text.encode("utf-32"))}
    assert "not_utf8 (converting it to UTF-8 keeps it)" in (drop_warning(summary) or "")


@pytest.mark.parametrize("block", [1 << 20, 5])
def test_a_file_that_is_dropped_in_spite_of_repairs_is_described_as_it_is(
    block: int, raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places and sizes in the repaired text would be those of no file."""
    monkeypatch.setattr(streams, "BLOCK", block)
    (raw / "a.txt").write_bytes(b"\xff\xff \0 and \0 more")
    (raw / "b.txt.gz").write_bytes(gzip.compress(b"\xff\xff \0 and \0 more!"))
    snapshot = take_snapshot(raw, out, HALF.model_copy(update={"invalid_utf8": "replace"}))
    assert {entry["path"]: entry["detail"] for entry in snapshot.summary["quarantined"]} == {
        "a.txt": "NUL at byte 3",
        "b.txt.gz": "NUL at byte 3",
    }
    assert snapshot.summary["bytes_dropped"] == {"binary": 15 + 16}
    assert snapshot.summary["sequences_replaced"] == 0
    assert_bytes_add_up(snapshot)


@pytest.mark.parametrize("invalid_utf8", ["quarantine", "replace"])
def test_binary_content_is_quarantined_and_never_repaired(invalid_utf8: Any, raw: Path, out: Path) -> None:
    (raw / "a.txt").write_bytes("UTF-16 without a mark".encode("utf-16-le"))
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
    monkeypatch.setattr(streams, "MAX_COMPRESSION_FREE", 1 << 20)
    (raw / f"bomb.txt.{suffix}").write_bytes(pack(b"boom\n" * (16 << 20)))
    snapshot = take_snapshot(raw, out, HALF)
    assert statuses(snapshot)[f"bomb.txt.{suffix}"] == "too_compressed"
    assert snapshot.summary["bytes_read"] < 32 << 20
    assert_bytes_add_up(snapshot)


def test_a_file_with_an_overlong_jsonl_line_is_quarantined(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "MAX_LINE_BYTES", 1000)
    write_jsonl(raw / "a.jsonl", {"text": "fine"}, {"text": "x" * 2000})
    snapshot = take_snapshot(raw, out, HALF)
    assert statuses(snapshot)["a.jsonl"] == "line_too_long"
    assert_bytes_add_up(snapshot)
