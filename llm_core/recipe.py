"""The training recipe: the value of each training option that is not given, as a function of those that are.

A value that is given always wins. `learning_rate` without Muon means settings by hand: what else is not given then has the
classic values of the last column. d: hidden_size, S: max_steps, D: tokens of the run, U: learning_rate.

| option                    | Muon                              | AdamW                | AdamW with learning_rate |
|---------------------------|-----------------------------------|----------------------|--------------------------|
| batch_size                | 2.4 S^1.33 tokens, which is       | half of that         | 8 windows                |
|                           | 1.45 D^0.571; at most 32,768      |                      |                          |
| learning_rate             | 0.1 / sqrt(d)                     | 0.6 / d              |                          |
| rate of attention's out   | 3 U                               | U                    | U                        |
| and of MLP's down         |                                   |                      |                          |
| embedding_lr              | 160 U, tied to the head 4.5 U     | 30 U, tied U         | U                        |
| head_lr                   | 4.5 U                             | U                    | U                        |
| lr_schedule               | wsd with decay_fraction 0.65      | linear               | cosine                   |
| min_lr                    | 0.05 U                            | 0                    | 0.1 U                    |
| warmup_steps              | 0.08 S, at most 40                | 0.05 S, at most 2000 | 0.05 S, at most 2000     |
| weight_decay              | 0                                 | 0.1                  | 0.1                      |
| beta1, beta2, adam_eps    | 0.8, 0.96, 1e-10                  | 0.9, 0.95, 1e-8      | 0.9, 0.95, 1e-8          |
| initial weights           | see `initial_std`                 | GPT-2's              | GPT-2's                  |

In continued training, embedding and head have the rate U. The rates of Muon, their ratios and its schedule are those of nanochat
(Karpathy 2025), the batch is the step law's (Li et al. 2025) times 2.5, AdamW's rate falls with the width (Yang et al. 2022).
Fitted for 4 layers of width 192 and 1 to 2 M tokens (`benchmarks/DIARY.md`); elsewhere extrapolated.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

Optimizer = Literal["adamw", "muon"]

# Tokens of a batch by default: one pass of them fits into the memory of most devices.
_MAX_BATCH_TOKENS = 1 << 15

DEFAULT_STEPS = 1000

# Muon's rate of the output projections of attention and MLP, relative to the other matrices.
OUTPUT_RATE = 3.0


def choose_optimizer(optimizer: Literal["auto"] | Optimizer, learning_rate: float | None) -> Optimizer:
    """For auto Muon, but AdamW where a learning rate is given."""
    if optimizer == "auto":
        return "muon" if learning_rate is None else "adamw"
    return optimizer


def batch_windows(
    optimizer: Optimizer,
    learning_rate: float | None,
    max_length: int,
    *,
    max_steps: int | None = None,
    tokens: int | None = None,
) -> int:
    """Windows of a step, from the number of steps or from the tokens D of the run: a power of two, which most ranks divide."""
    if optimizer == "adamw" and learning_rate is not None:
        return 8
    if tokens is not None:
        batch = 1.45 * tokens**0.571
    else:
        assert max_steps is not None, "one of them is known"
        batch = 2.4 * max_steps**1.33
    batch = min(batch if optimizer == "muon" else batch / 2, _MAX_BATCH_TOKENS)
    return 1 << max(0, round(math.log2(batch / max_length)))


def recipe_defaults(
    optimizer: Optimizer,
    learning_rate: float | None,
    *,
    hidden_size: int,
    max_steps: int,
    tied: bool,
    continued: bool,
) -> dict[str, Any]:
    """The value of every option in the table above but the batch, without what is given.

    tied: the embedding and the head are one matrix. continued: the weights are those of another run, whose scale is unknown.
    """
    if optimizer == "muon":
        rate = learning_rate or 0.1 / math.sqrt(hidden_size)
        return {
            "learning_rate": rate,
            "embedding_lr": rate if continued else 4.5 * rate if tied else 160 * rate,
            "head_lr": rate if continued else 4.5 * rate,
            "lr_schedule": "wsd",
            "decay_fraction": 0.65,
            "min_lr": 0.05 * rate,
            "warmup_steps": min(40, round(0.08 * max_steps)),
            "weight_decay": 0.0,
            "beta1": 0.8,
            "beta2": 0.96,
            "adam_eps": 1e-10,
        }
    shared = {"decay_fraction": 0.2, "warmup_steps": min(2000, max_steps // 20), "weight_decay": 0.1}
    shared |= {"beta1": 0.9, "beta2": 0.95, "adam_eps": 1e-8}
    if learning_rate is not None:
        return shared | {"lr_schedule": "cosine", "min_lr": learning_rate / 10}
    rate = 0.6 / hidden_size
    return shared | {
        "learning_rate": rate,
        "embedding_lr": rate if continued or tied else 30 * rate,
        "head_lr": rate,
        "lr_schedule": "linear",
        "min_lr": 0.0,
    }


def suitable_parameters(tokens: float) -> float:
    """The size of a model that so many tokens train best in a given time: parameters with the head, without the embedding.

    12 tokens per parameter in long runs (Karpathy 2025: 8 to 12), fewer in short ones, where a larger model learns more from each
    token: 1 at 2.2 million tokens, 5 at 25 million (autoresearch on a laptop).
    """
    return tokens / min(12.0, 0.93 * (tokens / 2.2e6) ** 0.7)


def expected_bits_per_byte(parameters: float, tokens: float) -> float:
    """The quality to expect of a model of English tales, on tales that it has not read.

    Fitted to 0.9 to 3.9 million parameters, without the embedding, and 0.3 to 2.3 million tokens of a vocabulary of 4,096
    (`benchmarks/DIARY.md`); rough elsewhere.
    """
    return 1.38 + 0.063 * (parameters / 1e6) ** -0.9 + 0.08 / (tokens / 1e6)


@dataclass(frozen=True)
class InitialStd:
    """Standard deviations of the initial weights."""

    embedding: float
    head: float
    inputs: float  # qkv and gate_up
    outputs: float  # out and down, which write into the residual stream


def initial_std(optimizer: Optimizer, num_layers: int, tied: bool) -> InitialStd:
    """The distributions that the rates of an optimizer belong to.

    Muon: blocks that write nothing at first, beside an embedding of the size that they will write (nanochat). AdamW: GPT-2's; the
    residual stream is a sum of 2 * layers outputs, whose smaller std keeps its variance independent of depth.
    """
    if optimizer == "muon":
        return InitialStd(embedding=0.8 if not tied else 0.02, head=0.001, inputs=0.02, outputs=0.0)
    return InitialStd(embedding=0.02, head=0.02, inputs=0.02, outputs=0.02 / math.sqrt(2 * num_layers))
