"""The log and the page of raw_text say what of the folder is not read, in few lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.assets.left_out import LOGGED
from pipeline.assets.raw_text import raw_text
from tests.pipeline.conftest import Home


def lines(home: Home, result: Any, *beginnings: str) -> list[str]:
    return [line for line in home.messages(result) if line.startswith(beginnings)]


def test_skipped_entries_are_in_the_log_on_the_page_and_in_the_catalog(make_home: Callable[[], Home], tmp_path: Path) -> None:
    home = make_home()
    folder = Path(str(home.storage.raw_text))
    (folder / "books").symlink_to(tmp_path)
    (folder / ".hidden").mkdir()
    result = home.materialize(raw_text)
    assert lines(home, result, "skipped") == ["skipped: 1 link to folder, not followed: put the text itself into the folder"]
    shown = home.metadata(result, "raw_text")
    assert shown["files_skipped"] == 2
    assert shown["not_read"] == "skipped: 1 hidden; 1 link to folder, not followed"
    rows = {record.data["reason"]: record.data["entries"] for record in shown["skipped_entries"].records}
    assert rows == {"link_to_folder": 1, "hidden": 1}
    (row,) = home.catalog.query("SELECT files_skipped FROM snapshots")
    assert json.loads(row["files_skipped"]) == rows


def test_a_folder_of_mostly_other_formats_is_a_warning_with_the_most_frequent_extensions(make_home: Callable[[], Home]) -> None:
    home = make_home()
    folder = Path(str(home.storage.raw_text))
    files = home.metadata(home.materialize(raw_text), "raw_text")["files"]
    for number in range(files):
        (folder / f"{number}.html").touch()
    half = home.materialize(raw_text)
    assert not lines(home, half, "ignored"), "half of the files is usual"
    assert home.metadata(half, "raw_text")["not_read"] == f"{files} files of other formats ({files} .html)"
    (folder / "scan.pdf").touch()
    most = home.materialize(raw_text)
    (line,) = lines(home, most, "ignored")
    assert line.startswith(f"ignored: {files + 1} files of other formats ({files} .html, 1 .pdf) of {2 * files + 1}; only .txt")


def test_quarantined_files_are_one_line_each_the_largest_loss_first_and_known_ones_only_counted(
    make_home: Callable[[], Home],
) -> None:
    home = make_home()
    folder = Path(str(home.storage.raw_text))
    good, bad = '{"text": "A line of text."}', '{"body": "' + "x" * 100 + '"}'
    (folder / "rows.jsonl").write_text("\n".join([good, bad] * 30))
    for number in range(30):
        (folder / f"{number:02}.txt").write_bytes(b"\xff" * (100 + number))
    first = home.materialize(raw_text)
    total, largest, second, *others, rest = lines(home, first, "quarantined", "and ")
    assert total == "quarantined: 60 files, lines or rows (30 no text field, 30 not utf8)"
    assert largest.startswith("quarantined rows.jsonl: no_text_field (30 lines, the first: line at byte ")
    assert second.startswith("quarantined 29.txt: not_utf8 (")
    assert len(others) == LOGGED - 2
    assert rest.startswith("and 11 more; the page of raw_text lists up to 100")
    assert len(home.metadata(first, "raw_text")["quarantined_files"].records) == 31
    again = home.materialize(raw_text)
    assert lines(home, again, "quarantined", "and ") == [f"{total}, unchanged since the last run"]
    (folder / "new.txt").write_bytes(b"\xff" * 10)
    assert len(lines(home, home.materialize(raw_text), "quarantined", "and ")) == 2 + LOGGED


def test_text_that_a_filter_drops_is_not_called_quarantined(make_home: Callable[[], Home]) -> None:
    home = make_home()
    folder = Path(str(home.storage.raw_text))
    (folder / "rows.jsonl").write_text('{"text": "short"}\n{"text": " "}\n{"text": "' + "long enough " * 20 + '"}\n')
    result = home.materialize(raw_text, raw_text={"min_characters": 100})
    assert not lines(home, result, "quarantined")
    assert "quarantined_files" not in home.metadata(result, "raw_text")
