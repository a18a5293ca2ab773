"""Text to token ids and back: one interface for the three tokenizer types.

A tokenizer is a file in Hugging Face's tokenizer.json format, which alone determines the ids. Byte-level types (bpe and tiktoken)
are encoded by tiktoken's engine, several times as fast as `tokenizers` and with the same ids: both regular-expression engines
agree on the patterns below (tests compare every code point and generated strings). Special tokens are never parsed from text:
`<|endoftext|>` in a document is ordinary text.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llm_core.errors import DataError
from llm_core.layout import PreparedData
from llm_core.system import ID_LENGTH, atomic_writer

# Written as in Llama 3's tokenizer.json: other programs know a pattern by its text. No possessive quantifiers: after {1,3}
# Oniguruma reads "+" as "repeat".
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The same in tokenizers of version 0.1.0, with U+017F, the long s.
_FORMER_CONTRACTION = "'(?:[sS\u017fdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"

# The end of each pattern: the last white-space character goes to the following word.
_WHITESPACE_END = r"|\s+(?!\S)|\s+"

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + _WHITESPACE_END
# Llama 3's pattern, and that of new tokenizers: of those that Ollama knows it gives the most bytes per token, on prose and on
# source code. (Measured at vocabularies of 4096 and 16384; GPT-2's: 5 to 11 % less, Qwen 2's: 0 to 4 % less.)
CL100K_PATTERN = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + _WHITESPACE_END
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTION + "?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTION + "?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+" + _WHITESPACE_END
)

# tiktoken's engine fails on about a million white-space characters in a row; `tokenizers` does not.
_ENDLESS = 200_000
_ENDLESS_WHITESPACE = re.compile(rf"(?<!\s)\s{{{_ENDLESS}}}")  # searched at the start of white space only

# Token ids: uint16 if the vocabulary has at most 65,536 tokens, else uint32.
Ids = npt.NDArray[Any]


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def byte_characters() -> list[str]:
    """The character for each byte in byte-level vocabularies (GPT-2's table): printable Latin-1 is itself, other bytes are
    shifted to U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def byte_level_tokenizer(model: models.BPE, pattern: str, max_word: int | None = None) -> tokenizers.Tokenizer:
    """The pipeline of both byte-level types: split by `pattern`; nothing is normalized, added or lost.

    max_word: characters; longer words are cut, for training only.
    """
    cut = [] if max_word is None else [pre_tokenizers.FixedLength(max_word)]
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            *cut,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_known_pattern(serialized: bytes) -> bytes:
    """A tokenizer.json with the pattern written so that other programs know it; the tokens of any text stay the same."""
    former, known = (json.dumps(part, ensure_ascii=False)[1:-1].encode() for part in (_FORMER_CONTRACTION, _CONTRACTION))
    return serialized.replace(former, known)


def has_border(token: str) -> bool:
    """Whether a prefix of the token is also its suffix: text in front of the token can then complete it too early."""
    return any(token.startswith(token[-length:]) for length in range(1, len(token)))


class Tokenizer:
    """Encodes and decodes with one tokenizer.json. Thread-safe."""

    def __init__(self, serialized: bytes, source: str = "tokenizer.json") -> None:
        """Builds both engines from the bytes of a tokenizer.json.

        Raises:
            DataError: it is not a tokenizer made by textmill; the message names `source`.
        """
        self.serialized = serialized
        try:
            description = json.loads(serialized)
            self.reference = tokenizers.Tokenizer.from_buffer(serialized)
            self.reference.encode_special_tokens = True
            self.special_tokens: list[str] = [
                token["content"] for token in sorted(description["added_tokens"], key=lambda token: token["id"])
            ]
            vocab: dict[str, int] = self.reference.get_vocab(with_added_tokens=True)
            if sorted(vocab.values()) != list(range(len(vocab))):
                raise ValueError("its ids have holes")
            self._special_ids = {token: vocab[token] for token in self.special_tokens}
            self.vocab_size = len(vocab)
            self.eot_id = self._special_ids[self.special_tokens[0]]
            self.pieces = self._piece_bytes(vocab, description["model"]["type"])
            self._engine = self._byte_level_engine(description) if description["model"]["type"] == "BPE" else None
        except Exception as error:  # `tokenizers` raises plain Exception
            raise DataError(f"{source}: not a tokenizer this program understands ({error})") from None
        self.dtype = id_dtype(self.vocab_size)
        self.tokenizer_id = hashlib.sha256(serialized).hexdigest()[:ID_LENGTH]
        # Special tokens come after the ranks of a tiktoken encoding, and first in a trained vocabulary.
        self.tokenizer_type = "wordpiece" if self._engine is None else "tiktoken" if self.eot_id else "bpe"

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
            DataError: it is missing or not understood.
        """
        try:
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; make it with: python -m llm_core.data_prep_tool") from None

    @classmethod
    def stored(cls, data_dir: Path, tokenizer_id: str) -> "Tokenizer":
        """The tokenizer with this id in prepared data.

        Raises:
            DataError: it is missing or damaged.
        """
        path = PreparedData(data_dir).tokenizer_file(tokenizer_id)
        if not path.is_file():
            raise DataError(f"{path}: no such file; give the folder of the checkpoint's prepared data with --data_dir")
        tokenizer = cls.load(path)
        if tokenizer.tokenizer_id != tokenizer_id:
            raise DataError(
                f"{path}: damaged, its content does not match its id; restore it, or prepare the data again, which"
                " repairs it from an intact tokenizer.json"
            )
        return tokenizer

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json atomically, byte for byte as loaded or trained."""
        with atomic_writer(path) as file:
            file.write(self.serialized)

    def encode(self, text: str) -> Ids:
        """Token ids [tokens] of a text. All of it is ordinary text; no special token is added."""
        if self._engine is None or (len(text) >= _ENDLESS and _ENDLESS_WHITESPACE.search(text)):
            return np.array(self.reference.encode(text, add_special_tokens=False).ids, dtype=self.dtype)
        return self._engine.encode_to_numpy(text, disallowed_special=()).astype(self.dtype, copy=False)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """`encode` of each text, mostly without the interpreter lock, so that other threads can run."""
        if self._engine is None:  # only its batch call releases the lock
            encodings = self.reference.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        separator = self.special_tokens[0]
        if not texts or has_border(separator) or any(len(text) >= _ENDLESS or separator in text for text in texts):
            return [self.encode(text) for text in texts]
        # One call for all texts saves waiting for the lock between them. No text contains the separator, nor completes it with
        # its end, so that its id appears only between texts; nothing is merged across a special token.
        joined = self._engine.encode_to_numpy(separator.join(texts), allowed_special={separator}, disallowed_special=())
        ids = joined.astype(self.dtype, copy=False)
        bounds = [-1, *np.flatnonzero(ids == self.eot_id).tolist(), len(ids)]
        return [ids[left + 1 : right] for left, right in itertools.pairwise(bounds)]

    def spelled_bytes(self, text: str) -> int:
        """UTF-8 bytes of the characters that tokens stand for, without the text of [UNK] tokens. For WordPiece."""
        encoding = self.reference.encode(text, add_special_tokens=False)
        special = set(self._special_ids.values())
        spans = (span for number, span in zip(encoding.ids, encoding.offsets, strict=True) if number not in special)
        return len("".join(text[start:end] for start, end in spans).encode())

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Text of token ids [tokens]. Exact for byte-level types, where an incomplete character becomes U+FFFD."""
        numbers = np.asarray(ids, dtype=np.int64).tolist()
        if self._engine is None:
            return str(self.reference.decode(numbers, skip_special_tokens=False))
        return b"".join([self.pieces[number] for number in numbers]).decode(errors="replace")

    def can_read(self, tokenizer_id: str, tokenizer_type: str) -> bool:
        """Whether text can be converted from the tokens of another tokenizer: WordPiece does not give the text back."""
        return tokenizer_id == self.tokenizer_id or "wordpiece" not in (tokenizer_type, self.tokenizer_type)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes [vocab_size] of each token, 0 for special tokens.

        Exact for byte-level types: the sum over the tokens of a text is its length. WordPiece loses white space.
        """
        lengths = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        lengths[list(self._special_ids.values())] = 0
        return lengths

    def begins_character(self) -> npt.NDArray[np.bool_]:
        """Whether each token [vocab_size] begins with the first byte of a character; special tokens do."""
        return np.array([not piece or piece[0] & 0xC0 != 0x80 for piece in self.pieces])

    def _piece_bytes(self, vocab: dict[str, int], model_type: str) -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        pieces = [b""] * len(vocab)
        for token, number in vocab.items():
            if token in self._special_ids:
                pieces[number] = token.encode()
            elif model_type == "BPE":
                pieces[number] = bytes(byte_of[character] for character in token)
            else:
                pieces[number] = token.removeprefix("##").encode()
        return pieces

    def _byte_level_engine(self, description: dict[str, Any]) -> tiktoken.Encoding:
        """tiktoken's engine. Ranks are ids, which must therefore increase in the order of the merges."""
        pattern = description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        expected = json.loads(byte_level_tokenizer(models.BPE(), pattern).to_str())
        for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if description[name] != expected[name]:
                raise ValueError(f"its {name} is not the one of a byte-level tokenizer")
        model = description["model"]
        if model["dropout"] or model["ignore_merges"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
            raise ValueError("its model has options that are not used here")
        ranks = {piece: number for number, piece in enumerate(self.pieces) if number not in self._special_ids.values()}
        merged = [model["vocab"][left + right] for left, right in model["merges"]]
        if any(following <= rank for rank, following in itertools.pairwise(merged)):
            raise ValueError("its merges are not in the order of their ids")
        if len(ranks) != 256 + len(merged) or any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("its vocabulary is not 256 bytes and one token per merge")
        # As one group, everything before the look-ahead is a single automaton in tiktoken's engine instead of one per alternative
        # (1.4 times as slow). The matches are the same.
        words = pattern.removesuffix(_WHITESPACE_END)
        if words != pattern:
            pattern = f"(?:{words}){_WHITESPACE_END}"
        # `encode` allows no special token, but without any in the vocabulary tiktoken's search for them is slow.
        engine = tiktoken.Encoding("textmill", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self._special_ids)
        # The first thread to use the engine's automaton owns it and marks each use in memory that all threads read: if a worker
        # owns it, two workers take twice as long. This thread does not encode next to workers.
        engine.encode_ordinary("a")
        return engine
