"""Data preparation beside its peers: `python -m benchmarks.data` prints the tables of benchmarks/README.md.

The corpus is text found on any machine, the Python installation and its packages (`--corpus` names another folder); all
contenders encode with the same vocabulary, trained on it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken

from benchmarks.measure import CORES, Figure, in_turns, keep, table
from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig
from llm_core.corpus import take_snapshot
from llm_core.dataset import TokenStream, Windows
from llm_core.encoding import encode_all
from llm_core.parts import kept_runs
from llm_core.shards import build_dataset, load_manifest
from llm_core.tokenizer import Tokenizer
from llm_core.tokenizer_store import TokenizerArtifact, prepare_tokenizer

WINDOW = 1024
MEMORY_BUDGET = ["--shard_bytes", str(8 << 20), "--tokenizer_train_bytes", str(8 << 20)]


def found_texts(corpus: Path | None) -> Iterator[str]:
    """Texts of the corpus: clean UTF-8 alone, since peers know nothing else."""
    paths = sysconfig.get_paths()
    for folder in [corpus] if corpus else [Path(paths["stdlib"]), Path(paths["purelib"])]:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".txt", ".md", ".rst") and path.is_file():
                try:
                    text = path.read_bytes().decode()
                except UnicodeDecodeError:
                    continue
                if text.strip() and "\0" not in text:
                    yield text


def write_corpus(texts: Iterator[str], folder: Path, megabytes: float) -> list[str]:
    """Writes texts as files until there are enough, and returns them."""
    written: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        path = folder / f"{number // 500:03}" / f"{number:06}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        written.append(text)
        size += path.stat().st_size
        if size >= megabytes * 1e6:
            break
    return written


def prepare(raw: Path, out: Path, tokenizer: TokenizerConfig, shards: ShardConfig) -> None:
    snapshot = take_snapshot(raw, out, CorpusConfig())
    build_dataset(snapshot, prepare_tokenizer(snapshot, raw, out, tokenizer), raw, out, shards)


def prepare_corpus(corpus: Path | None, megabytes: float, folder: Path, tokenizer: TokenizerConfig, shards: ShardConfig) -> Path:
    """Prepared data of the corpus, for those that train on it."""
    write_corpus(found_texts(corpus), folder / "raw", megabytes)
    prepare(folder / "raw", folder / "data", tokenizer, shards)
    return folder / "data"


def encoding(texts: list[str], artifact: TokenizerArtifact, raw: Path, out: Path, rounds: int) -> list[Figure]:
    """MB/s of text to ids, with all cores; last, of files to shards: read, clean, hash, encode, write."""
    tokenizer = artifact.tokenizer
    same = tiktoken.Encoding(
        "same", pat_str=_pattern(tokenizer), mergeable_ranks=_ranks(tokenizer), special_tokens={tokenizer.special_tokens[0]: 0}
    )
    few = texts[::8]  # the slow ones have an eighth to do, taken evenly
    work = {
        "textmill": (texts, lambda: sum(1 for _ in encode_all(tokenizer, texts, CORES))),
        "tiktoken encode_ordinary_batch": (texts, lambda: same.encode_ordinary_batch(texts, num_threads=CORES)),
        "tokenizers encode_batch_fast": (few, lambda: tokenizer.reference.encode_batch_fast(few, add_special_tokens=False)),
        "tokenizers encode_batch": (few, lambda: tokenizer.reference.encode_batch(few, add_special_tokens=False)),
        "files to shards": (texts, lambda: files_to_shards(artifact, raw, out)),
    }
    ours, theirs = next(iter(encode_all(tokenizer, texts[:1], 1))).tolist(), same.encode_ordinary(texts[0])
    assert ours == theirs == tokenizer.reference.encode(texts[0], add_special_tokens=False).ids
    seconds = in_turns(rounds, {name: call for name, (_, call) in work.items()})
    sizes = {name: sum(len(text.encode()) for text in some) / 1e6 for name, (some, _) in work.items()}
    return [Figure(name, "MB/s", [sizes[name] / second for second in taken]) for name, taken in seconds.items()]


def files_to_shards(artifact: TokenizerArtifact, raw: Path, out: Path) -> None:
    """The preparation from nothing, with a tokenizer that is there already."""
    for name in ("dataset", "manifests", "snapshots"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "metadata.json").unlink(missing_ok=True)
    build_dataset(take_snapshot(raw, out, CorpusConfig()), artifact, raw, out, ShardConfig())


def incremental(raw: Path, out: Path, rounds: int) -> list[Figure]:
    """Seconds of a rerun over 10,000 files, with nothing new and with one file added."""
    raw.mkdir()
    for number in range(10_000):
        (raw / f"{number:05}.txt").write_text(f"File number {number} says {number * number}. " * 20)
    added = 0

    def rerun() -> None:
        prepare(raw, out, TokenizerConfig(vocab_size=300), ShardConfig())

    def add_one() -> None:
        nonlocal added
        added += 1
        (raw / f"added{added}.txt").write_text(f"Something new came in, and it is text number {added}. " * 50)
        rerun()

    rerun()
    seconds = in_turns(rounds, {"rerun, nothing new": rerun, "rerun, one file added": add_one})
    return [Figure(name, "s", taken) for name, taken in seconds.items()]


def random_windows(out: Path, rounds: int) -> list[Figure]:
    """Million tokens per second of random windows, ours beside a bare NumPy memory map of the same tokens."""
    manifest = load_manifest(out)
    (runs,) = kept_runs(out, manifest, "train")
    windows = Windows([TokenStream(runs)], WINDOW, 0, 0)
    flat = out / "flat.bin"
    np.concatenate(list(runs)).tofile(flat)
    bare = np.memmap(flat, dtype=manifest.dtype, mode="r")
    chosen = np.random.default_rng(0).integers(0, len(windows) - 1, size=(200, 16))

    def bare_batches() -> None:
        for rows in chosen:
            batch = np.stack([bare[row * WINDOW : row * WINDOW + WINDOW + 1] for row in rows]).astype(np.int64)
            batch[:, :-1], batch[:, 1:]

    def our_batches() -> None:
        for rows in chosen:
            windows.batch(rows)

    seconds = in_turns(rounds, {"textmill": our_batches, "numpy memmap": bare_batches})
    tokens = chosen.size * WINDOW / 1e6
    return [Figure(f"random windows, {name}", "Mtok/s", [tokens / second for second in taken]) for name, taken in seconds.items()]


def preparation_memory(raw: Path, out: Path) -> float:
    """MB that a data preparation takes at most, in a process of its own, the training of its tokenizer included."""
    program = (
        "import sys; from benchmarks.measure import peak_memory; from llm_core.data_prep_tool import main;"
        "main(sys.argv[1:]); print(peak_memory())"
    )
    options = ["--input_dir", str(raw), "--output_dir", str(out), "--vocab_size", "4096", *MEMORY_BUDGET]
    done = subprocess.run([sys.executable, "-c", program, *options], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) / 1e6


def _pattern(tokenizer: Tokenizer) -> str:
    pattern: str = json.loads(tokenizer.serialized)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return pattern


def _ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {piece: rank for rank, piece in enumerate(tokenizer.pieces) if rank != tokenizer.eot_id}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--corpus", type=Path, help="a folder of .py, .txt, .md and .rst files; default: the Python installation")
    parser.add_argument("--megabytes", type=float, default=200, help="of text to take from it")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, out = folder / "raw", folder / "out"
        texts = write_corpus(found_texts(options.corpus), raw, options.megabytes)
        snapshot = take_snapshot(raw, out, CorpusConfig())
        megabytes = snapshot.summary["bytes_read"] / 1e6
        artifact = prepare_tokenizer(snapshot, raw, out, TokenizerConfig())
        print(f"{megabytes:.0f} MB in {len(texts):,} files, {artifact.tokenizer.vocab_size:,} tokens, {CORES} cores")
        *encoded, whole = encoding(texts, artifact, raw, out, options.rounds)
        windows = random_windows(out, options.rounds)
        reruns = incremental(folder / "many", folder / "many_out", options.rounds)
        third = folder / "third"
        write_corpus(iter(texts[: len(texts) // 3]), third, megabytes)
        memory = [
            Figure(f"peak memory, {size:.0f} MB of text", "MB", [preparation_memory(source, folder / f"{source.name}_out")])
            for source, size in ((third, _size(third)), (raw, _size(raw)))
        ]
    ours = encoded[0].median
    print("\n" + table(["encode", "MB/s", "textmill is"], [(f.name, f, f"{ours / f.median:.2f}x") for f in encoded]))
    share = f"{whole.median / ours:.0%} of encoding alone"
    print(f"\n{whole.name} (read, clean, hash, encode, write): {whole} MB/s, {share}")
    print(
        "\n"
        + table(
            ["random windows", "Mtok/s", "textmill is"], [(f.name, f, f"{windows[0].median / f.median:.2f}x") for f in windows]
        )
    )
    print("\n" + table(["10,000 files", "s"], [(f.name, f) for f in reruns]))
    print("\n" + table(["", "MB"], [(f.name, f"{f.median:,.0f}") for f in memory]))
    path = keep("data", [*encoded, whole, *windows, *reruns, *memory], megabytes=megabytes, files=len(texts))
    print(f"\nkept in {path}")


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.txt")) / 1e6


if __name__ == "__main__":
    main()
