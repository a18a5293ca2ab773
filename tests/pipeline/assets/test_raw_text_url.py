"""Raw text at a URL: data preparation reads it from there, and never treats the URL as a local path."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pipeline.assets.raw_text import raw_text
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.assets.trained_tokenizer import trained_tokenizer
from pipeline.resources import Storage
from tests.pipeline.conftest import Home


@pytest.fixture
def home(make_home: Callable[[], Home]) -> Home:
    return make_home()


def test_data_preparation_reads_from_a_url(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    expected = home.metadata(home.materialize(raw_text), "raw_text")["snapshot_id"]
    fs = fsspec.filesystem("memory")
    fs.put(str(home.folders.root / "raw_text_data"), "/raw_of_a_url", recursive=True)
    home.storage = Storage(home=home.storage.home, raw_text_dir="memory://raw_of_a_url")
    try:
        result = home.materialize(raw_text, trained_tokenizer, tokenized_shards)
    finally:
        fs.rm("/raw_of_a_url", recursive=True)
    assert home.metadata(result, "raw_text")["snapshot_id"] == expected
    assert home.metadata(result, "raw_text")["folder"] == "memory://raw_of_a_url"
    assert home.metadata(result, "tokenized_shards")["train_tokens"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_resolved_and_a_url_is_kept_unchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage(home="h", raw_text_dir="texts").raw_text == tmp_path / "texts"
    assert Storage(home="h", raw_text_dir="s3://bucket/texts").raw_text == "s3://bucket/texts"
    assert Storage(home="h").raw_text == tmp_path / "h" / "raw_text_data"
