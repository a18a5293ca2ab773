"""Whether one model predicts held-out text better than another: their difference in bits per byte, with a confidence interval."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llm_core.errors import DataError

# Fewer documents say nothing about others.
MIN_DOCUMENTS = 5

# The 97.5 % quantile of the normal distribution.
_NORMAL = 1.959963984540054


@dataclass(frozen=True)
class Difference:
    """By how many bits per byte one model is better than another (negative: worse), with the limits of its 95 % interval.

    With fewer than MIN_DOCUMENTS documents the limits are infinite.
    """

    improvement: float
    low: float
    high: float
    documents: int

    def __str__(self) -> str:
        if self.documents < MIN_DOCUMENTS:
            return f"{self.improvement:+.4f} bits per byte on {self.documents} documents, too few for an interval"
        interval = f"95 % interval {self.low:+.4f} to {self.high:+.4f}"
        return f"{self.improvement:+.4f} bits per byte ({interval}, {self.documents:,} documents)"


def compare(new: pa.Table, old: pa.Table) -> Difference:
    """By how much the model of `new` is better than that of `old` on the same text.

    The difference is a ratio of two sums over documents, nats and bytes. Its standard error is that of the delete-one jackknife
    (Tukey 1958): documents are independent of each other, their tokens are not. So the pieces of a file count as one document,
    unless there are fewer than MIN_DOCUMENTS files. The quantile is Student's.

    new, old: document_id, text, nats and bytes of each piece; see `read_documents`.

    Raises:
        DataError: they are not of the same text.
    """
    new, old = new.sort_by("document_id"), old.sort_by("document_id")
    sizes = new["bytes"].to_numpy()
    if new["document_id"] != old["document_id"] or not np.allclose(sizes, old["bytes"].to_numpy(), rtol=1e-9, atol=0):
        raise DataError("the two evaluations are not of the same text; delete both files to evaluate again")
    saved = (old["nats"].to_numpy() - new["nats"].to_numpy()) / math.log(2)
    texts, text = np.unique(new["text"].to_pylist(), return_inverse=True)
    if len(texts) >= MIN_DOCUMENTS:
        saved, sizes = np.bincount(text, saved), np.bincount(text, sizes)
    improvement, documents = float(saved.sum() / sizes.sum()), len(sizes)
    if documents < MIN_DOCUMENTS:
        return Difference(improvement, -math.inf, math.inf, documents)
    without_one = (saved - improvement * sizes) / (sizes.sum() - sizes)
    error = math.sqrt((documents - 1) / documents * float(np.square(without_one).sum()))
    margin = _quantile(documents - 1) * error
    return Difference(improvement, improvement - margin, improvement + margin, documents)


def _quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.3 % from 4 degrees of freedom (Abramowitz and Stegun 1964, 26.7.5)."""
    z, n = _NORMAL, degrees
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return z + sum(terms)
