"""Training a vocabulary: the same bytes each time, and a clear message where the text or an option does not fit."""

import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from llm_core.config import TokenizerConfig
from llm_core.errors import UserError
from tests.support.tokenizers import train


@pytest.mark.parametrize("token", ["the", "", " ", "##e", "<|x|> ", "Ġ<<", "a"])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "tiktoken"])
def test_a_special_token_that_text_could_produce_is_refused(token: str, kind: str) -> None:
    with pytest.raises(UserError, match=r"--special_tokens .*: ordinary text could become this token; write it like <\|name\|>"):
        train(tokenizer_type=kind, special_tokens=[token])


@pytest.mark.parametrize("tokens", [["<|x|>", "<|x|>"], ["[UNK]"]])
def test_special_tokens_are_not_repeated(tokens: list[str]) -> None:
    with pytest.raises(UserError, match="is repeated"):
        train(special_tokens=tokens)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_rule_33_training_gives_the_same_bytes_in_every_process(kind: str, request: pytest.FixtureRequest) -> None:
    program = f"""
from itertools import islice
from pydoc_data.topics import topics
from llm_core.config import TokenizerConfig
from llm_core.tokenizer.training import train_tokenizer
texts = list(islice(topics.values(), 25))
print(train_tokenizer(lambda: iter(texts), TokenizerConfig(tokenizer_type={kind!r}, vocab_size=600)).tokenizer_id)
"""
    ids = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() for _ in "12"
    }
    assert ids == {request.getfixturevalue(kind).tokenizer_id}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_vocabulary_too_large_for_the_text_names_the_largest_size(kind: str) -> None:
    with pytest.raises(
        UserError, match=r"--vocab_size 50000: the text yields \d+ tokens; give --vocab_size \d+ or less, or add text"
    ) as caught:
        train(tokenizer_type=kind, vocab_size=50_000)
    reached = int(re.findall(r"--vocab_size (\d+) or", str(caught.value))[0])
    if kind == "bpe":
        assert train(vocab_size=reached).vocab_size == reached


def test_a_vocabulary_too_small_for_bytes_and_special_tokens_names_the_smallest_size() -> None:
    with pytest.raises(UserError, match=r"--vocab_size 258: the text yields 260 tokens; give --vocab_size 260 or more"):
        train(vocab_size=258, special_tokens=["<|a|>", "<|b|>", "<|c|>", "<|d|>"])
    with pytest.raises(ValidationError, match="vocab_size"):
        TokenizerConfig(vocab_size=200)
