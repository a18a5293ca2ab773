"""An older catalog is migrated to the newest schema."""

from pathlib import Path
from typing import Any

import pytest

from llm_core.errors import UserError
from pipeline.catalog import database
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogError, Database
from tests.support.artifacts import contents


def schema_of(path: Path) -> list[tuple[Any, ...]]:
    with Database(path).connect(read_only=True) as connection:
        columns = "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns ORDER BY ALL"
        views = "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY ALL"
        versions = "SELECT version FROM schema_version ORDER BY ALL"
        return [row for sql in (columns, views, versions) for row in connection.execute(sql).fetchall()]


def test_a_migrated_catalog_keeps_its_rows_and_has_the_schema_of_a_new_one(
    catalog: Catalog, monkeypatch: Any, tmp_path: Path
) -> None:
    before = contents(catalog)
    newest = database.schema_versions()[-1][0]
    later = [
        *database.schema_versions(),
        (newest + 1, "ALTER TABLE models ADD COLUMN stars INTEGER; CREATE TABLE extra (a INTEGER);"),
        (newest + 2, "ALTER TABLE extra ADD COLUMN b INTEGER;"),
    ]
    monkeypatch.setattr(database, "schema_versions", lambda: later)
    with pytest.raises(UserError, match="has the older schema version"):
        catalog.query("SELECT * FROM models")
    catalog.create()
    catalog.create()
    Catalog(tmp_path / "fresh.duckdb").create()
    assert schema_of(catalog._database.path) == schema_of(tmp_path / "fresh.duckdb")
    monkeypatch.undo()
    with pytest.raises(UserError, match="use a newer textmill"):
        catalog.create()
    monkeypatch.setattr(database, "schema_versions", lambda: later)
    kept = contents(catalog)
    assert {table: rows for table, rows in kept.items() if table != "models"} == {
        table: rows for table, rows in before.items() if table != "models"
    }


def test_a_migration_that_fails_changes_nothing(catalog: Catalog, monkeypatch: Any) -> None:
    before = schema_of(catalog._database.path)
    newest = database.schema_versions()[-1][0]
    broken = [
        *database.schema_versions(),
        (newest + 1, "CREATE TABLE half (a INTEGER); ALTER TABLE nothing ADD COLUMN b INTEGER;"),
    ]
    monkeypatch.setattr(database, "schema_versions", lambda: broken)
    with pytest.raises(CatalogError):
        catalog.create()
    monkeypatch.undo()
    assert schema_of(catalog._database.path) == before
