"""Ready tiktoken encodings as byte-level BPE: their ranks files, and the merges that give the same ids elsewhere."""

import base64
import binascii
import itertools
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import models

from llm_core.config import TokenizerConfig
from llm_core.errors import UserError
from llm_core.tokenizer import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, byte_characters, byte_level_tokenizer

PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "r50k_base": GPT2_PATTERN,
    "p50k_base": GPT2_PATTERN,
    "cl100k_base": CL100K_PATTERN,
    "o200k_base": O200K_PATTERN,
}
"""How each encoding divides text; a pattern is not part of a ranks file."""

_SIZES = {"gpt2": 50_256, "r50k_base": 50_256, "p50k_base": 50_280, "cl100k_base": 100_256, "o200k_base": 199_998}
"""Tokens in each encoding's ranks file, by which one that was given for another encoding is told."""


def ready_tokenizer(config: TokenizerConfig) -> tokenizers.Tokenizer:
    """The encoding that `config` names, from a local ranks file or tiktoken's download.

    Ids are the ranks; special tokens take the free ids, lowest first (for gpt2 that is OpenAI's own id of <|endoftext|>).

    Raises:
        UserError: a ranks file cannot be used, or there is no way to download one.
    """
    name = config.tiktoken_encoding
    if config.tiktoken_ranks is None:
        source, ranks = f"--tiktoken_encoding {name}", _downloaded_ranks(name)
    else:
        source, ranks = f"--tiktoken_ranks {config.tiktoken_ranks}", read_ranks(Path(config.tiktoken_ranks))
    others = [other for other, size in _SIZES.items() if size == len(ranks)]
    if others and name not in others:
        raise UserError(f"{source}: {len(ranks)} tokens, as {others[0]} has them; give --tiktoken_encoding {others[0]}")
    if any(token.encode() in ranks for token in config.special_tokens):
        raise UserError(f"--special_tokens {config.special_tokens}: {source} already has one of them as ordinary text")
    size = len(ranks) + len(config.special_tokens)
    free = sorted(set(range(size)) - set(ranks.values()))
    if len(free) != len(config.special_tokens):
        raise UserError(
            f"{source}: {len(ranks)} tokens with ranks up to {max(ranks.values())} and {len(config.special_tokens)} special"
            " tokens leave ids without a token; give as many --special_tokens as there are gaps"
        )

    characters = byte_characters()
    as_text = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [(as_text[left], as_text[right]) for left, right in merges_of(ranks, source)]
    vocab = {as_text[token]: rank for token, rank in ranks.items()} | dict(zip(config.special_tokens, free, strict=True))
    tokenizer = byte_level_tokenizer(models.BPE(vocab=vocab, merges=merges), PATTERNS[name])
    tokenizer.add_special_tokens(config.special_tokens)
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a ranks file: one base64 token and its rank per line. (tiktoken's own reader caches by path, not content.)

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
        raise UserError(f"--tiktoken_ranks {path}: not a whole ranks file (it lacks single bytes, or two tokens share a rank)")
    return ranks


def merges_of(ranks: dict[bytes, int], source: str) -> list[tuple[bytes, bytes]]:
    """The pair of tokens that makes each longer token, in the order of the ranks.

    The pair is what is left of the token when all merges of lower rank are done. Two tokens of a BPE vocabulary stand side by
    side only if their joined text is encoded as just these two, so that this pair is the only one ever to make the token.

    Raises:
        UserError: a token cannot be made this way: the ranks are not those of a byte-pair encoding.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            candidates = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(candidates)
            if best >= rank:
                break
            at = candidates.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) != 2:
            raise UserError(f"{source}: token {rank} cannot be merged from tokens of lower rank; this is not a BPE ranks file")
        merges.append((parts[0], parts[1]))
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
