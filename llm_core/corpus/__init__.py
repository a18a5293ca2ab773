"""A folder of text becomes documents: input folders, readers of each format, filters, deduplication, snapshots."""

from llm_core.corpus.input_folder import InputDir, is_url, open_input_folder
from llm_core.corpus.readers import iter_texts
from llm_core.corpus.sample_corpus import has_earlier_text, write_sample_corpus
from llm_core.corpus.snapshot import Snapshot, load_scan, load_snapshot, read_summary, take_snapshot
from llm_core.corpus.summary import LISTED_QUARANTINES, WARN_DROPPED, QuarantineEntry, drop_warning, dropped_text, skipped_entries
from llm_core.corpus.types import READABLE, source_of, text_of

__all__ = [
    "LISTED_QUARANTINES", "READABLE", "WARN_DROPPED", "InputDir", "QuarantineEntry", "Snapshot", "drop_warning", "dropped_text",
    "has_earlier_text", "is_url", "iter_texts", "load_scan", "load_snapshot", "open_input_folder", "read_summary",
    "skipped_entries", "source_of", "take_snapshot", "text_of", "write_sample_corpus",
]  # fmt: skip
