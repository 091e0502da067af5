"""Whether a GGUF is the checkpoint that it was made from."""
