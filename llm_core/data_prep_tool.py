"""python -m llm_core.data_prep_tool: a folder of raw text becomes a tokenizer and token shards.

Running it again does only what is new; see `corpus.snapshot`, `tokenizer_store` and `shards` for what that means.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a plain file: find the package beside it, not its modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pydantic import Field
from tqdm import tqdm

from llm_core.cli import parse_options, printable, run_tool
from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig
from llm_core.corpus import READABLE, Snapshot, take_snapshot
from llm_core.encoding import check_engine
from llm_core.errors import DataError
from llm_core.locks import preparing
from llm_core.shards import DatasetManifest, build_dataset
from llm_core.tokenizer_store import TokenizerArtifact, prepare_tokenizer
from llm_core.tokenizer_training import check_tokenizer

PROG = "python -m llm_core.data_prep_tool"


class DataPrepOptions(ShardConfig, TokenizerConfig, CorpusConfig):
    """Turns a folder of raw text into a tokenizer and token shards; running it again does only what is new."""

    input_dir: str = Field(
        "raw_text_data", description=f"Folder of {READABLE} files, also with .gz or .zst, or its fsspec URL; never written to."
    )
    output_dir: str = Field("processed_data", description="Folder for the tokenizer, the shards and their manifest.")


def prepare(options: DataPrepOptions) -> None:
    """Runs the three stages, showing progress and, at the end, a table of what there is now.

    Raises:
        UserError: an option does not fit the text.
        DataError: a file is damaged, or cannot be written.
    """
    check_engine(options.engine)
    check_tokenizer(options.part(TokenizerConfig))
    input_dir, output_dir = options.input_dir, Path(options.output_dir)
    try:
        with preparing(output_dir, _say):
            with _progress("Looking", "files") as show:
                snapshot = take_snapshot(input_dir, output_dir, options.part(CorpusConfig), show)
            _say("Tokenizer ...")
            artifact = prepare_tokenizer(snapshot, input_dir, output_dir, options.part(TokenizerConfig))
            shards_before = {path.name for path in (output_dir / "dataset").glob("*.arrow")}
            with _progress("Encoding", "B") as show:
                manifest = build_dataset(snapshot, artifact, input_dir, output_dir, options.part(ShardConfig), show)
    except OSError as error:
        raise DataError(f"--output_dir {output_dir}: {error.filename or ''} {error.strerror or error}") from error
    written = sum(Path(shard.file).name not in shards_before for shard in manifest.shards)
    for name, value in _facts(snapshot, artifact, manifest, written, output_dir):
        print(f"{name:<14} {value}")


def _facts(
    snapshot: Snapshot, artifact: TokenizerArtifact, manifest: DatasetManifest, written: int, output_dir: Path
) -> Iterator[tuple[str, str]]:
    summary, report = snapshot.summary, artifact.report
    passed_over = summary["files_ignored"] + sum(summary["files_skipped"].values())
    yield "Files", f"{summary['files']:,} of text, {passed_over:,} passed over"
    yield (
        "Text",
        f"{summary['bytes_kept']:,} bytes in {summary['documents']:,} documents, of {summary['bytes_read']:,} bytes read",
    )
    for reason, size in sorted(summary["bytes_dropped"].items()):
        yield "  dropped", f"{size:,} bytes: {reason.replace('_', ' ')}"
    if summary["sequences_replaced"]:
        yield "  repaired", f"{summary['sequences_replaced']:,} sequences that were not UTF-8"
    for reason, count in sorted(summary["quarantined_by_reason"].items()):
        yield "  quarantined", f"{count:,} files, lines or rows: {reason.replace('_', ' ')}"
    for entry in summary["quarantined"][:5]:
        yield "", printable(f"{entry['path']}: {entry['reason'].replace('_', ' ')}, {entry['detail']}")
    origin = "kept" if artifact.reused else "new"
    yield "Tokenizer", f"{artifact.tokenizer_id}, {report['tokenizer_type']}, {report['vocab_size']:,} tokens, {origin}"
    yield "", f"{report['bytes_per_token']:.2f} bytes per token, {report['tokens_per_word']:.2f} tokens per word"
    trial = artifact.trial
    if trial.drift is not None:
        less_or_more = "fewer" if trial.drift > 0 else "more"
        yield "", f"{abs(trial.drift):.1%} {less_or_more} bytes per token on text that came since it was made"
    for text in [*trial.changed.values()][:5]:
        yield "", printable(f"a document does not come back from its tokens: {text!r}")
    for split, totals in manifest.splits.items():
        yield f"Tokens, {split}", f"{totals.tokens:,} in {totals.documents:,} documents"
    yield "Shards", f"{written} written, {len(manifest.shards) - written} reused"
    yield "Dataset", f"{manifest.dataset_id}, windows of {manifest.max_length:,} tokens, overlap {manifest.stride:,}"
    yield "In", str(output_dir / "metadata.json")


@contextmanager
def _progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line at each tenth of the way."""
    bar = tqdm(desc=title, unit=unit, unit_scale=unit == "B", disable=not sys.stderr.isatty())
    tenth = 0

    def show(done: int, total: int) -> None:
        nonlocal tenth
        bar.total = total
        bar.update(done - bar.n)
        if bar.disable and 10 * done // total > tenth:
            tenth = 10 * done // total
            _say(f"{title}: {done:,} of {total:,} {unit}")

    with bar:
        yield show


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(DataPrepOptions, PROG, arguments)
    run_tool(lambda: prepare(options), PROG)


if __name__ == "__main__":
    main()
