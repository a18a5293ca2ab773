"""Manifests: what is missing, damaged or unknown is named."""

from pathlib import Path
from typing import Any

import pytest

from llm_core.dataset import load_manifest
from llm_core.errors import DataError, UserError
from llm_core.system import write_json


@pytest.mark.parametrize("folder", ["nowhere", ""])
def test_missing_data_is_reported_with_the_command_that_prepares_it(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data_dir .*: no prepared data .*python -m llm_core.data_prep_tool"):
        load_manifest(tmp_path / folder)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ('{"format_version": 1}', "damaged or edited manually"),
        ({"format_version": 9}, "format version 9, this program reads 1"),
        ({"format_version": 1}, r"damaged, field dataset_id: Field required"),
    ],
)
def test_a_damaged_manifest_is_named(content: str | dict[str, Any], problem: str, tmp_path: Path) -> None:
    if isinstance(content, str):
        (tmp_path / "metadata.json").write_text(content)
    else:
        write_json(tmp_path / "metadata.json", content)
    with pytest.raises(DataError, match=f"metadata.json: {problem}"):
        load_manifest(tmp_path)


def test_an_unknown_dataset_id_is_named(data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"--dataset_id 0000: no such dataset"):
        load_manifest(data_dir, "0000")
