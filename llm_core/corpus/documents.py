"""Text to documents: split where it is long, identified by hash, assigned to train or validation, given a status."""

import hashlib
import math

from llm_core.config import CorpusConfig
from llm_core.corpus.filters import content_reason, length_reason
from llm_core.corpus.types import KEPT, Document, Quarantine


def split_of(document_id: str, val_fraction: float) -> str:
    """The split of a document: its hash as a number in [0, 1), compared with the fraction. Nothing else matters."""
    return "val" if _number(document_id) < val_fraction else "train"


def fraction_for_both_splits(document_ids: list[str]) -> float | None:
    """A short val_fraction with which both splits have some of these documents, None if there is none."""
    numbers = [_number(document_id) for document_id in document_ids]
    for digits in range(2, 7):
        fraction = math.floor(min(numbers) * 10**digits + 1) / 10**digits
        if min(numbers) < fraction <= max(numbers) and fraction < 0.5:
            return fraction
    return None


def _number(document_id: str) -> float:
    return int(document_id[:16], 16) / 2**64


def piece_end(data: bytes, start: int, max_bytes: int) -> int:
    """The end of the piece that begins at `start`: after the last line that fits, else between two characters."""
    end = start + max_bytes
    if end >= len(data):
        return len(data)
    line_end = data.rfind(b"\n", start, end) + 1
    if line_end > start:
        return line_end
    while end > start + max_bytes - 4 and data[end] & 0xC0 == 0x80:  # inside a UTF-8 character of at most 4 bytes
        end -= 1
    return end


def document(data: bytes, path: str, start: int, end: int, text_start: int, config: CorpusConfig) -> Document:
    """The document of a piece of text.

    Raises:
        Quarantine: it is binary or not UTF-8.
    """
    if b"\0" in data:
        raise binary(start + data.index(0))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(start, error) from None
    document_id = hashlib.sha256(data).hexdigest()
    status = "blank" if not text or text.isspace() else content_reason(text, config) or KEPT
    split = split_of(document_id, config.val_fraction)
    return Document(document_id, path, start, end, text_start, len(data), len(text), split, status)


def split_text(text: bytes, path: str, start: int, end: int, config: CorpusConfig) -> list[Document]:
    """The documents of one complete text; an empty text is one document."""
    documents, text_start = [], 0
    while True:
        text_end = piece_end(text, text_start, config.max_document_bytes)
        documents.append(document(text[text_start:text_end], path, start, end, text_start, config))
        text_start = text_end
        if text_end == len(text):
            return filter_by_length(documents, config)


def filter_by_length(documents: list[Document], config: CorpusConfig) -> list[Document]:
    """The documents of one complete text, all dropped if the text is too short or too long."""
    if config.min_characters is None and config.max_characters is None:
        return documents
    reason = length_reason(sum(document.characters for document in documents), config)
    if reason is None:
        return documents
    return [document._replace(status=reason) if document.status == KEPT else document for document in documents]


def rejected(data: bytes, path: str, start: int, end: int, config: CorpusConfig, reason: str) -> Document:
    """The document of a line or row without usable text, identified by the hash of its raw bytes."""
    document_id = hashlib.sha256(data).hexdigest()
    return Document(document_id, path, start, end, 0, len(data), 0, split_of(document_id, config.val_fraction), reason)


def binary(first_nul: int) -> Quarantine:
    """first_nul: its offset in the file."""
    return Quarantine("binary", f"NUL at byte {first_nul}")


def not_utf8(start: int, error: UnicodeDecodeError) -> Quarantine:
    """The error as a quarantine. start: offset of the decoded bytes in the file."""
    return Quarantine("not_utf8", f"{error.reason} at byte {start + error.start}")
