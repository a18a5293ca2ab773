"""What every asset of the lineage shares in the web UI."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from pipeline.retries import say_why_and_retry_only_what_may_go_away

HOOKS = {say_why_and_retry_only_what_may_go_away}
"""Of the assets and not of the jobs: "Materialize" in the asset graph launches a job of Dagster's own."""

OWNERS = ["team:textmill"]
"""Who is asked about an asset; teams replace it with their own."""

DATA, MODEL = "data", "model"
"""Groups: preparation of the text, and what is made of it."""


def rounded(value: float | None, digits: int = 4) -> float | None:
    """A figure as people read it; None, which stands for one that is not finite, stays. The catalog has every digit."""
    return None if value is None else round(value, digits)


def table(rows: Iterable[Mapping[str, Any]], **columns: str) -> dg.TableMetadataValue:
    """Rows as a table of the asset page; columns: name -> type ("string", "int" or "float"), in the order they are shown.

    Numbers are rounded to four digits after the point: the page shows all there are.
    """
    schema = dg.TableSchema(columns=[dg.TableColumn(name, type) for name, type in columns.items()])
    shown = ({name: round(row[name], 4) if isinstance(row[name], float) else row[name] for name in columns} for row in rows)
    return dg.MetadataValue.table([dg.TableRecord(row) for row in shown], schema)


def tables(**found: dg.TableMetadataValue) -> dict[str, dg.TableMetadataValue]:
    """Those that have rows: a heading alone looks like an error."""
    return {name: value for name, value in found.items() if value.records}


def markdown_table(rows: Iterable[Mapping[str, object]]) -> dg.MarkdownMetadataValue:
    """Rows with the same names as a table in markdown, numbers with thousands apart. Unlike `table`, it is seen at once."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()] for row in rows]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(line)} |" for line in lines))


def literal(text: str, width: int = 44) -> str:
    """Text as a code block of markdown: no character of it means anything, and no line is wider than the page's table."""
    wrapped = [textwrap.wrap(line, width) for line in text.splitlines()]
    return "\n".join(f"    {line}" for lines in wrapped for line in lines or [""])
