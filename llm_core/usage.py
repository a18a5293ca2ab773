"""Which step read which document, from the data order alone: nothing is logged per step."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from llm_core.config import TrainConfig
from llm_core.dataset import Windows
from llm_core.files import atomic_writer
from llm_core.order import Indices, WindowOrder
from llm_core.parts import Parts, kept_documents
from llm_core.shards import DatasetManifest
from llm_core.tables import parquet_bytes

NEVER = np.iinfo(np.int64).max


def first_step_of_windows(order: WindowOrder, part: int, config: TrainConfig) -> Indices:
    """For each window of a part the 0-based step that reads it first, NEVER where the run ends before."""
    steps = order.first_positions(part) // config.batch_size
    return np.where(steps < config.max_steps, steps, NEVER)


def first_step_of_documents(counts: Indices, first_steps: Indices, windows: Windows) -> Indices:
    """For each document of a part the first step that has one of its tokens as a target.

    counts: (documents,) number of tokens, the leading end-of-text included, in the order of the part's stream.
    first_steps: (windows,) the step that reads each window of the part first.
    """
    starts = np.cumsum(counts) - counts
    step = windows.max_length - windows.stride
    # Window w has the targets at w*step + 1 to w*step + max_length. The leading token is no text of the document.
    first = np.maximum(0, -(-(starts + 1 - windows.max_length) // step))
    last = np.minimum(len(first_steps) - 1, np.maximum(0, starts + counts - 2) // step)
    # Minimum over each range first..last. reduceat wants ascending pairs: every other result is the range asked for.
    padded = np.append(first_steps, NEVER)
    bounds = np.stack((first, last + 1), axis=1).ravel()
    return np.minimum.reduceat(padded, bounds)[::2]


def write_document_steps(
    path: Path,
    data_dir: Path,
    manifest: DatasetManifest,
    parts: Parts | None,
    windows: Windows,
    order: WindowOrder,
    config: TrainConfig,
) -> str:
    """Writes (document_id, first_step) for each training document that the run reads by its last step.

    Returns:
        The file's SHA-256.
    """
    tables = []
    for part, (ids, counts) in enumerate(kept_documents(data_dir, manifest, "train", parts)):
        if not windows.sizes[part]:
            continue
        steps = first_step_of_documents(counts, first_step_of_windows(order, part, config), windows)
        seen = steps != NEVER
        tables.append(pa.table({"document_id": ids.filter(pa.array(seen)), "first_step": steps[seen]}))
    with atomic_writer(path) as file:
        file.write(parquet_bytes(pa.concat_tables(tables)))
        return file.sha256()
