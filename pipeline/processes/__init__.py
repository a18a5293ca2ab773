"""Child processes: torchrun, its ranks, and llm_core's tools."""
