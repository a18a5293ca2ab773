"""Texts encoded in parallel, on threads and on Ray: the same ids in the same order, and no process left running."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from llm_core.errors import DataError, UserError
from llm_core.tokenizer import Tokenizer, encode_all, parallel
from tests.llm_core.test_data_prep_tool import run

TEXTS = [f"The {number}th text of many, " * (number % 7) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("prepared")
    run(corpus_dir, out)
    return Tokenizer.load(out / "tokenizer.json")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_BATCH_CHARACTERS", 200)


@pytest.mark.usefixtures("small_batches")
def test_no_more_texts_are_read_ahead_than_the_workers_need(tokenizer: Tokenizer) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for text in ["x" * 200] * 1000:
            read += 1
            yield text

    for done, _ in enumerate(encode_all(tokenizer, texts(), workers=3)):
        assert read <= done + 6


@pytest.mark.usefixtures("small_batches")
def test_an_error_while_reading_stops_encoding(tokenizer: Tokenizer) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS[:50]
        raise DataError("changed since the snapshot was taken")

    with pytest.raises(DataError, match="changed since"):
        list(encode_all(tokenizer, texts(), workers=2))


def test_ray_that_is_not_installed_is_reported_with_the_install_command(
    corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit):
        run(corpus_dir, tmp_path, "--engine", "ray")
    message = capsys.readouterr().err
    assert "--engine ray" in message
    assert '".[ray]"' in message


# With Ray

ENCODE_THREE_TEXTS = """
import sys
import numpy as np
from llm_core.tokenizer import Tokenizer, encode_all
ids = list(encode_all(Tokenizer(sys.stdin.buffer.read()), ["on a cluster"] * 3, 0, "ray"))
print(np.concatenate(ids).tolist())
"""


@pytest.fixture(scope="module")
def _ray() -> None:
    pytest.importorskip("ray")


@pytest.mark.usefixtures("_ray")
def test_ray_writes_the_same_bytes_and_leaves_no_process(corpus_dir: Path, tmp_path: Path) -> None:
    local = run(corpus_dir, tmp_path / "local")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    on_ray = run(corpus_dir, tmp_path / "ray", "--engine", "ray", "--num_workers", "2")
    assert on_ray == local
    for shard in local["shards"]:
        for file in (shard["file"], shard["facts_file"]):
            assert (tmp_path / "local" / file).read_bytes() == (tmp_path / "ray" / file).read_bytes()
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    assert not psutil.wait_procs(left, timeout=30)[1]


@pytest.mark.usefixtures("_ray")
def test_a_cluster_is_found_by_its_address_and_left_running(tokenizer: Tokenizer) -> None:
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        address = ray.get_runtime_context().gcs_address
        environment = os.environ | {"RAY_ADDRESS": address}
        done = subprocess.run(
            [sys.executable, "-c", ENCODE_THREE_TEXTS],
            input=tokenizer.serialized,
            env=environment,
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode().split("\n")[-2] == str(np.concatenate([tokenizer.encode("on a cluster")] * 3).tolist())
        assert ray.cluster_resources()["CPU"] == 1, "it still runs"
    finally:
        ray.shutdown()


@pytest.mark.usefixtures("_ray")
def test_ray_is_not_started_when_there_is_nothing_to_encode(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "not an address")
    assert list(encode_all(tokenizer, [], 1, "ray")) == []


@pytest.mark.usefixtures("_ray")
def test_an_unreachable_cluster_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "not an address")
    with pytest.raises(UserError, match="RAY_ADDRESS=not an address"):
        list(encode_all(tokenizer, TEXTS, 1, "ray"))
