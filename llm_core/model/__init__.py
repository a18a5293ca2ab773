"""The transformer, its kernels, loss and precision, and text generation."""

# Modules that need PyTorch are entered by name: attention, generation, loss, precision, transformer.
__all__ = ["attention", "generation", "loss", "precision", "transformer"]
