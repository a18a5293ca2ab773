"""Models as Hugging Face directories: Llama weights and configuration, the model card, textmill.json."""

from llm_core.huggingface.record import ModelRecord, is_intact

# Modules that need PyTorch are entered by name: directory, llama.
__all__ = ["ModelRecord", "directory", "is_intact", "llama"]
