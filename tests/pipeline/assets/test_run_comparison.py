"""The asset run_comparison: runs evaluated on the same text, and which of them were released."""

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.assets.evaluation import evaluation
from pipeline.assets.plots import ComparedRun, plot_run_comparison
from pipeline.assets.raw_text import raw_text
from pipeline.assets.run_comparison import run_comparison
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.assets.trained_tokenizer import trained_tokenizer
from tests.pipeline.conftest import Home


def rows_of(metadata: dict[str, Any]) -> list[dict[str, str]]:
    header, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in metadata["runs"].splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.mark.slow
def test_runs_that_were_evaluated_on_the_same_text_are_compared(
    trained_home: tuple[Home, Any], clone: Callable[..., tuple[Home, Any]]
) -> None:
    home, first = clone(trained_home)
    small = home.metadata(first, "checkpoint")
    # An evaluation on less of the text is not comparable.
    home.materialize(evaluation, evaluation={"max_eval_tokens": 256})
    result = home.materialize(checkpoint={"hidden_size": 64, "max_steps": 12})
    wide = home.metadata(result, "checkpoint")
    compared = home.metadata(result, "run_comparison")
    rows = rows_of(compared)
    assert [row["run"] for row in rows] == [wide["run_id"][:8], small["run_id"][:8]], "the better one first"
    assert [row["released"] for row in rows] == ["yes", "earlier"]
    for row, trained in zip(rows, (wide, small), strict=True):
        assert row["parameters"] == f"{trained['parameters']:,}"
        assert row["tokens"] == f"{trained['tokens_seen']:,}"
        (recorded,) = home.catalog.query(
            "SELECT value FROM evaluations WHERE checkpoint_id = ? AND metric = 'bits_per_byte' AND source = 'all' AND "
            "dataset_id = ? AND evaluation_id IN (SELECT evaluation_id FROM evaluations WHERE metric = 'tokens' AND value = 512)",
            [trained["checkpoint_id"], trained["dataset_id"]],
        )
        assert row["bits per byte"] == f"{recorded['value']:.4f}"
    curves = home.catalog.loss_curves([wide["run_id"], small["run_id"]], points=6)
    assert [len(curve) for curve in curves.values()] == [6, 6], "twelve steps averaged to six points"
    losses = home.catalog.query("SELECT tokens, loss FROM train_metrics WHERE run_id = ? ORDER BY step", [wide["run_id"]])
    assert curves[wide["run_id"]][0] == {
        "tokens": losses[1]["tokens"],
        "loss": pytest.approx((losses[0]["loss"] + losses[1]["loss"]) / 2),
    }

    assert compared["comparison"].startswith("![comparison of runs](data:image/png;base64,")
    alone = home.materialize(run_comparison)
    assert home.metadata(alone, "run_comparison")["runs"] == compared["runs"]

    on_other_text = [raw_text, trained_tokenizer, tokenized_shards, evaluation, run_comparison]
    other = home.metadata(home.materialize(*on_other_text, raw_text={"val_fraction": 0.3}), "run_comparison")
    assert [row["run"] for row in rows_of(other)] == [wide["run_id"][:8]]
    assert other["dataset_id"] != compared["dataset_id"]

    home.folders.catalog.unlink()
    home.catalog.create()
    lost = home.materialize(run_comparison, expect_success=False)
    (failure,) = [event for event in lost.all_events if event.is_step_failure]
    assert "textmill catalog rebuild" in str(failure.event_specific_data)


@pytest.mark.parametrize("sizes", [[21_000_000], [21_000_000, 21_100_000, 134_000_000]])
def test_the_comparison_is_a_png(sizes: list[int]) -> None:
    runs = [ComparedRun(f"run{size}", size, 1.0, size == 21_000_000, [1, 2, 3], [3.0, 2.0, 1.5]) for size in sizes]
    assert plot_run_comparison(runs).startswith(b"\x89PNG")
