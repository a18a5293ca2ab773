"""What a run reads: the windows of both splits, their order, and what they come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_core.config import TrainConfig
from llm_core.dataset import Windows
from llm_core.evaluate import token_bytes
from llm_core.identity import run_id
from llm_core.mixture import final_shares, plan_mixture
from llm_core.order import WindowOrder
from llm_core.parent import DOCUMENT_STEPS, Parent, write_known_documents
from llm_core.parts import Parts
from llm_core.shards import DatasetManifest, TokenizerEntry
from llm_core.tokenizer import Tokenizer
from llm_core.usage import write_document_steps


@dataclass(frozen=True)
class TrainingData:
    """The data of one run; `open` is how it is made."""

    manifest: DatasetManifest
    train: Windows
    val: Windows
    order: WindowOrder
    parts: Parts | None  # of the training text; None: all of it is alike
    parent: Parent | None  # where the weights come from
    token_bytes: Tensor  # (V,) fp64, UTF-8 bytes of each token, 0 for special tokens

    @classmethod
    def open(cls, data_dir: Path, manifest: DatasetManifest, config: TrainConfig, parent: Parent | None) -> "TrainingData":
        """Opens both splits as a resolved configuration wants them. Validation windows never overlap.

        Raises:
            UserError: the options do not go together with this text or this parent.
            DataError: a shard or the tokenizer is missing or damaged.
        """
        assert config.max_length is not None and config.stride is not None
        mixture = plan_mixture(config, data_dir, manifest, parent.known if parent is not None else None)
        parts = mixture.parts if mixture is not None else None
        train = Windows.open(data_dir, manifest, "train", config.max_length, config.stride, parts)
        order = WindowOrder(train.sizes, config.seed)
        if mixture is not None:
            windows = config.max_steps * config.batch_size
            order = WindowOrder(train.sizes, config.seed, final_shares(mixture, train.sizes, windows, config.max_source_epochs))
        tokenizer = Tokenizer.stored(data_dir, manifest.tokenizer.tokenizer_id)
        return cls(
            manifest=manifest,
            train=train,
            val=Windows.open(data_dir, manifest, "val", config.max_length, 0),
            order=order,
            parts=parts,
            parent=parent,
            token_bytes=token_bytes(tokenizer, manifest),
        )

    @property
    def tokenizer(self) -> TokenizerEntry:
        return self.manifest.tokenizer

    @property
    def parent_checkpoint_id(self) -> str | None:
        return self.parent.checkpoint_id if self.parent is not None else None

    def run_id(self, config: TrainConfig) -> str:
        return run_id(self.manifest, config, self.parent_checkpoint_id)

    def mixture(self, config: TrainConfig) -> list[dict[str, Any]]:
        """What the run reads of each part: its windows, how many of them are read in all, and how often each one."""
        read = self.order.windows_read(config.max_steps * config.batch_size)
        names = self.parts.names if self.parts is not None else ["all"]
        return [
            {"part": name, "windows": size, "windows_read": count, "share": count / sum(read), "epochs": count / max(1, size)}
            for name, size, count in zip(names, self.train.sizes, read, strict=True)
        ]

    def write_usage(self, run_dir: Path, data_dir: Path, config: TrainConfig) -> dict[str, str | None]:
        """Writes which documents the run reads when, and which ones its parents have seen, where that is known.

        Returns:
            The SHA-256 of both files, None for the one that is not written.
        """
        steps = write_document_steps(
            run_dir / DOCUMENT_STEPS, data_dir, self.manifest, self.parts, self.train, self.order, config
        )
        known = None
        if self.parent is not None and self.parent.known is not None:
            known = write_known_documents(run_dir, self.parent.known)
        return {"document_steps_sha256": steps, "known_documents_sha256": known}
