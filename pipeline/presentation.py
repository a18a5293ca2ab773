"""Numbers and tables for the asset pages, and for the terminal at the end of a run."""

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import dagster as dg

from llm_core.layout import Home


def report_table(title: str, rows: Mapping[str, object]) -> str:
    """Rows of name and value, aligned, under a title."""
    width = max(len(name) for name in rows)
    lines = [f"  {name:<{width}}  {_shown(value)}" for name, value in rows.items()]
    rule = "-" * min(max(len(title), *(len(line) for line in lines)), get_terminal_size().columns)
    return "\n".join([rule, title, rule, *lines, rule])


def _shown(value: object) -> str:
    if isinstance(value, Path):  # as short as it can be typed
        return str(value.relative_to(Path.cwd()) if value.is_relative_to(Path.cwd()) else value)
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def locations(home: Home) -> dict[str, object]:
    """Where the pipeline's files are."""
    return {
        "tokenizer": home.prepared.tokenizer,
        "dataset": home.prepared.metadata,
        "checkpoints": home.checkpoints,
        "catalog": home.catalog,
    }


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Round for display; None (not finite) passes through. The catalog has every digit."""
    return None if value is None else round(value, digits)


def table(rows: Iterable[Mapping[str, Any]], **columns: str) -> dg.TableMetadataValue:
    """Rows as a table of the asset page. columns: name -> type ("string", "int" or "float"), in order.

    Numbers are rounded to four decimals, since the page shows every digit.
    """
    schema = dg.TableSchema(columns=[dg.TableColumn(name, type) for name, type in columns.items()])
    shown = ({name: round(row[name], 4) if isinstance(row[name], float) else row[name] for name in columns} for row in rows)
    return dg.MetadataValue.table([dg.TableRecord(row) for row in shown], schema)


def tables(**candidates: dg.TableMetadataValue) -> dict[str, dg.TableMetadataValue]:
    """The tables that have rows: an empty one looks like an error."""
    return {name: value for name, value in candidates.items() if value.records}


def markdown_table(rows: Iterable[Mapping[str, object]]) -> dg.MarkdownMetadataValue:
    """Rows with the same names as a Markdown table, which the page shows without a click."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()] for row in rows]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(line)} |" for line in lines))


def literal(text: str, width: int = 44) -> str:
    """Text as a Markdown code block, where no character is markup, wrapped to the width of the page."""
    wrapped = [textwrap.wrap(line, width) for line in text.splitlines()]
    return "\n".join(f"    {line}" for lines in wrapped for line in lines or [""])
