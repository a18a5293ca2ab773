"""Windows: every token is a target once, shifted once."""

import itertools

import numpy as np
import pytest
import torch

from llm_core.config import IGNORE_INDEX
from llm_core.dataset import windows as windows_module
from llm_core.dataset.windows import TokenStream, Windows, require_text
from llm_core.errors import UserError

EOT = 0


def windows(tokens: int, max_length: int, stride: int = 0, pieces: int = 1) -> Windows:
    stream = np.arange(1, tokens + 1, dtype=np.uint16)
    return Windows([TokenStream(np.array_split(stream, pieces))], max_length, stride, EOT)


@pytest.mark.parametrize("pieces", [1, 3, 10])
def test_a_stream_reads_across_its_slices(pieces: int) -> None:
    tokens = np.arange(10)
    stream = TokenStream(np.array_split(tokens, pieces))
    assert len(stream) == 10
    for start in range(10):
        for stop in range(start + 1, 13):
            assert stream.read(start, stop).tolist() == tokens[start:stop].tolist()


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 16, 17, 18, 41])
@pytest.mark.parametrize("pieces", [1, 2])
def test_rule_12_and_34_every_token_but_the_first_is_a_target_exactly_once(tokens: int, pieces: int) -> None:
    data = windows(tokens, max_length=8, pieces=pieces)
    inputs, targets = data.batch(np.arange(len(data)))
    real = targets != IGNORE_INDEX
    assert targets[real].tolist() == list(range(2, tokens + 1))
    assert inputs[real].tolist() == list(range(1, tokens)), "each target follows its input: shifted once"
    assert real.sum() == data.num_targets(np.arange(len(data))) == tokens - 1
    assert (inputs[~real][1:] == EOT).all()


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_stride_is_the_overlap_of_consecutive_windows(stride: int) -> None:
    data = windows(40, max_length=8, stride=stride)
    inputs, targets = data.batch(np.arange(len(data)))
    for one, next_one in itertools.pairwise(inputs):
        shared = one[8 - stride :]
        assert next_one[:stride][: len(shared)].tolist() == shared.tolist()
    real = targets != IGNORE_INDEX
    assert set(targets[real].tolist()) == set(range(2, 41))
    assert data.num_targets(np.arange(len(data))) == int(real.sum())
    assert real[-1].any(), "no window without a target"


def test_held_out_text_without_a_token_of_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "_READ_TOKENS", 3)
    sizes = torch.zeros(50)
    data = windows(20, max_length=8)
    with pytest.raises(UserError, match=r"only words that the tokenizer cannot spell; .*--tokenizer_type bpe"):
        require_text(data, sizes)
    sizes[20] = 4
    require_text(data, sizes)
