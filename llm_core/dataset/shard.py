"""One token shard: an immutable file named by its content, and an index of its rows.

dataset/<shard_id>.arrow    Arrow IPC, one uncompressed record batch: document_id, bytes, tokens (large_list<uint16|uint32>).
                            The tokens of a row are the end-of-text id and the document, so that the values of the column are
                            contiguous: "eot doc eot doc ..."
dataset/<shard_id>.parquet  document_id, token_start, token_count (both in those values, end-of-text included), bytes
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from llm_core.errors import DataError
from llm_core.layout import PreparedData
from llm_core.system import ID_LENGTH, InnerPath, atomic_writer, parquet_bytes, read_parquet, verify_file
from llm_core.tokenizer import Ids, Tokenizer

FORMAT_VERSION = 1

_REMEDY = "delete it and run python -m llm_core.data_prep_tool again, which rebuilds it"


class ShardEntry(BaseModel):
    """One shard in a manifest. tokens, documents and bytes include `removed_rows`."""

    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)

    shard_id: InnerPath
    file: InnerPath
    sha256: str
    file_bytes: int
    # Format version 1 calls the row index "facts".
    index_file: InnerPath = Field(alias="facts_file")
    index_sha256: str = Field(alias="facts_sha256")
    split: str
    tokens: int
    documents: int
    bytes: int
    removed_rows: list[int] = []


class ShardWriter:
    """Collects the encoded documents of one shard in memory and writes them as one immutable file."""

    def __init__(self, split: str, tokenizer: Tokenizer) -> None:
        self._split = split
        self._eot_id = tokenizer.eot_id
        self._metadata = {
            "format_version": str(FORMAT_VERSION),
            "tokenizer_id": tokenizer.tokenizer_id,
            "vocab_size": str(tokenizer.vocab_size),
            "split": split,
        }
        self._document_ids: list[str] = []
        self._sizes: list[int] = []
        self._ends: list[int] = []  # where each row's tokens end
        # One buffer that doubles when it is full: an array per document would fragment the heap.
        self._tokens = np.empty(1 << 16, dtype=tokenizer.dtype)
        self._count = 0
        self.bytes = 0

    def add(self, document_id: str, size: int, tokens: Ids) -> None:
        """Appends a document of `size` UTF-8 bytes."""
        start, self._count = self._count, self._count + 1 + len(tokens)
        if self._count > len(self._tokens):
            grown = np.empty(max(self._count, 2 * len(self._tokens)), dtype=self._tokens.dtype)
            grown[:start] = self._tokens[:start]
            self._tokens = grown
        self._tokens[start] = self._eot_id
        self._tokens[start + 1 : self._count] = tokens
        self._document_ids.append(document_id)
        self._sizes.append(size)
        self._ends.append(self._count)
        self.bytes += size

    def publish(self, data_dir: Path) -> ShardEntry:
        """Writes both files; intact files of an interrupted build are kept. The writer cannot be used afterwards."""
        ends = np.array(self._ends, dtype=np.int64)
        document_ids, sizes = pa.array(self._document_ids, pa.string()), pa.array(self._sizes, pa.int64())
        content = self._arrow_file(document_ids, sizes, ends)
        index = _index(document_ids, ends, sizes)
        sha256 = hashlib.sha256(content).hexdigest()
        shard_id, folder = sha256[:ID_LENGTH], PreparedData(data_dir)
        entry = ShardEntry(
            shard_id=shard_id,
            file=folder.name_of(folder.shard(shard_id)),
            sha256=sha256,
            file_bytes=content.size,
            index_file=folder.name_of(folder.shard_index(shard_id)),
            index_sha256=hashlib.sha256(index).hexdigest(),
            split=self._split,
            tokens=self._count,
            documents=len(ends),
            bytes=self.bytes,
        )
        _write_once(data_dir / entry.index_file, entry.index_sha256, index)
        _write_once(data_dir / entry.file, entry.sha256, content)
        return entry

    def _arrow_file(self, document_ids: pa.Array, sizes: pa.Array, ends: npt.NDArray[np.int64]) -> pa.Buffer:
        tokens = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), pa.array(self._tokens[: self._count]))
        batch = pa.record_batch({"document_id": document_ids, "bytes": sizes, "tokens": tokens})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema.with_metadata(self._metadata)) as writer:
            writer.write_batch(batch.replace_schema_metadata(self._metadata))
        return sink.getvalue()


class TokensOnDisk:
    """Tokens [size] of a shard that are read from its file when np.asarray asks for them; a slice reads nothing."""

    def __init__(self, path: Path, dtype: np.dtype[Any], offset: int, size: int) -> None:
        """offset: of the first token in the file, in bytes."""
        self.size = size
        self._path, self._dtype, self._offset = path, dtype, offset

    def __getitem__(self, part: slice) -> "TokensOnDisk":
        start, stop, _ = part.indices(self.size)
        return TokensOnDisk(self._path, self._dtype, self._offset + start * self._dtype.itemsize, max(0, stop - start))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Ids:
        tokens = np.fromfile(self._path, self._dtype, self.size, offset=self._offset)
        if tokens.size < self.size:
            raise DataError(f"{self._path}: shorter than when it was verified; {_REMEDY}")
        return tokens


# Tokens of which `np.asarray` makes ids.
TokenSlice = Ids | TokensOnDisk


def open_tokens(data_dir: Path, shard: ShardEntry, verify: bool = True) -> Ids:
    """All tokens [tokens] of a shard, removed rows included, as a memory-mapped view.

    verify: read the file once, compare its SHA-256, and check every id against the vocabulary.

    Raises:
        DataError: the file is missing, damaged, or has an id outside its vocabulary.
    """
    return _map_tokens(data_dir, shard, verify)[0]


def open_tokens_on_disk(data_dir: Path, shard: ShardEntry) -> TokensOnDisk:
    """`open_tokens`, verified and without a memory map, of which the system allows a process 65,530."""
    tokens, offset = _map_tokens(data_dir, shard, verify=True)
    return TokensOnDisk(data_dir / shard.file, tokens.dtype, offset, tokens.size)


def _map_tokens(data_dir: Path, shard: ShardEntry, verify: bool) -> tuple[Ids, int]:
    """The tokens, and where they begin in the file."""
    path = data_dir / shard.file
    if verify:
        _verify(path, shard.sha256)
    try:
        source = pa.memory_map(str(path))
        reader = pa.ipc.open_file(source)
        tokens: Ids = reader.get_batch(0).column("tokens").values.to_numpy(zero_copy_only=True)
        vocab_size = int(reader.schema.metadata[b"vocab_size"])
        source.seek(0)
        offset = tokens.ctypes.data - source.read_buffer().address
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as a token shard ({error}); {_REMEDY}") from None
    if len(tokens) != shard.tokens:
        raise DataError(f"{path}: holds {len(tokens)} tokens, the manifest says {shard.tokens}; {_REMEDY}")
    if verify and int(tokens.max()) >= vocab_size:
        raise DataError(f"{path}: token id {tokens.max()} is outside its vocabulary of {vocab_size}; {_REMEDY}")
    return tokens, offset


def read_index(data_dir: Path, shard: ShardEntry) -> pa.Table:
    """The row index of a shard: document_id (large strings), token_start, token_count, bytes.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = data_dir / shard.index_file
    _verify(path, shard.index_sha256)
    index = read_parquet(path)
    return index.set_column(0, "document_id", index["document_id"].cast(pa.large_string()))


def repair_index(data_dir: Path, shard: ShardEntry) -> None:
    """Writes the row index of a shard again if it is lost or damaged: the shard holds the same values.

    Raises:
        DataError: the shard is damaged too.
    """
    try:
        verify_file(data_dir / shard.index_file, shard.index_sha256)
        return
    except DataError:
        open_tokens(data_dir, shard)
    batch = pa.ipc.open_file(pa.memory_map(str(data_dir / shard.file))).get_batch(0)
    ends = batch.column("tokens").offsets.to_numpy()[1:]
    index = _index(batch.column("document_id"), ends, batch.column("bytes"))
    _write_once(data_dir / shard.index_file, shard.index_sha256, index)


def _index(document_ids: pa.Array, ends: npt.NDArray[np.int64], sizes: pa.Array) -> bytes:
    """The bytes of an index file; ends: where each row's tokens end."""
    counts = np.diff(ends, prepend=0)
    return parquet_bytes(
        pa.table({"document_id": document_ids, "token_start": ends - counts, "token_count": counts, "bytes": sizes})
    )


def _verify(path: Path, sha256: str) -> None:
    try:
        verify_file(path, sha256)
    except DataError as error:
        raise DataError(f"{error}; {_REMEDY}") from None


def _write_once(path: Path, sha256: str, content: bytes | pa.Buffer) -> None:
    try:
        verify_file(path, sha256)
    except DataError:
        with atomic_writer(path) as file:
            file.write(content)
