"""The catalog in folders whose names mean something to DuckDB or to a file system library."""

from pathlib import Path

import pytest

from llm_core.errors import UserError
from llm_core.layout import Home
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import Database
from pipeline.catalog.rebuild import rebuild
from tests.support.artifacts import NASTY, Artifacts
from tests.support.names import WORST_NAME

# Of the catalog's files: the database and its locks.
ENDS = ("", ".lock", ".queue")


@pytest.mark.parametrize("name", ["?y=1", "\\", "*", "[v1]", "md:x", WORST_NAME])
def test_the_catalog_is_the_same_in_every_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Folders that a pattern would match too, with other text.
    for decoy in {"v", "xy=1", "x"} - {name}:
        Artifacts(tmp_path / decoy).snapshot("snap", ["decoy.txt", "other.txt"])
    home = Home(Path(name))
    Artifacts(home.root.absolute()).snapshot("snap", NASTY)
    catalog = Catalog(home.catalog)
    catalog.record_snapshot(home.prepared.root, "snap")
    rows = catalog.query("SELECT path FROM snapshot_documents ORDER BY path")
    assert [row["path"] for row in rows] == sorted([*NASTY, "copy.txt"])
    assert {path.name for path in home.root.iterdir()} <= {"processed_data", *(f"catalog.duckdb{end}" for end in ENDS)}
    assert not (tmp_path / "catalog.duckdb").exists()


def test_a_rebuild_works_in_a_folder_with_the_worst_name(tmp_path: Path) -> None:
    home = Home(tmp_path / WORST_NAME)
    Artifacts(home.root).full_lineage(NASTY)
    assert rebuild(home.root, home.catalog) == []
    assert Catalog(home.catalog).usage(NASTY[1])


def test_a_failed_transaction_in_a_folder_that_duckdb_misreads_changes_nothing(tmp_path: Path) -> None:
    artifacts, database = Artifacts(tmp_path / "a?b"), Database(tmp_path / "a?b" / "catalog.duckdb")
    artifacts.snapshot("snap", NASTY)
    Catalog(database.path).record_snapshot(artifacts.processed, "snap")

    def fail() -> None:
        with database.connect() as connection:
            connection.execute("DELETE FROM snapshots")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert Catalog(database.path).query("SELECT count(*) AS rows FROM snapshots") == [{"rows": 1}]


def test_a_temporary_folder_that_duckdb_misreads_too_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t?").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t?"))
    Catalog(tmp_path / "plain" / "catalog.duckdb").create()
    with pytest.raises(UserError, match=r"TMPDIR .*t\?: DuckDB cannot open a path with \? or .*; name another folder"):
        Catalog(tmp_path / "a?b" / "catalog.duckdb").create()
