"""The catalog is rebuilt from the files on disk."""

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogBusyError, CatalogError, Database
from pipeline.catalog.rebuild import rebuild
from tests.support.artifacts import (
    TABLES,
    Artifacts,
    contents,
    document_id,
    killed_at_random,
    leave_a_log,
    python,
    python_ready,
)


def test_a_rebuilt_catalog_has_the_same_rows(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    assert rebuild(artifacts.home, artifacts.home / "catalog.duckdb") == []
    assert contents(catalog) == before
    assert sorted(path.name for path in artifacts.home.glob("catalog*")) == [
        "catalog.duckdb",
        "catalog.duckdb.lock",
        "catalog.duckdb.queue",
    ]


def test_the_catalog_of_a_real_lineage_is_rebuilt_with_the_same_rows(trained_home: Any, clone: Any) -> None:
    home, _ = clone(trained_home)
    before = contents(home.catalog)
    assert all(before[table] for table in TABLES)
    assert rebuild(home.folders.root, home.folders.catalog) == []
    assert contents(home.catalog) == before


@pytest.mark.parametrize("suffix", ["", ".wal"])
def test_a_damaged_file_is_reported_with_a_remedy_that_works(suffix: str, catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    leave_a_log(path)
    damaged = path.with_name(path.name + suffix)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 if suffix else 8] ^= 1  # the middle of the log, the file's magic number
    damaged.write_bytes(content)
    for access in (lambda: catalog.query("SELECT 1"), catalog.create):
        with pytest.raises(CatalogError) as caught:
            access()
        assert str(path) in str(caught.value)
        assert "textmill catalog rebuild" in str(caught.value)
    assert rebuild(artifacts.home, path) == []
    assert contents(catalog) == before


def test_a_flipped_bit_anywhere_is_harmless_or_reported(catalog: Catalog, artifacts: Artifacts) -> None:
    artifacts.snapshot("large", [f"file {number} {document_id(str(number))}" for number in range(5_000)])
    catalog.record_snapshot(artifacts.processed, "large")
    path = artifacts.home / "catalog.duckdb"
    before, intact = contents(catalog), path.read_bytes()
    chance, refused = random.Random(1), []
    for _ in range(25):
        damaged = bytearray(intact)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert contents(catalog) == before
        except CatalogError as error:
            refused.append(str(error))
    assert len(refused) > 2
    assert all("textmill catalog rebuild" in message for message in refused)


def test_rebuild_skips_and_names_damaged_files(catalog: Catalog, artifacts: Artifacts) -> None:
    (artifacts.home / "models" / "model" / "textmill.json").write_text("{")
    (artifacts.home / "checkpoints" / "run" / "metrics.jsonl").write_text("\0\0\0\n")
    problems = rebuild(artifacts.home, artifacts.home / "catalog.duckdb")
    assert [problem.split(":")[0].split("/")[-1] for problem in problems] == ["metrics.jsonl", "textmill.json"]
    assert len(catalog.query("SELECT * FROM snapshots")) == 1


def test_a_rebuild_killed_at_any_moment_loses_nothing(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    program = """
import sys
from pathlib import Path
from pipeline.catalog.rebuild import rebuild
print("ready", flush=True)
while True:
    rebuild(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    for _ in killed_at_random(program, artifacts.home, path, seed=8, within=0.6):
        assert contents(catalog) == before
    assert rebuild(artifacts.home, path) == []
    assert not list(artifacts.home.glob("*.new*"))


def test_a_rebuild_that_fails_before_the_rename_keeps_the_old_catalog_and_its_log(
    catalog: Catalog, artifacts: Artifacts, monkeypatch: Any
) -> None:
    path = artifacts.home / "catalog.duckdb"
    leave_a_log(path)
    before = contents(catalog)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="power cut"):
        rebuild(artifacts.home, path)
    assert contents(catalog) == before


def test_a_second_rebuild_waits_before_it_changes_anything(catalog: Catalog, artifacts: Artifacts, monkeypatch: Any) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    program = """
import sys
from pathlib import Path
import pipeline.catalog.rebuild as module
print("ready", flush=True)
module.rebuild(*map(Path, sys.argv[1:]))
"""
    record_model = Catalog.record_model

    def record_last(catalog: Catalog, model_dir: Path) -> None:
        second = python_ready(program, artifacts.home, path)
        time.sleep(1)
        second.kill()
        second.communicate()
        record_model(catalog, model_dir)

    monkeypatch.setattr(Catalog, "record_model", record_last)
    assert rebuild(artifacts.home, path) == []
    assert contents(catalog) == before


def test_concurrent_rebuilds_and_records_do_not_interfere(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    program = """
import sys
from pathlib import Path
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.rebuild import rebuild
home, path = map(Path, sys.argv[1:])
for _ in range(4):
    assert rebuild(home, path) == []
    Catalog(path).record_run(home / "checkpoints" / "run")
"""
    processes = [python(program, artifacts.home, path) for _ in range(3)]
    while any(process.poll() is None for process in processes):
        assert contents(catalog) == before, "at all times: a later rebuild would hide an earlier error"
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 3
    assert contents(catalog) == before


def test_rebuild_does_not_replace_a_file_that_the_duckdb_command_may_write(
    shell: Any, catalog: Catalog, monkeypatch: Any
) -> None:
    path = catalog._database.path
    before = contents(catalog)
    process = shell(path)
    monkeypatch.setattr("pipeline.catalog.rebuild.Database", lambda path: Database(path, wait_seconds=1))
    with pytest.raises(CatalogBusyError, match="has it open"):
        rebuild(path.parent, path)
    process.communicate()
    assert contents(catalog) == before
