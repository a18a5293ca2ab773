"""Budgets of a training: tokens, epochs and minutes become steps, and then it is an ordinary run."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llm_core.config import TrainConfig
from llm_core.dataset import load_manifest
from llm_core.distributed.ranks import Ranks
from llm_core.errors import DataError, UserError
from llm_core.recipe import suitable_parameters
from llm_core.system import read_json, write_json
from llm_core.training import cost, find_plan, request_id, resolve
from llm_core.training.cost import estimate_memory, largest_micro_batch
from llm_core.training.plan import SHAPES, Shape, choose_shape, shape_options
from tests.support.dagster_dev import ROOT
from tests.support.training import SMALL, run_train

OPEN: dict[str, Any] = {"max_steps": None, "batch_size": None, "learning_rate": None, "warmup_steps": None, "eval_tokens": None}
OPEN |= dict.fromkeys(("hidden_size", "num_layers", "num_heads", "num_kv_heads"))


def train_for(minutes: float, data_dir: Path, run_dir: Path, **options: Any) -> str:
    """Trains with every default but the time; returns the output."""
    done = run_train(data_dir, run_dir, **(OPEN | {"train_minutes": minutes, "max_source_epochs": 100} | options))
    return done.stdout + done.stderr


def only_plan(run_dir: Path) -> Path:
    (path,) = run_dir.glob("plan_*.json")
    return path


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
    with pytest.raises(ValidationError, match=rf"max_steps 10 and {second} 5(\.0)?: .* give one of them"):
        TrainConfig(max_steps=10, **{second: 5})


def test_options_that_count_steps_must_fit_the_steps_of_a_budget() -> None:
    with pytest.raises(UserError, match="--warmup_steps 100 must not exceed the 4 steps"):
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
    assert list(run_dir.iterdir()) == [only_plan(run_dir)], "nothing is trained"
    plan = read_json(only_plan(run_dir))

    output = train_for(0.4, data_dir, run_dir)
    config, run = json.loads((run_dir / "config.json").read_text()), json.loads((run_dir / "run.json").read_text())
    assert read_json(only_plan(run_dir)) == plan, "the run keeps the plan that was explained"
    assert {name: config[name] for name in plan["options"]} == plan["options"]
    assert config["train_minutes"] is None
    assert "bits per byte, if the text is like" in output
    assert run["tokens_seen"] == pytest.approx(plan["tokens"], rel=0.02)

    # The same values by hand are the same run, for which nothing is left to do.
    chosen = OPEN | plan["options"] | {"max_source_epochs": 100, "resume": "auto"}
    assert f"run {run['run_id']} has finished all" in run_train(data_dir, run_dir, **chosen).stderr

    # A run with checkpoints keeps its plan, even on a machine of another kind.
    assert "has finished all" in train_for(0.4, data_dir, run_dir, resume="auto", threads_per_process=2)
    assert read_json(only_plan(run_dir)) == plan


def test_a_plan_answers_its_own_request_only(data_dir: Path, tmp_path: Path) -> None:
    train_for(0.1, data_dir, tmp_path, explain=True, num_layers=1, hidden_size=32, num_heads=2)
    plan = read_json(only_plan(tmp_path))
    assert {name: plan["options"][name] for name in ("num_layers", "hidden_size", "num_heads")} == {
        "num_layers": 1,
        "hidden_size": 32,
        "num_heads": 2,
    }
    assert find_plan(tmp_path, plan["request_id"], plan["machine"]) is not None
    assert find_plan(tmp_path, plan["request_id"], None) is not None
    assert find_plan(tmp_path, plan["request_id"], "another machine") is None
    assert find_plan(tmp_path, "another request", None) is None
    path = only_plan(tmp_path)
    train_for(0.1, data_dir, tmp_path, explain=True, num_layers=2, hidden_size=32, num_heads=2)
    assert len(list(tmp_path.glob("plan_*.json"))) == 2, "the plan of another request is kept"
    assert read_json(path) == plan

    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 1}))
    with pytest.raises(DataError, match="plan"):
        find_plan(tmp_path, plan["request_id"], None)
    write_json(path, {"request_id": "x"})
    with pytest.raises(DataError, match="plan"):
        find_plan(tmp_path, plan["request_id"], None)


def test_a_short_text_ends_the_run_before_its_time(data_dir: Path, tmp_path: Path) -> None:
    output = train_for(5, data_dir, tmp_path, max_source_epochs=1.5, explain=True, num_layers=1, hidden_size=32, num_heads=2)
    plan = read_json(only_plan(tmp_path))
    assert not plan["enough_text"]
    assert plan["epochs"] == pytest.approx(1.5, rel=0.1)
    assert plan["minutes"] < 5
    assert "more text would help more than more time" in output


def test_two_ranks_plan_together(data_dir: Path, tmp_path: Path) -> None:
    train_for(0.3, data_dir, tmp_path, ranks=2)
    plan, run = read_json(only_plan(tmp_path)), json.loads((tmp_path / "run.json").read_text())
    assert run["world_size"] == 2 and "2 x 1 threads" in plan["machine"]
    assert plan["options"]["batch_size"] % 2 == 0
    assert math.isfinite(plan["speeds"][0]["tokens_per_second"])


def test_a_plan_is_for_one_window_length(data_dir: Path) -> None:
    manifest, options = load_manifest(data_dir), TrainConfig(train_minutes=1)
    requests = {
        request_id(options, manifest, None),
        request_id(options, manifest.model_copy(update={"max_length": 128}), None),
        request_id(options, manifest.model_copy(update={"stride": 8}), None),
        request_id(options, manifest, "a parent"),
        request_id(TrainConfig(train_minutes=2), manifest, None),
        request_id(TrainConfig(train_minutes=1, compile_model=True), manifest, None),
    }
    assert len(requests) == 6
    assert request_id(TrainConfig(train_minutes=1, log_interval=3), manifest, None) in requests, "it changes nothing of the plan"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 100_000}, "--warmup_steps 100000 must not exceed the"),
        ({"profile": "5:100000"}, "--profile 5:100000 must end within the"),
        ({"batch_size": 3, "micro_batch_size": 2}, "--batch_size 3 is not a multiple of --micro_batch_size 2"),
    ],
)
def test_an_option_that_does_not_fit_the_plan_is_refused_and_no_plan_is_kept(
    options: dict[str, Any], message: str, data_dir: Path, tmp_path: Path
) -> None:
    small = OPEN | {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_source_epochs": 100}
    done = run_train(data_dir, tmp_path / "run", check=False, **(small | {"train_minutes": 0.1} | options))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not list((tmp_path / "run").glob("plan_*.json"))


def test_a_mixture_is_planned_within_what_its_sources_give(data_dir: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "source_weights": '{"more": 1, "*": 1}'}
    for epochs in (1.1, 1.3):
        run_dir = tmp_path / f"{epochs}"
        train_for(0.5, data_dir, run_dir, max_source_epochs=epochs, **small)
        run = json.loads((run_dir / "run.json").read_text())
        assert all(usage["epochs"] <= 1.01 * epochs for usage in run["mixture"]), run["mixture"]


def test_ranks_with_other_budgets_are_refused_before_anything_is_measured(data_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        "from llm_core.distributed.launch import run_rank\n"
        "from llm_core.train import main\n"
        "sys.argv += ['--train_minutes', '0.1' if os.environ['RANK'] == '0' else '0.2']\n"
        "run_rank(main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script), "--data_dir", str(data_dir)]
    done = subprocess.run([*command, "--save_dir", str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT)
    assert "train_minutes is 0.1 on rank 0 and 0.2 on rank 1; start every machine with the same flags" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_from_another_model_has_its_sizes(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "parent", max_steps=2)
    (parent,) = (tmp_path / "parent").glob("*.pt")
    inherited = shape_options(TrainConfig(train_minutes=1, init_from=str(parent)))
    assert inherited is not None and (inherited["hidden_size"], inherited["num_kv_heads"]) == (32, 2)
    with pytest.raises(UserError, match=r"--rope_theta 5000.0: the run of --init_from has 10000.0; give that"):
        shape_options(TrainConfig(train_minutes=1, init_from=str(parent), rope_theta=5000))
    (tmp_path / "parent" / "run.json").unlink()
    with pytest.raises(UserError, match=r"no run\.json beside it says its sizes; give --hidden_size"):
        shape_options(TrainConfig(train_minutes=1, init_from=str(parent)))


def test_a_batch_that_does_not_fit_into_memory_is_divided(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ranks = TrainConfig(**(SMALL | {"batch_size": 24})).resolved(64, 0), Ranks.alone("cpu", 1)
    one, two = (estimate_memory(config, 512, windows, "fp32").total for windows in (1, 2))
    for windows, expected in ((24, 24), (23, 12), (5, 4), (1, 1), (0, None)):
        monkeypatch.setattr(cost, "device_memory", lambda _, windows=windows: (one + (windows - 1) * (two - one) + 1) / 0.8)
        assert largest_micro_batch(config, 512, "fp32", ranks) == expected
