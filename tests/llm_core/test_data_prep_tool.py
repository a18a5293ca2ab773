"""Data preparation from the user's side: flags, messages, exit codes and files."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from llm_core import data_prep_tool
from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig
from llm_core.data_prep_tool import DataPrepOptions
from llm_core.dataset import load_manifest
from llm_core.dataset.shard import open_tokens
from llm_core.tokenizer import Tokenizer, parallel
from llm_core.tokenizer.training import train_tokenizer

ROOT = Path(data_prep_tool.__file__).parents[1]
SMALL = ["--vocab_size", "300", "--max_document_bytes", "2048", "--num_workers", "2"]


def run(corpus: Path, out: Path, *flags: str) -> dict[str, Any]:
    """Runs the tool in this process and returns its metadata."""
    data_prep_tool.main(["--input_dir", str(corpus), "--output_dir", str(out), *SMALL, *flags])
    metadata: dict[str, Any] = json.loads((out / "metadata.json").read_text())
    return metadata


def report_of(out: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "tokenizers" / f"{metadata['tokenizer']['tokenizer_id']}.report.json").read_text())
    return report


@pytest.mark.parametrize("command", [["-m", "llm_core.data_prep_tool"], [str(ROOT / "llm_core" / "data_prep_tool.py")]])
def test_the_command_line_works_as_a_module_and_as_a_file(command: list[str], corpus_dir: Path, tmp_path: Path) -> None:
    flags = ["--input_dir", str(corpus_dir), "--output_dir", "processed_data", "--tokenizer_type", "bpe", *SMALL]
    environment = os.environ | ({"PYTHONPATH": str(ROOT)} if command[0] == "-m" else {"PYTHONPATH": ""})
    done = subprocess.run(
        [sys.executable, *command, *flags, "--max_length", "128", "--stride", "16"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    out = tmp_path / "processed_data"
    manifest = load_manifest(out)
    assert (manifest.max_length, manifest.stride) == (128, 16)
    assert Tokenizer.load(out / "tokenizer.json").tokenizer_id == manifest.tokenizer.tokenizer_id
    assert all((out / shard.file).is_file() for shard in manifest.shards)
    assert "Reading: 40 of 40 files" in done.stderr
    assert "Encoding: " in done.stderr
    assert f"Dataset        {manifest.dataset_id}, windows of 128 tokens, overlap 16" in done.stdout
    assert f"{manifest.splits['train'].tokens:,} in {manifest.splits['train'].documents} documents" in done.stdout


def test_the_defaults_match_the_documentation() -> None:
    options = DataPrepOptions()
    assert (options.input_dir, options.output_dir) == ("raw_text_data", "processed_data")
    assert (options.tokenizer_type, options.vocab_size, options.max_length, options.stride) == ("bpe", 32000, 2048, 0)
    for stage in (CorpusConfig, TokenizerConfig, ShardConfig):
        assert options.stage(stage) == stage()


def test_the_table_shows_what_was_read_dropped_and_made(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in corpus_dir.glob("*.txt"):
        (raw / path.name).symlink_to(os.path.relpath(path, raw))  # a link out of the folder
        (raw / f"copy of {path.name}").write_bytes(path.read_bytes())
    (raw / "latin1.txt").write_bytes(b"caf\xe9")
    (raw / "paper.pdf").write_bytes(b"")
    run(raw, tmp_path / "out")
    first = capsys.readouterr().out
    assert "36: 36 added, 0 changed, 0 removed, 0 unchanged" in first
    assert "ignored      1 files of other formats: 1 .pdf" in first
    assert "skipped      35 link out of folder" in first
    assert re.search(r"dropped      4 bytes \(0\.0%\) in 1 documents: not utf8", first)
    assert "quarantined  1 files, lines or rows: not utf8" in first
    assert "latin1.txt: not utf8, unexpected end of data at byte 3" in first
    assert "bpe, 300 tokens, new" in first
    assert "bytes per token" in first
    assert " written, 0 reused" in first
    run(raw, tmp_path / "out")
    second = capsys.readouterr()
    assert "bpe, 300 tokens, kept" in second.out
    assert "0 written, " in second.out
    assert "Encoded        0 documents, 0 bytes; " in second.out
    assert "warning" not in second.err
    (raw / "latin1.txt").write_bytes(b"caf\xe9" * 10_000)
    run(raw, tmp_path / "out")
    warned = capsys.readouterr().err
    assert re.search(
        r"data_prep_tool: warning: [\d.]+% of the text is dropped: [\d.]+% not_utf8 \(converting it to UTF-8 keeps it", warned
    )


def test_the_table_names_the_largest_quarantined_files_and_where_the_others_are(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(corpus_dir, raw)
    for size in range(1, 8):
        (raw / f"zeros{size}.txt").write_bytes(bytes(size))
    run(raw, tmp_path / "out")
    shown = capsys.readouterr().out
    assert re.findall(r"zeros\d", shown) == ["zeros7", "zeros6", "zeros5", "zeros4", "zeros3"]
    (files, documents) = re.findall(r"and 2 more: see the column status of (\S+) and, of lines and rows, (\S+)\n", shown)[0]
    assert Path(files).is_file() and Path(documents).is_file()


# Every flag


def test_tokenizer_type_and_vocab_size(corpus_dir: Path, tmp_path: Path) -> None:
    for kind in ("bpe", "wordpiece"):
        tokenizer = run(corpus_dir, tmp_path, "--tokenizer_type", kind, "--vocab_size", "400")["tokenizer"]
        assert (tokenizer["tokenizer_type"], tokenizer["vocab_size"]) == (kind, 400)


def test_tiktoken_ranks_and_encoding(corpus_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes.tiktoken").write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    flags = ["--tokenizer_type", "tiktoken", "--tiktoken_ranks", str(tmp_path / "bytes.tiktoken")]
    made = [run(corpus_dir, tmp_path / "out", *flags, "--tiktoken_encoding", name) for name in ("gpt2", "o200k_base")]
    assert made[0]["tokenizer"]["tokenizer_id"] != made[1]["tokenizer"]["tokenizer_id"]
    for metadata in made:
        assert (metadata["tokenizer"]["vocab_size"], metadata["tokenizer"]["eot_id"]) == (257, 256)
        assert (
            metadata["splits"]["train"]["tokens"]
            == metadata["splits"]["train"]["bytes"] + metadata["splits"]["train"]["documents"]
        )


def test_special_tokens(corpus_dir: Path, tmp_path: Path) -> None:
    metadata = run(corpus_dir, tmp_path, "--special_tokens", '["<|end|>", "<|pad|>"]')
    assert Tokenizer.load(tmp_path / "tokenizer.json").special_tokens == ["<|end|>", "<|pad|>"]
    assert metadata["tokenizer"]["eot_id"] == open_tokens(tmp_path, load_manifest(tmp_path).shards[0])[0]


def test_max_length_and_stride_rebuild_no_shard(corpus_dir: Path, tmp_path: Path) -> None:
    before = run(corpus_dir, tmp_path, "--max_length", "64")
    after = run(corpus_dir, tmp_path, "--max_length", "32", "--stride", "8")
    assert (after["max_length"], after["stride"]) == (32, 8)
    assert after["shards"] == before["shards"]
    assert after["dataset_id"] == before["dataset_id"]


def test_num_workers_changes_only_the_time(corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_BATCH_CHARACTERS", 512)
    used: dict[str, set[int]] = {"1": set(), "3": set()}
    original = Tokenizer.encode_batch
    every_thread_has_a_batch = threading.Barrier(3)

    def recording(tokenizer: Tokenizer, texts: list[str]) -> Any:
        if workers == "3" and threading.get_ident() not in used[workers]:
            every_thread_has_a_batch.wait(60)
        used[workers].add(threading.get_ident())
        return original(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", recording)
    metadata = []
    for workers in used:
        metadata.append(run(corpus_dir, tmp_path / workers, "--num_workers", workers))
    assert metadata[0] == metadata[1]
    assert used["1"] == {threading.get_ident()}
    assert len(used["3"]) == 3


def test_num_workers_0_means_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[int] = []

    def recording(tokenizer: Tokenizer, batches: Any, workers: int) -> Any:
        requested.append(workers)
        return map(tokenizer.encode_batch, batches)

    monkeypatch.setattr(parallel, "_encode_on_threads", recording)
    monkeypatch.setattr(parallel, "available_cores", lambda: 7)
    tokenizer = train_tokenizer(lambda: iter(["some text, some text"]), TokenizerConfig(vocab_size=260))
    assert len(list(parallel.encode_all(tokenizer, ["one", "two"], 0))) == 2
    assert requested == [7]


def test_shard_bytes_bounds_a_shard(corpus_dir: Path, tmp_path: Path) -> None:
    few = run(corpus_dir, tmp_path / "few")["shards"]
    many = run(corpus_dir, tmp_path / "many", "--shard_bytes", "65536")["shards"]
    assert len(few) == 2 < len(many)
    assert max(shard["bytes"] for shard in many) <= 65536


def test_max_document_bytes_val_fraction_and_text_field(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [json.dumps({"body": f"Sentence {n} of this line of text. " * 20}) for n in range(200)]
    (raw / "lines.jsonl").write_text("\n".join(lines))
    flags = ["--text_field", "body", "--vocab_size", "290", "--max_document_bytes"]
    undivided = run(raw, tmp_path / "a", *flags, "4096", "--val_fraction", "0.3")["splits"]
    divided = run(raw, tmp_path / "b", *flags, "256", "--val_fraction", "0.1")["splits"]
    documents = [sum(split["documents"] for split in splits.values()) for splits in (undivided, divided)]
    assert documents[0] == 200
    assert documents[1] > 500
    assert 0.2 < undivided["val"]["documents"] / documents[0] < 0.4
    assert 0.05 < divided["val"]["documents"] / documents[1] < 0.15


def test_filters_and_invalid_utf8(corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(corpus_dir, raw)
    (raw / "short.txt").write_text("Too short.")
    (raw / "long.txt").write_text("Far too long. " * 2000)
    (raw / "spam.txt").write_text("buy cheap pills online now " * 50)
    (raw / "digits.txt").write_text(" ".join(str(number * number) for number in range(300)))
    (raw / "latin1.txt").write_bytes(f"caf\xe9 {' '.join(f'number{n}' for n in range(60))}".encode("latin-1"))
    flags = "--min_characters 50 --max_characters 20000 --min_letter_share 0.5 --max_repetition 0.3 --invalid_utf8 replace"
    run(raw, tmp_path / "out", *flags.split())
    out = capsys.readouterr().out
    for reason in ("too short", "too long", "few letters", "repetitive"):
        assert re.search(rf"dropped +[\d,]+ bytes \([\d.]+%\) in \d+ documents: {reason}", out)
    assert "repaired     1 sequences that were not UTF-8" in out
    assert "quarantined" not in out


def test_tokenizer_train_bytes_and_tokenizer_seed(corpus_dir: Path, tmp_path: Path) -> None:
    flags = ["--tokenizer_train_bytes", "65536", "--tokenizer_seed"]
    made = [run(corpus_dir, tmp_path / seed, *flags, seed) for seed in ("1", "2")]
    assert made[0]["tokenizer"]["tokenizer_id"] != made[1]["tokenizer"]["tokenizer_id"]
    assert report_of(tmp_path / "1", made[0])["train_bytes"] <= 65536


def test_retrain_tokenizer(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text("".join(f"The {n} quick brown foxes jumped over {n * n} lazy dogs.\n" for n in range(1000)))
    first = run(raw, tmp_path / "out")
    (raw / "b.txt").write_text("".join(f"Ganz andere Wörter {n * 7} stehen hier überall herum.\n" for n in range(2000)))
    frozen = run(raw, tmp_path / "out")
    retrained = run(raw, tmp_path / "out", "--retrain_tokenizer")
    assert frozen["tokenizer"] == first["tokenizer"] != retrained["tokenizer"]
    assert frozen["splits"]["train"]["tokens"] > retrained["splits"]["train"]["tokens"]


# Every bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size", "100"], "--vocab_size 100: Input should be greater than or equal to 258"),
        (["--vocab_size", "many"], "--vocab_size many: Input should be a valid integer"),
        (["--tokenizer_type", "unigram"], "--tokenizer_type unigram: Input should be 'bpe', 'wordpiece' or 'tiktoken'"),
        (["--stride", "64", "--max_length", "64"], "stride 64 must be smaller than max_length 64"),
        (["--max_length", "4"], "--max_length 4: Input should be greater than or equal to 8"),
        (["--val_fraction", "0"], "--val_fraction 0: Input should be greater than 0"),
        (["--max_document_bytes", "10"], "--max_document_bytes 10: Input should be greater than or equal to 256"),
        (["--num_workers", "-1"], "--num_workers -1: Input should be greater than or equal to 0"),
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--vocab_size", "90000"], "--vocab_size 90000: the text yields"),
        (["--special_tokens", '["the"]'], "--special_tokens 'the': ordinary text could become this token"),
        (["--tokenizer_type", "tiktoken", "--tiktoken_encoding", "gpt9"], "--tiktoken_encoding gpt9: unknown"),
        (["--tokenizer_type", "tiktoken", "--tiktoken_ranks", "/nowhere"], "--tiktoken_ranks /nowhere: no such file"),
        (["--input_dir", "/nowhere"], "--input_dir /nowhere: no such folder"),
        (["--input_dir", __file__], "test_data_prep_tool.py: is a file; name the folder that contains it"),
        (["--val_fraction", "0.0000001"], "--val_fraction 1e-07: none of the"),
    ],
)
def test_an_invalid_option_exits_with_code_2_and_is_named(
    flags: list[str], message: str, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(corpus_dir, tmp_path / "out", *flags)
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out" / "metadata.json").exists()


def test_the_output_folder_is_never_inside_the_input_folder(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus_dir, tmp_path / "raw")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "raw", tmp_path / "raw" / "out")
    assert ended.value.code == 2
    assert f"is inside --input_dir {tmp_path / 'raw'} and would be read as text" in capsys.readouterr().err


def test_an_unwritable_folder_exits_with_code_2_and_is_named(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as ended:
        run(corpus_dir, tmp_path / "out")
    assert ended.value.code == 2
    assert f"{tmp_path / 'out'}: not a writable folder" in capsys.readouterr().err


def test_damaged_metadata_exits_with_code_3_and_is_named(
    corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus_dir, tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        run(corpus_dir, tmp_path)
    assert ended.value.code == 3
    assert "metadata.json: not readable as JSON" in capsys.readouterr().err
