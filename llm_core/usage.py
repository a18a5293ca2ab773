"""Which step read which document, from the data order alone: nothing is logged per step."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from llm_core.config import TrainConfig
from llm_core.dataset import Windows
from llm_core.files import atomic_writer
from llm_core.order import Indices, Permutation
from llm_core.shards import DatasetManifest, kept_documents
from llm_core.tables import parquet_bytes

NEVER = np.iinfo(np.int64).max


def first_step_of_windows(num_windows: int, config: TrainConfig) -> Indices:
    """For each window the 0-based step that reads it first, NEVER where the run ends before."""
    order = Permutation(num_windows, config.seed, epoch=0)
    steps = order.inverse(np.arange(num_windows, dtype=np.int64)) // config.batch_size
    return np.where(steps < config.max_steps, steps, NEVER)


def first_step_of_documents(starts: Indices, counts: Indices, windows: Windows, config: TrainConfig) -> Indices:
    """For each document the first step that has one of its tokens as a target.

    starts, counts: (documents,) place in the token stream and number of tokens, the leading end-of-text included.
    """
    per_window = first_step_of_windows(len(windows), config)
    step = windows.max_length - windows.stride
    # Window w has the targets at w*step + 1 to w*step + max_length. The leading token is no text of the document.
    first = np.maximum(0, -(-(starts + 1 - windows.max_length) // step))
    last = np.minimum(len(windows) - 1, np.maximum(0, starts + counts - 2) // step)
    # Minimum over each range first..last. reduceat wants ascending pairs: every other result is the range asked for.
    padded = np.append(per_window, NEVER)
    bounds = np.stack((first, last + 1), axis=1).ravel()
    return np.minimum.reduceat(padded, bounds)[::2]


def write_document_steps(path: Path, data_dir: Path, manifest: DatasetManifest, windows: Windows, config: TrainConfig) -> None:
    """Writes (document_id, first_step) for each training document that the run reads by its last step."""
    ids, counts = kept_documents(data_dir, manifest, "train")
    starts = np.cumsum(counts) - counts
    steps = first_step_of_documents(starts, counts, windows, config)
    seen = steps != NEVER
    table = pa.table({"document_id": ids.filter(pa.array(seen)), "first_step": steps[seen]})
    with atomic_writer(path) as file:
        file.write(parquet_bytes(table))
