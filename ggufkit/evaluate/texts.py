"""The name under which other programs import :func:`load_text`; see :mod:`ggufkit.texts.load`."""

from ggufkit.texts.load import load_text

__all__ = ["load_text"]
