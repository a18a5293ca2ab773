"""What a run of the lineage did and where its files are, as a table for people at a terminal."""

from collections.abc import Mapping
from pathlib import Path
from shutil import get_terminal_size

from pipeline.resources import Storage


def report_table(title: str, rows: Mapping[str, object]) -> str:
    """Rows of name and value, aligned, under a title."""
    width = max(len(name) for name in rows)
    lines = [f"  {name:<{width}}  {_shown(value)}" for name, value in rows.items()]
    rule = "-" * min(max(len(title), *(len(line) for line in lines)), get_terminal_size().columns)
    return "\n".join([rule, title, rule, *lines, rule])


def _shown(value: object) -> str:
    if isinstance(value, Path):  # as short as it can be typed here
        return str(value.relative_to(Path.cwd()) if value.is_relative_to(Path.cwd()) else value)
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def locations(storage: Storage) -> dict[str, object]:
    """Where a person finds what the pipeline wrote."""
    return {
        "tokenizer": storage.processed / "tokenizer.json",
        "dataset": storage.processed / "metadata.json",
        "checkpoints": storage.checkpoints,
        "catalog": storage.root / "catalog.duckdb",
    }
