"""Data preparation compared with its peers: `python -m benchmarks.data` prints the tables of benchmarks/README.md.

The corpus is text that every machine has, the Python installation and its packages (`--corpus` names another folder). All
contenders encode with the same vocabulary, trained on this corpus.
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
from llm_core.dataset import build_dataset, load_manifest, token_slices
from llm_core.dataset.windows import TokenStream, Windows
from llm_core.layout import PreparedData
from llm_core.tokenizer import Tokenizer, TokenizerArtifact, encode_all, prepare_tokenizer

WINDOW = 1024
MEMORY_BUDGET = ["--shard_bytes", str(8 << 20), "--tokenizer_train_bytes", str(8 << 20)]


def corpus_texts(corpus: Path | None) -> Iterator[str]:
    """Texts of the corpus; only valid UTF-8, because the peers read nothing else."""
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
    """Writes texts as files until they reach this size, and returns them."""
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
    """Prepares the corpus for training and returns the folder."""
    write_corpus(corpus_texts(corpus), folder / "raw", megabytes)
    prepare(folder / "raw", folder / "data", tokenizer, shards)
    return folder / "data"


def encoding(texts: list[str], artifact: TokenizerArtifact, raw: Path, out: Path, rounds: int) -> list[Figure]:
    """MB/s of text to ids on all cores; the last figure is files to shards: read, clean, hash, encode, write."""
    tokenizer = artifact.tokenizer
    peer = tiktoken.Encoding(
        "same", pat_str=_pattern(tokenizer), mergeable_ranks=_ranks(tokenizer), special_tokens={tokenizer.special_tokens[0]: 0}
    )
    few = texts[::8]  # every eighth text, for the slow contenders
    work = {
        "textmill": (texts, lambda: sum(1 for _ in encode_all(tokenizer, texts, CORES))),
        "tiktoken encode_ordinary_batch": (texts, lambda: peer.encode_ordinary_batch(texts, num_threads=CORES)),
        "tokenizers encode_batch_fast": (few, lambda: tokenizer.reference.encode_batch_fast(few, add_special_tokens=False)),
        "tokenizers encode_batch": (few, lambda: tokenizer.reference.encode_batch(few, add_special_tokens=False)),
        "files to shards": (texts, lambda: files_to_shards(artifact, raw, out)),
    }
    ours, theirs = next(iter(encode_all(tokenizer, texts[:1], 1))).tolist(), peer.encode_ordinary(texts[0])
    assert ours == theirs == tokenizer.reference.encode(texts[0], add_special_tokens=False).ids
    seconds = in_turns(rounds, {name: call for name, (_, call) in work.items()})
    sizes = {name: sum(len(text.encode()) for text in encoded) / 1e6 for name, (encoded, _) in work.items()}
    return [Figure(name, "MB/s", [sizes[name] / second for second in taken]) for name, taken in seconds.items()]


def files_to_shards(artifact: TokenizerArtifact, raw: Path, out: Path) -> None:
    """The preparation from scratch with an existing tokenizer."""
    for name in ("dataset", "manifests", "snapshots"):
        shutil.rmtree(out / name, ignore_errors=True)
    PreparedData(out).metadata.unlink(missing_ok=True)
    build_dataset(take_snapshot(raw, out, CorpusConfig()), artifact, raw, out, ShardConfig())


def incremental(raw: Path, out: Path, rounds: int) -> list[Figure]:
    """Seconds of a rerun over 10,000 files, with nothing new and with one added file."""
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
    """Million tokens per second of random windows, compared with a plain NumPy memory map of the same tokens."""
    manifest = load_manifest(out)
    (slices,) = token_slices(out, manifest, "train")
    windows = Windows([TokenStream(slices)], WINDOW, 0, 0)
    flat = out / "flat.bin"
    np.concatenate(list(slices)).tofile(flat)
    memory_map = np.memmap(flat, dtype=manifest.dtype, mode="r")
    chosen = np.random.default_rng(0).integers(0, len(windows) - 1, size=(200, 16))

    def memory_map_batches() -> None:
        for rows in chosen:
            batch = np.stack([memory_map[row * WINDOW : row * WINDOW + WINDOW + 1] for row in rows]).astype(np.int64)
            batch[:, :-1], batch[:, 1:]

    def textmill_batches() -> None:
        for rows in chosen:
            windows.batch(rows)

    seconds = in_turns(rounds, {"textmill": textmill_batches, "numpy memmap": memory_map_batches})
    tokens = chosen.size * WINDOW / 1e6
    return [Figure(f"random windows, {name}", "Mtok/s", [tokens / second for second in taken]) for name, taken in seconds.items()]


def preparation_memory(raw: Path, out: Path) -> float:
    """Peak memory in MB of a data preparation in its own process, with the training of its tokenizer."""
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
    parser.add_argument("--corpus", type=Path, help="folder of .py, .txt, .md and .rst files; default: the Python installation")
    parser.add_argument("--megabytes", type=float, default=200, help="size of the text to use")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, out = folder / "raw", folder / "out"
        texts = write_corpus(corpus_texts(options.corpus), raw, options.megabytes)
        snapshot = take_snapshot(raw, out, CorpusConfig())
        megabytes = snapshot.summary["bytes_read"] / 1e6
        artifact = prepare_tokenizer(snapshot, raw, out, TokenizerConfig())
        print(f"{megabytes:.0f} MB in {len(texts):,} files, {artifact.tokenizer.vocab_size:,} tokens, {CORES} cores")
        *encoded, to_shards = encoding(texts, artifact, raw, out, options.rounds)
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
    share = f"{to_shards.median / ours:.0%} of the speed of encoding alone"
    print(f"\n{to_shards.name} (read, clean, hash, encode, write): {to_shards} MB/s, {share}")
    print(
        "\n"
        + table(
            ["random windows", "Mtok/s", "textmill is"], [(f.name, f, f"{windows[0].median / f.median:.2f}x") for f in windows]
        )
    )
    print("\n" + table(["10,000 files", "s"], [(f.name, f) for f in reruns]))
    print("\n" + table(["", "MB"], [(f.name, f"{f.median:,.0f}") for f in memory]))
    path = keep("data", [*encoded, to_shards, *windows, *reruns, *memory], megabytes=megabytes, files=len(texts))
    print(f"\nappended to {path}")


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.txt")) / 1e6


if __name__ == "__main__":
    main()
