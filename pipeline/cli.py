"""The `textmill` command: catalog queries and rebuild, garbage collection."""

import sys

from llm_core.interrupts import exit_on_interrupt

if __name__ == "__main__" or sys.argv[0].endswith("textmill"):
    exit_on_interrupt()

import argparse
import json
import os
import signal
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from llm_core.cli import printable, run_tool
from llm_core.errors import DataError, UserError
from llm_core.layout import Home, named_folder
from llm_core.system import is_unicode, read_parquet, release
from pipeline.artifacts.pointers import find_current
from pipeline.artifacts.retention import collect_home, released_models
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.rebuild import rebuild

PROG = "textmill"


_SHORT_ID = 8  # characters


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `textmill` command."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback in `textmill lineage ... | head`
    options = _parser().parse_args(arguments)
    home = options.home if "home" in options else os.environ.get("TEXTMILL_HOME", "data")
    run_tool(lambda: options.run(Home(named_folder(home)), options), PROG, options.interrupted)


class _Parser(argparse.ArgumentParser):
    """Refuses wrong arguments in one line, as the tools of llm_core do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROG}: error: {printable(message)} (`{self.prog} --help`; a value that begins with - follows = or --)\n")


def _text(value: str) -> str:
    if not is_unicode(value):
        raise argparse.ArgumentTypeError(f"{value}: not UTF-8")
    return value


def _parser() -> argparse.ArgumentParser:
    # --home may precede or follow the command. With a default, the second parser would overwrite the value of the first.
    home = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    home.add_argument("--home", help="root of everything textmill writes (default: TEXTMILL_HOME or ./data)")
    description = "Trace a model to its training text and a text to its models; maintain the catalog and the prepared data."
    parser = _Parser(prog=PROG, description=description, parents=[home])
    parser.add_argument("--version", action="version", version=f"textmill {release()}")
    parser.set_defaults(run=lambda *_: parser.print_help(), interrupted="nothing was changed")
    commands = parser.add_subparsers(metavar="COMMAND")

    lineage = commands.add_parser(
        "lineage", help="show the data, tokenizer, options, code and text a checkpoint was made from", parents=[home]
    )
    lineage.add_argument(
        "checkpoint", type=_text, help="id of a checkpoint, a run (its last checkpoint) or a model; a unique prefix is enough"
    )
    lineage.set_defaults(run=_lineage)

    usage = commands.add_parser("usage", help="list the checkpoints trained on a document or a raw file", parents=[home])
    usage.add_argument("document", type=_text, help="id of a document, or path of a raw file relative to the raw text folder")
    usage.set_defaults(run=_usage)

    runs = commands.add_parser("runs", help="list all training runs", parents=[home])
    runs.set_defaults(run=_runs)

    gc = commands.add_parser(
        "gc",
        help="list the files of old runs and models, and prepared data that nothing needs; --delete removes them",
        parents=[home],
    )
    gc.add_argument(
        "--keep_runs",
        "--keep-runs",
        type=_at_least_one,
        default=5,
        metavar="N",
        help="number of the newest runs, and of the newest models, to keep (default: 5); what is released, current or in use is "
        "always kept, with the runs it started from",
    )
    gc.add_argument(
        "--keep",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="number of the newest datasets to keep, including the current one (default: 1); those of kept runs are always kept",
    )
    action = gc.add_mutually_exclusive_group()
    action.add_argument("--delete", action="store_true", help="remove what is listed")
    action.add_argument("--dry-run", "--dry_run", action="store_true", help="only list it (the default)")
    gc.set_defaults(run=_gc, interrupted="what it removed so far was not needed; run it again to remove the rest")

    catalog = commands.add_parser("catalog", help="maintain the catalog file").add_subparsers(required=True, metavar="COMMAND")
    rebuilding = catalog.add_parser("rebuild", help="rebuild the catalog from the files on disk", parents=[home])
    rebuilding.set_defaults(run=_rebuild, interrupted="the catalog is as it was; run it again to rebuild")
    return parser


def _lineage(home: Home, options: argparse.Namespace) -> None:
    catalog = Catalog(home.catalog)
    checkpoint_id = catalog.checkpoint_id(options.checkpoint)
    rows = catalog.lineage(checkpoint_id)
    runs = {row["generation"]: row for row in rows}
    columns = ("run_id", "step", "seed", "dataset_id", "snapshot_id", "tokenizer_id", "code_version", "git_commit")
    for generation, run in runs.items():
        title = {"checkpoint_id": checkpoint_id} if generation == 0 else {"started from": f"the weights of run {run['run_id']}"}
        if run["removed_at"] is not None:
            title["removed"] = f"{_shown(run['removed_at'])}: the checkpoints of this run are gone, this record stays"
        config = {
            f"config {name}": f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
            for name, value in json.loads(run["config"] or "{}").items()
        }
        fields = title | {name: run[name] for name in columns} | config
        print(_table([{"field": name, "value": value} for name, value in fields.items()]))
        print()
    place = ("path", "start_byte", "end_byte", "document_id", "first_step", *(["run_id"] if len(runs) > 1 else []))
    documents = [{name: row[name] for name in place} for row in rows if row["document_id"] is not None]
    print(_table(documents) if documents else f"checkpoint {checkpoint_id} has not been trained on any text")


def _usage(home: Home, options: argparse.Namespace) -> None:
    try:
        rows = Catalog(home.catalog).usage(options.document)
    except UserError:  # the catalog knows documents only: the file may have none
        current = find_current(home.prepared.current_snapshot)
        files = read_parquet(home.prepared.snapshot_files(current.stem)).to_pylist() if current else []
        file = next((file for file in files if file["path"] == options.document and not file["documents"]), None)
        if file is None:
            raise
        why = f"{file['status'].replace('_', ' ')}{f', {detail}' if (detail := file['detail']) else ''}"
        print(f"no checkpoint was trained on {options.document}: the file is quarantined ({why})")
        return
    print(_table(rows) if rows else f"no checkpoint was trained on {options.document}")


def _runs(home: Home, options: argparse.Namespace) -> None:
    rows, lines = Catalog(home.catalog).runs(), released_models(home)
    for row in rows:
        # A release compares a run on the dataset of a later one: such values are not those of its own text.
        row["evaluated_on"] = row["evaluated_on"] and row["evaluated_on"][:_SHORT_ID]
        released = [line for model_id in row.pop("model_ids") or [] for line in lines.get(model_id, [])]
        row |= {"released": ", ".join(released) or None, "removed_at": row.pop("removed_at")}
    print(_table(rows) if rows else "no training runs yet")


def _gc(home: Home, options: argparse.Namespace) -> None:
    _require_home(home)
    collection = collect_home(home, options.keep_runs, options.delete, lambda line: print(line, file=sys.stderr), options.keep)
    rows = [
        {
            "what": candidate.kind,
            "id": candidate.identifier,
            "since": datetime.fromisoformat(candidate.since),
            "bytes": f"{candidate.bytes:,}".rjust(16),
            "kept": candidate.kept or "no",
        }
        for candidate in collection.candidates
    ]
    print(_table(rows) if rows else "no runs or models")
    print(
        f"{'removed' if options.delete else 'to remove'}: {len(collection.removed)} runs and models, {collection.bytes:,} bytes"
    )
    for folder, table in collection.prepared.items():
        print(f"\n{folder}:\n{table}")
    print("\nprepared data younger than an hour is kept: it may be in use")
    if not options.delete:
        print("nothing was removed; to remove it, add --delete")


def _rebuild(home: Home, options: argparse.Namespace) -> None:
    _require_home(home)
    problems = rebuild(home.root, home.catalog)
    for problem in problems:
        print(f"skipped: {_shown(problem)}", file=sys.stderr)
    print(f"{home.catalog}: rebuilt from {home.root}, {len(problems)} artifact(s) skipped")
    if problems:
        raise SystemExit(DataError.exit_code)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a whole number of at least 1")
    return int(text)


def _require_home(home: Home) -> None:
    if not (home.all_prepared() or home.runs() or home.model_folders()):
        raise UserError(f"--home {home.root}: no prepared data, runs or models in it; name the root of all textmill writes")


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned columns under a header."""
    names = list(rows[0])
    cells = [names, *([_shown(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M} UTC"
    if value is None:
        return "-"
    return printable(str(value))


if __name__ == "__main__":
    main()
