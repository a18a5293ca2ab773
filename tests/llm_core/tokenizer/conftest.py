"""Tokenizers that several modules test."""

import pytest

from llm_core.tokenizer import Tokenizer
from tests.support.tokenizers import train


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train(tokenizer_type="bpe", vocab_size=600)


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    return train(tokenizer_type="wordpiece", vocab_size=600)
