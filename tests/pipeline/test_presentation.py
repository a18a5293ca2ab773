"""The table at the end of a run."""

from pathlib import Path

import pytest

from pipeline.presentation import locations, report_table
from pipeline.resources import Storage


def test_paths_in_the_working_directory_are_shown_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage(home="data")
    assert "  catalog      data/catalog.duckdb\n" in report_table("a run", locations(storage.folders))
    elsewhere = Storage(home=str(tmp_path / "data"))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    assert f"  catalog      {tmp_path}/data/catalog.duckdb\n" in report_table("a run", locations(elsewhere.folders))


def test_numbers_have_thousands_separators_and_columns_are_aligned() -> None:
    table = report_table("a run", {"steps": 1600, "bits per byte": 1.97971, "released": "yes"})
    assert table.splitlines()[3:6] == ["  steps          1,600", "  bits per byte  1.9797", "  released       yes"]
