"""Token shards on disk and the windows cut from them; the order in which a run reads them."""

from llm_core.dataset.build import DatasetBuild, build_dataset
from llm_core.dataset.groups import ALL, DocumentGroups, Numbers, groups_by_source, kept_documents, known_first, token_slices
from llm_core.dataset.manifest import DatasetManifest, DatasetVersion, TokenizerEntry, load_manifest
from llm_core.dataset.sampler import SHARE_UNITS, Indices, WindowSampler, rank_micro_batches

# Modules that need PyTorch are entered by name: windows.
__all__ = [
    "ALL", "SHARE_UNITS", "DatasetBuild", "DatasetManifest", "DatasetVersion", "DocumentGroups", "Indices", "Numbers",
    "TokenizerEntry", "WindowSampler", "build_dataset", "groups_by_source", "kept_documents", "known_first", "load_manifest",
    "rank_micro_batches", "token_slices", "windows",
]  # fmt: skip
