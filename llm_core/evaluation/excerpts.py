"""Which held-out text is read: windows spread evenly over all of it, each source by its share.

The windows are counted in the tokens of the dataset, and their text is the same for every model. Adjacent ones form one excerpt,
which begins and ends between two characters, so that any byte-level tokenizer can encode it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus import load_snapshot
from llm_core.dataset import DatasetManifest, Indices, Numbers, groups_by_source, kept_documents
from llm_core.dataset.windows import TokenStream, Windows, open_streams
from llm_core.errors import UserError
from llm_core.system import content_id
from llm_core.tokenizer import Ids, Tokenizer


@dataclass(frozen=True)
class HeldOutDocuments:
    """The documents of the validation split, in the order of their tokens.

    counts: (documents,) tokens, with the end-of-text in front. sources: (documents,) the number of the source in `source_names`.
    """

    ids: pa.ChunkedArray
    paths: pa.ChunkedArray  # of their raw files
    counts: Numbers
    source_names: list[str]
    sources: Numbers

    @classmethod
    def load(cls, data_dir: Path, manifest: DatasetManifest) -> "HeldOutDocuments":
        """Reads the snapshot and the indexes of the shards.

        Raises:
            UserError: the snapshot, which the user can name, lacks one of the documents.
            DataError: the snapshot or the index of a shard is missing or damaged.
        """
        ((ids, counts),) = kept_documents(data_dir, manifest, "val")
        kept = load_snapshot(data_dir, manifest.snapshot_id).kept_documents()
        places = pc.index_in(ids, value_set=kept["document_id"])
        if places.null_count:
            raise UserError(
                f"--snapshot_id {manifest.snapshot_id}: lacks documents of the dataset {manifest.dataset_id}; leave it out"
            )
        sources = groups_by_source(kept)
        return cls(ids, kept["path"].take(places), counts, sources.names, sources.group_of(ids))


def choose_windows(
    data_dir: Path, manifest: DatasetManifest, length: int, max_tokens: int, documents: HeldOutDocuments | None = None
) -> Indices:
    """The numbers of the windows of `length` tokens that make up about `max_tokens` held-out tokens (0: all), in order.

    documents: loaded if they are needed and not given.

    Raises:
        UserError: see `HeldOutDocuments.load`.
        DataError: the snapshot or the index of a shard is missing or damaged.
    """
    windows = -(-(manifest.splits["val"].tokens - 1) // length)
    count = min(windows, -(-max_tokens // length)) or windows
    if count >= windows:
        return np.arange(max(0, windows), dtype=np.int64)
    documents = documents or HeldOutDocuments.load(data_dir, manifest)
    return windows_by_share(documents.sources, documents.counts, length, count)


def windows_by_share(sources: Numbers, counts: Numbers, length: int, count: int) -> Indices:
    """The numbers of `count` windows, in order.

    Each source gets its share of them, at least one if there are as many windows as sources. They are spread evenly over its
    text.

    sources, counts: (documents,) the number of the source, and the tokens with the end-of-text in front. length: of a window.
    """
    starts = np.cumsum(counts) - counts
    last = int(counts.sum()) - 1
    windows = -(-last // length)
    middles = np.minimum(np.arange(windows) * length + length // 2 + 1, last)
    owners = sources[np.searchsorted(starts, middles, side="right") - 1]
    by_number = np.argsort(sources, kind="stable")
    small = np.setdiff1d(sources, owners)  # in the middle of no window
    first, end = (np.searchsorted(sources[by_number], small, side) for side in ("left", "right"))
    for source, document in zip(small, by_number[(first + end) // 2], strict=True):
        owners[max(0, starts[document] + counts[document] // 2 - 1) // length] = source
    by_source = np.argsort(owners, kind="stable")
    sizes = np.bincount(owners)
    taken = np.bincount(owners[by_source][_evenly(count, windows)], minlength=len(sizes))
    for missed in np.flatnonzero((sizes > 0) & (taken == 0)):
        if taken.max() > 1:
            taken[taken.argmax()] -= 1
            taken[missed] = 1
    windows_of_source = np.split(by_source, np.cumsum(sizes)[:-1])
    chosen = [own[_evenly(number, len(own))] for own, number in zip(windows_of_source, taken.tolist(), strict=True)]
    return np.sort(np.concatenate(chosen))


def _evenly(count: int, size: int) -> Indices:
    """`count` of the numbers below `size`: the middle of each of `count` equal parts."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * size // (2 * max(1, count))


@dataclass(frozen=True)
class Reading:
    """Held-out text as the windows of a model, and the pieces of documents that their streams consist of, in order.

    documents: (pieces,) the number of the document of each piece; -1 if its targets do not count. sizes: (pieces,) its tokens.
    """

    windows: Windows
    documents: Numbers
    sizes: Numbers


@dataclass(frozen=True)
class HeldOutText:
    """The held-out text that is read, as excerpts of the validation tokens.

    bounds: the first and the last token of each excerpt. The first is only context; the others are predicted.
    window: tokens of the windows that it was chosen by.
    """

    stream: TokenStream
    tokenizer: Tokenizer  # of the dataset
    bounds: list[tuple[int, int]]
    window: int

    @classmethod
    def open(cls, data_dir: Path, manifest: DatasetManifest, tokenizer: Tokenizer, length: int, chosen: Indices) -> "HeldOutText":
        """The text of windows of `length` tokens. chosen: their numbers, in order.

        Raises:
            UserError: the validation split has too few tokens for one target.
            DataError: a shard is missing or damaged.
        """
        (stream,) = open_streams(data_dir, manifest, "val")
        begins_character = tokenizer.begins_character()
        end = len(stream) - 1
        bounds = []
        for adjacent in np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1):
            first, last = int(adjacent[0]) * length, min((int(adjacent[-1]) + 1) * length, end)
            # Usually these are at most three tokens at each end. But where tokens contain parts of two characters there can be
            # no place between two characters in the whole window, which is then left out.
            while first < last and not begins_character[stream[first + 1]]:
                first += 1
            while first < last < end and not begins_character[stream[last + 1]]:
                last -= 1
            if first < last:
                bounds.append((first, last))
        bounds = bounds or [(0, end)]
        return cls(stream, tokenizer, bounds, length)

    def text_id(self, manifest: DatasetManifest) -> str:
        """The same for all evaluations of the same text."""
        return content_id("held-out text", manifest.dataset_id, self.bounds)

    def targets(self) -> Ids:
        """The tokens that are predicted [targets], in order."""
        return np.concatenate([self.stream.read(first + 1, last + 1) for first, last in self.bounds])

    def windows(self) -> Windows:
        """The excerpts as the windows that they were chosen by."""
        streams = [self.stream.part(first, last + 1) for first, last in self.bounds]
        return Windows(streams, self.window, 0, self.tokenizer.eot_id)

    def read_by(self, tokenizer: Tokenizer, length: int, counts: Numbers) -> Reading:
        """The text as the windows of a model.

        tokenizer: that of the dataset, or another byte-level one. length: context of the model. counts: (documents,) tokens of
        each document of the split.
        """
        streams, documents, sizes = [], [], []
        starts = np.cumsum(counts) - counts
        fits = tokenizer is self.tokenizer and length == self.window
        for first, last in self.bounds:
            stream = self.stream.part(first, last + 1)
            begin, end = np.searchsorted(starts, (first, last), side="right")
            numbers, begins = np.arange(begin - 1, end), starts[begin:end] - first
            if tokenizer is not self.tokenizer:
                stream, begins = self._reencoded(stream, begins, tokenizer)
            is_all = first == 0 and last == len(self.stream) - 1
            for start, stop, counted in _stretches(len(stream) - 1, length, overlap=not fits and not is_all):
                streams.append(stream.part(start, stop + 1))
                of_first, end = np.searchsorted(begins, (counted + 1, stop), side="right")
                again = [counted + 1] if counted > start else []  # where the targets begin that were not read before
                documents.append(np.append(np.full(len(again), -1), numbers[of_first : end + 1]))
                sizes.append(np.diff([start, *again, *begins[of_first:end], stop + 1]))
        # Windows longer than every stream would only have more padding.
        longest = max(len(stream) - 1 for stream in streams)
        windows = Windows(streams, min(length, longest), 0, tokenizer.eot_id)
        return Reading(windows, np.concatenate(documents), np.concatenate(sizes))

    def _reencoded(self, stream: TokenStream, begins: Numbers, tokenizer: Tokenizer) -> tuple[TokenStream, Numbers]:
        """An excerpt in the tokens of another tokenizer, and the places at which all documents but the first begin."""
        pieces = np.split(stream.read(0, len(stream)), begins)
        texts = tokenizer.encode_batch([self.tokenizer.decode(piece[1:]) for piece in pieces])
        begin = np.array([tokenizer.eot_id], dtype=tokenizer.dtype)
        context = begin  # or, inside a document, the last token of the text before the excerpt
        if pieces[0][0] != self.tokenizer.eot_id:
            context = tokenizer.encode(self.tokenizer.decode(pieces[0][:1]))[-1:]
        encoded = [np.append(begin if number else context, text) for number, text in enumerate(texts)]
        return TokenStream(encoded), np.cumsum([piece.size for piece in encoded])[:-1]


def _stretches(targets: int, length: int, overlap: bool) -> list[tuple[int, int, int]]:
    """The first and last token of each stretch of an excerpt to read, and the token after which its targets count.

    Whole windows, and with `overlap` one more that ends with the excerpt and begins with tokens that were read before: short
    windows would make a model look worse whose windows do not fit the excerpt.
    """
    whole = targets // length * length
    if not overlap or whole in (0, targets):
        return [(0, targets, 0)]
    return [(0, whole, 0), (targets - length, targets, whole)]
