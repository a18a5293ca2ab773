"""The `textmill` command: questions to the catalog, and its rebuilding."""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_core.cli import run_tool
from pipeline.catalog.catalog import Catalog, rebuild

PROG = "textmill"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `textmill` command."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `textmill lineage ... | head` ends without a traceback
    options = _parser().parse_args(arguments)
    home = Path(options.home)
    run_tool(lambda: options.run(home, home / "catalog.duckdb", options), PROG)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Asks the catalog where a model came from and where a text went.")
    default_home = os.environ.get("TEXTMILL_HOME", "data")
    parser.add_argument(
        "--home", default=default_home, help="root of everything textmill wrote (default: TEXTMILL_HOME or ./data)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    lineage = commands.add_parser("lineage", help="everything a checkpoint was made from")
    lineage.add_argument("checkpoint", help="id of a checkpoint")
    lineage.set_defaults(run=_lineage)

    usage = commands.add_parser("usage", help="the checkpoints that have seen a document or a raw file")
    usage.add_argument("document", help="id of a document, or path of a raw file relative to the raw text folder")
    usage.set_defaults(run=_usage)

    runs = commands.add_parser("runs", help="all training runs")
    runs.set_defaults(run=_runs)

    catalog = commands.add_parser("catalog", help="care for the catalog file").add_subparsers(required=True, metavar="COMMAND")
    catalog.add_parser("rebuild", help="make the catalog anew from the files on disk").set_defaults(run=_rebuild)
    return parser


def _lineage(home: Path, path: Path, options: argparse.Namespace) -> None:
    rows = Catalog(path).lineage(options.checkpoint)
    if not rows:
        print(f"checkpoint {options.checkpoint} has seen no text yet")
        return
    facts = ("checkpoint_id", "run_id", "step", "seed", "dataset_id", "snapshot_id", "tokenizer_id", "code_version", "git_commit")
    print(_table([{"what": name, "value": rows[0][name]} for name in (*facts, "config")]))
    print()
    print(_table([{name: row[name] for name in ("path", "start_byte", "end_byte", "document_id", "first_step")} for row in rows]))


def _usage(home: Path, path: Path, options: argparse.Namespace) -> None:
    rows = Catalog(path).usage(options.document)
    print(_table(rows) if rows else f"no checkpoint has seen {options.document}")


def _runs(home: Path, path: Path, options: argparse.Namespace) -> None:
    rows = Catalog(path).runs()
    print(_table(rows) if rows else "no training runs yet")


def _rebuild(home: Path, path: Path, options: argparse.Namespace) -> None:
    problems = rebuild(home, path)
    for problem in problems:
        print(f"left out: {problem}")
    print(f"{path}: rebuilt from {home}, {len(problems)} artifact(s) left out")


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned columns under their names."""
    names = list(rows[0])
    cells = [names, *([_shown(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if value is None:
        return "-"
    # A file's name may hold anything; a control character must not reach the terminal.
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(value))


if __name__ == "__main__":
    main()
