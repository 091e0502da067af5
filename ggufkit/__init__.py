"""ggufkit: from a checkpoint to a quantized, measured, runnable GGUF."""

__version__ = "0.1.0"
