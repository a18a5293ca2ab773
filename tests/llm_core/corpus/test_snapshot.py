"""A folder becomes documents: every byte is accounted for, nothing outside is read, nothing is read twice."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_core.config import CorpusConfig
from llm_core.corpus import documents, drop_warning, dropped_text, load_snapshot, local_folder, readers, take_snapshot
from llm_core.errors import DataError, UserError
from llm_core.system import read_json, write_json
from tests.support.corpora import HALF, fill, statuses, texts_of, write_jsonl, write_parquet

# Levels of folders inside each other: more than Python recurses, and paths longer than 4,096 bytes.
DEPTH = 1500

# Scanning


def test_hidden_files_links_out_of_the_folder_and_special_files_are_skipped(raw: Path, out: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("outside")
    (tmp_path / "elsewhere").mkdir()
    (raw / "leaves.txt").symlink_to(secret)
    (raw / "leaves_too").symlink_to(tmp_path / "elsewhere")
    (raw / "stays.txt").symlink_to("plain00.txt")
    (raw / "dangling.txt").symlink_to("nowhere.txt")
    (raw / "circular.txt").symlink_to("circular.txt")
    (raw / ".hidden.txt").write_text("hidden")
    os.mkfifo(raw / "fifo.txt")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(raw / "socket.txt"))
    server.close()
    summary = take_snapshot(raw, out, HALF).summary
    assert summary["files_skipped"] == {
        "link_out_of_folder": 1,
        "link_to_folder": 1,
        "broken_link": 2,
        "hidden": 1,
        "not_a_regular_file": 2,
    }
    assert summary["bytes_dropped"] == {"duplicate": (raw / "plain00.txt").stat().st_size}  # the link that stays inside


def test_a_folder_that_vanishes_during_the_scan_is_counted(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (raw / "going").mkdir()
    (raw / "going" / "a.txt").write_text("soon gone")
    original = local_folder.OpenFolder.enter

    def removing(self: Any, folder: str) -> int:
        if folder == "going":
            (raw / "going" / "a.txt").unlink()
            (raw / "going").rmdir()
        return original(self, folder)

    monkeypatch.setattr(local_folder.OpenFolder, "enter", removing)
    assert take_snapshot(raw, out, HALF).summary["files_skipped"] == {"vanished": 1}


def test_a_folder_that_cannot_be_listed_is_left_out_with_a_warning(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files count as removed: never without a word."""
    (raw / "locked").mkdir()
    (raw / "locked" / "a.txt").write_text("a text in a folder")
    take_snapshot(raw, out, HALF)
    original = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if path == "locked":
            raise PermissionError(13, "Permission denied", path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    summary = take_snapshot(raw, out, HALF).summary
    assert (summary["documents"], summary["files_removed"]) == (16, 1)
    assert summary["files_skipped"] == {"unreadable_folder": 1}
    assert (drop_warning(summary) or "").startswith("the files in 'locked' are left out, and count as removed")
    assert drop_warning(take_snapshot(raw, out, HALF).summary), "also if nothing else has changed"
    monkeypatch.undo()
    assert drop_warning(take_snapshot(raw, out, HALF).summary) is None


def test_an_input_folder_that_cannot_be_listed_is_refused(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*arguments: Any, **options: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(local_folder.os, "open", refusing)
    with pytest.raises(UserError, match=r"--input_dir .*/raw: cannot be listed \(Permission denied\); make it readable"):
        take_snapshot(raw, out, HALF)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Folders inside each other, far below what the system takes as one path, with a text in each: above or below the next."""
    root, texts, path = tmp_path / "deep", {}, ""
    root.mkdir()
    descriptor = os.open(root, os.O_RDONLY)
    for level in range(DEPTH):
        name = "az"[level % 2] + ".txt"
        texts[path + name] = f"A text on level {level}.\n"
        with open(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=descriptor), "w") as file:
            file.write(texts[path + name])
        os.mkdir("deeper", dir_fd=descriptor)
        above, descriptor = descriptor, os.open("deeper", os.O_RDONLY, dir_fd=descriptor)
        os.close(above)
        path += "deeper/"
    os.close(descriptor)
    yield root, texts
    subprocess.run(["rm", "-rf", root], check=True)  # Python's own removal recurses


def test_folders_of_any_depth_are_read_in_a_few_steps_each(
    deep: tuple[Path, dict[str, str]], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, texts = deep
    original, steps = os.open, Counter[str]()

    def counting(*arguments: Any, **options: Any) -> int:
        steps["open"] += 1
        return original(*arguments, **options)

    monkeypatch.setattr(os, "open", counting)
    snapshot = take_snapshot(root, out, HALF)
    assert texts_of(snapshot, root) == [texts[path] for path in sorted(texts)]
    assert steps["open"] < 16 * DEPTH, "three passes, down and up, and the files"
    assert snapshot.summary["files_skipped"] == {}


def test_a_folder_that_was_moved_out_is_not_left_to_where_it_is_now(raw: Path, tmp_path: Path) -> None:
    (raw / "a" / "b").mkdir(parents=True)
    (raw / "a" / "kept.txt").write_text("inside")
    (tmp_path / "secret.txt").write_text("outside")
    folders = local_folder.OpenFolder(raw)
    folders.enter("a/b")
    (raw / "a" / "b").rename(tmp_path / "b")
    assert os.fstat(folders.enter("a")).st_ino == (raw / "a").stat().st_ino
    with pytest.raises(FileNotFoundError):
        folders.enter("a/b")
    with pytest.raises(FileNotFoundError):
        folders.open("secret.txt")


def test_files_are_read_again_after_the_readers_have_changed(
    raw: Path, out: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = take_snapshot(raw, out, HALF)
    opened.clear()
    monkeypatch.setattr("llm_core.corpus.snapshot._READER_VERSION", "next")
    assert take_snapshot(raw, out, HALF).snapshot_id == first.snapshot_id
    assert len(opened) == 16
    opened.clear()
    take_snapshot(raw, out, HALF)
    assert opened == []


def test_short_reads_are_continued_to_the_end_of_the_file(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take_snapshot(raw, out, HALF).snapshot_id
    original = os.read
    monkeypatch.setattr(local_folder.os, "read", lambda descriptor, size: original(descriptor, min(size, 7)))
    assert take_snapshot(raw, out.with_name("pieces"), HALF).snapshot_id == expected


# Identity, duplicates, split


def test_a_document_id_is_the_hash_of_its_text_and_the_first_duplicate_is_kept(raw: Path, out: Path) -> None:
    write_jsonl(raw / "a.jsonl", {"text": "This is text number 5.\n" * 3})
    snapshot = take_snapshot(raw, out, HALF)
    rows = [row for row in snapshot.documents.to_pylist() if row["path"] in ("a.jsonl", "plain05.txt")]
    assert [row["status"] for row in rows] == ["kept", "duplicate"]
    assert rows[0]["document_id"] == rows[1]["document_id"] == hashlib.sha256((raw / "plain05.txt").read_bytes()).hexdigest()
    (raw / "a.jsonl").unlink()
    again = take_snapshot(raw, out, HALF)
    assert "duplicate" not in again.documents["status"].to_pylist(), "the copy replaces the removed original"


def test_rule_29_the_split_is_a_pure_function_of_the_content(raw: Path, out: Path) -> None:
    before = take_snapshot(raw, out, HALF)
    fill(raw, 40)
    (raw / "plain01.txt").rename(raw / "zz.txt")
    after = take_snapshot(raw, out, HALF)
    side = dict(zip(after.documents["document_id"].to_pylist(), after.documents["split"].to_pylist(), strict=True))
    for row in before.documents.to_pylist():
        assert side[row["document_id"]] == row["split"] == documents.split_of(row["document_id"], 0.49)


def test_rule_29_a_larger_val_fraction_only_moves_documents_to_val() -> None:
    ids = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(4000)]
    small = {i for i in ids if documents.split_of(i, 0.05) == "val"}
    large = {i for i in ids if documents.split_of(i, 0.2) == "val"}
    assert small < large
    assert 140 < len(small) < 260
    assert 700 < len(large) < 900


# Incremental


def test_a_second_scan_of_the_same_content_opens_and_writes_nothing(raw: Path, out: Path, opened: list[str]) -> None:
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


def test_the_counts_of_a_scan_are_reported_even_if_the_snapshot_is_an_older_one(raw: Path, out: Path) -> None:
    first = take_snapshot(raw, out, HALF)
    (raw / "picture.png").write_bytes(b"not text")
    (raw / "new.txt").write_text("something new")
    take_snapshot(raw, out, HALF)
    (raw / "new.txt").unlink()
    again = take_snapshot(raw, out, HALF)
    assert again.snapshot_id == first.snapshot_id
    assert again.summary["files_ignored"] == first.summary["files_ignored"] + 1
    assert (again.summary["files_added"], again.summary["files_removed"]) == (0, 1)
    assert take_snapshot(raw, out, HALF).summary["files_removed"] == 0


def test_a_change_that_keeps_the_size_is_detected(raw: Path, out: Path) -> None:
    first = take_snapshot(raw, out, HALF)
    (raw / "plain02.txt").write_text("That is text number 2.\n" * 3)
    assert take_snapshot(raw, out, HALF).snapshot_id != first.snapshot_id


def test_a_change_that_keeps_size_mtime_and_inode_is_detected(raw: Path, out: Path) -> None:
    """As by unpacking a new version of an archive with fixed times."""
    os.utime(raw / "plain02.txt", (1_000_000_000, 1_000_000_000))
    first = take_snapshot(raw, out, HALF)
    before = (raw / "plain02.txt").stat()
    (raw / "plain02.txt").write_text("That is text number 2.\n" * 3)
    os.utime(raw / "plain02.txt", (1_000_000_000, 1_000_000_000))
    after = (raw / "plain02.txt").stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert take_snapshot(raw, out, HALF).snapshot_id != first.snapshot_id


def test_a_replaced_folder_is_opened_again(raw: Path) -> None:
    for name in ("old", "new"):
        (raw / name).mkdir()
    (raw / "old" / "a.txt").write_text("a")
    (raw / "new" / "b.txt").write_text("b")
    place = local_folder.LocalFolder(raw)
    with place.open("old/a.txt") as file:
        assert file.raw.read() == b"a"
    shutil.rmtree(raw / "old")
    (raw / "new").rename(raw / "old")
    with place.open("old/b.txt") as file:
        assert file.raw.read() == b"b"


def test_a_second_write_within_a_clock_tick_is_detected(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("llm_core.corpus.snapshot.time.sleep", waited.append)
    (raw / "plain02.txt").touch()
    take_snapshot(raw, out, HALF)
    assert 0 < waited[0] <= 0.02, "a file written a moment ago"
    monkeypatch.setattr("llm_core.corpus.snapshot.time.time", lambda: (raw / "plain02.txt").stat().st_ctime + 1)
    take_snapshot(raw, out, HALF)
    assert waited[1] == 0


def test_another_configuration_reads_every_file_again(raw: Path, out: Path, opened: list[str]) -> None:
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


def test_a_damaged_snapshot_is_detected_and_written_again(raw: Path, out: Path) -> None:
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


# Files that change


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
    with pytest.raises(DataError, match=r"plain05\.txt: changed 3 times while it was read; run again when it no longer changes"):
        take_snapshot(raw, out, HALF)


def test_an_unreadable_file_is_quarantined_and_read_again_at_the_next_scan(
    raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("plain06.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(os, "open", refusing)
        snapshot = take_snapshot(raw, out, HALF)
    assert {"path": "plain06.txt", "reason": "unreadable", "detail": "Permission denied"} in snapshot.summary["quarantined"]
    assert snapshot.summary["bytes_dropped"] == {"unreadable": (raw / "plain06.txt").stat().st_size}
    assert statuses(take_snapshot(raw, out, HALF))["plain06.txt"] == "kept"


@pytest.mark.parametrize("change", ["edit", "remove", "replace by a folder"])
def test_text_that_changed_since_the_snapshot_is_refused(change: str, raw: Path, out: Path) -> None:
    snapshot = take_snapshot(raw, out, HALF)
    path = raw / "plain07.txt"
    path.unlink()
    if change == "edit":
        path.write_text("Other words, of any length, that are not what the snapshot has read here.")
    elif change == "replace by a folder":
        path.mkdir()
    with pytest.raises(DataError, match=r"plain07\.txt: changed since the snapshot was taken; run again"):
        texts_of(snapshot, raw)


def test_reading_the_documents_of_a_file_opens_it_once(raw: Path, out: Path, opened: list[str]) -> None:
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


def test_a_folder_with_nothing_but_a_link_to_the_text_says_what_to_do(tmp_path: Path, out: Path) -> None:
    fill(tmp_path / "elsewhere")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "books").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"0 other files; 1 skipped: 1 link to folder, not followed\)") as caught:
        take_snapshot(tmp_path / "raw", out, HALF)
    assert str(caught.value).endswith(
        "another folder, such as the one that a link leads to; a bind mount or a copy works as well"
    )


def test_a_folder_without_usable_text_is_explained(tmp_path: Path, out: Path) -> None:
    (tmp_path / "raw").mkdir()
    bad = tmp_path / "raw" / "x.txt"
    for data, remedy in ((b"A" * 199 + b"\xff", "--invalid_utf8 replace"), (b"\xff\xfe" * 100, "converting it to UTF-8")):
        bad.write_bytes(data)
        with pytest.raises(UserError, match=rf"no usable text in its 1 files \(not_utf8 200 bytes\); try {remedy}$"):
            take_snapshot(tmp_path / "raw", out, HALF)
    assert not out.exists()


def test_a_split_without_documents_is_reported_with_what_to_change(tmp_path: Path, out: Path) -> None:
    fill(tmp_path / "raw", 1)
    with pytest.raises(UserError, match=r"--val_fraction 0.0001: none of the 1 documents \(69 bytes\) falls to val; add text$"):
        take_snapshot(tmp_path / "raw", out, CorpusConfig(val_fraction=0.0001))


@pytest.mark.parametrize("files", [3, 16, 200])
@pytest.mark.parametrize("val_fraction", [1e-6, 0.49999])
def test_the_val_fraction_in_the_message_puts_text_into_both_splits(
    files: int, val_fraction: float, tmp_path: Path, out: Path
) -> None:
    fill(tmp_path / "raw", files)
    try:
        take_snapshot(tmp_path / "raw", out, CorpusConfig(val_fraction=val_fraction))
    except UserError as error:
        (advised,) = re.findall(r"give --val_fraction (\S+), or add text", str(error))
        summary = take_snapshot(tmp_path / "raw", out, CorpusConfig(val_fraction=float(advised))).summary
        assert summary["train_bytes"] and summary["val_bytes"]
    else:
        assert val_fraction > 0.1


def test_one_long_text_is_divided_as_the_message_says(tmp_path: Path, out: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "book.txt").write_text("".join(f"Line {number} of the only book.\n" for number in range(1000)))
    with pytest.raises(UserError, match=r"give --max_document_bytes \d+, which makes about 100 documents") as caught:
        take_snapshot(tmp_path / "raw", out, CorpusConfig())
    (size,) = re.findall(r"--max_document_bytes (\d+)", str(caught.value))
    assert 80 < take_snapshot(tmp_path / "raw", out, CorpusConfig(max_document_bytes=int(size))).summary["documents"] < 140


# What is dropped


def test_dropped_text_is_counted_by_reason_in_documents_and_bytes(raw: Path, out: Path) -> None:
    (raw / "copy.txt").write_bytes((raw / "plain03.txt").read_bytes())
    (raw / "latin1.txt").write_bytes("é".encode("latin-1") * 50)
    (raw / "empty.txt").write_text("")
    write_jsonl(raw / "lines.jsonl", {"text": "A line.", "meta": "x" * 4000}, {"body": "?"}, {"body": "!"})
    snapshot = take_snapshot(raw, out, HALF)
    rows = {row["reason"]: (row["documents"], row["bytes"]) for row in dropped_text(snapshot.summary)}
    copied = (raw / "copy.txt").stat().st_size
    assert rows == {"duplicate": (1, copied), "not_utf8": (1, 50), "no_text_field": (2, 28), "empty": (1, 0)}, "no envelope"
    share = {row["reason"]: row["share"] for row in dropped_text(snapshot.summary)}
    assert share["not_utf8"] == 50 / (snapshot.summary["bytes_kept"] + copied + 50 + 28)
    reopened = load_snapshot(out, snapshot.snapshot_id)
    assert reopened.summary["documents_dropped"] == snapshot.summary["documents_dropped"]
    path = out / "snapshots" / f"{snapshot.snapshot_id}.json"
    older = {name: value for name, value in read_json(path).items() if name != "documents_dropped"}
    write_json(path, {name: value for name, value in older.items() if not name.startswith("sha256")})
    assert load_snapshot(out, snapshot.snapshot_id).summary["documents_dropped"] == snapshot.summary["documents_dropped"]


def test_more_than_5_percent_of_dropped_text_is_worth_a_warning(raw: Path, out: Path) -> None:
    fill(raw, 60)
    kept = take_snapshot(raw, out, HALF).summary["bytes_kept"]
    (raw / "bad.txt").write_bytes(b"\xff" + b"?" * (kept // 20 - 1))
    assert drop_warning(take_snapshot(raw, out, HALF).summary) is None
    (raw / "bad.txt").write_bytes(b"\xff" + b"?" * (kept // 18))
    warning = "5.3% of the text is dropped: 5.3% not_utf8 (--invalid_utf8 replace keeps it)"
    assert drop_warning(take_snapshot(raw, out, HALF).summary) == warning
    (raw / "bad.txt").write_bytes(b"\xff" * (kept // 18 + 1))
    warning = "5.3% of the text is dropped: 5.3% not_utf8 (converting it to UTF-8 keeps it)"
    assert drop_warning(take_snapshot(raw, out, HALF).summary) == warning
    (raw / "bad.txt").unlink()
    write_jsonl(raw / "lines.jsonl", {"text": "A line.", "meta": "x" * 10 * kept})
    assert drop_warning(take_snapshot(raw, out, HALF).summary) is None, "an envelope is not text"


def test_quarantined_lines_and_rows_are_one_entry_of_their_file_and_the_largest_loss_comes_first(raw: Path, out: Path) -> None:
    (raw / "a.txt").write_bytes(b"\0" * 50)
    (raw / "b.jsonl").write_text('{"text": "good"}\n' + "{not json}\n" * 30 + '{"body": "?"}\n')
    write_parquet(raw / "c.parquet", ["good", "\0" * 60, "\0" * 61])
    snapshot = take_snapshot(raw, out, HALF)
    assert snapshot.summary["quarantined"] == snapshot.quarantined()
    assert [(entry["path"], entry["reason"], entry["detail"]) for entry in snapshot.quarantined()] == [
        ("b.jsonl", "unreadable_json", "30 lines, the first: line at byte 17"),
        ("c.parquet", "binary", "2 rows, the first: row 1"),
        ("a.txt", "binary", "NUL at byte 0"),
        ("b.jsonl", "no_text_field", "line at byte 347"),
    ]
    assert snapshot.summary["quarantined_by_reason"] == {"unreadable_json": 30, "binary": 3, "no_text_field": 1}


def test_ignored_files_are_counted_by_extension(raw: Path, out: Path) -> None:
    for name in ("a.PDF", "b.pdf", "table.csv.gz", "only.gz", "README", "v1.2/notes"):
        (raw / name).parent.mkdir(exist_ok=True)
        (raw / name).write_bytes(b"?")
    summary = take_snapshot(raw, out, HALF).summary
    assert summary["ignored_by_extension"] == {".pdf": 2, ".csv.gz": 1, ".gz": 1, "no extension": 2}
    assert summary["files_ignored"] == 6
