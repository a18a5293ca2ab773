"""The gate in front of a release, and what a release and the evaluation before it tell."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest

from llm_core.config import ReleaseConfig
from llm_core.evaluation_file import Evaluation, metric, read_evaluation
from llm_core.model_card import model_card
from pipeline.assets.released_model import released_model
from pipeline.release import decide
from tests.pipeline.conftest import Home

RELEASED = {"model_id": "m1", "checkpoint_id": "c1", "metrics": {"bits_per_byte": 2.0}}


def judged(bits_per_byte: float, checkpoint_id: str = "c2") -> Evaluation:
    entry = {"metric": "bits_per_byte", "split": "val", "source": "all", "value": bits_per_byte}
    return cast(Evaluation, {"checkpoint_id": checkpoint_id, "metrics": [entry]})


@pytest.mark.parametrize(
    ("released", "found", "before", "margin", "promoted", "reason"),
    [
        (None, judged(3.0), None, 0.0, True, "first release: 3.0000"),
        (None, judged(math.nan), None, 0.0, False, "not finite"),
        (RELEASED, judged(math.inf), judged(2.0, "c1"), 0.0, False, "not finite"),
        (RELEASED, judged(1.9), judged(2.1, "c1"), 0.1, True, "m1 has 2.1000 on the same held-out text"),
        (RELEASED, judged(1.9), judged(2.1, "c1"), 0.3, False, "not better by more than 0.3, the old release stays"),
        (RELEASED, judged(1.9), judged(1.8, "c1"), 0.0, False, "m1 has 1.8000 on the same held-out text"),
        (RELEASED, judged(1.9), None, 0.0, True, "m1 has 2.0000 as recorded at its release"),
        (RELEASED, judged(2.0, "c1"), None, 0.0, True, "already"),
    ],
)
def test_a_model_is_released_that_is_finite_and_better_by_the_margin_or_first(
    released: dict[str, Any] | None, found: Evaluation, before: Evaluation | None, margin: float, promoted: bool, reason: str
) -> None:
    verdict = decide(released, found, before, ReleaseConfig(min_improvement=margin))
    assert verdict.promoted == promoted
    assert reason in verdict.reason


def test_a_model_with_another_tokenizer_competes_on_the_same_text(
    trained_home: tuple[Home, Any], clone: Callable[..., Any]
) -> None:
    home, first = clone(trained_home)
    result = home.materialize(trained_tokenizer={"vocab_size": 450})
    verdict, shown = home.metadata(result, "released_model"), home.metadata(result, "evaluation")
    assert "on the same held-out text" in verdict["reason"]
    # 512 tokens of the new vocabulary stand for more text than 512 of the old one: another stretch, nearly the same figure.
    assert shown["released_bits_per_byte"] == pytest.approx(home.metadata(first, "evaluation")["bits_per_byte"], rel=0.05)


def test_a_released_directory_that_was_deleted_is_made_again_and_troubles_no_other_line(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]]
) -> None:
    home, first = clone(trained_home)
    model_id = home.metadata(first, "released_model")["model_id"]
    shutil.rmtree(home.storage.models / model_id)
    other = Home(home.storage.root, dg.DagsterInstance.ephemeral(), release_line="other")
    assert home.metadata(other.materialize(checkpoint={"seed": 5}), "released_model")["promoted"]
    again = home.metadata(home.materialize(), "released_model")
    assert again["promoted"] and again["model_id"] == model_id
    assert (home.storage.models / model_id / "model.safetensors").is_file()


def test_nothing_is_released_whose_evaluation_is_not_finite(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]]
) -> None:
    home, _ = clone(trained_home)
    home.storage.released.unlink()
    home.make_the_evaluation_not_finite()
    again = home.materialize(released_model, expect_success=False)
    (failure,) = [event for event in again.all_events if event.is_step_failure]
    assert "nothing is released: nan bits per byte" in str(failure.event_specific_data)
    assert not home.storage.released.exists()


def test_the_evaluation_shows_samples_of_its_prompts_and_keeps_to_its_budget(trained_home: tuple[Home, Any]) -> None:
    home, result = trained_home
    shown = home.metadata(result, "evaluation")
    assert shown["tokens"] == 512
    assert 0 < shown["share_of_text"] < 1
    assert "sample 1:\n\n    The " in shown["samples"]
    assert "sample 2:\n\n    Return the " in shown["samples"]


def test_nothing_in_a_model_card_is_markup_but_its_own() -> None:
    markup = "<img src=x> | [a](javascript:x)\n# title"
    sample = {"prompt": markup, "continuation": f"\r\n```\n{markup}"}
    card = model_card("id", 5, {"loss": 1.5}, {"run_id": "r"}, {"source_weights": {markup: 1}, "init_from": markup}, sample)
    written = card.split("## A sample\n\n")[1].rstrip("\n")
    assert all(line.startswith("    ") for line in written.split("\n")), "a block of code"
    rest = card.split("## Lineage")[1].split("## A sample")[0]
    assert "<img" not in rest and not re.search(r"(?<!\\)\[", rest)
    assert "| init_from | &lt;img src=x&gt; \\| \\[a](javascript:x) # title |" in rest, "one row, as it was"


def test_the_model_card_tells_data_tokenizer_configuration_metrics_and_commit(trained_home: tuple[Home, Any]) -> None:
    home, result = trained_home
    model, data = home.metadata(result, "released_model"), home.metadata(result, "tokenized_shards")
    judged = read_evaluation(Path(home.metadata(result, "evaluation")["file"]))
    card = (Path(model["directory"]) / "README.md").read_text()
    (run,) = home.catalog.query("SELECT * FROM training_runs")
    told = {
        "run_id": run["run_id"],
        "checkpoint_id": model["checkpoint_id"],
        "dataset_id": data["dataset_id"],
        "snapshot_id": data["snapshot_id"],
        "dataset_tokens": data["train_tokens"],
        "tokenizer_id": home.metadata(result, "trained_tokenizer")["tokenizer_id"],
        "code_version": run["code_version"],
        "git_commit": run["git_commit"],
        "seed": 1337,
        "bits_per_byte": f"{metric(judged, 'bits_per_byte'):.6g}",
        "learning_rate": "0.01",
        "tokens_seen": home.metadata(result, "checkpoint")["tokens_seen"],
        "hidden_size": 32,
    }
    for name, value in told.items():
        assert f"| {name} | {value} |" in card, name
