"""`python -m llm_core.data_prep_tool`: turns a folder of raw text into a tokenizer and token shards.

Running it again processes only what is new.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a plain file: find the package beside it, not its modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from llm_core.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

from pydantic import Field
from tqdm import tqdm

from llm_core.cli import parse_options, printable, run_tool
from llm_core.config import CorpusConfig, ShardConfig, TokenizerConfig
from llm_core.corpus import READABLE, Snapshot, drop_warning, dropped_text, skipped_entries, take_snapshot
from llm_core.dataset import DatasetBuild, build_dataset
from llm_core.errors import DataError
from llm_core.layout import PreparedData
from llm_core.system import preparing
from llm_core.tokenizer import MAX_DRIFT, TokenizerArtifact, check_engine, check_tokenizer, prepare_tokenizer

PROG = "python -m llm_core.data_prep_tool"

# Quarantined files in the table.
_LISTED = 5


class DataPrepOptions(ShardConfig, TokenizerConfig, CorpusConfig):
    """Turns a folder of raw text into a tokenizer and token shards; running it again does only what is new."""

    input_dir: str = Field(
        "raw_text_data", description=f"Folder of {READABLE} files, also with .gz or .zst, or its fsspec URL; never written to."
    )
    output_dir: str = Field("processed_data", description="Folder for the tokenizer, the shards and their manifest.")


def prepare(options: DataPrepOptions) -> None:
    """Runs the three stages with progress, and prints a table of the result.

    Raises:
        UserError: an option does not fit the text.
        DataError: a file is damaged or cannot be written.
    """
    check_engine(options.engine)
    check_tokenizer(options.stage(TokenizerConfig))
    input_dir, data_dir = options.input_dir, Path(options.output_dir)
    try:
        with preparing(data_dir, _log):
            with _progress("Reading", "files") as show:
                snapshot = take_snapshot(input_dir, data_dir, options.stage(CorpusConfig), show)
            _log("Tokenizer ...")
            artifact = prepare_tokenizer(snapshot, input_dir, data_dir, options.stage(TokenizerConfig))
            with _progress("Encoding", "B") as show:
                build = build_dataset(snapshot, artifact, input_dir, data_dir, options.stage(ShardConfig), show)
    except OSError as error:
        raise DataError(f"--output_dir {data_dir}: {error.filename or ''} {error.strerror or error}") from error
    for name, value in _report_rows(snapshot, artifact, build, data_dir):
        print(f"{name:<14} {value}")
    coverage = artifact.drift_report.coverage
    unknown = f"the tokenizer cannot spell {coverage}; --tokenizer_type bpe spells all of it" if coverage.is_low else None
    for warning in filter(None, (drop_warning(snapshot.summary), unknown)):
        _log(f"{PROG}: warning: {printable(warning)}")


def _report_rows(
    snapshot: Snapshot, artifact: TokenizerArtifact, build: DatasetBuild, data_dir: Path
) -> Iterator[tuple[str, str]]:
    summary, report, manifest = snapshot.summary, artifact.report, build.manifest
    changes = ", ".join(f"{summary[f'files_{how}']:,} {how}" for how in ("added", "changed", "removed", "unchanged"))  # type: ignore[literal-required]
    yield "Text files", f"{summary['files']:,}: {changes}"
    if ignored := summary["ignored_by_extension"]:
        by_extension = ", ".join(f"{count:,} {extension}" for extension, count in ignored.items())
        yield "  ignored", printable(f"{summary['files_ignored']:,} files of other formats: {by_extension}")
    for skipped in skipped_entries(summary["files_skipped"]):
        yield "  skipped", skipped
    yield (
        "Text",
        f"{summary['bytes_kept']:,} bytes in {summary['documents']:,} documents, of {summary['bytes_read']:,} bytes read",
    )
    for dropped in dropped_text(summary):
        share = f"{dropped['bytes']:,} bytes ({dropped['share']:.1%}) in {dropped['documents']:,} documents"
        yield "  dropped", f"{share}: {dropped['reason'].replace('_', ' ')}"
    if summary["sequences_replaced"]:
        yield "  repaired", f"{summary['sequences_replaced']:,} sequences that were not UTF-8"
    for reason, count in sorted(summary["quarantined_by_reason"].items()):
        yield "  quarantined", f"{count:,} files, lines or rows: {reason.replace('_', ' ')}"
    entries = snapshot.quarantined()
    for entry in entries[:_LISTED]:
        yield "", printable(f"{entry['path']}: {entry['reason'].replace('_', ' ')}, {entry['detail']}")
    if len(entries) > _LISTED:
        folder, snapshot_id = PreparedData(data_dir), snapshot.snapshot_id
        tables = f"{folder.snapshot_files(snapshot_id)} and, of lines and rows, {folder.snapshot_documents(snapshot_id)}"
        yield "", f"and {len(entries) - _LISTED:,} more: see the column status of {tables}"
    origin = "kept" if artifact.reused else "new"
    yield "Tokenizer", f"{artifact.tokenizer_id}, {report['tokenizer_type']}, {report['vocab_size']:,} tokens, {origin}"
    if artifact.text_gone:
        yield "", "trained again: none of the text that the previous one was trained on remains"
    yield "", f"{report['bytes_per_token']:.2f} bytes per token, {report['tokens_per_word']:.2f} tokens per word"
    drift_report = artifact.drift_report
    if drift_report.coverage.unknown:
        yield "", printable(f"cannot spell {drift_report.coverage}")
    if drift_report.drift is not None:
        less_or_more = "fewer" if drift_report.drift > 0 else "more"
        remedy = "; --retrain_tokenizer trains a new one" if drift_report.drift > MAX_DRIFT else ""
        yield "", f"{abs(drift_report.drift):.1%} {less_or_more} bytes per token on text that is newer than it{remedy}"
    for text in [*drift_report.changed.values()][:5]:
        yield "", printable(f"a document changes when it is encoded and decoded: {text!r}")
    for split, totals in manifest.splits.items():
        yield f"Tokens, {split}", f"{totals.tokens:,} in {totals.documents:,} documents"
    yield "Encoded", f"{build.documents_encoded:,} documents, {build.bytes_encoded:,} bytes; {build.documents_reused:,} reused"
    yield "Shards", f"{build.shards_written} written, {len(manifest.shards) - build.shards_written} reused"
    yield "Dataset", f"{manifest.dataset_id}, windows of {manifest.max_length:,} tokens, overlap {manifest.stride:,}"
    yield "In", str(PreparedData(data_dir).metadata)


@contextmanager
def _progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; elsewhere a line every 10 %."""
    bar = tqdm(desc=title, unit=unit, unit_scale=unit == "B", disable=not sys.stderr.isatty())
    tenth = 0

    def show(done: int, total: int) -> None:
        nonlocal tenth
        bar.total = total
        bar.update(done - bar.n)
        if bar.disable and 10 * done // total > tenth:
            tenth = 10 * done // total
            _log(f"{title}: {done:,} of {total:,} {unit}")

    with bar:
        yield show


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(DataPrepOptions, PROG, arguments)
    run_tool(
        lambda: prepare(options),
        PROG,
        f"what is complete is in {options.output_dir}; the same command continues from there",
    )


if __name__ == "__main__":
    main()
