"""How a tokenizer does on the text that came after it was made: how well it compresses it, and whether it comes back.

tokenizers/<tokenizer_id>.tried.json   the newest snapshot it was tried on, and what was found; a cache, never the truth

Of a snapshot only the documents that came since the last trial are read, and of those a sample: where one file is added to ten
thousand, that file alone is opened. Where text is removed, some that stayed may take its place in the sample.
"""

from dataclasses import asdict, dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus import InputDir, Snapshot, iter_texts, load_snapshot, source_of
from llm_core.errors import DataError
from llm_core.files import read_json, write_json
from llm_core.tokenizer import Tokenizer

_SAMPLED_BYTES = 2 << 20
_SAMPLED_DOCUMENTS = 10_000
_ROUND_TRIPS = 100
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Trial:
    """What a tokenizer did on the documents of a snapshot. New are those that the snapshot it was made for does not have."""

    drift: float | None
    """By which share the bytes per token of new documents lie below those of the report; None where none are new, or nobody knows
    which are, that snapshot being gone."""
    sources: list[dict[str, Any]]
    """Bytes per token of new documents, source by source."""
    round_trips: int
    """Documents that were encoded and decoded again, at this look and at earlier ones."""
    changed: dict[str, str]
    """Those that did not come back, by id: how they begin."""


UNTRIED = Trial(drift=None, sources=[], round_trips=0, changed={})


def try_out(tokenizer: Tokenizer, report: dict[str, Any], snapshot: Snapshot, input_dir: InputDir, processed_dir: Path) -> Trial:
    """Tries a tokenizer on what came since its last trial; adds that to what was found before.

    Raises:
        DataError: the text changed since the snapshot.
    """
    path = processed_dir / "tokenizers" / f"{tokenizer.tokenizer_id}.tried.json"
    note = _read(path)
    if note is None or (note["snapshot_id"], note["made_for"]) != (snapshot.snapshot_id, report["snapshot_id"]):
        known = note or {"snapshot_id": None, "tokens": {}, "round_trips": 0, "changed": {}}
        note = _trial_of(tokenizer, report, snapshot, input_dir, processed_dir, known)
        write_json(path, note)
    return Trial(**{field.name: note[field.name] for field in fields(Trial)})


def _trial_of(
    tokenizer: Tokenizer,
    report: dict[str, Any],
    snapshot: Snapshot,
    input_dir: InputDir,
    processed_dir: Path,
    known: dict[str, Any],
) -> dict[str, Any]:
    documents = snapshot.kept_documents()
    came = _without(documents, _ids_of(known["snapshot_id"], processed_dir))
    to_return = came.slice(0, _ROUND_TRIPS)
    tokens = dict(known["tokens"])
    made_for = _ids_of(report["snapshot_id"], processed_dir)
    # Drawn by their ids, which are hashes: who was in the sample before mostly stays in it, and need not be read again.
    sampled = _first(documents, made_for) if made_for is not None else documents.slice(0, 0)
    unread = _without(sampled, pa.array(tokens, pa.large_string()))
    wanted = pa.concat_arrays([_column(unread), _column(to_return)])
    to_read = documents.filter(_in(documents, wanted))
    returning, changed = set(_column(to_return).to_pylist()), {}
    for document_id, text in zip(_column(to_read).to_pylist(), iter_texts(input_dir, to_read, snapshot.config), strict=True):
        ids = tokenizer.encode(text)
        tokens[document_id] = len(ids)
        if document_id in returning and not _comes_back(tokenizer, text, ids):
            changed[document_id] = text[:_SHOWN_CHARACTERS]

    tokens = {document_id: tokens[document_id] for document_id in _column(sampled).to_pylist()}
    before = pa.array(known["changed"], pa.large_string())
    present = before.filter(pc.is_in(before, value_set=_column(documents))).to_pylist()
    trial = Trial(
        drift=_drift(sampled, tokens, report),
        sources=_by_source(sampled, tokens),
        round_trips=known["round_trips"] + len(returning),
        changed={document_id: known["changed"][document_id] for document_id in present} | changed,
    )
    return {"snapshot_id": snapshot.snapshot_id, "made_for": report["snapshot_id"], "tokens": tokens} | asdict(trial)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        note = read_json(path)
    except DataError:
        return None
    return note if note.keys() >= {"snapshot_id", "made_for", "tokens", *(field.name for field in fields(Trial))} else None


def _comes_back(tokenizer: Tokenizer, text: str, ids: Any) -> bool:
    """Whether a text is there again after decoding; WordPiece keeps no white space and nothing unprintable, but all the rest."""
    if tokenizer.tokenizer_type == "wordpiece":
        return bool(len(ids)) or not any(character.isprintable() and not character.isspace() for character in text)
    return tokenizer.decode(ids) == text


def _ids_of(snapshot_id: str | None, processed_dir: Path) -> pa.Array | None:
    """The ids of a snapshot's documents; None where it is gone."""
    if snapshot_id is None:
        return None
    try:
        return _column(load_snapshot(processed_dir, snapshot_id).kept_documents())
    except DataError:
        return None


def _column(documents: pa.Table) -> pa.Array:
    return documents["document_id"].cast(pa.large_string()).combine_chunks()


def _in(documents: pa.Table, ids: pa.Array) -> pa.Array:
    return pc.is_in(_column(documents), value_set=ids)


def _without(documents: pa.Table, ids: pa.Array | None) -> pa.Table:
    return documents if ids is None else documents.filter(pc.invert(_in(documents, ids)))


def _first(documents: pa.Table, made_for: pa.Array) -> pa.Table:
    """The new ones among documents that come first by their ids, at least one if there is any, as many as a sample holds."""
    new = _without(documents, made_for).sort_by("document_id").slice(0, _SAMPLED_DOCUMENTS)
    fitting = pc.sum(pc.less_equal(pc.cumulative_sum(new["bytes"]), _SAMPLED_BYTES)).as_py() or 0
    return new.slice(0, max(1, fitting))


def _drift(sampled: pa.Table, tokens: dict[str, int], report: dict[str, Any]) -> float | None:
    counted = sum(tokens.values())
    if not counted:  # also where the tokenizer knows nothing of the text: WordPiece drops what is not printed
        return None
    return float(1 - pc.sum(sampled["bytes"]).as_py() / counted / report["bytes_per_token"])


def _by_source(sampled: pa.Table, tokens: dict[str, int]) -> list[dict[str, Any]]:
    totals: dict[str, list[int]] = {}
    for document_id, path, size in zip(*(sampled[name].to_pylist() for name in ("document_id", "path", "bytes")), strict=True):
        total = totals.setdefault(source_of(path), [0, 0])
        total[0] += size
        total[1] += tokens[document_id]
    rows = [
        {"source": source, "measured_bytes": size, "bytes_per_token": size / max(1, counted)}
        for source, (size, counted) in totals.items()
    ]
    return sorted(rows, key=itemgetter("measured_bytes"), reverse=True)
