"""tiktoken encodings as byte-level BPE: ranks files, and the merges that give the same ids in `tokenizers`."""

import base64
import binascii
import itertools
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import models

from llm_core.config import TokenizerConfig
from llm_core.errors import UserError
from llm_core.tokenizer.tokenizer import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, byte_characters, byte_level_tokenizer

# How each encoding splits text; ranks files do not contain the pattern.
PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "r50k_base": GPT2_PATTERN,
    "p50k_base": GPT2_PATTERN,
    "cl100k_base": CL100K_PATTERN,
    "o200k_base": O200K_PATTERN,
}

# Tokens in each encoding's ranks file, to recognize a file given for another encoding.
_SIZES = {"gpt2": 50_256, "r50k_base": 50_256, "p50k_base": 50_280, "cl100k_base": 100_256, "o200k_base": 199_998}


def ready_tokenizer(config: TokenizerConfig) -> tokenizers.Tokenizer:
    """The encoding that `config` names, from a local ranks file or downloaded by tiktoken.

    Ids are the ranks; special tokens get the free ids, lowest first (for gpt2 this is OpenAI's id of <|endoftext|>).

    Raises:
        UserError: the ranks file is unusable or cannot be downloaded.
    """
    name = config.tiktoken_encoding
    if config.tiktoken_ranks is None:
        source, ranks = f"--tiktoken_encoding {name}", _downloaded_ranks(name)
    else:
        source, ranks = f"--tiktoken_ranks {config.tiktoken_ranks}", read_ranks(Path(config.tiktoken_ranks))
    others = [other for other, size in _SIZES.items() if size == len(ranks)]
    if others and name not in others:
        raise UserError(f"{source}: {len(ranks)} tokens, the size of {others[0]}; give --tiktoken_encoding {others[0]}")
    if any(token.encode() in ranks for token in config.special_tokens):
        raise UserError(f"--special_tokens {config.special_tokens}: {source} already has one of them as ordinary text")
    size = len(ranks) + len(config.special_tokens)
    free = sorted(set(range(size)) - set(ranks.values()))
    if len(free) != len(config.special_tokens):
        raise UserError(
            f"{source}: {len(ranks)} tokens with ranks up to {max(ranks.values())} and {len(config.special_tokens)} special"
            f" tokens leave ids without a token; give {max(ranks.values()) + 1 - len(ranks)} or more --special_tokens"
        )

    characters = byte_characters()
    as_text = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [(as_text[left], as_text[right]) for left, right in merges_of(ranks, source)]
    vocab = {as_text[token]: rank for token, rank in ranks.items()} | dict(zip(config.special_tokens, free, strict=True))
    tokenizer = byte_level_tokenizer(models.BPE(vocab=vocab, merges=merges), PATTERNS[name])
    tokenizer.add_special_tokens(config.special_tokens)
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a ranks file: a base64 token and its rank per line. (tiktoken's reader caches by path, not by content.)

    Raises:
        UserError: the file is missing or not a ranks file.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--tiktoken_ranks {path}: {error.strerror}; give the path of a .tiktoken file") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if ranks.setdefault(token, int(rank)) != int(rank):
                raise UserError(f"--tiktoken_ranks {path}: line {number} gives a second rank to the token {token!r}")
        except (ValueError, binascii.Error):
            raise UserError(f'--tiktoken_ranks {path}: line {number} is not "<token in base64> <rank>"') from None
    if len(set(ranks.values())) < len(ranks) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(
            f"--tiktoken_ranks {path}: not a complete ranks file (single bytes are missing, or two tokens share a rank)"
        )
    return ranks


def merges_of(ranks: dict[bytes, int], source: str) -> list[tuple[bytes, bytes]]:
    """The pair of tokens that merges into each longer token, in the order of the ranks.

    It is the pair that remains after all merges of lower rank. No other pair of adjacent BPE tokens can form the token, since its
    text would be encoded as this pair.

    Raises:
        UserError: a token is not a merge of two others: the ranks are not those of a byte-pair encoding.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        pieces = [token[at : at + 1] for at in range(len(token))]
        while len(pieces) > 2:
            candidates = [ranks.get(left + right, rank) for left, right in itertools.pairwise(pieces)]
            best = min(candidates)
            if best >= rank:
                break
            at = candidates.index(best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        if len(pieces) != 2:
            raise UserError(f"{source}: token {rank} cannot be merged from tokens of lower rank; this is not a BPE ranks file")
        merges.append((pieces[0], pieces[1]))
    return merges


def _downloaded_ranks(name: str) -> dict[bytes, int]:
    try:
        return tiktoken.get_encoding(name)._mergeable_ranks
    except (OSError, ImportError, ValueError) as error:
        url = f"https://openaipublic.blob.core.windows.net/encodings/{'r50k_base' if name == 'gpt2' else name}.tiktoken"
        raise UserError(
            f"--tiktoken_encoding {name}: cannot be downloaded here ({type(error).__name__});"
            f" fetch {url} elsewhere and give the file with --tiktoken_ranks"
        ) from None
