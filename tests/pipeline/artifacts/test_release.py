"""The decision to release a model, and what its evaluation and model card report."""

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest

from llm_core.config import ReleaseConfig
from llm_core.evaluation import Evaluation, compare, metric, read_evaluation
from llm_core.huggingface.model_card import model_card
from pipeline.artifacts.release import Comparison, decide
from pipeline.assets.released_model import released_model
from tests.pipeline.conftest import Home
from tests.support.records import model_record

RELEASED = model_record(model_id="m1", checkpoint_id="c1", metrics={"bits_per_byte": 2.0})


def evaluation(bits_per_byte: float, checkpoint_id: str = "c2") -> Evaluation:
    entry = {"metric": "bits_per_byte", "split": "val", "source": "all", "value": bits_per_byte}
    return cast(Evaluation, {"checkpoint_id": checkpoint_id, "metrics": [entry]})


def beside_released(improvement: float, noise: float, documents: int = 40) -> Comparison:
    """A comparison on documents of different sizes; noise: standard deviation of the bits per byte between them."""
    random = np.random.default_rng(0)
    sizes = np.exp(random.normal(6, 1, documents))
    saved = random.normal(0, noise, documents) * sizes
    saved += (improvement - saved.sum() / sizes.sum()) * sizes
    ids = [str(row) for row in range(documents)]
    new, old = (
        pa.table({"document_id": ids, "text": ids, "nats": nats, "bytes": sizes}) for nats in (0 * sizes, saved * math.log(2))
    )
    return Comparison(RELEASED, evaluation(2.0, "c1"), compare(new, old))


GONE = Comparison(RELEASED, missing="the checkpoint of the released model m1 is gone")
DIVERGED = replace(beside_released(0.1, 0.05), released=evaluation(math.nan, "c1"))
FEW = beside_released(0.9, 0.01, documents=4)


@pytest.mark.parametrize(
    ("comparison", "candidate", "newer", "minimum", "promoted", "reason"),
    [
        (Comparison(), evaluation(3.0), False, 0.0, True, "first release: 3.0000"),
        (Comparison(), evaluation(math.nan), False, 0.0, False, "not finite"),
        (beside_released(0.5, 0.01), evaluation(math.inf), True, 0.0, False, "not finite"),
        (Comparison(RELEASED), evaluation(2.0, "c1"), False, 0.0, True, "already"),
        (GONE, evaluation(9.0), False, 0.0, True, "nothing to compare with: the checkpoint of the released model m1 is gone"),
        (DIVERGED, evaluation(9.0), False, 0.0, True, "m1 has nan"),
        (beside_released(0.1, 0.05), evaluation(1.9), False, 0.0, True, "improvement +0.1000 bits per byte (95 % interval +0.0"),
        (beside_released(0.1, 0.05), evaluation(1.9), False, 0.05, True, "40 documents)"),
        (beside_released(0.1, 0.05), evaluation(1.9), True, 0.3, False, "not better by more than 0.3, the old release stays"),
        (beside_released(-0.1, 0.05), evaluation(2.1), True, 0.0, False, "worse, the old release stays"),
        (beside_released(0.1, 1.0), evaluation(1.9), False, 0.0, False, "a tie, the old release stays"),
        (beside_released(0.1, 1.0), evaluation(1.9), True, 0.0, True, "a tie, which goes to the model trained on newer text"),
        (beside_released(-0.1, 1.0), evaluation(2.1), True, 0.0, True, "a tie, which goes to the model trained on newer text"),
        (beside_released(0.1, 1.0), evaluation(1.9), True, 0.01, False, "a tie, the old release stays"),
        (FEW, evaluation(1.1), False, 0.0, False, "4 documents, too few for an interval: a tie"),
        (FEW, evaluation(1.1), True, 0.0, True, "a tie, which goes to the model trained on newer text"),
        (beside_released(-3.0, 0.01, documents=4), evaluation(5.0), True, 0.0, False, "a tie, the old release stays"),
        (beside_released(-0.1, 0.05), evaluation(2.1), False, -0.5, True, "improvement -0.1000"),
        (beside_released(-0.1, 1.0), evaluation(2.1), False, -0.15, False, "a tie, the old release stays"),
    ],
)  # fmt: skip
def test_a_model_is_released_if_it_is_certainly_better_or_tied_and_of_newer_text(
    comparison: Comparison, candidate: Evaluation, newer: bool, minimum: float, promoted: bool, reason: str
) -> None:
    verdict = decide(comparison, candidate, newer, ReleaseConfig(min_improvement=minimum))
    assert verdict.promoted == promoted
    assert reason in verdict.reason


def test_a_model_with_another_tokenizer_competes_on_the_same_text(
    trained_home: tuple[Home, Any], clone: Callable[..., Any]
) -> None:
    home, first = clone(trained_home)
    result = home.materialize(trained_tokenizer={"vocab_size": 450})
    verdict, shown = home.metadata(result, "released_model"), home.metadata(result, "evaluation")
    assert "on the same held-out text; improvement " in verdict["reason"]
    assert f"improvement {shown['improvement']}" in verdict["reason"]
    files = list(home.folders.checkpoints.glob("*/*.documents.parquet"))
    assert len(files) == 3, "the first model on both texts, the second on its own"
    # 512 tokens of the new vocabulary cover more text than 512 of the old one, so the values differ a little.
    assert shown["released_bits_per_byte"] == pytest.approx(home.metadata(first, "evaluation")["bits_per_byte"], rel=0.05)


def test_a_deleted_release_is_exported_again_and_does_not_affect_other_lines(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]]
) -> None:
    home, first = clone(trained_home)
    model_id = home.metadata(first, "released_model")["model_id"]
    shutil.rmtree(home.folders.models / model_id)
    other = Home(home.folders.root, dg.DagsterInstance.ephemeral(), release_line="other")
    assert home.metadata(other.materialize(checkpoint={"seed": 5}), "released_model")["promoted"]
    again = home.metadata(home.materialize(), "released_model")
    assert again["promoted"] and again["model_id"] == model_id
    assert (home.folders.models / model_id / "model.safetensors").is_file()


def test_a_model_whose_evaluation_is_not_finite_is_not_released(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]]
) -> None:
    home, _ = clone(trained_home)
    home.storage.released.unlink()
    home.make_the_evaluation_not_finite()
    again = home.materialize(released_model, expect_success=False)
    (failure,) = [event for event in again.all_events if event.is_step_failure]
    assert "nothing is released: nan bits per byte" in str(failure.event_specific_data)
    assert not home.storage.released.exists()


def test_the_evaluation_page_shows_samples_and_respects_the_token_budget(trained_home: tuple[Home, Any]) -> None:
    home, result = trained_home
    shown = home.metadata(result, "evaluation")
    assert shown["tokens"] == 512
    assert 0 < shown["share_of_text"] < 1
    assert "sample 1:\n\n    The " in shown["samples"]
    assert "sample 2:\n\n    Return the " in shown["samples"]


def test_a_model_card_escapes_markup_in_values() -> None:
    markup = "<img src=x> | [a](javascript:x)\n# title"
    sample = {"prompt": markup, "continuation": f"\r\n```\n{markup}"}
    card = model_card(model_record(metrics={"loss": 1.5}), 5, {"source_weights": {markup: 1}, "init_from": markup}, sample)
    written = card.split("## A sample\n\n")[1].rstrip("\n")
    assert all(line.startswith("    ") for line in written.split("\n")), "a block of code"
    rest = card.split("## Lineage")[1].split("## A sample")[0]
    assert "<img" not in rest and not re.search(r"(?<!\\)\[", rest)
    assert "| init_from | &lt;img src=x&gt; \\| \\[a](javascript:x) # title |" in rest, "one row, escaped"


def test_the_model_card_names_data_tokenizer_configuration_metrics_and_commit(trained_home: tuple[Home, Any]) -> None:
    home, result = trained_home
    model, data = home.metadata(result, "released_model"), home.metadata(result, "tokenized_shards")
    evaluated = read_evaluation(Path(home.metadata(result, "evaluation")["file"]))
    card = (Path(model["directory"]) / "README.md").read_text()
    (run,) = home.catalog.query("SELECT * FROM training_runs")
    expected = {
        "run_id": run["run_id"],
        "checkpoint_id": model["checkpoint_id"],
        "dataset_id": data["dataset_id"],
        "snapshot_id": data["snapshot_id"],
        "dataset_tokens": data["train_tokens"],
        "tokenizer_id": home.metadata(result, "trained_tokenizer")["tokenizer_id"],
        "code_version": run["code_version"],
        "git_commit": run["git_commit"],
        "seed": 1337,
        "bits_per_byte": f"{metric(evaluated, 'bits_per_byte'):.6g}",
        "learning_rate": "0.01",
        "tokens_seen": home.metadata(result, "checkpoint")["tokens_seen"],
        "hidden_size": 32,
    }
    for name, value in expected.items():
        assert f"| {name} | {value} |" in card, name
