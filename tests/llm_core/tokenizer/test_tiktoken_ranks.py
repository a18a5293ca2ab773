"""tiktoken encodings from ranks files: the same ids, and an error that names the option for anything else."""

import re
from pathlib import Path

import pytest
import tiktoken
from pydantic import ValidationError

from llm_core.config import END_OF_TEXT, TokenizerConfig
from llm_core.errors import UserError
from llm_core.tokenizer import Tokenizer
from llm_core.tokenizer.store import tokenizer_identity
from llm_core.tokenizer.tiktoken_ranks import PATTERNS, merges_of
from llm_core.tokenizer.tokenizer import CL100K_PATTERN, GPT2_PATTERN
from tests.support.tokenizers import TEXTS, ranks_file, train


def test_a_ranks_file_keeps_its_ranks_as_ids(bpe: Tokenizer, tmp_path: Path) -> None:
    ranks = ranks_file(tmp_path / "own.tiktoken", bpe)
    tokenizer = train(tokenizer_type="tiktoken", tiktoken_encoding="cl100k_base", tiktoken_ranks=str(tmp_path / "own.tiktoken"))
    assert (tokenizer.tokenizer_type, tokenizer.vocab_size, tokenizer.eot_id) == ("tiktoken", len(ranks) + 1, len(ranks))
    original = tiktoken.Encoding("own", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})
    for text in TEXTS[:5]:
        assert tokenizer.encode(text).tolist() == original.encode_ordinary(text)


def test_special_tokens_take_the_free_ids(bpe: Tokenizer, tmp_path: Path) -> None:
    ranks_file(tmp_path / "gap.tiktoken", bpe, lambda rank: rank + (rank >= 300))
    options = {"tokenizer_type": "tiktoken", "tiktoken_ranks": str(tmp_path / "gap.tiktoken")}
    tokenizer = train(**options)
    assert (tokenizer.eot_id, tokenizer.tokenizer_type) == (300, "tiktoken")
    ranks_file(tmp_path / "gap.tiktoken", bpe, lambda rank: rank + 3 * (rank >= 300))
    with pytest.raises(UserError, match="leave ids without a token; give 3 or more --special_tokens"):
        train(**options)
    assert train(**options, special_tokens=["<|a|>", "<|b|>", "<|c|>"]).eot_id == 300


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"YQ== 0\n", "single bytes are missing"),
        (b"YQ== zero\n", 'line 1 is not "<token in base64> <rank>"'),
        (b"??? 0\n", "line 1"),
        (None, "no such file; give the path"),
    ],
)
def test_a_bad_ranks_file_names_the_option(content: bytes | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--tiktoken_ranks {path}: .*{re.escape(problem)}"):
        train(tokenizer_type="tiktoken", tiktoken_ranks=str(path))


def test_a_ranks_file_that_would_not_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"tiktoken_ranks my\.tiktoken: not with tokenizer_type bpe"):
        TokenizerConfig(tiktoken_ranks="my.tiktoken")
    mistyped = TokenizerConfig(tokenizer_type="tiktoken", tiktoken_ranks=str(tmp_path / "mine.tiktoken"))
    with pytest.raises(UserError, match=r"--tiktoken_ranks .*mine\.tiktoken: no such file"):
        tokenizer_identity(mistyped)


def test_ranks_that_are_not_a_byte_pair_encoding_are_refused() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(UserError, match="token 256 cannot be merged from tokens of lower rank"):
        merges_of(ranks, "own")
    assert merges_of(ranks | {b"bc": 256, b"abc": 257}, "own") == [(b"b", b"c"), (b"a", b"bc")]


def test_an_unknown_encoding_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"--tiktoken_encoding gpt9: unknown; choose one of {', '.join(PATTERNS)}"):
        train(tokenizer_type="tiktoken", tiktoken_encoding="gpt9")


def test_an_encoding_that_cannot_be_downloaded_is_reported_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"--tiktoken_encoding gpt2: .*fetch https://\S+/r50k_base.tiktoken .* --tiktoken_ranks"):
        train(tokenizer_type="tiktoken")


def test_a_downloaded_encoding_is_used_like_a_ranks_file(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ranks_file(tmp_path / "own.tiktoken", bpe)
    named = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": named}.__getitem__)
    local = train(tokenizer_type="tiktoken", tiktoken_ranks=str(tmp_path / "own.tiktoken"))
    assert train(tokenizer_type="tiktoken").tokenizer_id == local.tokenizer_id
