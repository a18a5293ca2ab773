"""The content of a file as a byte stream: decompressed, optionally repaired, counted, hashed and bounded."""

import codecs
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Any

import pyarrow as pa

from llm_core.corpus.types import CONVERT, Quarantine

# Decompressed bytes per compressed byte. Text stays below 30; a file above the limit counts as a decompression bomb.
MAX_COMPRESSION = 200

# The ratio is not checked up to this many decompressed bytes.
MAX_COMPRESSION_FREE = 64 << 20

BLOCK = 1 << 20

_CUT_SHORT = "the file ends early, after {} decompressed bytes"
_FOLLOWED = "used up to {} decompressed bytes; the rest of the file is not {}"

BOM = b"\xef\xbb\xbf"

# Byte order marks of other encodings. That of UTF-32 begins with that of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def open_content(raw: IO[bytes], path: str, meter: "Meter") -> Any:
    """The decompressed bytes of an open file as a buffered, seekable stream; seeking back can mean starting over.

    Compressed data is read up to where it is damaged, and the meter gets the damage, or the failure if the bytes before it may be
    wrong, too. Neither is raised: a buffered stream that raises loses what it has read.
    """
    name = path.lower()
    if name.endswith(".gz"):
        return io.BufferedReader(BlockStream(lambda: _up_to_damage(_gzip_blocks(raw), meter)), BLOCK)
    if name.endswith(".zst"):
        return io.BufferedReader(BlockStream(lambda: _up_to_damage(_zstd_blocks(raw), meter)), BLOCK)
    return raw


def is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".zst"))


class Meter:
    """Counts and hashes the content of a file of `size` bytes, and stops a decompression bomb."""

    def __init__(self, size: int) -> None:
        self._max_bytes = max(MAX_COMPRESSION_FREE, size * MAX_COMPRESSION)
        self._hash = hashlib.sha256()
        self._pending = b""  # hashed late: the hash of a file with a single piece may never be needed
        self.position = 0
        self.replaced = 0  # invalid UTF-8 sequences that became U+FFFD
        self.damage: Quarantine | None = None  # why the rest of a compressed file was not read
        self.failure: Quarantine | None = None  # why nothing that was read of it can be used

    def add(self, data: bytes) -> None:
        self._hash.update(self._pending)
        self._pending = data
        self.position += len(data)
        if self.position > self._max_bytes:
            raise Quarantine("too_compressed", f"expands to more than {self._max_bytes} bytes")

    def mark(self, boundary: bytes) -> None:
        """Hashes a boundary between values without counting it as content."""
        self._hash.update(self._pending)
        self._pending = boundary

    def count_at_least(self, size: int) -> None:
        """Counts what could not be read of a file of `size` bytes, so that a loss of unknown size does not look small.

        The hash covers the size: a file that is as unusable as before, but larger, is another one.
        """
        if self.position < size:
            self.mark(size.to_bytes(8, "little"))
            self.position = size

    def sha256(self) -> str:
        self._hash.update(self._pending)
        self._pending = b""
        return self._hash.hexdigest()


class Content:
    """Reads the content of a file once, in order, through a meter.

    All methods that read raise Quarantine at the end of a compressed file whose bytes may be wrong.
    """

    def __init__(self, raw: IO[bytes], path: str, meter: Meter, repair: bool = False) -> None:
        self._source = open_content(raw, path, meter)
        self._stream = repaired(self._source, meter) if repair else self._source
        self._meter = meter

    @property
    def position(self) -> int:
        return self._meter.position

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        return self._counted(data, at_end=len(data) < size)

    def readline(self, limit: int) -> bytes:
        data: bytes = self._stream.readline(limit)
        return self._counted(data, at_end=len(data) < limit and not data.endswith(b"\n"))

    def _counted(self, data: bytes, at_end: bool) -> bytes:
        self._meter.add(data)
        if at_end and self._meter.failure:
            raise self._meter.failure
        return data

    def mark(self, boundary: bytes) -> None:
        self._meter.mark(boundary)

    def skip_byte_order_mark(self) -> int:
        """Skips a byte order mark at the start and returns its size.

        Raises:
            Quarantine: the mark is that of another encoding.
        """
        start = self._source.read(4)
        self._source.seek(0)
        for mark, encoding in _OTHER_MARKS.items():
            if start.startswith(mark):
                raise Quarantine("not_utf8", f"{encoding}; {CONVERT}")
        return len(self.read(len(BOM))) if start.startswith(BOM) else 0

    def drain(self) -> int:
        """Counts and hashes the rest as far as it is readable. Returns the place of the first NUL in it, -1 without one."""
        first_nul = -1
        with suppress(Quarantine):
            while block := self.read(BLOCK):
                if first_nul < 0 and 0 in block:
                    first_nul = self.position - len(block) + block.index(0)
        return first_nul


def repaired(stream: Any, meter: Meter) -> io.BufferedReader:
    """A seekable stream with each invalid UTF-8 sequence replaced by U+FFFD; the meter counts them."""

    def blocks() -> Iterator[bytes]:
        stream.seek(0)
        replacing, ignoring = (codecs.getincrementaldecoder("utf-8")(errors) for errors in ("replace", "ignore"))
        block = b"more"
        while block:
            block = stream.read(BLOCK)
            text = replacing.decode(block, final=not block)
            meter.replaced += len(text) - len(ignoring.decode(block, final=not block))
            if text:
                yield text.encode()

    return io.BufferedReader(BlockStream(blocks), BLOCK)


class BlockStream(io.RawIOBase):
    """A readable stream over an iterator of blocks; seeking back starts a new iterator."""

    def __init__(self, blocks: Callable[[], Iterator[bytes]]) -> None:
        self._restart = blocks
        self._blocks = blocks()
        self._rest = memoryview(b"")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("a stream of unknown length seeks from its start")
        if offset < self._position:
            self._blocks, self._rest, self._position = self._restart(), memoryview(b""), 0
        while self._position < offset and self._take(offset - self._position):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _take(self, size: int) -> memoryview:
        if not self._rest:
            self._rest = memoryview(next(self._blocks, b""))
        data, self._rest = self._rest[:size], self._rest[size:]
        self._position += len(data)
        return data


class _Lent:
    """A file that Arrow can read but not close."""

    closed = False

    def __init__(self, raw: IO[bytes]) -> None:
        self.read = raw.read

    def close(self) -> None:
        pass


class _Damage(Quarantine):
    """Compressed data ends early, or is followed by something else; all of it up to there was read."""


def _up_to_damage(blocks: Iterator[bytes], meter: Meter) -> Iterator[bytes]:
    """The blocks up to damage, without their last bytes where it cuts a character in two."""
    end = b""  # a character has at most 4 bytes
    try:
        for block in blocks:
            end += block
            if len(end) > 3:  # an empty block would end the stream
                yield end[:-3]
                end = end[-3:]
    except _Damage as damage:
        meter.damage = damage
        end = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(end).encode(errors="surrogateescape")
    except Quarantine as failure:
        meter.failure = failure
    yield end


def _gzip_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """All members of a gzip file; zeros after them are padding."""
    raw.seek(0)
    stream = gzip.GzipFile(fileobj=raw)
    try:
        while block := stream.read1(BLOCK):
            yield block
    except EOFError:
        raise _Damage("unreadable_gzip", _CUT_SHORT.format(stream.tell())) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        if stream.tell() and str(error).startswith("Not a gzipped file"):  # an error of the header
            raise _Damage("unreadable_gzip", _FOLLOWED.format(stream.tell(), "gzip")) from None
        raise Quarantine("unreadable_gzip", str(error)) from None


def _zstd_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """All frames of a Zstandard file. The library refuses windows above 128 MiB, zstd's default limit."""
    position, size = 0, BLOCK
    while True:
        raw.seek(0)
        stream = pa.CompressedInputStream(pa.PythonFile(_Lent(raw), mode="r"), "zstd")
        try:
            skipped = 0
            while skipped < position:
                if not (block := stream.read(min(BLOCK, position - skipped))):
                    raise Quarantine("unreadable_zstd", "the file became shorter while it was read")
                skipped += len(block)
            while block := stream.read(size):
                position += len(block)
                yield block
            return
        except OSError as error:
            if error.errno:  # an error of the disk, not of the format
                raise
            if size > 1:
                # The call that fails returns nothing: what it has decompressed by then is read again in smaller pieces.
                size = max(1, size // 32)
                continue
            if "Truncated" in str(error):
                raise _Damage("unreadable_zstd", _CUT_SHORT.format(position)) from None
            if position and "Unknown frame descriptor" in str(error):
                raise _Damage("unreadable_zstd", _FOLLOWED.format(position, "Zstandard")) from None
            raise Quarantine("unreadable_zstd", str(error)) from None
