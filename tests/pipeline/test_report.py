"""The table at the end of a run."""

from pathlib import Path

import pytest

from pipeline.report import locations, report_table
from pipeline.resources import Storage


def test_files_are_named_as_they_can_be_typed_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage(home="data")
    assert "  catalog      data/catalog.duckdb\n" in report_table("a run", locations(storage))
    elsewhere = Storage(home=str(tmp_path / "data"))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    assert f"  catalog      {tmp_path}/data/catalog.duckdb\n" in report_table("a run", locations(elsewhere))


def test_numbers_are_shown_with_their_thousands_apart_and_columns_aligned() -> None:
    table = report_table("a run", {"steps": 1600, "bits per byte": 1.97971, "released": "yes"})
    assert table.splitlines()[3:6] == ["  steps          1,600", "  bits per byte  1.9797", "  released       yes"]
