"""Plain text and .jsonl: a stream of bytes to documents."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from llm_core.config import CorpusConfig
from llm_core.corpus.documents import document, filter_by_length, piece_end, rejected, split_text
from llm_core.corpus.streams import BLOCK, BOM, Content
from llm_core.corpus.types import Document, Quarantine

# A .jsonl line is held in memory: a file with a longer one is quarantined.
MAX_LINE_BYTES = 64 << 20

_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|\Z)', re.DOTALL)
# Large lines with more values are quarantined. Without this, 60 MB of `[],` took 9 s and 1.6 GiB; with it, 0.3 s and 0.2 GiB.
_LARGE = 4 << 20
_BYTES_PER_VALUE = 8


def text_documents(content: Content, path: str, config: CorpusConfig) -> list[Document]:
    """The documents of a text file, read block by block."""
    return filter_by_length(list(_pieces(content, path, config)), config)


def _pieces(content: Content, path: str, config: CorpusConfig) -> Iterator[Document]:
    start, pending, at_end = content.position, b"", False
    while not at_end:
        blocks = [pending] if pending else []
        while not at_end and sum(map(len, blocks)) <= config.max_document_bytes:
            blocks.append(content.read(BLOCK))
            at_end = len(blocks[-1]) < BLOCK
        pending = b"".join(blocks)
        used = 0
        while len(pending) - used > config.max_document_bytes or (at_end and used < len(pending)):
            end = piece_end(pending, used, config.max_document_bytes)
            yield document(pending[used:end], path, start + used, start + end, 0, config)
            used = end
        start, pending = start + used, pending[used:]


def jsonl_documents(content: Content, path: str, config: CorpusConfig) -> Iterator[Document]:
    """The documents of a .jsonl file, read line by line; a line without usable text is quarantined by itself."""
    while line := content.readline(MAX_LINE_BYTES + 1):
        start, end = content.position - len(line), content.position
        if len(line) > MAX_LINE_BYTES:
            raise Quarantine("line_too_long", f"the line at byte {start} has more than {MAX_LINE_BYTES} bytes")
        if line.startswith(BOM):  # one of several files in a row; marked, since earlier versions rejected the line
            content.mark(BOM)
        if not line.removeprefix(BOM).strip():
            continue
        try:
            # Marked, since earlier versions rejected the line.
            text = jsonl_text(line, config.text_field, on_long_integer=lambda: content.mark(b"integer"))
        except Quarantine as quarantine:
            yield rejected(line, path, start, end, config, quarantine.reason)
            continue
        yield from split_text(text, path, start, end, config)


def jsonl_text(line: bytes, text_field: str, on_long_integer: Callable[[], None] = lambda: None) -> bytes:
    """UTF-8 bytes of the text in one line, never longer than the line: a JSON escape is at least as long as its character.

    on_long_integer: called if the line has an integer with more digits than Python converts.

    Raises:
        Quarantine: the line has no text.
    """
    line = line.removeprefix(BOM)
    if b"\0" in line:
        raise Quarantine("binary", "NUL in it")
    if len(line) > _LARGE and _has_too_many_values(line):
        raise Quarantine("too_many_values", f"more than one in {_BYTES_PER_VALUE} bytes")
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        raise Quarantine("not_utf8", error.reason) from None
    try:
        value = _parsed(decoded, on_long_integer)
    except (ValueError, RecursionError) as error:
        raise Quarantine("unreadable_json", str(error)) from None
    text = value.get(text_field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise Quarantine("no_text_field", f"no string under {text_field!r}")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise Quarantine("lone_surrogate", "an escape is half of a character") from None
    if b"\0" in data:
        raise Quarantine("binary", "an escape is NUL")
    return data


def _parsed(line: str, on_long_integer: Callable[[], None]) -> Any:
    """A JSON value. With an integer of more digits than Python converts, integers are floats: only the text of a line is used."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # any other one is about the number of digits
        on_long_integer()
        return json.loads(line, parse_int=float)


def _has_too_many_values(line: bytes) -> bool:
    marks, most = _marks(line), len(line) // _BYTES_PER_VALUE
    if marks <= most:
        return False
    # The text may be a table: then the commas are in few strings, which are quick to scan.
    quotes = line.count(b'"') - line.count(b'\\"')
    return quotes > most // 8 or marks - sum(_marks(string[0]) for string in _STRING.finditer(line)) > most


def _marks(text: bytes) -> int:
    """Upper bound of the number of values in a line, strings aside."""
    return sum(map(text.count, (b",", b"[", b"{")))
