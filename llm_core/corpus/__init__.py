"""A folder of text becomes documents: `source` knows where it lies, `readers` its formats, `snapshot` what it held then."""

from llm_core.corpus.folder import READABLE, source_of
from llm_core.corpus.readers import iter_texts
from llm_core.corpus.snapshot import Snapshot, load_snapshot, take_snapshot
from llm_core.corpus.source import InputDir, is_url

__all__ = ["READABLE", "InputDir", "Snapshot", "is_url", "iter_texts", "load_snapshot", "source_of", "take_snapshot"]
