"""Near duplicates: documents that share most of their wording with one that stands before them.

Documents are compared by the Jaccard similarity of their sets of five-word shingles, estimated by MinHash (Broder 1997) and found
by locality-sensitive hashing, both of the package datasketch. They are gone through in the order of the documents table: one that
is similar enough to a kept one before it is dropped. The outcome is a function of the documents alone, whatever came when.

snapshots/signatures.parquet   the signature of every document compared last: a cache, never the truth
"""

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus.records import KEPT, NEAR_DUPLICATE
from llm_core.errors import UserError
from llm_core.files import atomic_writer
from llm_core.tables import parquet_bytes, read_parquet

_PERMUTATIONS = 128
"""Hash functions; the standard error of the estimated similarity is at most 0.5 / sqrt(128) = 0.044."""
_SHINGLE_WORDS = 5
_WORD = re.compile(r"\w+")

_FILE = Path("snapshots", "signatures.parquet")
_SCHEMA = pa.schema([("document_id", pa.large_string()), ("signature", pa.binary(4 * _PERMUTATIONS))])
_METHOD = "datasketch 2 affine32, 128 permutations, 5 words, 1"
"""What a signature depends on besides the text; signatures made in another way are made again."""

_Signature = npt.NDArray[np.uint32]


def check_available(threshold: float) -> None:
    """Raises UserError if the package that finds near duplicates is not installed."""
    if importlib.util.find_spec("datasketch") is None:
        raise UserError(
            f"--near_duplicates {threshold} needs the package datasketch; install it with: "
            'pip install -c constraints.txt -e ".[dedup]"'
        )


def mark_near_duplicates(
    documents: pa.Table, threshold: float, processed_dir: Path, read_texts: Callable[[pa.Table], Iterator[str]]
) -> pa.Table:
    """Marks each kept document whose similarity to a kept one before it is at least `threshold`.

    Only documents without a stored signature are read, through `read_texts`.
    """
    kept = pc.equal(documents["status"], KEPT)
    compared = documents.filter(kept)
    signatures = _signatures(compared, processed_dir, read_texts)
    near = np.zeros(documents.num_rows, dtype=bool)
    near[kept.to_numpy()] = list(_near(signatures, threshold))
    status = pc.if_else(pa.array(near), NEAR_DUPLICATE, documents["status"])
    return documents.set_column(documents.schema.get_field_index("status"), "status", status)


def _near(signatures: Iterable[_Signature | None], threshold: float) -> Iterator[bool]:
    """For each signature whether it is near to an earlier one for which that is false."""
    from datasketch import LeanMinHash, MinHashLSH

    # Candidates are compared one by one, so a false one costs time and a missed one is lost: weigh the latter more.
    index = MinHashLSH(threshold, _PERMUTATIONS, weights=(0.1, 0.9))
    first: dict[int, _Signature] = {}
    for number, signature in enumerate(signatures):
        if signature is None:  # nothing to compare
            yield False
            continue
        minhash = LeanMinHash(seed=1, hashvalues=signature, scheme="affine32")
        near = any(np.mean(first[candidate] == signature) >= threshold for candidate in index.query(minhash))
        if not near:
            first[number] = signature
            index.insert(number, minhash, check_duplication=False)
        yield near


def _signatures(
    documents: pa.Table, processed_dir: Path, read_texts: Callable[[pa.Table], Iterator[str]]
) -> Iterator[_Signature | None]:
    """The signature of each document, None for one without a word; stores them all."""
    ids = documents["document_id"].combine_chunks()
    stored = _stored(processed_dir)
    missing = pc.invert(pc.is_in(ids, value_set=stored["document_id"].combine_chunks()))
    made = _made(documents.filter(missing), read_texts)
    table = pa.concat_tables([stored, made])
    table = table.take(pc.index_in(ids, value_set=table["document_id"].combine_chunks()))
    if made.num_rows or stored.num_rows != table.num_rows:
        with atomic_writer(processed_dir / _FILE) as file:
            file.write(parquet_bytes(table.replace_schema_metadata({"method": _METHOD}), write_page_checksum=True))
    for value in table["signature"]:
        yield np.frombuffer(value.as_py(), np.uint32) if value.is_valid else None


def _stored(processed_dir: Path) -> pa.Table:
    try:
        table = read_parquet(processed_dir / _FILE, page_checksum_verification=True)
        if table.schema.metadata[b"method"].decode() == _METHOD:
            return table.select(_SCHEMA.names).cast(_SCHEMA)
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        pass  # lost or damaged: the documents are read again
    return _SCHEMA.empty_table()


def _made(documents: pa.Table, read_texts: Callable[[pa.Table], Iterator[str]]) -> pa.Table:
    from datasketch import MinHash

    blank = MinHash(_PERMUTATIONS, seed=1, scheme="affine32")
    signatures = []
    for text in read_texts(documents):
        shingles = _shingles(text)
        minhash = blank.copy()
        minhash.update_batch(shingles)
        signatures.append(minhash.hashvalues.tobytes() if shingles else None)
    return pa.table([documents["document_id"].combine_chunks(), pa.array(signatures, _SCHEMA.types[1])], schema=_SCHEMA)


def _shingles(text: str) -> list[bytes]:
    """Every run of five words, without case or punctuation; the words of a shorter text are one shingle."""
    words = _WORD.findall(text.casefold())
    runs = {" ".join(words[n : n + _SHINGLE_WORDS]) for n in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
    return [run.encode() for run in runs if run]
