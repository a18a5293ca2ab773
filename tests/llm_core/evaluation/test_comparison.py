"""The difference of two models, and how sure it is."""

import math

import numpy as np
import pyarrow as pa
import pytest

from llm_core.errors import DataError
from llm_core.evaluation import MIN_DOCUMENTS, compare


def table(nats: np.ndarray, sizes: np.ndarray) -> pa.Table:
    ids = [f"{row:04}" for row in range(len(sizes))]
    return pa.table({"document_id": ids, "text": ids, "nats": nats, "bytes": sizes})


def test_the_difference_is_that_of_the_bits_per_byte_of_all_documents() -> None:
    sizes = np.array([100.0, 2000, 30, 700, 5])
    new, old = np.array([60.0, 1500, 20, 400, 4]), np.array([70.0, 1490, 25, 420, 3])
    difference = compare(table(new, sizes).take(pa.array([4, 2, 0, 1, 3])), table(old, sizes))
    assert difference.improvement == pytest.approx((old.sum() - new.sum()) / math.log(2) / sizes.sum())
    assert difference.low < difference.improvement < difference.high
    assert difference.documents == 5
    assert str(difference).startswith("+0.0122 bits per byte (95 % interval -0.")
    assert str(difference).endswith(", 5 documents)")


def test_the_interval_of_equal_documents_is_that_of_a_mean() -> None:
    """With equal sizes the ratio is a mean, and its interval is Student's."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    saved = np.random.default_rng(0).normal(0.02, 0.1, 12)
    difference = compare(table(np.zeros(12), np.ones(12)), table(saved * math.log(2), np.ones(12)))
    low, high = stats.t.interval(0.95, 11, saved.mean(), saved.std(ddof=1) / math.sqrt(12))
    assert (difference.low, difference.high) == pytest.approx((low, high), rel=1e-3)


@pytest.mark.parametrize(("documents", "spread"), [(5, 0.5), (20, 1.0), (200, 1.0)])
def test_the_interval_covers_the_true_difference_in_95_of_100_samples(documents: int, spread: float) -> None:
    """Documents of very different sizes, whose differences per byte have heavy tails."""
    random, covered, trials = np.random.default_rng(1), 0, 1000
    for _ in range(trials):
        sizes = np.exp(random.normal(6, spread, documents))
        per_byte = 0.02 + 0.05 * random.standard_t(5, documents)
        difference = compare(table(np.zeros(documents), sizes), table(per_byte * sizes * math.log(2), sizes))
        covered += difference.low <= 0.02 <= difference.high
    assert 0.92 <= covered / trials <= 0.98


def in_files(table: pa.Table, files: int) -> pa.Table:
    return table.set_column(1, "text", [[f"{row % files}.txt" for row in range(len(table))]])


def test_the_pieces_of_a_file_are_one_document_unless_there_are_few_files() -> None:
    random = np.random.default_rng(2)
    of_file, sizes = random.normal(0, 1, 10), np.ones(200)
    new, old = table(np.zeros(200), sizes), table(np.tile(of_file, 20) + random.normal(0, 0.1, 200), sizes)
    pieces = compare(new, old)
    files = compare(in_files(new, 10), in_files(old, 10))
    assert (pieces.documents, files.documents) == (200, 10)
    assert files.improvement == pytest.approx(pieces.improvement)
    assert files.high - files.low > 3 * (pieces.high - pieces.low), "pieces of a file are alike"
    few = MIN_DOCUMENTS - 1
    assert compare(in_files(new, few), in_files(old, few)) == pieces


def test_a_few_documents_have_no_interval() -> None:
    few = MIN_DOCUMENTS - 1
    difference = compare(table(np.zeros(few), np.ones(few)), table(np.ones(few), np.ones(few)))
    assert (difference.low, difference.high) == (-math.inf, math.inf)
    assert "4 documents, too few for an interval" in str(difference)


@pytest.mark.parametrize("sizes", [np.ones(6), np.array([1.0, 1, 1, 1, 2])])
def test_evaluations_of_other_text_are_refused(sizes: np.ndarray) -> None:
    with pytest.raises(DataError, match="not of the same text"):
        compare(table(np.ones(5), np.ones(5)), table(np.ones(len(sizes)), sizes))
