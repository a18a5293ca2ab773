"""The optimizer step and the training loop."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

from llm_core.checkpoint.state import load_model
from llm_core.config import IGNORE_INDEX, TrainConfig
from llm_core.errors import DataError, UserError
from llm_core.model.precision import resolve_precision
from llm_core.training import read_metrics
from llm_core.training.loop import TrainingLoop
from tests.support.training import assert_same_state, gradients, make_trainer, run_train, train_lines


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_rule_1_accumulated_gradients_are_those_of_the_whole_batch(micro_batch_size: int, data_dir: Path, tmp_path: Path) -> None:
    whole = make_trainer(data_dir)
    accumulated = make_trainer(data_dir, micro_batch_size=micro_batch_size)
    # The last window of the corpus is mostly padding: a mean of means would be wrong here.
    last = len(whole.data.train) - 1
    windows = np.array([last, *range(7)])
    targets = whole.data.train.num_targets(windows)
    assert targets < 8 * 64
    for trainer in (whole, accumulated):
        trainer._accumulate_gradients(windows, targets)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(accumulated)[name], gradient, rtol=1e-4, atol=1e-6)
    # The loss is the mean over all targets of the batch.
    inputs, labels = whole.data.train.batch(windows)
    logits = whole.model.logits(inputs).flatten(0, 1)
    reference = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX)
    whole.model.zero_grad()
    reference.backward()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradient, gradients(accumulated)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_rule_1_every_layout_of_ranks_and_micro_batches_trains_the_same(data_dir: Path, tmp_path: Path) -> None:
    layouts = {"1x8": (0, 1), "2x4": (2, 1), "8x1": (8, 1), "1x1": (0, 8)}
    for name, (ranks, micro) in layouts.items():
        # With a small epsilon AdamW would amplify rounding errors of gradients close to 0.
        run_train(data_dir, tmp_path / name, ranks, micro_batch_size=micro, max_steps=2, adam_eps=1e-3)
    for name in ("2x4", "8x1", "1x1"):
        assert_same_state(tmp_path / "1x8/checkpoint_step_2.pt", tmp_path / name / "checkpoint_step_2.pt", rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_rule_2_and_22_two_ranks_equal_one_rank_with_two_micro_batches_bit_for_bit(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "one", 0, micro_batch_size=4, max_steps=4, eval_interval=2)
    run_train(data_dir, tmp_path / "two", 2, micro_batch_size=4, max_steps=4, eval_interval=2)
    assert_same_state(tmp_path / "one/checkpoint_step_4.pt", tmp_path / "two/checkpoint_step_4.pt")
    assert train_lines(tmp_path / "one") == train_lines(tmp_path / "two"), "the logged loss is the mean over all ranks"
    evals = [
        [line["val_loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl") if line["kind"] == "eval"]
        for run in ("one", "two")
    ]
    assert evals[0] == pytest.approx(evals[1], rel=1e-12), "validation sums are reduced over the ranks"


def test_rule_2_only_the_last_micro_batch_synchronizes_gradients(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(data_dir, micro_batch_size=2)
    synchronized: list[bool] = []
    monkeypatch.setattr(
        "llm_core.training.trainer.gradient_sync", lambda module, last: synchronized.append(last) or nullcontext()
    )
    trainer.train_step()
    assert synchronized == [False, False, False, True]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:--precision")
def test_rule_3_every_precision_trains(precision: str, data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_dir, precision=precision, batch_size=4)
    losses = [trainer.train_step().loss for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters()), "master weights stay fp32"
    assert trainer.scaler.is_enabled() == (precision == "fp16"), "only fp16 needs a loss scaler"


@pytest.mark.filterwarnings("ignore:--precision")
def test_rule_3_an_overflow_skips_the_step_and_lowers_the_scale(data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_dir, precision="fp16", batch_size=4)
    trainer.train_step()
    before = [weight.clone() for weight in trainer.model.parameters()]
    scale = trainer.scaler.get_scale()
    assert trainer.scaler.state_dict()["_growth_tracker"] == 1
    trainer.scaler.update(1e38)
    result = trainer.train_step()
    assert result.skipped
    assert trainer.skipped_steps == 1
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.scaler.get_scale() < 1e38
    assert trainer.scaler.state_dict()["_growth_tracker"] == 0, "the scale grows after good steps in a row"
    trainer.scaler.update(scale)
    assert not trainer.train_step().skipped


def test_rule_4_clipping_uses_the_global_norm_and_logs_it_before_clipping(data_dir: Path, tmp_path: Path) -> None:
    free = make_trainer(data_dir, grad_clip=0)
    clipped = make_trainer(data_dir, grad_clip=0.01)
    norms = [trainer.train_step().grad_norm for trainer in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    total = math.sqrt(sum(float(g.square().sum()) for g in gradients(free).values()))
    assert total == pytest.approx(norms[0], rel=1e-4)
    total = math.sqrt(sum(float(g.square().sum()) for g in gradients(clipped).values()))
    assert total == pytest.approx(0.01, rel=1e-3)


def test_rule_4_a_gradient_that_is_not_finite_never_reaches_the_optimizer(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(data_dir, max_skipped_steps=3)
    trainer.train_step()
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    poison = [torch.tensor(math.nan)]
    monkeypatch.setattr(trainer.model.head.weight, "grad", None)
    handle = trainer.model.head.weight.register_hook(lambda gradient: gradient * poison[0])
    result = trainer.train_step()
    assert result.skipped
    assert math.isnan(result.grad_norm)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    trainer.train_step()
    windows = trainer.data.order.windows_of_step(3, 8).tolist()
    with pytest.raises(DataError, match="3 steps in a row were not finite") as stopped:
        trainer.train_step()
    assert str(windows) in str(stopped.value), "the message names the windows"
    handle.remove()


def test_rule_12_one_batch_can_be_memorized(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(data_dir, batch_size=2, max_steps=200, hidden_size=64, warmup_steps=5, weight_decay=0)
    monkeypatch.setattr(trainer.data.order, "windows_of_step", lambda *_: np.array([0, 1]))
    losses = [trainer.train_step().loss for _ in range(150)]
    assert losses[0] == pytest.approx(math.log(512), abs=0.15)
    assert losses[-1] < 0.05


def test_rule_16_weights_come_from_one_seed_and_dropout_from_seed_step_and_rank(data_dir: Path, tmp_path: Path) -> None:
    one, same, other = (make_trainer(data_dir, dropout=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.model.head.weight, same.model.head.weight)
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    torch.manual_seed(99)  # earlier draws do not matter
    assert one.train_step() == same.train_step()
    first = one.train_step()
    assert first == same.train_step()


def test_rule_18_and_26_each_step_sets_the_learning_rate_and_clears_the_gradients(data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_dir)
    for _ in range(3):
        result = trainer.train_step()
        assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {result.learning_rate}

    def begin_without_gradients(*_: Any) -> None:
        assert all(parameter.grad is None for parameter in trainer.model.parameters())

    trainer.module.register_forward_pre_hook(begin_without_gradients)
    trainer.train_step()


def test_rule_21_validation_has_no_side_effects_and_reads_the_same_tokens(data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_dir, dropout=0.2)
    trainer.train_step()
    state, weights = torch.get_rng_state(), [weight.clone() for weight in trainer.model.parameters()]
    loop = TrainingLoop(trainer, tmp_path, None)
    first, second = loop.validate(), loop.validate()
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training
    assert all(torch.equal(one, other) for one, other in zip(weights, trainer.model.parameters(), strict=True))


def test_rule_17_ten_steps_equal_six_a_kill_and_four_bit_for_bit(data_dir: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options: dict[str, Any] = {"dropout": 0.1, "save_interval": 3, "eval_interval": 5, "keep_checkpoints": 5}
    run_train(data_dir, whole, **options)
    run_train(data_dir, broken, **options)
    # The state after a kill at step 8: the newest checkpoint is of step 6, the metrics end with step 8.
    for step in (9, 10):
        for path in broken.glob(f"checkpoint_step_{step}.pt*"):
            path.unlink()
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 8) + '{"kind": "tr')
    started_at = json.loads((broken / "run.json").read_text())["started_at"]
    done = run_train(data_dir, broken, resume="auto", **options)
    assert json.loads((broken / "run.json").read_text())["started_at"] == started_at
    assert "at step 6" in done.stderr
    assert_same_state(whole / "checkpoint_step_10.pt", broken / "checkpoint_step_10.pt")
    assert train_lines(whole) == train_lines(broken)
    assert (whole / "checkpoint_step_10.pt").read_bytes() == (broken / "checkpoint_step_10.pt").read_bytes()


def test_rule_17_a_resume_with_other_options_is_refused_with_both_values(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "run", max_steps=2)
    checkpoint = tmp_path / "run/checkpoint_step_2.pt"
    done = run_train(data_dir, tmp_path / "else", check=False, checkpoint=checkpoint, max_steps=2, num_layers=3)
    assert done.returncode == 2
    assert "num_layers is 2 in the checkpoint and 3 now" in done.stderr
    done = run_train(data_dir, tmp_path / "else", check=False, checkpoint=checkpoint, max_steps=3)
    assert "max_steps is 2 in the checkpoint and 3 now" in done.stderr


def test_rule_20_checkpoints_hold_bare_names_and_load_strictly(data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_dir, tie_embeddings=True)
    names = trainer.state()["model"].keys()
    assert not [name for name in names if name.startswith(("module.", "_orig_mod."))]
    run_train(data_dir, tmp_path / "run", max_steps=1, tie_embeddings=True)
    model, state = load_model(tmp_path / "run/checkpoint_step_1.pt")
    assert state["model"].keys() == names
    assert model.head.weight is model.embedding.weight
    heads = [state["model"][name].untyped_storage().data_ptr() for name in ("head.weight", "embedding.weight")]
    assert heads[0] == heads[1], "a tied matrix is stored once"


@pytest.mark.slow
def test_rule_24_compiled_blocks_train_the_same_and_keep_their_names(data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data_dir, compile_model=True)
    torch.use_deterministic_algorithms(False)  # compiling for a CPU has switched it on
    assert all(block._compiled_call_impl is not None for block in trainer.model.blocks)
    run_train(data_dir, tmp_path / "plain", max_steps=3)
    run_train(data_dir, tmp_path / "compiled", max_steps=3, compile_model=True)
    assert_same_state(tmp_path / "plain/checkpoint_step_3.pt", tmp_path / "compiled/checkpoint_step_3.pt", rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_rule_27_an_error_on_any_rank_fails_the_whole_job_and_reaches_the_user(data_dir: Path, tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    save_dir.mkdir()
    (save_dir / "checkpoint_step_5.pt").mkdir()  # makes the first save on rank 0 fail
    done = run_train(data_dir, save_dir, ranks=2, check=False, save_interval=5)
    assert done.returncode != 0
    assert "checkpoint_step_5.pt" in done.stderr
    assert json.loads((save_dir / "run.json").read_text())["status"] == "failed"


def test_an_indivisible_batch_size_is_refused_with_the_numbers(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--batch_size 8 is not a multiple of --micro_batch_size 3 x 1 ranks = 3"):
        make_trainer(data_dir, micro_batch_size=3)


def test_precision_auto_chooses_the_fastest_safe_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, mixed = torch.device("cpu"), TrainConfig(mixed_precision=True)
    assert resolve_precision(TrainConfig(), cpu) == "fp32"
    for fast, expected in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr("llm_core.model.precision.cpu_has_bf16", lambda fast=fast: fast)
        assert resolve_precision(mixed, cpu) == expected
    monkeypatch.setattr("llm_core.model.precision.cpu_has_bf16", lambda: False)
    with pytest.warns(UserWarning, match="--precision bf16 is emulated"):
        assert resolve_precision(TrainConfig(precision="bf16"), cpu) == "bf16"
    for capability, expected in (((9, 0), "bf16"), ((7, 5), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        assert resolve_precision(mixed, torch.device("cuda", 0)) == expected


@pytest.mark.slow
def test_rule_17_holds_for_muon_too(data_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": "muon", "save_interval": 3, "keep_checkpoints": 5, "max_steps": 6}
    run_train(data_dir, tmp_path / "whole", **options)
    run_train(data_dir, tmp_path / "other", **options, checkpoint=tmp_path / "whole/checkpoint_step_3.pt")
    assert_same_state(tmp_path / "whole/checkpoint_step_6.pt", tmp_path / "other/checkpoint_step_6.pt")


def test_without_a_compiler_compile_model_is_refused_before_the_training(data_dir: Path) -> None:
    with (
        inductor_config.patch({"cpp.cxx": (None, "/missing/g++")}),
        pytest.raises(UserError, match=r"--compile_model: torch.compile does not work .*/missing/g\+\+.* install a C and C\+\+"),
    ):
        make_trainer(data_dir, compile_model=True)
