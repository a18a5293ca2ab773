"""Small tokenizers of each type."""

import base64
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from llm_core.config import TokenizerConfig
from llm_core.tokenizer import Tokenizer
from llm_core.tokenizer.training import train_tokenizer

TEXTS = list(islice(topics.values(), 25))


def train(**options: Any) -> Tokenizer:
    return train_tokenizer(lambda: iter(TEXTS), TokenizerConfig(**options))


def ranks_file(path: Path, tokenizer: Tokenizer, encoding_order: Callable[[int], int] = lambda rank: rank) -> dict[bytes, int]:
    """Writes a bpe tokenizer's vocabulary as a .tiktoken file and returns its ranks."""
    special = len(tokenizer.special_tokens)
    pieces = tokenizer.pieces[special:]
    ranks = {piece: encoding_order(rank) for rank, piece in enumerate(pieces)}
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items()))
    return ranks
