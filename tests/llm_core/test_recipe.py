"""The values of the training options that are not given."""

import itertools
from typing import Any

import pytest

from llm_core.config import TrainConfig, step_before_decay
from llm_core.errors import UserError

# What version 0.1 did with a learning rate and nothing else.
BY_HAND = {
    "optimizer": "adamw",
    "batch_size": 8,
    "embedding_lr": None,
    "head_lr": None,
    "min_lr": 1e-4,
    "lr_schedule": "cosine",
    "warmup_steps": 50,
    "decay_fraction": 0.2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "adam_eps": 1e-8,
}


def resolved(**options: Any) -> dict[str, Any]:
    return TrainConfig(**options).resolved(256, 0).model_dump()


def test_a_learning_rate_alone_means_adamw_with_the_settings_of_version_0_1() -> None:
    values = resolved(learning_rate=1e-3)
    assert {name: values[name] for name in BY_HAND} == BY_HAND


def test_the_id_of_a_run_by_hand_has_no_field_that_version_0_1_did_not_have() -> None:
    assert {"embedding_lr", "head_lr"}.isdisjoint(TrainConfig(learning_rate=1e-3).resolved(256, 0).identity())
    assert {"embedding_lr", "head_lr"} <= TrainConfig().resolved(256, 0).identity().keys()


@pytest.mark.parametrize("optimizer", ["auto", "adamw", "muon"])
@pytest.mark.parametrize("given", sorted({*BY_HAND, "learning_rate"} - {"optimizer"}))
def test_a_value_that_is_given_always_wins(optimizer: str, given: str) -> None:
    value = {"batch_size": 3, "lr_schedule": "linear", "warmup_steps": 7}.get(given, 1e-5)
    assert resolved(**{"optimizer": optimizer, given: value})[given] == value


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_fall_with_the_width_and_the_batch_grows_with_the_steps(optimizer: str) -> None:
    widths = [resolved(optimizer=optimizer, hidden_size=width, num_heads=2)["learning_rate"] for width in (64, 256, 1024)]
    assert all(narrow > wide for narrow, wide in itertools.pairwise(widths))
    steps = [resolved(optimizer=optimizer, max_steps=steps)["batch_size"] for steps in (10, 300, 2000)]
    assert steps[0] == 1
    assert all(fewer < more for fewer, more in itertools.pairwise(steps))
    assert resolved(optimizer=optimizer, max_steps=10**9)["batch_size"] * 256 == 1 << 15
    assert all(batch.bit_count() == 1 for batch in steps), "most numbers of ranks divide a power of two"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_rate_for_all_where_the_scale_of_the_weights_is_unknown(optimizer: str) -> None:
    values = resolved(optimizer=optimizer, init_from="run")
    assert values["embedding_lr"] == values["head_lr"] == values["learning_rate"]


def test_the_embedding_has_a_lower_rate_where_it_is_also_the_head() -> None:
    assert resolved(tie_embeddings=True)["embedding_lr"] < resolved()["embedding_lr"] / 10


def test_a_final_rate_above_the_peak_of_the_recipe_is_refused() -> None:
    with pytest.raises(UserError, match=r"--min_lr 0\.5 must not exceed the learning rate 0\.0063"):
        resolved(min_lr=0.5)


def test_a_run_is_continued_from_before_its_decay_only_where_most_of_the_steps_come_first() -> None:
    assert step_before_decay(TrainConfig().resolved(256, 0)) is None
    by_hand = TrainConfig(learning_rate=1e-3, lr_schedule="wsd", max_steps=100).resolved(256, 0)
    assert step_before_decay(by_hand) == 79
