"""Ranks: starting and stopping them, communication, DDP and FSDP."""

# Modules that need PyTorch are entered by name: launch, ranks, sharding.
__all__ = ["launch", "ranks", "sharding"]
