"""Folders of the corpus tests: raw text and prepared data."""

from pathlib import Path

import pytest

from tests.support.corpora import fill


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    fill(tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
