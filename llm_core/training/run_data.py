"""The data of a run: the windows of both splits, their order, and the step that first reads each document."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from llm_core.artifact_ids import run_id
from llm_core.checkpoint import GroupUsage, Parent, write_known_documents
from llm_core.config import ResolvedTrainConfig
from llm_core.dataset import DatasetManifest, DocumentGroups, Indices, TokenizerEntry, WindowSampler, kept_documents
from llm_core.dataset.windows import Windows, require_text, token_bytes
from llm_core.evaluation.excerpts import HeldOutText, choose_windows
from llm_core.layout import RunFolder
from llm_core.system import atomic_writer, parquet_bytes
from llm_core.tokenizer import Tokenizer
from llm_core.training.mixture import final_shares, plan_mixture


@dataclass(frozen=True)
class TrainingData:
    """The data of one run, see `open`."""

    manifest: DatasetManifest
    train: Windows
    val: Windows  # of the text that each validation reads
    order: WindowSampler
    groups: DocumentGroups | None  # of the training text; None without a mixture
    parent: Parent | None  # the run whose weights this one starts from
    token_bytes: Tensor  # (V,) fp64, UTF-8 bytes of each token, 0 for special tokens

    @classmethod
    def open(
        cls,
        data_dir: Path,
        manifest: DatasetManifest,
        config: ResolvedTrainConfig,
        parent: Parent | None,
        validation: Indices | None = None,
    ) -> "TrainingData":
        """Opens both splits. validation: from `validation_windows`, so that all ranks have the same.

        Raises:
            UserError: the options do not fit this text or this parent.
            DataError: a shard or the tokenizer is missing or damaged.
        """
        validation = validation_windows(data_dir, manifest, config) if validation is None else validation
        mixture = plan_mixture(config, data_dir, manifest, parent.known if parent is not None else None)
        groups = mixture.groups if mixture is not None else None
        train = Windows.open(data_dir, manifest, "train", config.max_length, config.stride, groups)
        order = WindowSampler(train.sizes, config.seed)
        if mixture is not None:
            windows = config.max_steps * config.batch_size
            order = WindowSampler(train.sizes, config.seed, final_shares(mixture, train.sizes, windows, config.max_source_epochs))
        tokenizer = Tokenizer.stored(data_dir, manifest.tokenizer.tokenizer_id)
        val = HeldOutText.open(data_dir, manifest, tokenizer, config.max_length, validation).windows()
        sizes = token_bytes(tokenizer, manifest)
        require_text(val, sizes)
        return cls(
            manifest=manifest,
            train=train,
            val=val,
            order=order,
            groups=groups,
            parent=parent,
            token_bytes=sizes,
        )

    @property
    def tokenizer(self) -> TokenizerEntry:
        return self.manifest.tokenizer

    @property
    def parent_checkpoint_id(self) -> str | None:
        return self.parent.checkpoint_id if self.parent is not None else None

    def run_id(self, config: ResolvedTrainConfig) -> str:
        return run_id(self.manifest, config, self.parent_checkpoint_id)

    def mixture(self, config: ResolvedTrainConfig) -> list[GroupUsage]:
        """How much the run reads of each group of documents."""
        read = self.order.windows_read(config.max_steps * config.batch_size)
        names = self.groups.names if self.groups is not None else ["all"]
        return [
            GroupUsage(group=name, windows=size, windows_read=count, share=count / sum(read), epochs=count / max(1, size))
            for name, size, count in zip(names, self.train.sizes, read, strict=True)
        ]

    def write_usage(self, run_dir: Path, data_dir: Path, config: ResolvedTrainConfig) -> dict[str, str | None]:
        """Writes the step that first reads each document, and the documents that the parents have read, if that is known.

        Returns:
            The SHA-256 of both files, None for one that is not written.
        """
        steps = self._write_document_steps(RunFolder(run_dir).document_steps, data_dir, config)
        known = None
        if self.parent is not None and self.parent.known is not None:
            known = write_known_documents(run_dir, self.parent.known)
        return {"document_steps_sha256": steps, "known_documents_sha256": known}

    def _write_document_steps(self, path: Path, data_dir: Path, config: ResolvedTrainConfig) -> str:
        """Writes (document_id, first_step) for each training document that the run reads, and returns the file's SHA-256."""
        tables = []
        for group, (ids, counts) in enumerate(kept_documents(data_dir, self.manifest, "train", self.groups)):
            if not self.train.sizes[group]:
                continue
            steps = first_step_of_documents(counts, first_step_of_windows(self.order, group, config), self.train)
            read = steps != NEVER
            tables.append(pa.table({"document_id": ids.filter(pa.array(read)), "first_step": steps[read]}))
        with atomic_writer(path) as file:
            file.write(parquet_bytes(pa.concat_tables(tables)))
            return file.sha256()


def validation_windows(data_dir: Path, manifest: DatasetManifest, config: ResolvedTrainConfig) -> Indices:
    """The windows of held-out text that each validation of a run reads."""
    return choose_windows(data_dir, manifest, config.max_length, config.eval_tokens)


# The first step of a window or document that the run does not read.
NEVER = np.iinfo(np.int64).max


def first_step_of_windows(order: WindowSampler, group: int, config: ResolvedTrainConfig) -> Indices:
    """(windows of the group,) the 0-based step that first reads each window, or NEVER."""
    steps = order.first_positions(group) // config.batch_size
    return np.where(steps < config.max_steps, steps, NEVER)


def first_step_of_documents(counts: Indices, first_steps: Indices, windows: Windows) -> Indices:
    """(documents,) the first step that has a token of the document as a target, or NEVER.

    counts: (documents,) tokens of each document of a group, in the order of its stream, with the leading end-of-text.
    first_steps: (windows,) see `first_step_of_windows`.
    """
    starts = np.cumsum(counts) - counts
    hop = windows.max_length - windows.stride
    # The targets of window w are at w * hop + 1 to w * hop + max_length. The leading end-of-text does not count.
    first = np.maximum(0, -(-(starts + 1 - windows.max_length) // hop))
    last = np.minimum(len(first_steps) - 1, np.maximum(0, starts + counts - 2) // hop)
    # Minimum over each range first..last: reduceat takes the bounds as pairs, and every other result is one of the ranges.
    padded = np.append(first_steps, NEVER)
    bounds = np.stack((first, last + 1), axis=1).ravel()
    return np.minimum.reduceat(padded, bounds)[::2]
