"""A folder of text files becomes documents: `readers` knows formats, `snapshot` knows what the folder held at one moment."""

from llm_core.corpus.folder import READABLE
from llm_core.corpus.readers import iter_texts
from llm_core.corpus.snapshot import Snapshot, load_snapshot, take_snapshot

__all__ = ["READABLE", "Snapshot", "iter_texts", "load_snapshot", "take_snapshot"]
