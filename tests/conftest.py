"""Text and prepared data shared by many tests, which only read them."""

import os
import signal
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig
from llm_core.corpus import take_snapshot
from llm_core.corpus.local_folder import OpenFolder
from llm_core.dataset import build_dataset
from llm_core.tokenizer import prepare_tokenizer

# Everywhere the same results and ids: with bf16 units, `precision: auto` would give others.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# Background jobs of a shell and workers of xdist ignore SIGINT, and programs started by tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 KB of the Python manual in 40 files, a few of them in a subfolder."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "more").mkdir()
    for number, text in enumerate(islice(topics.values(), 40)):
        (folder / ("more" if number % 8 == 0 else "") / f"topic{number:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def data_dir(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`corpus_dir` prepared: bpe with a vocabulary of 512, windows of 64 tokens."""
    folder = tmp_path_factory.mktemp("processed")
    snapshot = take_snapshot(corpus_dir, folder, CorpusConfig(max_document_bytes=2048))
    artifact = prepare_tokenizer(snapshot, corpus_dir, folder, TokenizerConfig(vocab_size=512))
    build_dataset(snapshot, artifact, corpus_dir, folder, ShardConfig(max_length=64, num_workers=2, shard_bytes=1 << 16))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the raw text files that the test opens."""
    paths: list[str] = []
    original = OpenFolder.open

    def recording(folders: OpenFolder, path: str) -> int:
        paths.append(path)
        return original(folders, path)

    monkeypatch.setattr(OpenFolder, "open", recording)
    return paths
