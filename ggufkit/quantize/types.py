"""The quantization types that llama-quantize knows, by name.

The names are those of the pinned llama-quantize; a test holds the table
against what the tool itself prints.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from ggufkit.errors import GgufkitError, UsageError

FLOAT_TYPES = ("F32", "F16", "BF16")

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

TYPES = (
    *("Q1_0", "Q2_0", "Q4_0", "Q4_1", "MXFP4_MOE", "Q5_0", "Q5_1", "Q8_0"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"),
    *("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_S", "IQ3_M", "IQ3_XS"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_NL", "IQ4_XS"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *FLOAT_TYPES,
    "COPY",
)


NEED_IMATRIX = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"),
    *("Q2_K_S", "IQ3_XXS", "IQ3_XS"),
)
"""Types that llama-quantize makes with an importance matrix alone."""
_SUPER_BLOCK = 256
"""Weights of a super-block (``QK_K``); rows that these cannot fill get other types."""


def require_importance(type: str, columns: Iterable[int]) -> None:
    """Refuse a type that needs an importance matrix, where there is none.

    Args:
        type: the quantization type.
        columns: lengths of the rows of the linear maps in the model's blocks. If
            super-blocks fit none of them, every tensor falls back to another type.

    Raises:
        GgufkitError: if llama-quantize would refuse it.
    """
    if type in NEED_IMATRIX and any(count % _SUPER_BLOCK == 0 for count in columns):
        raise GgufkitError(
            f"{type} needs an importance matrix",
            "Add --imatrix auto (with a checkpoint), name one that llama-imatrix made with "
            "--imatrix FILE, or take a larger type such as q3_k_s",
        )


def parse_type(name: str) -> str:
    """The canonical name of a quantization type, whatever its case.

    Raises:
        UsageError: if there is no such type; suggests the nearest.
    """
    upper = name.strip().upper().replace("-", "_")
    upper = ALIASES.get(upper, upper)
    if upper in TYPES:
        return upper
    near = get_close_matches(upper, (*TYPES, *ALIASES), 1, cutoff=0.5)
    known = f"Known types: {', '.join(TYPES)}"
    raise UsageError(
        f"there is no quantization type '{name}'",
        f"Did you mean {near[0].lower()}? {known}" if near else known,
    )


def is_float(type: str) -> bool:
    """Whether a type rounds to floats, so that scales cannot help it."""
    return type in (*FLOAT_TYPES, "COPY")


def stem_of(gguf: Path) -> str:
    """A GGUF's file name without its type, such as ``model`` of ``model-F16.gguf``."""
    types = "|".join(sorted((*TYPES, *ALIASES), key=len, reverse=True))
    return re.sub(rf"[-._]({types})$", "", gguf.stem, flags=re.IGNORECASE) or gguf.stem


def space_forecast(parameters: int, types: Iterable[str]) -> int:
    """Bytes that files of these types will take at most, with fallbacks and metadata."""
    return sum(int(parameters * _forecast_bits(t) / 8) + (16 << 20) for t in types)


def _forecast_bits(type: str) -> float:
    if type in FLOAT_TYPES or type == "COPY":
        return 16 if "16" in type else 32
    # A mixture or a fallback costs up to two bits more than its name says.
    digits = re.search(r"\d", type)
    return (int(digits[0]) if digits else 8) + 2
