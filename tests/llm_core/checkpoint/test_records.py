"""run.json and checkpoint manifests: what is written, what earlier versions wrote, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from llm_core.checkpoint import CheckpointRecord, GroupUsage, RunRecord
from llm_core.errors import DataError
from llm_core.layout import RunFolder
from llm_core.system import read_json, write_json
from tests.support.records import run_record

CONFIG = {"hidden_size": 16, "seed": 1}
USAGE = {"windows": 8, "windows_read": 16, "share": 1.0, "epochs": 2.0}


def write_format_1(run_dir: Path, **fields: Any) -> None:
    """A run.json of format 1, which has the configuration and calls a group of documents a part."""
    record = run_record().model_dump(mode="json", exclude={"config_sha256"})
    old = {"format_version": 1, "config": CONFIG, "mixture": [{"part": "web", **USAGE}]}
    write_json(RunFolder(run_dir).record, record | old | fields)


def test_a_run_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert RunRecord.find(tmp_path) is None
    record = run_record(mixture=[GroupUsage(group="web", **USAGE)], config_sha256="d", seconds_by_phase={"data": 0.5})
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == RunRecord.find(tmp_path) == record
    assert "config" not in read_json(RunFolder(tmp_path).record)


def test_a_run_record_of_format_1_is_read_with_its_configuration(tmp_path: Path) -> None:
    write_format_1(tmp_path)
    record = RunRecord.read(tmp_path)
    assert record.format_version == 1
    assert record.mixture == [GroupUsage(group="web", **USAGE)]
    assert record.train_config(tmp_path) == CONFIG, "no config.json is needed"


def test_the_oldest_run_records_lack_the_later_fields(tmp_path: Path) -> None:
    write_format_1(tmp_path)
    path = RunFolder(tmp_path).record
    later = {name for name, field in RunRecord.model_fields.items() if not field.is_required()} - {"config"}
    write_json(path, {name: value for name, value in read_json(path).items() if name not in later})
    record = RunRecord.read(tmp_path)
    assert (record.snapshot_id, record.mixture, record.train_config(tmp_path)) == (None, [], CONFIG)


def test_a_run_record_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    write_format_1(tmp_path, format_version=3)
    with pytest.raises(DataError, match=r"run\.json: format 3, this version reads formats 1 and 2; use a newer textmill"):
        RunRecord.read(tmp_path)


def test_a_wrong_field_of_a_run_record_is_named(tmp_path: Path) -> None:
    write_format_1(tmp_path, status="lost")
    with pytest.raises(DataError, match=r"run\.json: damaged, field status"):
        RunRecord.read(tmp_path)


def test_a_changed_configuration_is_refused(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).config
    record = run_record(config_sha256=write_json(path, CONFIG))
    assert record.train_config(tmp_path).items() >= CONFIG.items()
    write_json(path, CONFIG | {"seed": 2})
    with pytest.raises(DataError, match=r"config\.json"):
        record.train_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format 2, this version reads format 1"),
        ({"file": "checkpoint_step_5.pt"}, "damaged, it names another file, 'checkpoint_step_5.pt'"),
        ({}, "damaged, field 'checkpoint_id' is missing"),
    ],
)
def test_a_damaged_checkpoint_manifest_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_4.pt.json"
    write_json(path, {"format_version": 1, "file": "checkpoint_step_4.pt"} | change)
    with pytest.raises(DataError, match=message):
        CheckpointRecord.read(path)
