"""Quantization types, plans and what a GGUF holds."""
