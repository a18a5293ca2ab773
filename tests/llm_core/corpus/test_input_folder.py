"""A corpus gives the same snapshot from a path, a URL, memory or disk."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_core import data_prep_tool
from llm_core.config import CorpusConfig
from llm_core.corpus import Snapshot, is_url, iter_texts, open_input_folder, take_snapshot
from llm_core.corpus import remote_folder as remote
from llm_core.corpus.local_folder import LocalFolder
from llm_core.errors import DataError, UserError

HALF = CorpusConfig(val_fraction=0.49, max_document_bytes=256)


def fill(directory: Path) -> None:
    for number in range(12):
        (directory / f"plain{number:02}.txt").write_text(f"This is text number {number}.\n" * 3)
    (directory / "deep" / "er").mkdir(parents=True)
    (directory / "deep" / "er" / "a.md.gz").write_bytes(gzip.compress("squeezed ü".encode()))
    line = json.dumps({"text": "a line " * 60}).encode()
    (directory / "deep" / "b.jsonl.zst").write_bytes(pa.compress(line, codec="zstd", asbytes=True))
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(50)]}), directory / "c.parquet", row_group_size=20)
    (directory / "picture.png").write_bytes(b"\x89PNG")
    (directory / ".hidden.txt").write_text("hidden")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    fill(tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def memory(raw: Path) -> Iterator[str]:
    """The same files in fsspec's memory file system."""
    fs = fsspec.filesystem("memory")
    fs.put(str(raw), "/corpus", recursive=True)
    yield "memory://corpus"
    fs.rm("/corpus", recursive=True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the remote files that the test opens."""
    names: list[str] = []
    original = remote.RemoteFolder.open

    def recording(self: Any, path: str) -> Any:
        names.append(path)
        return original(self, path)

    monkeypatch.setattr(remote.RemoteFolder, "open", recording)
    return names


def texts_of(taken: Snapshot, place: Any) -> list[str]:
    return list(iter_texts(place, taken.kept_documents(), taken.config))


def test_a_url_gives_the_same_snapshot_and_texts_as_the_files_on_disk(raw: Path, memory: str, tmp_path: Path) -> None:
    local = take_snapshot(raw, tmp_path / "local", HALF)
    for number, place in enumerate([memory, memory + "/", f"file://{raw}", str(raw)]):
        taken = take_snapshot(place, tmp_path / str(number), HALF)
        assert taken.snapshot_id == local.snapshot_id
        assert taken.documents.equals(local.documents)
        assert (taken.summary["files_ignored"], taken.summary["files_skipped"]) == (1, {"hidden": 1})
        assert texts_of(taken, place) == texts_of(local, raw)
    assert len(local.kept_documents()) == 12 + 1 + 2 + 50


def test_links_and_special_files_are_skipped_by_fsspecs_local_file_system(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("outside")
    (raw / "leaves.txt").symlink_to(tmp_path / "secret.txt")
    folder = remote.RemoteFolder("local", fsspec.filesystem("file"), str(raw)).walk()
    assert "leaves.txt" not in folder.files
    assert folder.skipped["not_a_regular_file"] == 1
    assert list(folder.files) == [path for path in LocalFolder(raw).walk().files if path != "leaves.txt"]


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, raw: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Callable]:
    """A remote folder and a function that writes a file into it."""
    if request.param == "memory":
        fs = fsspec.filesystem("memory")
        return memory, lambda name, data: fs.pipe_file(f"/corpus/{name}", data)
    monkeypatch.setattr(remote, "local_path", lambda url: None)  # through fsspec anyway
    return f"file://{raw}", lambda name, data: (raw / name).write_bytes(data)


def test_only_new_and_changed_files_are_opened(place: tuple[str, Callable], tmp_path: Path, opened: list[str]) -> None:
    url, write = place
    out = tmp_path / "out"
    first = take_snapshot(url, out, HALF)
    assert len(opened) == 15
    opened.clear()
    assert take_snapshot(url, out, HALF).snapshot_id == first.snapshot_id
    assert opened == []
    write("new.txt", b"something new")
    write("plain02.txt", b"That is text number 2.\n" * 3)  # same size
    second = take_snapshot(url, out, HALF)
    assert sorted(opened) == ["new.txt", "plain02.txt"]
    assert second.summary["files_added"] == second.summary["files_changed"] == 1
    assert take_snapshot(url, tmp_path / "scratch", HALF).snapshot_id == second.snapshot_id


def test_a_file_of_unknown_version_is_read_at_every_scan(raw: Path, memory: str, tmp_path: Path, opened: list[str]) -> None:
    stamp = remote.RemoteFolder(memory)._stamp
    assert stamp({"size": 3, "ETag": '"a"'}) == remote.RemoteFolder(memory)._stamp({"size": 3, "ETag": '"a"'})
    assert stamp({"size": 3, "ETag": '"a"'}) != stamp({"size": 3, "ETag": '"b"'})
    assert stamp({"size": 3}) != remote.RemoteFolder(memory)._stamp({"size": 3})
    now = {"size": 3, "mtime": float(int(remote.time.time()))}
    assert stamp(now) != remote.RemoteFolder(memory)._stamp(now), "a second write within that second would be invisible"
    long_ago = {"size": 3, "modified": "2020-01-01T00:00:00+00:00"}
    assert stamp(long_ago) == remote.RemoteFolder(memory)._stamp(long_ago)


def test_text_that_changed_since_the_snapshot_is_refused(place: tuple[str, Callable], tmp_path: Path) -> None:
    url, write = place
    taken = take_snapshot(url, tmp_path / "out", HALF)
    write("plain07.txt", b"Other words that are not in the snapshot, of any length.")
    with pytest.raises(DataError, match=rf"{url}/plain07\.txt: changed since the snapshot was taken; run again"):
        texts_of(taken, url)


def test_a_failed_connection_is_not_reported_as_a_damaged_file(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, size: int = -1) -> bytes:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", failing)
    with pytest.raises(DataError, match=r"memory://corpus/.*: could not be read \(reset by peer\); run again when"):
        take_snapshot(memory, tmp_path / "out", HALF)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", r"--input_dir memory://nowhere: no such folder; create it and put"),
        ("nosuch://bucket", r"--input_dir nosuch://bucket: Protocol not known: nosuch"),
        ("missing://bucket", r"--input_dir missing://bucket: Install missingfs to access it"),
    ],
)
def test_an_unusable_url_is_explained(url: str, message: str, tmp_path: Path) -> None:
    known = {"class": "no_such_module.FileSystem", "err": "Install missingfs to access it"}
    fsspec.register_implementation("missing", known["class"], clobber=True, errtxt=known["err"])
    with pytest.raises(UserError, match=message):
        take_snapshot(url, tmp_path / "out", HALF)


def test_the_data_preparation_tool_takes_a_url(memory: str, tmp_path: Path) -> None:
    flags = ["--vocab_size", "270", "--max_length", "16", "--val_fraction", "0.4", "--max_document_bytes", "256"]
    data_prep_tool.main(["--input_dir", memory, "--output_dir", str(tmp_path / "out"), *flags])
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["splits"]["train"]["documents"] > 0


def test_urls_are_distinguished_from_paths() -> None:
    assert [is_url(place) for place in ("s3://b/c", "simplecache::s3://b", "raw", "/raw", Path("/s3:/b"))] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert isinstance(open_input_folder("file:///raw"), LocalFolder)


def test_an_output_folder_inside_a_file_url_is_refused(raw: Path) -> None:
    with pytest.raises(UserError, match="is inside --input_dir file://"):
        take_snapshot(f"file://{raw}", raw / "processed", HALF)
