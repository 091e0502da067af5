"""Measuring: texts, and llama-perplexity's own number."""
