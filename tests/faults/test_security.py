"""Untrusted files execute no code and reach no other folder; files and ports are closed to other users."""

import ast
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from dagster._cli.dev import dev_command
from dagster_webserver.cli import dagster_webserver

from llm_core.checkpoint.state import load_checkpoint
from llm_core.corpus import load_snapshot, local_folder, readers, take_snapshot
from llm_core.dataset import load_manifest
from llm_core.errors import DataError
from llm_core.layout import PreparedData, RunFolder, checkpoint_manifest
from llm_core.system import read_json, sha256_file, write_json
from llm_core.tokenizer import Tokenizer, load_tokenizer
from pipeline.artifacts.pointers import find_current
from pipeline.catalog.catalog import Catalog
from tests.support.corpora import HALF, fill
from tests.support.training import SMALL

ROOT = Path(__file__).parent.parent.parent
PRODUCT = sorted(path for package in ("llm_core", "pipeline") for path in (ROOT / package).rglob("*.py"))

# No file is executed


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_no_file_content_is_executed(path: Path) -> None:
    for name, call in _calls(path):
        assert name.split(".")[0] not in ("eval", "exec", "compile", "__import__", "marshal", "shelve"), name
        assert not re.fullmatch(r"(pickle|dill|cloudpickle)\..*|os\.(system|popen)", name), name
        assert not name.startswith("yaml.") or name.startswith("yaml.safe_"), name
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("shell", "False") == "False", name
        assert "allow_pickle" not in keywords and "trust_remote_code" not in keywords, name
        if name in ("torch.load", "load") and "map_location" in keywords:
            assert keywords["weights_only"] == "True", path


@pytest.mark.parametrize("path", [path for path in PRODUCT if path.parts[-2] == "catalog"], ids=lambda path: path.name)
def test_values_reach_sql_only_as_bound_parameters(path: Path) -> None:
    """A statement is a constant with placeholders, other constants and, where DuckDB cannot bind a value, a quoted one."""
    allowed = {"_placeholders(row)", "values", "known", "quoted", "options"}
    for name, call in _calls(path):
        if name.split(".")[-1] not in ("execute", "executemany", "query", "sql") or not call.args:
            continue
        statement = call.args[0]
        if isinstance(statement, ast.JoinedStr):
            inserted = {ast.unparse(part.value) for part in statement.values if isinstance(part, ast.FormattedValue)}
            assert inserted <= allowed, f"{path.name}:{call.lineno}: {inserted - allowed}"
        else:
            assert isinstance(statement, ast.Constant | ast.Name), f"{path.name}:{call.lineno}: {ast.unparse(statement)}"


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._canary),)


def _manifest(checkpoint: Path, **changes: Any) -> None:
    fields = {"checkpoint_id": "c", "run_id": "r", "step": 1, "tokens_seen": 1, "val_loss": None, "format_version": 1}
    fields |= {"sha256": sha256_file(checkpoint), "bytes": checkpoint.stat().st_size, "file": checkpoint.name}
    write_json(checkpoint_manifest(checkpoint), fields | changes)


@pytest.mark.parametrize("zipped", [True, False, None])
def test_a_pickle_is_never_loaded_as_a_checkpoint(zipped: bool | None, tmp_path: Path) -> None:
    path, evil = tmp_path / "checkpoint_step_1.pt", Evil(tmp_path / "CANARY")
    if zipped is None:
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save({"model": evil}, path, _use_new_zipfile_serialization=zipped)
    _manifest(path)
    with pytest.raises(DataError, match=r"checkpoint_step_1\.pt: not a readable checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "CANARY").exists()
    pickle.loads(pickle.dumps(evil))  # proves that it works
    assert (tmp_path / "CANARY").exists()


NO_JSON = ["pickle", b"[" * 1_000_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 10_000 + b"}", b"", b"\xff\xfe"]


@pytest.mark.parametrize("content", NO_JSON, ids=["pickle", "lists", "objects", "number", "empty", "bytes"])
def test_an_invalid_manifest_or_tokenizer_is_reported_with_its_name(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "CANARY")) if content == "pickle" else content)
    for read in (read_json, Tokenizer.load):
        with pytest.raises(DataError, match=r"tokenizer\.json: "):
            read(path)
    assert not (tmp_path / "CANARY").exists()


# No path leaves its folder

ELSEWHERE = ["../outside", "/etc/passwd", "a/../../outside", "..", "", "a\0b"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_manifest_cannot_name_a_file_outside_its_folder(name: str, data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "processed_data"
    shutil.copytree(data_dir, folder)
    prepared = PreparedData(folder)
    manifest = read_json(prepared.metadata)
    snapshot_id, shard = manifest["snapshot_id"], manifest["shards"][0]
    for change in (
        {"shards": [shard | {"file": name}]},
        {"shards": [shard | {"facts_file": name}]},
        {"tokenizer": manifest["tokenizer"] | {"file": name}},
        {"snapshot_id": name},
    ):
        write_json(prepared.metadata, manifest | change)
        with pytest.raises(DataError, match=r"metadata\.json: .*does not name a file inside its folder"):
            load_manifest(folder)
    summary = read_json(prepared.snapshot(snapshot_id))
    table = summary["documents_table"] | {"file": name}
    write_json(prepared.snapshot(snapshot_id), summary | {"documents_table": table})
    for read in (load_snapshot, Catalog(tmp_path / "catalog.duckdb").record_snapshot):
        with pytest.raises(DataError, match="does not name a file inside its folder"):
            read(folder, snapshot_id)
    write_json(tmp_path / "released.json", {"path": name})
    with pytest.raises(DataError, match="does not name a file inside its folder"):
        find_current(tmp_path / "released.json")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "a\0b"])
def test_an_id_cannot_name_a_file_outside_its_folder(name: str, data_dir: Path, tmp_path: Path) -> None:
    """Ids come from run.json, from checkpoints and from the command line."""
    catalog = Catalog(tmp_path / "catalog.duckdb")
    records = (catalog.record_snapshot, catalog.record_tokenizer, catalog.record_dataset)
    for read in (load_manifest, load_snapshot, load_tokenizer, Tokenizer.stored, *records):
        with pytest.raises(DataError, match="does not name a file inside its folder"):
            read(data_dir, name)


@pytest.mark.parametrize("name", ["../checkpoint_step_1.pt", "/etc/passwd", "..", "", 5, None, "checkpoint_step_2.pt"])
def test_a_checkpoint_manifest_cannot_name_another_file(name: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_1.pt"
    path.write_bytes(b"x")
    _manifest(path, file=name)
    with pytest.raises(DataError, match="it names another file"):
        load_checkpoint(path)


def test_a_link_that_replaces_a_file_after_the_walk_is_not_followed_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, secret = tmp_path / "raw", tmp_path / "secret.txt"
    fill(raw)
    secret.write_text("a secret outside the folder")
    original: Callable[..., Any] = readers._read_open_file

    def swapping(*arguments: Any) -> Any:
        (raw / "plain07.txt").unlink(missing_ok=True)
        (raw / "plain07.txt").symlink_to(secret)
        (raw / "plain08.txt").unlink(missing_ok=True)
        (raw / "plain08.txt").symlink_to("plain01.txt")
        monkeypatch.setattr(readers, "_read_open_file", original)
        return original(*arguments)

    monkeypatch.setattr(readers, "_read_open_file", swapping)
    snapshot = take_snapshot(raw, tmp_path / "out", HALF)
    status = dict(zip(snapshot.files["path"].to_pylist(), snapshot.files["status"].to_pylist(), strict=True))
    assert status["plain07.txt"] == "unreadable"
    rows = {row["path"]: row for row in snapshot.documents.to_pylist()}
    assert rows["plain08.txt"]["document_id"] == rows["plain01.txt"]["document_id"], "a link inside the folder is read"
    assert secret.stat().st_size not in snapshot.documents["bytes"].to_pylist()


def test_a_link_that_replaces_a_folder_after_the_walk_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, secret = tmp_path / "raw", tmp_path / "secret"
    fill(raw)
    (raw / "inner").mkdir()
    secret.mkdir()
    for parent, text in ((raw / "inner", "harmless"), (secret, "a secret outside the folder")):
        (parent / "text.txt").write_text(text)
    original: Callable[..., Any] = local_folder.walk

    def swapping(input_dir: Path) -> Any:
        listing = original(input_dir)
        shutil.rmtree(raw / "inner")
        (raw / "inner").symlink_to(secret)
        return listing

    monkeypatch.setattr(local_folder, "walk", swapping)
    snapshot = take_snapshot(raw, tmp_path / "out", HALF)
    status = dict(zip(snapshot.files["path"].to_pylist(), snapshot.files["status"].to_pylist(), strict=True))
    assert status["inner/text.txt"] == "unreadable"


# Files


@pytest.mark.slow
@pytest.mark.parametrize(("umask", "forbidden"), [(0o000, 0o022), (0o002, 0o002), (0o077, 0o077)])
def test_only_the_owner_can_write_files_of_the_tools(umask: int, forbidden: int, corpus_dir: Path, tmp_path: Path) -> None:
    """Even under a umask that lets everyone write; a umask that lets the group write is kept."""
    processed, run_dir = tmp_path / "processed", tmp_path / "runs" / "run"
    prepare = {"input_dir": corpus_dir, "output_dir": processed, "vocab_size": 400, "max_length": 32, "num_workers": 1}
    train = SMALL | {"data_dir": processed, "save_dir": run_dir, "max_steps": 2, "num_layers": 1, "device": "cpu"}
    for module, options in (("data_prep_tool", prepare), ("train", train)):
        arguments = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([sys.executable, "-m", f"llm_core.{module}", *arguments], check=True, capture_output=True, umask=umask)
    written = [path for folder in (processed, tmp_path / "runs") for path in (folder, *folder.rglob("*"))]
    assert len(written) > 15
    assert [path for path in written if path.stat().st_mode & forbidden] == []
    if umask == 0o002:
        assert run_dir.stat().st_mode & 0o020, "the group may write"


def test_the_pipeline_restricts_a_umask_that_lets_others_write() -> None:
    code = "import os, pipeline.definitions; print(oct(os.umask(0)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, umask=0)
    assert done.stdout.strip() == "0o22"


# The network


def test_every_documented_web_server_listens_on_loopback_only() -> None:
    # Without an option, `dagster dev` leaves the host to the web server, whose default is loopback.
    assert dev_command.make_context("dev", []).params["host"] is None
    assert dagster_webserver.make_context("dagster-webserver", []).params["host"] == "127.0.0.1"
    commands = []
    for document in [ROOT / "README.md", *(ROOT / "deploy").glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for line in document.read_text().splitlines():
            commands += re.findall(r"^(?:.*&& )?(dagster dev.*|dagster-webserver.*)", line.strip())
    assert len(commands) >= 2
    for command in commands:
        assert re.fullmatch(r"dagster dev", command.split(" #")[0].strip()) or "-h 127.0.0.1" in command, command


DOCUMENTED = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [DOCUMENTED, ["--master_port=0"]], ids=["as documented", "plain"])
def test_a_training_on_one_machine_listens_on_loopback_only(flags: list[str], data_dir: Path, tmp_path: Path) -> None:
    """With a plain torchrun, only the ranks do: its own rendezvous listens on all interfaces, and no flag changes that."""
    readme = (ROOT / "README.md").read_text()
    assert (
        f"export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\ntorchrun {' '.join(DOCUMENTED)} --nproc_per_node=4 -m llm_core.train"
        in readme
    )
    options = SMALL | {"data_dir": data_dir, "save_dir": tmp_path / "run", "max_steps": 1_000_000, "device": "cpu"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = ["torchrun", *flags, "--nproc_per_node=2", "-m", "llm_core.train", *arguments]
    command[0] = str(Path(sys.executable).with_name("torchrun"))
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if flags == DOCUMENTED else {}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        family: list[psutil.Process] = []
        for _ in range(900):
            if RunFolder(tmp_path / "run").metrics.exists() or process.poll() is not None:
                family = psutil.Process(process.pid).children(recursive=True)
                break
            time.sleep(0.1)
        assert len(family) >= 2, (tmp_path / "log").read_text()
        family += [psutil.Process(process.pid)] if flags == DOCUMENTED else []
        connections = [connection for member in family for connection in member.net_connections(kind="inet")]
        listening = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
        assert listening <= {"127.0.0.1", "::1"}, listening
    finally:
        for member in {*family, psutil.Process(process.pid)}:
            member.kill()
        process.wait()
