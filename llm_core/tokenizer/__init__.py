"""Text to token ids and back: training, the store that keeps tokenizers, drift, encoding on many workers."""

from llm_core.tokenizer.coverage import WARN_UNKNOWN
from llm_core.tokenizer.drift import MAX_DRIFT, measure_drift
from llm_core.tokenizer.parallel import check_engine, encode_all
from llm_core.tokenizer.report import TokenizerReport, read_report
from llm_core.tokenizer.store import TokenizerArtifact, load_tokenizer, prepare_tokenizer
from llm_core.tokenizer.tokenizer import Ids, Tokenizer, with_known_pattern
from llm_core.tokenizer.training import check_tokenizer

__all__ = [
    "MAX_DRIFT", "WARN_UNKNOWN", "Ids", "Tokenizer", "TokenizerArtifact", "TokenizerReport", "check_engine", "check_tokenizer",
    "encode_all", "load_tokenizer", "measure_drift", "prepare_tokenizer", "read_report", "with_known_pattern",
]  # fmt: skip
