"""Budgets of a training: tokens, epochs and minutes become steps, and then it is an ordinary run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llm_core.config import TrainConfig
from llm_core.dataset import load_manifest
from llm_core.errors import DataError, UserError
from llm_core.recipe import suitable_parameters
from llm_core.system import read_json, write_json
from llm_core.training import find_plan, resolve
from llm_core.training.plan import SHAPES, Shape, choose_shape
from tests.support.training import run_train

OPEN: dict[str, Any] = {"max_steps": None, "batch_size": None, "learning_rate": None, "warmup_steps": None, "eval_tokens": None}
OPEN |= dict.fromkeys(("hidden_size", "num_layers", "num_heads", "num_kv_heads"))


def train_for(minutes: float, data_dir: Path, run_dir: Path, **options: Any) -> str:
    """Trains with every default but the time; returns the output."""
    done = run_train(data_dir, run_dir, **(OPEN | {"train_minutes": minutes, "max_source_epochs": 100} | options))
    return done.stdout + done.stderr


def test_tokens_are_a_budget() -> None:
    config = TrainConfig(max_tokens=1_000_000).resolved(256, 0)
    assert config.max_steps * config.batch_size * 256 == pytest.approx(1_000_000, rel=0.01)
    by_hand = TrainConfig(max_tokens=1_000_000, batch_size=10, learning_rate=1e-3).resolved(100, 0)
    assert (by_hand.max_steps, by_hand.batch_size) == (1000, 10)
    assert TrainConfig(max_tokens=5).resolved(256, 0).max_steps == 1


def test_epochs_are_a_budget(data_dir: Path) -> None:
    manifest = load_manifest(data_dir)
    tokens = manifest.splits["train"].tokens
    for stride, factor in ((0, 1), (32, 2)):
        config = TrainConfig(max_epochs=3, batch_size=2, stride=stride)
        resolved = resolve(config, manifest)
        assert resolved.max_steps == pytest.approx(3 * tokens * factor / (2 * 64), abs=1)


def test_a_budget_gives_the_same_run_as_the_steps_that_it_means() -> None:
    config = TrainConfig(max_tokens=1_000_000).resolved(256, 0)
    steps = TrainConfig(max_steps=config.max_steps, batch_size=config.batch_size).resolved(256, 0)
    assert config.identity() == steps.identity()


@pytest.mark.parametrize("second", ["max_tokens", "max_epochs", "train_minutes"])
def test_two_budgets_are_refused(second: str) -> None:
    with pytest.raises(ValidationError, match=rf"max_steps 10 and {second} 5: .* give one of them"):
        TrainConfig(max_steps=10, **{second: 5})


def test_options_that_count_steps_must_fit_the_steps_of_a_budget() -> None:
    with pytest.raises(UserError, match="--warmup_steps 100 must not exceed max_steps 4"):
        TrainConfig(max_tokens=1024, batch_size=1, warmup_steps=100).resolved(256, 0)
    with pytest.raises(UserError, match="--profile 1:9 must end within the 4 steps"):
        TrainConfig(max_tokens=1024, batch_size=1, profile="1:9").resolved(256, 0)


def test_the_suitable_size_grows_with_the_tokens_to_twelve_per_parameter() -> None:
    sizes = [suitable_parameters(tokens) for tokens in (1e5, 1e6, 1e7, 1e8, 1e9)]
    assert sizes == sorted(sizes)
    assert suitable_parameters(1e9) == pytest.approx(1e9 / 12)
    assert suitable_parameters(2.2e6) == pytest.approx(2.2e6 / 0.93)


def test_a_faster_machine_gets_a_larger_model() -> None:
    def parameters(shape: Shape) -> int:
        return 12 * shape.num_layers * shape.hidden_size**2

    def chosen(flops: float) -> int:
        return SHAPES.index(choose_shape(SHAPES, parameters, lambda shape: flops / parameters(shape)))

    assert chosen(1e11) < chosen(1e13) < chosen(1e15) < chosen(1e17)


def test_minutes_become_a_plan_and_then_it_is_an_ordinary_run(data_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    explained = train_for(0.4, data_dir, run_dir, explain=True)
    assert "expected quality" in explained and "tokens/s" in explained
    assert [path.name for path in run_dir.iterdir()] == ["plan.json"], "nothing is trained"
    plan = read_json(run_dir / "plan.json")

    output = train_for(0.4, data_dir, run_dir)
    config, run = json.loads((run_dir / "config.json").read_text()), json.loads((run_dir / "run.json").read_text())
    assert read_json(run_dir / "plan.json") == plan, "the run keeps the plan that was explained"
    assert {name: config[name] for name in plan["options"]} == plan["options"]
    assert config["train_minutes"] is None
    assert "bits per byte, if the text is like" in output
    assert run["tokens_seen"] == pytest.approx(plan["tokens"], rel=0.02)

    # The same values by hand are the same run, for which nothing is left to do.
    chosen = OPEN | plan["options"] | {"max_source_epochs": 100, "resume": "auto"}
    assert f"run {run['run_id']} has finished all" in run_train(data_dir, run_dir, **chosen).stderr

    # A run with checkpoints keeps its plan, even on a machine of another kind.
    assert "has finished all" in train_for(0.4, data_dir, run_dir, resume="auto", threads_per_process=2)
    assert read_json(run_dir / "plan.json") == plan


def test_a_plan_answers_its_own_request_only(data_dir: Path, tmp_path: Path) -> None:
    train_for(0.1, data_dir, tmp_path, explain=True, num_layers=1, hidden_size=32, num_heads=2)
    plan = read_json(tmp_path / "plan.json")
    assert {name: plan["options"][name] for name in ("num_layers", "hidden_size", "num_heads")} == {
        "num_layers": 1,
        "hidden_size": 32,
        "num_heads": 2,
    }
    assert find_plan(tmp_path, plan["request_id"], plan["machine"]) is not None
    assert find_plan(tmp_path, plan["request_id"], None) is not None
    assert find_plan(tmp_path, plan["request_id"], "another machine") is None
    assert find_plan(tmp_path, "another request", None) is None
    train_for(0.1, data_dir, tmp_path, explain=True, num_layers=2, hidden_size=32, num_heads=2)
    assert read_json(tmp_path / "plan.json")["request_id"] != plan["request_id"]

    damaged = json.loads((tmp_path / "plan.json").read_text()) | {"tokens": 1}
    (tmp_path / "plan.json").write_text(json.dumps(damaged))
    with pytest.raises(DataError, match="plan"):
        find_plan(tmp_path, plan["request_id"], None)
    write_json(tmp_path / "plan.json", {"request_id": "x"})
    with pytest.raises(DataError, match="plan"):
        find_plan(tmp_path, plan["request_id"], None)


def test_a_short_text_ends_the_run_before_its_time(data_dir: Path, tmp_path: Path) -> None:
    output = train_for(5, data_dir, tmp_path, max_source_epochs=1.5, explain=True, num_layers=1, hidden_size=32, num_heads=2)
    plan = read_json(tmp_path / "plan.json")
    assert not plan["enough_text"]
    assert plan["epochs"] == pytest.approx(1.5, rel=0.1)
    assert plan["minutes"] < 5
    assert "more text would help more than more time" in output


def test_two_ranks_plan_together(data_dir: Path, tmp_path: Path) -> None:
    train_for(0.3, data_dir, tmp_path, ranks=2)
    plan, run = read_json(tmp_path / "plan.json"), json.loads((tmp_path / "run.json").read_text())
    assert run["world_size"] == 2 and "2 x 1 threads" in plan["machine"]
    assert plan["options"]["batch_size"] % 2 == 0
    assert math.isfinite(plan["speeds"][0]["tokens_per_second"])
