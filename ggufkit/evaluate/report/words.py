"""Numbers and names, as people read them."""

import os
import re
from collections.abc import Sequence
from itertools import takewhile
from math import expm1, floor, log10
from pathlib import Path


def size(nbytes: float) -> str:
    """A size in binary units, three digits or so."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return (
                f"{nbytes:.0f} {unit}" if nbytes >= 100 or unit == "B" else f"{nbytes:.1f} {unit}"
            )
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def figures(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, and no exponent where none is needed."""
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return f"{value:.1e}"
    text = f"{value:.{digits}g}"
    if "e" in text:
        return f"{value:.1e}" if abs(value) < 1 else f"{value:.0f}"
    # %g drops zeros that say how exact the number is: 0.010 is not 0.01.
    whole = len(text.lstrip("-").replace(".", "").lstrip("0"))
    if whole < digits and abs(value) < 10 ** (digits - 1):
        text += ("" if "." in text else ".") + "0" * (digits - whole)
    return text


def with_error(value: float, error: float) -> str:
    """A figure and its standard error, both as exact as the error lets them be."""
    if not 0 < error < float("inf") or abs(value) < 1e-5:
        return f"{figures(value)} ± {figures(error, 2)}"
    decimals = max(0, -floor(log10(error)) + (error * 10 ** -floor(log10(error)) < 2))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def change(log_ratio: float) -> str:
    """A difference of log perplexities as a signed percentage of perplexity."""
    value = 100 * expm1(log_ratio)
    digits = 1 if abs(value) >= 0.95 else 2
    # What rounds to nothing has no sign worth showing.
    return f"{value:+.{digits}f} %" if round(value, digits) else f"{0:.{digits}f} %"


def moment(created: str) -> str:
    """An ISO 8601 time, without what nobody reads."""
    return created[:16].replace("T", " ") + " UTC" if created else ""


def short_text(name: str) -> str:
    """A text's name: of a file, only the file's name."""
    return Path(name).name if os.sep in name else name


def printable(text: str) -> str:
    """Text without characters that break lines, files or terminals."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shortened(text: str, most: int = 26) -> str:
    """A label of at most so many characters: of a long one, both ends."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def labels(names: Sequence[str]) -> list[str]:
    """What tells names from each other: they lose what all of them begin with."""
    if len(set(names)) < 2:
        return [_type_at_the_end(name) for name in names]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    cut = max(common.rfind(mark) for mark in "-. ") + 1
    return [name[cut:] or name for name in names]


_TYPE = re.compile(r"[-.](I?Q\d\w*|TQ\d\w*|BF16|F16|F32|(?:MX|NV)FP4)$", re.IGNORECASE)


def _type_at_the_end(name: str) -> str:
    found = _TYPE.search(name)
    return found[1] if found else name


def without_type(name: str) -> str:
    """A file's name without the quantization type at its end."""
    return _TYPE.sub("", name) or name
