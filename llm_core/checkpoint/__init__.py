"""A run folder's records and checkpoints: written whole, verified when read, resumed from, continued from."""

from llm_core.checkpoint.parent import Parent, find_parent, starting_parent, write_known_documents
from llm_core.checkpoint.records import (
    CheckpointRecord,
    GroupUsage,
    RunRecord,
    intact_checkpoints,
    named_checkpoint,
    newest_valid,
    prune_checkpoints,
)

# Modules that need PyTorch are entered by name: async_writer, resume, state.
__all__ = [
    "CheckpointRecord", "GroupUsage", "Parent", "RunRecord", "async_writer", "find_parent", "intact_checkpoints",
    "named_checkpoint", "newest_valid", "prune_checkpoints", "resume", "starting_parent", "state", "write_known_documents",
]  # fmt: skip
