"""Hostile files of every kind, given to the real preparation in a process whose memory is measured.

The preparation must succeed, prepare the files beside them as usual, account for every byte, execute nothing and stay within a
memory limit.
"""

import gzip
import io
import json
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm_core.corpus import load_snapshot
from llm_core.dataset import load_manifest
from llm_core.dataset.shard import open_tokens
from llm_core.layout import Home
from pipeline.catalog.catalog import Catalog
from tests.faults.report import Tally
from tests.support.corpora import fill, zstd

# Limit of resident bytes; the libraries take about a fifth of it.
MAX_MEMORY = 1 << 30

SPECIAL = "<|endoftext|><|pad|>[UNK][PAD]<|endoftext|>\n"

# A small process starts the command: the peak that the system reports includes the memory of the process that started it.
_MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10))
sys.exit(code)
"""

# Writes one or more files into a folder; the number is the size of large ones in bytes.
Make = Callable[[Path, int], object]


def _line(text: str, rest: str = "") -> bytes:
    return b'{"text": ' + json.dumps(text).encode() + rest.encode() + b"}\n"


def _gzip(path: Path, block: bytes, size: int) -> None:
    """A gzip file of repeated blocks, `size` bytes when decompressed, written without holding them in memory."""
    with gzip.open(path, "wb") as file:
        for _ in range(0, size, len(block)):
            file.write(block)


def _zstd(path: Path, block: bytes, size: int) -> None:
    with closing(pa.CompressedOutputStream(str(path), "zstd")) as file:
        for _ in range(0, size, len(block)):
            file.write(block)


def _plain(path: Path, block: bytes, size: int, before: bytes = b"", after: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(before)
        for _ in range(0, size, len(block)):
            file.write(block)
        file.write(after)


def _parquet(path: Path, text: Any, **options: Any) -> None:
    pq.write_table(pa.table({"text": text}), path, **options)


def _lying_footer(path: Path) -> None:
    """A Parquet file whose footer claims a length greater than that of the file."""
    _parquet(path, ["text"] * 50)
    content = path.read_bytes()
    path.write_bytes(content[:-8] + struct.pack("<I", 0x7FFFFFF0) + content[-4:])


def _socket(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as server:
        here = os.open(path.parent, os.O_RDONLY)  # the full path may be too long for a socket
        server.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def _outside(folder: Path) -> Path:
    """The parent of the corpus folder."""
    return next(parent for parent in (folder, *folder.parents) if parent.name == "raw").parent


def _links(folder: Path) -> None:
    outside = _outside(folder) / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.txt").write_text("a secret outside the folder\n" * 3)
    (folder / "leaves.txt").symlink_to(outside / "secret.txt")
    (folder / "leaves_relatively.txt").symlink_to(os.path.relpath(outside / "secret.txt", folder))
    (folder / "leaves_as_folder").symlink_to(outside)
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "there.txt").symlink_to("back.txt")
    (folder / "back.txt").symlink_to("there.txt")
    (folder / "into_itself").symlink_to(".")
    (folder / "zero.txt").symlink_to("/dev/zero")


def _special_files(folder: Path) -> None:
    os.mkfifo(folder / "fifo.txt")
    _socket(folder / "socket.jsonl")
    with suppress(PermissionError):  # only root may
        os.mknod(folder / "device.txt", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero


NAMES = [
    "quote'.txt",
    'double".txt',
    "'; DROP TABLE documents; --.txt",
    "a\nnew line.txt",
    "\x1b[31mred\x07.txt",
    "--output_dir.txt",
    "-rf.txt",
    "CON.txt",
    "aux.jsonl.txt",
    "star*question?.txt",
    "percent%s%n {braces} $HOME `id`.txt",
    "back\\slash.txt",
    "key=value.txt",
    " spaces .txt",
    "\u202eright to left.txt",
    "<img src=x onerror=alert(1)>[link](javascript:alert(1)).txt",
    "n" * 251 + ".txt",
]


def _names(folder: Path) -> None:
    for number, name in enumerate(NAMES):
        (folder / name).write_text(f"A file with an unusual name, number {number}.\n" * 3)
    with open(os.fsencode(folder) + b"/not \xff\xfe utf8.txt", "w") as file:
        file.write("A file whose name is not UTF-8.\n")
    deep = folder
    for _ in range(40):
        deep = deep / "deep"
    deep.mkdir(parents=True)
    (deep / "down.txt").write_text("A file in a deep folder.\n" * 3)


def _deep_folders(folder: Path, levels: int = 1500) -> None:
    """More levels than Python recurses, and a path that is longer than the system takes as one."""
    descriptor = os.open(folder, os.O_RDONLY)
    for name in ["deep"] * levels:
        os.mkdir(name, dir_fd=descriptor)
        above, descriptor = descriptor, os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(above)
    with open(os.open("down.txt", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor), "w") as file:
        file.write("A file at the bottom.\n" * 3)
    os.close(descriptor)


def _archives(folder: Path) -> None:
    """Compressed files that end early, or are followed by something else."""
    text = "".join(f"Line {number} of {os.urandom(8).hex()}.\n" for number in range(20_000)).encode()
    for suffix, packed in (("gz", gzip.compress(text)), ("zst", zstd(text))):
        (folder / f"cut.txt.{suffix}").write_bytes(packed[: len(packed) // 2])
        (folder / f"followed.txt.{suffix}").write_bytes(packed + b"<html>")
        (folder / f"twice.txt.{suffix}").write_bytes(packed + packed[:-9])
        (folder / f"start.txt.{suffix}").write_bytes(packed[:7])


def _evil(path: Path) -> bytes:
    """A pickle that creates a file at `path` when it is loaded."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch '{path}'",))

    return pickle.dumps(Evil())


def _pickles(folder: Path) -> None:
    for suffix in ("txt", "jsonl", "parquet"):
        (folder / f"pickle.{suffix}").write_bytes(_evil(_outside(folder) / "CANARY"))


KINDS: dict[str, tuple[Make, dict[str, str | None]]] = {
    # The files, and the expected status of each; None: not listed at all.
    "one line": (lambda at, size: _plain(at / "line.txt", b"x" * (1 << 20), size), {"line.txt": "kept"}),
    "one line, gz": (lambda at, size: _gzip(at / "line.txt.gz", os.urandom(1 << 19).hex().encode(), size), {}),
    "one line of jsonl": (
        lambda at, size: _plain(at / "line.jsonl", b"x" * (1 << 20), max(size, 65 << 20), b'{"text": "', b'"}'),
        {"line.jsonl": "line_too_long"},
    ),
    "gzip bomb": (lambda at, size: _gzip(at / "bomb.txt.gz", bytes(1 << 20), 2 * size), {"bomb.txt.gz": "binary"}),
    "gzip bomb of text": (
        lambda at, size: _gzip(at / "bomb.txt.gz", b"boom\n" * 200_000, max(size, 80 << 20)),
        {"bomb.txt.gz": "too_compressed"},
    ),
    "zstd bomb": (
        lambda at, size: _zstd(at / "bomb.txt.zst", b"boom\n" * 200_000, max(size, 80 << 20)),
        {"bomb.txt.zst": "too_compressed"},
    ),
    "bomb of bombs": (
        lambda at, size: (at / "bomb.txt.gz").write_bytes(gzip.compress(gzip.compress(bytes(size)))),
        {"bomb.txt.gz": "binary"},
    ),
    "parquet in a bomb": (
        lambda at, size: _gzip(at / "bomb.parquet.gz", bytes(1 << 20), max(size, 80 << 20)),
        {"bomb.parquet.gz": "too_compressed"},
    ),
    "lines of nothing": (
        lambda at, size: _gzip(at / "ones.jsonl.gz", b"1\n" * (1 << 18), size),
        {"ones.jsonl.gz": "mostly_unusable"},
    ),
    "lines of nothing, not compressed": (
        lambda at, size: _plain(at / "ones.jsonl", b"{}\n" * (1 << 18), size),
        {"ones.jsonl": "mostly_unusable"},
    ),
    "rows of null": (
        lambda at, size: _parquet(at / "null.parquet", pa.nulls(max(size // 16, 1 << 19), pa.string())),
        {"null.parquet": "mostly_unusable"},
    ),
    "rows of one letter": (
        lambda at, size: _parquet(at / "a.parquet", pa.array(["a"]).take(pa.array([0] * max(size // 64, 1 << 19)))),
        {"a.parquet": "too_many_texts"},
    ),
    "line of empty objects": (
        lambda at, size: (at / "dicts.jsonl").write_bytes(_line("text", ', "x": [' + "{}," * (size // 16) + "{}]")),
        {},
    ),
    "string without an end": (
        lambda at, size: (at / "endless.jsonl").write_bytes(b'{"a": "' + b'\\"' * 8000 + b"," * min(size, 60 << 20) + b"\n"),
        {},
    ),
    "text of commas": (
        lambda at, size: (at / "commas.jsonl").write_bytes(_line("," * min(size, 60 << 20))),
        {"commas.jsonl": "kept"},
    ),
    "line of quotes": (
        lambda at, size: (at / "quotes.jsonl").write_bytes(b'{"text": [' + b'"",' * (min(size, 60 << 20) // 3) + b'""]}\n'),
        {},
    ),
    "deep nesting": (
        lambda at, _: (at / "deep.jsonl").write_bytes(
            _line("text", ', "x": ' + "[" * 500_000 + "]" * 500_000) + _line("Some text.")
        ),
        {"deep.jsonl": "kept"},
    ),
    "deep nesting, not closed": (
        lambda at, _: (at / "open.jsonl").write_bytes(b'{"a":' * 200_000),
        {"open.jsonl": "unreadable_json"},
    ),
    "huge numbers": (
        lambda at, _: (at / "numbers.jsonl").write_bytes(
            _line("text", ', "x": ' + "9" * 1_000_000) + _line("The number is infinite.", ', "x": 1e999999')
        ),
        {"numbers.jsonl": "kept"},
    ),
    "wrong types": (
        lambda at, _: (at / "types.jsonl").write_bytes(
            b'1\n"text"\n[]\nnull\ntrue\nNaN\n{"text": null}\n{"text": 1}\n{"text": ["a"]}\n{"text": {}}\n{"TEXT": "a"}\n'
        ),
        {"types.jsonl": "no_text_field"},
    ),
    "duplicate keys": (
        lambda at, _: (at / "twice.jsonl").write_bytes(
            b'{"text": 1, "text": "The last one counts, as JSON readers do.", "text": 1}\n'
        ),
        {"twice.jsonl": "no_text_field"},
    ),
    "lone surrogates, no newline": (
        lambda at, _: (at / "half.jsonl").write_bytes(
            b'{"text": "\\ud800"}\n{"text": "\\udc00\\ud800"}\n{"text": "\\ud83d\\ude42 is whole"}'
        ),
        {"half.jsonl": "kept"},
    ),
    "mixed encodings": (
        lambda at, _: (at / "mixed.jsonl").write_bytes(
            _line("good") + b'{"text": "caf\xe9"}\n' + '{"text": "x"}'.encode("utf-16")
        ),
        {"mixed.jsonl": "kept"},
    ),
    "NULs": (lambda at, size: os.truncate(os.open(at / "hole.txt", os.O_CREAT | os.O_WRONLY), size), {"hole.txt": "binary"}),
    "parquet cut off": (
        lambda at, _: (_parquet(at / "cut.parquet", ["row"] * 50), os.truncate(at / "cut.parquet", 60)),
        {"cut.parquet": "unreadable_parquet"},
    ),
    "parquet with a lying footer": (lambda at, _: _lying_footer(at / "lies.parquet"), {"lies.parquet": "unreadable_parquet"}),
    "parquet of lists": (lambda at, _: _parquet(at / "nested.parquet", [["a"], []]), {"nested.parquet": "no_text_field"}),
    "parquet of structures": (
        lambda at, _: _parquet(at / "nested.parquet", [{"text": "a"}]),
        {"nested.parquet": "no_text_field"},
    ),
    "parquet of decimals": (
        lambda at, _: _parquet(at / "decimal.parquet", pa.array([1], pa.decimal128(38, 10))),
        {"decimal.parquet": "no_text_field"},
    ),
    "parquet of bytes": (lambda at, _: _parquet(at / "binary.parquet", [b"\xff"]), {"binary.parquet": "no_text_field"}),
    "parquet of two texts": (
        lambda at, _: pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), at / "two.parquet"),
        {"two.parquet": "kept"},
    ),
    "special tokens": (lambda at, _: (at / "special.txt").write_text(SPECIAL * 100), {"special.txt": "kept"}),
    "links": (lambda at, _: _links(at), {"leaves.txt": None, "leaves_relatively.txt": None, "loop.txt": None, "zero.txt": None}),
    "special files": (lambda at, _: _special_files(at), {"fifo.txt": None, "socket.jsonl": None, "device.txt": None}),
    "names": (lambda at, _: _names(at), dict.fromkeys(NAMES, "kept") | {"/".join([*["deep"] * 40, "down.txt"]): "kept"}),
    "deep folders": (lambda at, _: _deep_folders(at), {"/".join([*["deep"] * 1500, "down.txt"]): "kept"}),
    "damaged archives": (
        lambda at, _: _archives(at),
        {
            **dict.fromkeys([f"{name}.txt.{suffix}" for name in ("followed", "twice") for suffix in ("gz", "zst")], "kept"),
            "cut.txt.gz": "kept",
            "start.txt.gz": "unreadable_gzip",
            "start.txt.zst": "unreadable_zstd",
        },
    ),
    "byte order marks": (
        lambda at, _: (at / "marks.jsonl").write_bytes((b"\xef\xbb\xbf" + _line("marked") + b"\xef\xbb\xbf\r\n") * 100),
        {"marks.jsonl": "kept"},
    ),
    "one word": (
        lambda at, size: (at / "word.jsonl").write_bytes(_line("".join(random.Random(0).choices("abcd", k=size // 8)))),
        {"word.jsonl": "kept"},
    ),
    "parquet of many row groups": (
        lambda at, _: _parquet(at / "groups.parquet", [f"row {number}" for number in range(5000)], row_group_size=1),
        {"groups.parquet": "kept"},
    ),
    "parquet of many columns": (
        lambda at, _: pq.write_table(
            pa.table({f"column {number}": ["a"] * 20 for number in range(2000)} | {"text": [f"row {n}" for n in range(20)]}),
            at / "columns.parquet",
            row_group_size=2,
        ),
        {"columns.parquet": "kept"},
    ),
    "empty files": (
        lambda at, _: [(at / f"empty.{suffix}").touch() for suffix in ("txt", "jsonl", "parquet", "md.gz", "md.zst")],
        {"empty.txt": "empty", "empty.jsonl": "empty", "empty.md.gz": "empty", "empty.parquet": "unreadable_parquet"},
    ),
    "pickles": (lambda at, _: _pickles(at), {"pickle.jsonl": "binary", "pickle.parquet": "unreadable_parquet"}),
}


def feed(folder: Path, size: int, seed: int, random_files: int, tokenizer_type: str = "bpe", together: bool = False) -> Tally:
    """Prepares every kind, each in its own corpus or `together` in one, and random bytes with every file suffix.

    size: of the large files, in bytes. random_files: number of the files with random bytes, in corpora of 50.
    """
    tally = Tally("hostile input", seed)
    if together:
        kinds: dict[str, tuple[Make, dict[str, str | None]]] = {"all kinds at once": (_all_kinds, _all_statuses())}
    else:
        kinds = dict(KINDS)
    chosen = random.Random(seed)
    for first in range(0, random_files, 50):
        files = list(_random_files(chosen, min(50, random_files - first)))
        kinds[f"random bytes from {first}"] = (
            lambda at, _, files=files: [(at / name).write_bytes(data) for name, data in files],
            {},
        )
    for number, (kind, (make, expected)) in enumerate(kinds.items()):
        here = folder / str(number)
        here.mkdir(parents=True)
        fill(here / "raw")
        make(here / "raw", size)
        problem = _problem(here, expected, tokenizer_type)
        tally.count(f"{kind}: {problem}" if problem else None)
        if not problem:
            subprocess.run(["rm", "-rf", here], check=True)  # Python's own removal recurses into deep folders
    return tally


def _all_kinds(at: Path, size: int) -> None:
    for number, (make, _) in enumerate(KINDS.values()):
        (at / f"kind{number}").mkdir()
        make(at / f"kind{number}", size)


def _all_statuses() -> dict[str, str | None]:
    return {
        f"kind{number}/{name}": status for number, (_, expected) in enumerate(KINDS.values()) for name, status in expected.items()
    }


def _random_files(chosen: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Random bytes, and intact files with a few bytes changed."""
    suffixes = [f"{kind}{packed}" for kind in ("txt", "md", "jsonl", "parquet") for packed in ("", ".gz", ".zst")]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {n} {chosen.random()}" for n in range(100)]}), table)
    for number in range(count):
        suffix = chosen.choice(suffixes)
        intact = table.getvalue() if ".parquet" in f".{suffix}" else b"".join(_line(f"text {chosen.random()}") for _ in range(30))
        data = bytearray(chosen.randbytes(chosen.randrange(2000)) if chosen.random() < 0.3 else intact)
        if suffix.endswith("gz"):
            data = bytearray(gzip.compress(data))
        elif suffix.endswith("zst"):
            data = bytearray(zstd(bytes(data)))
        for _ in range(chosen.randrange(4) if data else 0):
            data[chosen.randrange(len(data))] = chosen.randrange(256)
        yield f"random{number}.{suffix}", bytes(data[: chosen.randrange(len(data) + 1)] if chosen.random() < 0.2 else data)


def _problem(here: Path, expected: dict[str, str | None], tokenizer_type: str) -> str | None:
    """What went wrong when preparing `here`/raw, None if nothing did."""
    home = Home(here / "home")
    out = home.prepared.root
    options = {"input_dir": here / "raw", "output_dir": out, "tokenizer_type": tokenizer_type, "vocab_size": 270}
    options |= {"max_length": 64, "num_workers": 1, "val_fraction": 0.3}
    command = [sys.executable, "-m", "llm_core.data_prep_tool", *(f"--{name}={value}" for name, value in options.items())]
    with open(here / "log", "wb") as log:
        measured = [sys.executable, "-c", _MEASURED, str(here / "memory"), *command]
        code = subprocess.run(measured, stdout=log, stderr=log, stdin=subprocess.DEVNULL).returncode
    output = (here / "log").read_bytes()
    if code or b"Traceback" in output:
        return f"exit code {code}: {output[-1000:].decode(errors='replace')}"
    if (memory := int((here / "memory").read_text())) > MAX_MEMORY:
        return f"{memory >> 20} MiB of memory"
    if b"\x1b" in output or b"\x07" in output:
        return "a control character in a file name reached the terminal"
    if (here / "CANARY").exists():
        return "a pickle was loaded"
    manifest = load_manifest(out)
    snapshot = load_snapshot(out, manifest.snapshot_id)
    summary, files = snapshot.summary, {row["path"]: row for row in snapshot.files.to_pylist()}
    if summary["bytes_read"] != summary["bytes_kept"] + sum(summary["bytes_dropped"].values()):
        return f"bytes do not add up: {summary}"
    statuses = {path: row["status"] for path, row in files.items()}
    for path, status in (expected | {f"plain{number:02}.txt": "kept" for number in range(16)}).items():
        if statuses.get(path) != status:
            return f"{path!r} is {statuses.get(path)}, not {status}"
    if sum(totals.documents for totals in manifest.splits.values()) != summary["documents"]:
        return "a document is missing from the dataset"
    for shard in manifest.shards:
        ends = int((open_tokens(out, shard) == manifest.tokenizer.eot_id).sum())
        if ends != shard.documents:
            return f"{ends} end-of-text tokens in {shard.documents} documents"
    return _catalog_problem(home, snapshot.kept_documents().to_pylist(), out, manifest)


def _catalog_problem(home: Home, documents: list[dict[str, Any]], out: Path, manifest: Any) -> str | None:
    """What went wrong when recording the data and finding every file by its name, None if nothing did."""
    catalog = Catalog(home.catalog)
    catalog.record_snapshot(out, manifest.snapshot_id)
    catalog.record_dataset(out, manifest.dataset_id)
    rows = catalog.query("SELECT DISTINCT path FROM snapshot_documents WHERE status = 'kept'")
    if {row["path"] for row in rows} != {document["path"] for document in documents}:
        return "the file names in the catalog differ"
    for name in {document["path"] for document in documents}:
        catalog.usage(name)  # raises if the name is unknown
    return None
