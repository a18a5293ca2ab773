"""The tokenizers of a folder of prepared data: trained once per configuration, and kept.

tokenizers/<tokenizer_id>.json         every tokenizer, in Hugging Face's format
tokenizers/<tokenizer_id>.report.json  its training text, and how well it compresses
tokenizers/<tokenizer_id>.tried.json   how it does on newer text, see `drift`
tokenizers/frozen.json                 the tokenizer that each configuration keeps
tokenizer.json                         a copy of the current one; written last
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm_core.config import TokenizerConfig
from llm_core.corpus import InputDir, Snapshot, iter_texts, load_snapshot
from llm_core.errors import DataError
from llm_core.layout import PreparedData
from llm_core.system import ID_LENGTH, content_id, read_json, sha256_file, write_json
from llm_core.tokenizer.coverage import require_coverage
from llm_core.tokenizer.drift import DriftReport, measure_drift
from llm_core.tokenizer.report import TokenizerReport, measure_compression, read_report
from llm_core.tokenizer.tokenizer import Tokenizer
from llm_core.tokenizer.training import Texts, check_tokenizer, train_tokenizer

# Text that a tokenizer's report is measured on.
_MEASURED_BYTES = 16 << 20


@dataclass(frozen=True)
class TokenizerArtifact:
    """A tokenizer in the store."""

    tokenizer: Tokenizer
    report: TokenizerReport
    sha256: str
    reused: bool
    drift_report: DriftReport = field(default_factory=DriftReport)  # on the current text, by `prepare_tokenizer`
    replaced_drift: float | None = None  # of the tokenizer that this one replaces
    text_gone: bool = False  # it replaces one because none of the text that that one was trained on remains

    @property
    def tokenizer_id(self) -> str:
        return self.tokenizer.tokenizer_id

    @property
    def file(self) -> str:
        """Path relative to the folder of prepared data."""
        return PreparedData(Path()).tokenizer_file(self.tokenizer_id).as_posix()


def prepare_tokenizer(snapshot: Snapshot, input_dir: InputDir, data_dir: Path, config: TokenizerConfig) -> TokenizerArtifact:
    """The tokenizer for a snapshot, trained only if there is none yet.

    A configuration keeps its tokenizer, whatever text arrives: a new one makes tokens and trained models incomparable. A new one
    is trained when the configuration changed, with `retrain_tokenizer`, when the drift is above `retrain_on_drift`, or when none
    of the text that it was trained on remains.

    Raises:
        UserError: the configuration does not fit the text, or loses too much of it.
        DataError: the tokenizer of this configuration, tokenizer.json or frozen.json is damaged, or the text changed since the
            snapshot.
    """
    folder, identity = PreparedData(data_dir), tokenizer_identity(config)
    sample = cache(lambda: _training_sample(snapshot, config))  # drawn only if it is needed

    def texts() -> Iterator[str]:
        return iter_texts(input_dir, sample(), snapshot.config)

    replaced_drift, text_gone = None, False
    for kept, report in _reusable(folder, snapshot, config, identity):
        if _is_text_gone(report, snapshot, data_dir, config):
            text_gone = True
            continue
        drift_report = measure_drift(kept, report, snapshot, input_dir, data_dir)
        if config.retrain_on_drift is None or (drift_report.drift or 0.0) <= config.retrain_on_drift:
            require_coverage(drift_report.coverage, config, texts, snapshot, input_dir)
            _freeze(folder, identity, kept.tokenizer_id)
            return TokenizerArtifact(kept, report, report["sha256"], reused=True, drift_report=drift_report)
        replaced_drift = drift_report.drift
    tokenizer, report = _train(snapshot, input_dir, config, identity, sample(), texts)
    drift_report = measure_drift(tokenizer, report, snapshot, input_dir, data_dir)
    require_coverage(drift_report.coverage, config, texts, snapshot, input_dir)
    tokenizer.save(folder.tokenizer_file(tokenizer.tokenizer_id))
    write_json(folder.tokenizer_report(tokenizer.tokenizer_id), report)
    _freeze(folder, identity, tokenizer.tokenizer_id)
    tokenizer.save(folder.tokenizer)
    return TokenizerArtifact(
        tokenizer,
        report,
        report["sha256"],
        reused=False,
        drift_report=drift_report,
        replaced_drift=replaced_drift,
        text_gone=text_gone,
    )


def _reusable(
    folder: PreparedData, snapshot: Snapshot, config: TokenizerConfig, identity: dict[str, Any]
) -> Iterator[tuple[Tokenizer, TokenizerReport]]:
    """Tokenizers of this configuration with their reports: the frozen one first, then those trained on this snapshot."""
    current = folder.tokenizer
    current_id = sha256_file(current)[:ID_LENGTH] if current.is_file() else None
    if current_id and not config.retrain_tokenizer and not folder.tokenizer_report(current_id).is_file():
        if folder.tokenizer_file(current_id).is_file():
            raise DataError(
                f"{folder.tokenizer_report(current_id)}: missing; restore it, or train a tokenizer with --retrain_tokenizer,"
                " which on the same text gives the same one"
            )
        raise DataError(
            f"{current}: damaged, or not made by textmill; replace it with the right one of {folder.frozen_tokenizers.parent}, or"
            " train a new one with --retrain_tokenizer"
        )
    frozen_id = _frozen(folder).get(content_id(identity), current_id)
    frozen_report = folder.tokenizer_report(frozen_id) if frozen_id else None
    for path in sorted(folder.tokenizer_reports(), key=lambda path: (path != frozen_report, path)):
        report = cast(TokenizerReport, read_json(path))
        frozen = report["tokenizer_id"] == frozen_id and not config.retrain_tokenizer
        # Training again on the same text would give the same bytes.
        if report["config"] == identity and (frozen or report["snapshot_id"] == snapshot.snapshot_id):
            copies = (folder.tokenizer_file(report["tokenizer_id"]), current)
            if kept := _load_and_repair(copies, report["sha256"]):
                yield kept, report
            elif frozen:
                raise DataError(
                    f"{copies[0]}: missing or damaged, and there is no intact copy; restore it, or train a new tokenizer with"
                    " --retrain_tokenizer; existing models cannot read its tokens"
                )


def _train(
    snapshot: Snapshot, input_dir: InputDir, config: TokenizerConfig, identity: dict[str, Any], sample: pa.Table, texts: Texts
) -> tuple[Tokenizer, TokenizerReport]:
    """Trains a tokenizer on the texts of a sample and measures it; writes nothing."""
    documents = snapshot.kept_documents()
    whole = sample.num_rows == pc.sum(pc.equal(documents["split"], "train")).as_py()
    more_text = "add text to --input_dir" if whole else "raise --tokenizer_train_bytes"
    tokenizer = train_tokenizer(texts, config, more_text)
    measured = _sample(documents, _MEASURED_BYTES, config.tokenizer_seed)
    compression, sources = measure_compression(tokenizer, measured, iter_texts(input_dir, measured, snapshot.config))
    report: TokenizerReport = {
        "tokenizer_id": tokenizer.tokenizer_id,
        "tokenizer_type": tokenizer.tokenizer_type,
        "vocab_size": tokenizer.vocab_size,
        "sha256": hashlib.sha256(tokenizer.serialized).hexdigest(),
        "config": identity,
        "snapshot_id": snapshot.snapshot_id,
        "train_bytes": 0 if config.tokenizer_type == "tiktoken" else pc.sum(sample["bytes"]).as_py(),
        **compression,
        "sources": sources,
    }
    return tokenizer, report


def _training_sample(snapshot: Snapshot, config: TokenizerConfig) -> pa.Table:
    """The documents of a snapshot that a tokenizer is trained on."""
    documents = snapshot.kept_documents()
    train = documents.filter(pc.equal(documents["split"], "train"))
    return _sample(train, config.tokenizer_train_bytes, config.tokenizer_seed)


def _is_text_gone(report: TokenizerReport, snapshot: Snapshot, data_dir: Path, config: TokenizerConfig) -> bool:
    """Whether a snapshot has nothing of the text that a tokenizer was trained on; False if that text is not known."""
    if config.tokenizer_type == "tiktoken" or report["snapshot_id"] == snapshot.snapshot_id:
        return False
    try:
        earlier = load_snapshot(data_dir, report["snapshot_id"])
    except DataError:  # removed, or of an older version
        return False
    trained = _training_sample(earlier, config)
    if _overlap(trained["document_id"], snapshot.kept_documents()["document_id"]):
        return False
    # The same files can be cut into other documents now.
    paths = earlier.files["path"].cast(pa.large_string())
    files = earlier.files.filter(pc.is_in(paths, value_set=trained["path"].cast(pa.large_string())))
    return not _overlap(files["sha256"], snapshot.files.filter(pc.greater(snapshot.files["documents"], 0))["sha256"])


def _overlap(values: pa.ChunkedArray, others: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.is_in(values, value_set=others)).as_py())


def _frozen(folder: PreparedData) -> dict[str, str]:
    """The id of the tokenizer that each configuration keeps, by the hash of the configuration."""
    return read_json(folder.frozen_tokenizers) if folder.frozen_tokenizers.is_file() else {}


def _freeze(folder: PreparedData, identity: dict[str, Any], tokenizer_id: str) -> None:
    frozen, config_id = _frozen(folder), content_id(identity)
    if frozen.get(config_id) != tokenizer_id:
        write_json(folder.frozen_tokenizers, frozen | {config_id: tokenizer_id})


def load_tokenizer(data_dir: Path, tokenizer_id: str | None = None) -> TokenizerArtifact:
    """The current tokenizer, or another one by its id.

    Raises:
        DataError: it is missing or damaged.
    """
    if tokenizer_id is not None:
        tokenizer = Tokenizer.stored(data_dir, tokenizer_id)
    else:
        tokenizer = Tokenizer.load(PreparedData(data_dir).tokenizer)
    report = read_report(data_dir, tokenizer.tokenizer_id)
    return TokenizerArtifact(tokenizer, report, report["sha256"], reused=True)


def _load_and_repair(copies: tuple[Path, Path], sha256: str) -> Tokenizer | None:
    """Loads an intact copy and restores the other from it; None if both are lost."""
    intact = [path for path in copies if path.is_file() and sha256_file(path) == sha256]
    if not intact:
        return None
    tokenizer = Tokenizer.load(intact[0])
    for path in copies:
        if path not in intact:
            tokenizer.save(path)
    return tokenizer


def tokenizer_identity(config: TokenizerConfig) -> dict[str, Any]:
    """The fields that determine a tokenizer of the chosen type; a ranks file counts by its content.

    Raises:
        UserError: the configuration is wrong, see `check_tokenizer`.
    """
    check_tokenizer(config)
    identity = config.identity()
    ranks_path = identity.pop("tiktoken_ranks")
    if config.tokenizer_type == "tiktoken":
        for name in ("vocab_size", "tokenizer_train_bytes", "tokenizer_seed"):
            del identity[name]
        if ranks_path is not None:
            identity["tiktoken_ranks_sha256"] = sha256_file(Path(ranks_path))
    else:
        del identity["tiktoken_encoding"]
    return identity


def _sample(documents: pa.Table, max_bytes: int, seed: int) -> pa.Table:
    """A random sample of documents of at most `max_bytes` in total (at least one), in their own order."""
    sizes = documents["bytes"].to_numpy()
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    count = max(1, int(np.searchsorted(np.cumsum(sizes[drawn]), max_bytes, side="right")))
    return documents.take(np.sort(drawn[:count]))
