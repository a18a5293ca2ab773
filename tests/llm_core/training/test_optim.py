"""The learning rate, parameter groups and optimizers."""

import itertools
from typing import Any

import pytest
import torch

from llm_core.config import TrainConfig
from llm_core.model.transformer import Transformer
from llm_core.training.optim import build_optimizers, learning_rate, muon_groups, set_learning_rate
from tests.llm_core.model.test_transformer import build


def names_of(model: Transformer, groups: list[dict[str, Any]]) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("options", [{"learning_rate": 1e-3}, {"optimizer": "adamw"}, {"optimizer": "muon"}])
def test_rule_5_only_matrices_decay_and_groups_cover_each_parameter_once(options: dict[str, Any], tie_embeddings: bool) -> None:
    model = build(tie_embeddings=tie_embeddings)
    config = TrainConfig(**options, tie_embeddings=tie_embeddings, weight_decay=0.1).resolved(64, 0)
    groups = [group for optimizer in build_optimizers(model, config) for group in optimizer.param_groups]
    grouped = names_of(model, groups)
    assert sorted(itertools.chain.from_iterable(grouped)) == sorted(name for name, _ in model.named_parameters())
    for group, names in zip(groups, grouped, strict=True):
        plain = {name for name in names if "norm" in name or "embedding" in name}
        assert group["weight_decay"] == (0.0 if plain else 0.1)
        assert plain in (set(), set(names))


def test_rule_6_adamw_settings_and_fp32_state() -> None:
    model = build()
    (optimizer,) = build_optimizers(model, TrainConfig(learning_rate=1e-3).resolved(64, 0))
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    assert all(state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32 for state in optimizer.state.values())


def test_each_group_has_the_rate_of_its_option_at_every_step() -> None:
    model = build()
    options: dict[str, Any] = {"learning_rate": 0.01, "embedding_lr": 0.3, "head_lr": 0.02, "max_steps": 100}
    for optimizer in ("adamw", "muon"):
        config = TrainConfig(optimizer=optimizer, **options).resolved(64, 0)  # type: ignore[arg-type]
        optimizers = build_optimizers(model, config)
        set_learning_rate(optimizers, 0.005)  # half of the peak
        groups = [group for each in optimizers for group in each.param_groups]
        rates = {name: group["lr"] for group, names in zip(groups, names_of(model, groups), strict=True) for name in names}
        assert rates["embedding.weight"] == pytest.approx(0.15)
        assert rates["head.weight"] == pytest.approx(0.01)
        assert rates["norm.weight"] == rates["blocks.0.attention.qkv.weight"] == pytest.approx(0.005)
        assert rates["blocks.0.mlp.down.weight"] == pytest.approx(0.015 if optimizer == "muon" else 0.005)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_rule_19_warm_up_starts_above_zero_and_the_last_step_reaches_min_lr(schedule: str) -> None:
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1e-3, min_lr=1e-5, lr_schedule=schedule).resolved(64, 0)  # type: ignore[arg-type]
    rates = [learning_rate(step, config) for step in range(120)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == max(rates) == 1e-3
    assert rates[99] == 1e-5
    assert set(rates[99:]) == {1e-5}, "steps past the horizon clamp"
    assert all(earlier >= later for earlier, later in itertools.pairwise(rates[10:])), "never rises again"


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = TrainConfig(max_steps=101, warmup_steps=0, learning_rate=1e-3, min_lr=0).resolved(64, 0)
    assert learning_rate(50, config) == pytest.approx(5e-4)


def test_wsd_is_flat_until_its_last_fifth() -> None:
    config = TrainConfig(max_steps=100, warmup_steps=5, learning_rate=1e-3, min_lr=0, lr_schedule="wsd").resolved(64, 0)
    assert {learning_rate(step, config) for step in range(5, 80)} == {1e-3}
    assert learning_rate(89, config) == pytest.approx(5e-4)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_muon_trains_the_matrices_in_the_blocks_and_adamw_the_rest(tie_embeddings: bool) -> None:
    model = build(tie_embeddings=tie_embeddings)
    config = TrainConfig(optimizer="muon", tie_embeddings=tie_embeddings).resolved(64, 0)
    muon, adamw = (
        [name for group in names_of(model, optimizer.param_groups) for name in group]
        for optimizer in build_optimizers(model, config)
    )
    assert sorted(muon) == sorted(name for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2)
    assert "embedding.weight" in adamw


def test_muon_takes_query_key_value_gate_and_up_one_by_one() -> None:
    model = build(num_kv_heads=2)
    for group in muon_groups(model, TrainConfig(optimizer="muon").resolved(64, 0)):
        for parameter in group["params"]:
            assert sum(group.get("rows") or [len(parameter)]) == len(parameter)
    rows = [group.get("rows") for group in muon_groups(model, TrainConfig(optimizer="muon").resolved(64, 0))]
    assert rows[:2] == [[64, 32, 32], [192, 192]]
