"""The learning rate, parameter groups and optimizers."""

import itertools

import pytest
import torch

from llm_core.config import TrainConfig
from llm_core.training.optim import Muon, build_optimizers, learning_rate, newton_schulz, parameter_groups
from tests.llm_core.model.test_transformer import build


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_rule_5_only_matrices_decay_and_groups_cover_each_parameter_once(tie_embeddings: bool) -> None:
    model = build(tie_embeddings=tie_embeddings)
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(p) for p in itertools.chain(decayed["params"], plain["params"])]  # type: ignore[call-overload]
    assert sorted(grouped) == sorted(names)
    assert {names[id(p)] for p in plain["params"]} == {n for n in names.values() if "norm" in n or "embedding" in n}  # type: ignore[attr-defined]
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0


def test_rule_6_adamw_settings_and_fp32_state() -> None:
    model = build()
    (optimizer,) = build_optimizers(model, TrainConfig().resolved(64, 0))
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    assert all(state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32 for state in optimizer.state.values())


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
    muon, adamw = build_optimizers(model, TrainConfig(optimizer="muon").resolved(64, 0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [[names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    assert sorted(trained[0] + trained[1]) == sorted(names.values())
    assert all(name.startswith("blocks.") and "norm" not in name for name in trained[0])
    assert "embedding.weight" in trained[1]
    assert adamw.param_groups[-1]["weight_decay"] == 0


def test_muon_agrees_with_pytorchs_and_iterates_in_fp32_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 40, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([ours], lr=0.01, momentum=0.9, weight_decay=0.1)
    pytorchs = torch.optim.Muon([theirs], lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(24, 40, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        pytorchs.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # PyTorch's iterates in bf16
    for shape in ((24, 40), (40, 24)):
        orthogonal = newton_schulz(torch.randn(shape, generator=generator))
        assert orthogonal.dtype == torch.float32
        singular = torch.linalg.svdvals(orthogonal)
        assert singular.min() > 0.6 and singular.max() < 1.3
