"""The tokenizers of a folder of prepared data: made once for a configuration, and kept.

tokenizers/<tokenizer_id>.json         every tokenizer made, in Hugging Face's format
tokenizers/<tokenizer_id>.report.json  what it was made from and how well it compresses
tokenizers/<tokenizer_id>.tried.json   how it does on text that came later, see `tokenizer_trial`
tokenizers/frozen.json                 for each configuration the tokenizer that it means here
tokenizer.json                         a copy of the current one; written last
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llm_core.config import TokenizerConfig
from llm_core.corpus import InputDir, Snapshot, iter_texts, source_of
from llm_core.errors import DataError, UserError
from llm_core.files import ID_LENGTH, content_id, read_json, sha256_file, write_json
from llm_core.tokenizer import Ids, Tokenizer
from llm_core.tokenizer_training import train_tokenizer
from llm_core.tokenizer_trial import UNTRIED, Trial, try_out

_MEASURED_BYTES = 16 << 20
_LISTED_SOURCES = 50


@dataclass(frozen=True)
class TokenizerArtifact:
    """A tokenizer in the store."""

    tokenizer: Tokenizer
    report: dict[str, Any]
    sha256: str
    reused: bool
    trial: Trial = UNTRIED  # on the present text, by `prepare_tokenizer`
    replaced_drift: float | None = None  # of the tokenizer that this one was trained to replace

    @property
    def tokenizer_id(self) -> str:
        return self.tokenizer.tokenizer_id

    @property
    def file(self) -> str:
        """Path relative to the processed directory."""
        return f"tokenizers/{self.tokenizer_id}.json"


def prepare_tokenizer(snapshot: Snapshot, input_dir: InputDir, processed_dir: Path, config: TokenizerConfig) -> TokenizerArtifact:
    """The tokenizer for a snapshot, made only if there is none yet.

    The tokenizer of a configuration is frozen: it stays, whatever text arrives and whatever else is made meanwhile, because a new
    one makes every token and every trained model incomparable. A changed configuration, `retrain_tokenizer` or a drift beyond
    `retrain_on_drift` makes a new one.

    Raises:
        UserError: the configuration does not fit the text.
        DataError: the tokenizer of this configuration, tokenizer.json or frozen.json is damaged, or the text changed since the
            snapshot.
    """
    identity = tokenizer_identity(config)
    current = processed_dir / "tokenizer.json"
    current_id = sha256_file(current)[:ID_LENGTH] if current.is_file() else None
    store = processed_dir / "tokenizers"
    if current_id and not config.retrain_tokenizer and not (store / f"{current_id}.report.json").is_file():
        raise DataError(
            f"{current}: not a tokenizer made here, or damaged; copy the right one over it from {store}, or make a new one"
            " with --retrain_tokenizer"
        )
    replaced_drift = None
    config_id, frozen_ids = content_id(identity), _frozen(store)
    frozen_id = frozen_ids.get(config_id, current_id)
    # The frozen one first: it stays even if another of the same configuration was made from just this text.
    for report_path in sorted(store.glob("*.report.json"), key=lambda path: (path.name != f"{frozen_id}.report.json", path)):
        report = read_json(report_path)
        frozen = report["tokenizer_id"] == frozen_id and not config.retrain_tokenizer
        # Training again on the same text could only give the same bytes.
        if report["config"] == identity and (frozen or report["snapshot_id"] == snapshot.snapshot_id):
            copies = (store / f"{report['tokenizer_id']}.json", current)
            if kept := _load_and_mend(copies, report["sha256"]):
                trial = try_out(kept, report, snapshot, input_dir, processed_dir)
                if config.retrain_on_drift is not None and (trial.drift or 0.0) > config.retrain_on_drift:
                    replaced_drift = trial.drift
                    continue
                _freeze(store, frozen_ids, config_id, kept.tokenizer_id)
                return TokenizerArtifact(kept, report, report["sha256"], reused=True, trial=trial)
            if frozen:
                raise DataError(
                    f"{copies[0]}: missing or damaged, and no copy of it is whole; restore it, or make a new tokenizer with"
                    " --retrain_tokenizer, which no present model can read"
                )

    documents = snapshot.kept_documents()
    train = documents.filter(pa.compute.equal(documents["split"], "train"))
    sample = _sample(train, config.tokenizer_train_bytes, config.tokenizer_seed)
    tokenizer = train_tokenizer(lambda: iter_texts(input_dir, sample, snapshot.config), config)
    path = store / f"{tokenizer.tokenizer_id}.json"
    tokenizer.save(path)
    measured = _sample(documents, _MEASURED_BYTES, config.tokenizer_seed)
    report = {
        "tokenizer_id": tokenizer.tokenizer_id,
        "tokenizer_type": tokenizer.tokenizer_type,
        "vocab_size": tokenizer.vocab_size,
        "sha256": sha256_file(path),
        "config": identity,
        "snapshot_id": snapshot.snapshot_id,
        "train_bytes": 0 if config.tokenizer_type == "tiktoken" else pa.compute.sum(sample["bytes"]).as_py(),
        **_measure(tokenizer, measured, iter_texts(input_dir, measured, snapshot.config)),
    }
    write_json(store / f"{tokenizer.tokenizer_id}.report.json", report)
    _freeze(store, frozen_ids, config_id, tokenizer.tokenizer_id)
    tokenizer.save(current)
    trial = try_out(tokenizer, report, snapshot, input_dir, processed_dir)
    return TokenizerArtifact(tokenizer, report, report["sha256"], reused=False, trial=trial, replaced_drift=replaced_drift)


def _frozen(store: Path) -> dict[str, str]:
    """The id of the tokenizer that each configuration means, by the configuration's own id."""
    return read_json(store / "frozen.json") if (store / "frozen.json").is_file() else {}


def _freeze(store: Path, frozen_ids: dict[str, str], config_id: str, tokenizer_id: str) -> None:
    if frozen_ids.get(config_id) != tokenizer_id:
        write_json(store / "frozen.json", frozen_ids | {config_id: tokenizer_id})


def load_tokenizer(processed_dir: Path, tokenizer_id: str | None = None) -> TokenizerArtifact:
    """The current tokenizer, or another one by its id.

    Raises:
        DataError: there is none yet, or it is damaged.
    """
    if tokenizer_id is None:
        tokenizer = Tokenizer.load(processed_dir / "tokenizer.json")
    else:
        tokenizer = Tokenizer.stored(processed_dir, tokenizer_id)
    report = read_json(processed_dir / "tokenizers" / f"{tokenizer.tokenizer_id}.report.json")
    return TokenizerArtifact(tokenizer, report, report["sha256"], reused=True)


def _load_and_mend(copies: tuple[Path, Path], sha256: str) -> Tokenizer | None:
    """Loads an intact copy and makes the other one like it; None if both are lost."""
    intact = [path for path in copies if path.is_file() and sha256_file(path) == sha256]
    if not intact:
        return None
    tokenizer = Tokenizer.load(intact[0])
    for path in copies:
        if path not in intact:
            tokenizer.save(path)
    return tokenizer


def tokenizer_identity(config: TokenizerConfig) -> dict[str, Any]:
    """The fields that decide the tokenizer of the chosen type; a ranks file enters by content.

    Raises:
        UserError: there is no such ranks file.
    """
    identity = config.identity()
    ranks_path = identity.pop("tiktoken_ranks")
    if config.tokenizer_type == "tiktoken":
        for name in ("vocab_size", "tokenizer_train_bytes", "tokenizer_seed"):
            del identity[name]
        if ranks_path is not None:
            if not Path(ranks_path).is_file():
                raise UserError(f"--tiktoken_ranks {ranks_path}: no such file; give the path of a .tiktoken file")
            identity["tiktoken_ranks_sha256"] = sha256_file(Path(ranks_path))
    else:
        del identity["tiktoken_encoding"]
    return identity


def _sample(documents: pa.Table, max_bytes: int, seed: int) -> pa.Table:
    """Documents of at most `max_bytes` in all (at least one), drawn by `seed`, in their own order."""
    sizes = documents["bytes"].to_numpy()
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    count = max(1, int(np.searchsorted(np.cumsum(sizes[drawn]), max_bytes, side="right")))
    return documents.take(np.sort(drawn[:count]))


class _Measure:
    """Counts of a tokenizer at work on some texts."""

    def __init__(self, vocab_size: int) -> None:
        self.used = np.zeros(vocab_size, dtype=bool)
        self.bytes = self.words = self.tokens = 0

    def add(self, text: str, ids: Ids) -> None:
        self.used[ids] = True
        self.bytes += len(text.encode())
        self.words += len(text.split())
        self.tokens += len(ids)

    def report(self) -> dict[str, Any]:
        """More bytes per token and fewer tokens per word are better."""
        return {
            "measured_bytes": self.bytes,
            "bytes_per_token": self.bytes / max(1, self.tokens),
            "tokens_per_word": self.tokens / max(1, self.words),
            "vocab_used": float(self.used.mean()),
        }


def _measure(tokenizer: Tokenizer, documents: pa.Table, texts: Iterator[str]) -> dict[str, Any]:
    """How the tokenizer does on real text, in all and for each of the largest sources."""
    total, by_source = _Measure(tokenizer.vocab_size), dict[str, _Measure]()
    for path, text in zip(documents["path"].to_pylist(), texts, strict=True):
        ids = tokenizer.encode(text)
        total.add(text, ids)
        by_source.setdefault(source_of(path), _Measure(tokenizer.vocab_size)).add(text, ids)
    largest = sorted(by_source.items(), key=lambda item: (-item[1].bytes, item[0]))[:_LISTED_SOURCES]
    return total.report() | {"sources": [{"source": name} | measure.report() for name, measure in largest]}
