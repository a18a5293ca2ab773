"""Training a vocabulary: the same bytes each time, and a clear message where the text or an option does not fit."""

import random
import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from llm_core.config import TokenizerConfig
from llm_core.errors import UserError
from llm_core.tokenizer import training
from llm_core.tokenizer.training import train_tokenizer
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
        UserError, match=r"--vocab_size 50000: the text yields \d+ tokens.*, or add text to --input_dir"
    ) as caught:
        train(tokenizer_type=kind, vocab_size=50_000)
    reached = int(re.findall(r"give --vocab_size (\d+) or less", str(caught.value))[0])
    assert train(tokenizer_type=kind, vocab_size=reached).vocab_size == reached


# 700 different characters without spaces; each is a word of its own, so that there are no longer pieces.
CHINESE = ["".join(chr(0x4E00 + (7 * line + column) % 700) for column in range(50)) for line in range(150)]
# The same, and words of letters.
MIXED = [f"{line} {line[:1]} the quick brown foxes jump over lazy dogs" for line in CHINESE]


@pytest.mark.parametrize("texts", [CHINESE, MIXED], ids=["no longer pieces", "mixed"])
def test_every_wordpiece_vocabulary_up_to_the_largest_is_reached(texts: list[str]) -> None:
    def size(vocab_size: int) -> int:
        config = TokenizerConfig(tokenizer_type="wordpiece", vocab_size=vocab_size)
        return train_tokenizer(lambda: iter(texts), config).vocab_size

    with pytest.raises(UserError, match=r"give --vocab_size \d+ or less") as caught:
        size(8000)
    largest = int(re.findall(r"give --vocab_size (\d+) or less", str(caught.value))[0])
    assert largest >= 2 * 700
    for vocab_size in (largest, largest - 1, largest - 2, 701, 258):
        assert size(vocab_size) == vocab_size


@pytest.mark.parametrize(
    ("texts", "advice"),
    [
        ([f"Few words, number {number}." for number in range(30)], "use --tokenizer_type bpe --vocab_size NNN, or add text"),
        (["once"], "add text to --input_dir"),
    ],
)
def test_text_that_is_not_enough_for_the_smallest_vocabulary_gets_advice_that_works(texts: list[str], advice: str) -> None:
    with pytest.raises(UserError, match=re.escape(advice).replace("NNN", r"\d+")) as caught:
        train_tokenizer(lambda: iter(texts), TokenizerConfig(tokenizer_type="wordpiece", vocab_size=8000))
    for vocab_size in re.findall(r"--tokenizer_type bpe --vocab_size (\d+)", str(caught.value)):
        config = TokenizerConfig(vocab_size=int(vocab_size))
        assert train_tokenizer(lambda: iter(texts), config).vocab_size == int(vocab_size)


@pytest.mark.parametrize(("kind", "count"), [("bpe", 4), ("wordpiece", 300)])
def test_a_vocabulary_too_small_for_its_special_tokens_names_the_smallest_size(kind: str, count: int) -> None:
    special_tokens = [f"<|{number}|>" for number in range(count)]
    with pytest.raises(UserError, match=rf"--vocab_size 258: too small .* with {count} special tokens; give") as caught:
        train(tokenizer_type=kind, vocab_size=258, special_tokens=special_tokens)
    smallest = int(re.findall(r"give --vocab_size (\d+) or more", str(caught.value))[0])
    assert train(tokenizer_type=kind, vocab_size=smallest, special_tokens=special_tokens).vocab_size == smallest
    with pytest.raises(ValidationError, match="vocab_size"):
        TokenizerConfig(vocab_size=200)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_long_word_is_trained_on_as_its_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge takes time in proportion to the length of the words that it changes: 8 MB of one word took minutes."""
    letters = random.Random(0).choices("abcdefgh", k=6000)
    config = TokenizerConfig(tokenizer_type=kind, vocab_size=300)  # type: ignore[arg-type]
    monkeypatch.setattr(training, "_MAX_WORD", 50)
    word = train_tokenizer(lambda: iter(["".join(letters)]), config)
    pieces = train_tokenizer(lambda: iter(["".join(letters[start : start + 50]) for start in range(0, 6000, 50)]), config)
    assert word.tokenizer_id == pieces.tokenizer_id
    monkeypatch.setattr(training, "_MAX_WORD", 6000)
    assert train_tokenizer(lambda: iter(["".join(letters)]), config).tokenizer_id != word.tokenizer_id


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_limit_of_a_word_does_not_change_usual_text(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_MAX_WORD", 1 << 30)
    assert train(tokenizer_type=kind, vocab_size=600).serialized == request.getfixturevalue(kind).serialized
