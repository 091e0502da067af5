"""What the native tools print, read without guessing.

Everything here is pure. The patterns follow the pinned llama.cpp:
``src/llama-quant.cpp``, ``tools/perplexity/perplexity.cpp``,
``tools/llama-bench/llama-bench.cpp``, ``conversion/base.py``. A number that is
not where it should be is a :class:`~ggufkit.errors.ToolOutputError`, never a
default.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from ggufkit.errors import ToolOutputError
from ggufkit.llamacpp.blocks import TYPE_SIZES
from ggufkit.values import GGUFFile

_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)"


@dataclass(frozen=True)
class TensorPlan:
    """What llama-quantize does to one tensor.

    Attributes:
        name: of the tensor.
        type: ggml type that it gets, such as ``q6_K``.
        from_type: ggml type that it has.
        shape: in ggml's order, columns first, without trailing ones.
        nbytes: size of its data after.
    """

    name: str
    type: str
    from_type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class QuantizeOutput:
    """What llama-quantize did, or in a dry run would do.

    Attributes:
        tensors: in the order of the file.
        fallbacks: type fallen back to, and how many tensors did.
        fallback_tensors: name to the type that it fell back to.
        types_wanted: name of a tensor that fell back to the type it was to have.
        total_tensors: number of tensors of the file.
        bits_per_weight: of the result, as the tool says (two decimals).
        seconds: wall time.
        peak_rss_nbytes: peak resident memory of the tool.
        without_importance: tensors that the importance matrix had nothing for, or
            something of another size; none without a matrix, and none in a dry run,
            which says nothing of them.
    """

    tensors: tuple[TensorPlan, ...]
    fallbacks: dict[str, int]
    fallback_tensors: dict[str, str]
    types_wanted: dict[str, str]
    total_tensors: int
    bits_per_weight: float
    seconds: float
    peak_rss_nbytes: int
    without_importance: tuple[str, ...] = ()

    def bits_per_weight_asked(self, written: GGUFFile) -> float:
        """Bits per weight if no tensor had fallen back.

        Args:
            written: header of the file that was written.
        """
        bits = sum(
            t.parameters * _bits(self.types_wanted[t.name])
            if t.name in self.types_wanted
            else 8 * t.nbytes
            for t in written.tensors
        )
        return bits / max(1, written.parameters)


@dataclass(frozen=True)
class PerplexityOutput:
    """What llama-perplexity measured.

    Attributes:
        perplexity: the final estimate.
        error: its standard error, same unit.
        tokens: tokens read: chunks times context.
        chunks: number of contexts scored.
        context: tokens per chunk.
        seconds: wall time, loading included.
        peak_rss_nbytes: peak resident memory of the tool.
        chunk_estimates: the perplexity so far after each chunk.
    """

    perplexity: float
    error: float
    tokens: int
    chunks: int
    context: int
    seconds: float
    peak_rss_nbytes: int
    chunk_estimates: tuple[float, ...]


def _bits(type: str) -> float:
    block, nbytes = _type_size(type)
    return 8 * nbytes / block


def _type_size(type: str) -> tuple[int, int]:
    size = TYPE_SIZES.get(type.upper())
    if size is None:
        raise ToolOutputError(f"llama-quantize speaks of a type '{type}' that is not known here")
    return size


# llama-quantize. Warnings and results come on lines of their own:
#   warning: NAME - ncols 576 not divisible by 256 (required for type q4_K) -> falling back to q5_0
#   [  3/ 272] NAME - [ 576, 192, 1, 1], type = f16, converting to q5_0 .. size = 1 MiB -> 1 MiB
#   [  3/ 272] NAME - [ 576, 192, 1, 1], type = f16, size = 1 MiB -> 1 MiB (q5_0)   in a dry run
#   [  1/ 272] NAME - [ 576, 1, 1, 1], type = f32, size = 0.002 MiB                 left alone
_TENSOR = re.compile(
    r"^\[ *(?P<index>\d+)/ *(?P<total>\d+)\] (?P<name>\S+) +- \[(?P<shape>[\d, ]+)\], "
    r"type = +(?P<from_type>\w+), (?P<rest>.*)$"
)
_CONVERTED = re.compile(r"converting to (\w+) \.\. .*size = +[\d.]+ MiB -> +[\d.]+ MiB$")
_PLANNED = re.compile(r"size = +[\d.]+ MiB -> +[\d.]+ MiB \((\w+)\)$")
_LEFT_ALONE = re.compile(r"size = +[\d.]+ MiB$")
_FALLBACK = re.compile(
    r"^warning: (?P<name>\S+) +- ncols .*\(required for type +(?P<wanted>\w+)\)"
    r".*-> falling back to +(?P<got>\w+)$"
)
_FALLBACK_COUNT = re.compile(r"WARNING: (\d+) of (\d+) tensor\(s\) required fallback")
# Put into the middle of a tensor's line when the imatrix has nothing for it.
_INTERJECTION = re.compile(r"\n====== ([^\n]*)\n")
_WITHOUT_IMPORTANCE = re.compile(
    r"(?:did not find weights for|imatrix size \d+ is different from tensor size \d+ for) (\S+)$"
)
_QUANT_SIZE = re.compile(rf"quant size *= *{_NUMBER} MiB \(({_NUMBER}) BPW\)")


def parse_quantize(text: str, *, seconds: float, peak_rss_nbytes: int) -> QuantizeOutput:
    """Read what llama-quantize printed, of a real or a dry run.

    Raises:
        ToolOutputError: if a line cannot be read, a tensor or the result is
            missing, or the fallbacks do not add up to the tool's own count.
    """
    tensors: list[TensorPlan] = []
    wanted: dict[str, str] = {}
    got: dict[str, str] = {}
    total = told_fallbacks = 0
    bits_per_weight = None
    for line in _INTERJECTION.sub("", text).splitlines():
        if found := _FALLBACK.match(line):
            wanted[found["name"]], got[found["name"]] = found["wanted"], found["got"]
        elif "falling back" in line:
            raise ToolOutputError(f"this line of llama-quantize cannot be read: {line}")
        elif re.match(r"\[ *\d+/ *\d+\]", line):
            tensors.append(_tensor_of(line))
            total = _total_of(line)
        elif found := _QUANT_SIZE.search(line):
            bits_per_weight = float(found[1])
        elif found := _FALLBACK_COUNT.search(line):
            told_fallbacks = int(found[1])
    if bits_per_weight is None:
        raise ToolOutputError("llama-quantize printed no 'quant size = ... BPW'")
    if len(tensors) != total:
        raise ToolOutputError(f"llama-quantize listed {len(tensors)} of {total} tensors")
    if told_fallbacks != len(got):
        raise ToolOutputError(
            f"llama-quantize counts {told_fallbacks} tensors that fell back, but named {len(got)}"
        )
    remarks = [_WITHOUT_IMPORTANCE.search(remark) for remark in _INTERJECTION.findall(text)]
    if None in remarks:
        raise ToolOutputError("llama-quantize remarks something that cannot be read here")
    return QuantizeOutput(
        without_importance=tuple(found[1] for found in remarks if found),
        tensors=tuple(tensors),
        fallbacks=dict(Counter(got.values())),
        fallback_tensors=got,
        types_wanted=wanted,
        total_tensors=total,
        bits_per_weight=bits_per_weight,
        seconds=seconds,
        peak_rss_nbytes=peak_rss_nbytes,
    )


def _tensor_of(line: str) -> TensorPlan:
    found = _TENSOR.match(line)
    if not found:
        raise ToolOutputError(f"this line of llama-quantize cannot be read: {line}")
    rest, from_type = found["rest"], found["from_type"]
    if changed := _CONVERTED.search(rest) or _PLANNED.search(rest):
        type = changed[1]
    elif _LEFT_ALONE.search(rest):
        type = from_type
    else:
        raise ToolOutputError(f"this line of llama-quantize cannot be read: {line}")
    shape = [int(n) for n in found["shape"].split(",")]
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    block, nbytes = _type_size(type)
    return TensorPlan(found["name"], type, from_type, tuple(shape), prod(shape) // block * nbytes)


def _total_of(line: str) -> int:
    return int(line.partition("/")[2].partition("]")[0])


class _Lines:
    """Cuts text that comes in pieces into whole lines; a carriage return ends one as well."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[str]:
        """The lines that are whole now."""
        *lines, self._rest = re.split(r"[\r\n]", self._rest + text)
        return lines


class TensorCount:
    """Watches llama-quantize's text as it comes and tells how many tensors are done."""

    def __init__(self, on_total: Callable[[float], None], on_done: Callable[[float], None]) -> None:
        self._on_total = on_total
        self._on_done = on_done
        self._total = 0
        self._lines = _Lines()

    def feed(self, text: str) -> None:
        """Take the next piece of text."""
        for line in self._lines.feed(text):
            if found := _TENSOR.match(line):
                if not self._total:
                    self._total = int(found["total"])
                    self._on_total(self._total)
                self._on_done(int(found["index"]))


# llama-perplexity prints "[1]44.1913,[2]42.3745," with no line end until the last.
_ESTIMATE = re.compile(rf"\[(\d+)\]({_NUMBER}),")
_CHUNKS = re.compile(r"calculating perplexity over (\d+) chunks, n_ctx=(\d+),")
_FINAL = re.compile(rf"Final estimate: PPL = ({_NUMBER}) \+/- ({_NUMBER})")
_NEEDED = re.compile(r"you need at least (\d+) tokens")
_HAVE = re.compile(r"tokenizes to only (\d+) tokens")


class Estimates:
    """Watches llama-perplexity's text as it comes and tells each estimate.

    Attributes:
        chunks: number of chunks, once the tool has said so.
    """

    def __init__(self, on_estimate: Callable[[int, int | None, float], None] | None) -> None:
        self.chunks: int | None = None
        self._on_estimate = on_estimate
        self._rest = ""

    def feed(self, text: str) -> None:
        """Take the next piece of text."""
        self._rest += text
        if self.chunks is None:
            found = _CHUNKS.search(self._rest)
            if not found:
                return
            self.chunks = int(found[1])
            self._rest = self._rest[found.end() :]
        end = 0
        for found in _ESTIMATE.finditer(self._rest):
            end = found.end()
            if self._on_estimate:
                self._on_estimate(int(found[1]), self.chunks, float(found[2]))
        self._rest = self._rest[end:]


def says_estimate(pieces: Sequence[str]) -> bool:
    """Whether llama.cpp's logger got to say llama-perplexity's result."""
    return _FINAL.search("".join(pieces)) is not None


def parse_perplexity(text: str, *, seconds: float, peak_rss_nbytes: int) -> PerplexityOutput:
    """Read what llama-perplexity printed.

    Raises:
        ToolOutputError: if the number of chunks, an estimate or the final
            estimate is missing, or the result is not a finite number.
    """
    plan, final = _CHUNKS.search(text), _FINAL.search(text)
    if not plan:
        raise ToolOutputError("llama-perplexity did not print how many chunks it reads")
    if not final:
        raise ToolOutputError(
            "llama-perplexity printed no 'Final estimate: PPL = ...'",
            "If it came to its end, its logger lost the line: measure again",
        )
    chunks, context = int(plan[1]), int(plan[2])
    perplexity, error = float(final[1]), float(final[2])
    if not (perplexity < float("inf") and error < float("inf")):
        raise ToolOutputError(
            f"llama-perplexity ended with no number: {final[0]}", "The model's weights are broken"
        )
    estimates = {int(n): float(value) for n, value in _ESTIMATE.findall(text[plan.end() :])}
    if sorted(estimates) != list(range(1, chunks + 1)):
        raise ToolOutputError(f"llama-perplexity printed {len(estimates)} of {chunks} estimates")
    return PerplexityOutput(
        perplexity=perplexity,
        error=error,
        tokens=chunks * context,
        chunks=chunks,
        context=context,
        seconds=seconds,
        peak_rss_nbytes=peak_rss_nbytes,
        chunk_estimates=tuple(estimates[n] for n in sorted(estimates)),
    )


def parse_short_text(text: str) -> tuple[int, int] | None:
    """Tokens there are and tokens needed, if llama-perplexity says a text is too short."""
    needed, have = _NEEDED.search(text), _HAVE.search(text)
    return (int(have[1]), int(needed[1])) if needed and have else None


# The converter.


@dataclass(frozen=True)
class Problem:
    """Something that went wrong, in plain words, and what can be done."""

    message: str
    hint: str


def conversion_problem(tail: Sequence[str]) -> Problem | None:
    """A failure of the converter that has a plain explanation, or None."""
    text = "\n".join(tail)
    if found := re.search(r"Model (\S+) is not supported|Architecture '(\S+)' not supported", text):
        return Problem(
            f"llama.cpp at this commit does not know the architecture {found[1] or found[2]}",
            "A newer llama.cpp may: ggufkit build --source DIR",
        )
    if "BPE pre-tokenizer was not recognized" in text:
        return Problem(
            "llama.cpp does not recognise its tokenizer (the way text is split before BPE)",
            "Use the tokenizer files of the model's publisher, unchanged, "
            "or a newer llama.cpp: ggufkit build --source DIR",
        )
    if found := re.search(r"Quant method is not yet supported: '?(\w+)'?", text):
        return Problem(
            f"its weights are quantized already, by '{found[1]}'",
            "Use the unquantized checkpoint that it was made from",
        )
    if found := re.search(r"Can not map tensor '([^']+)'", text):
        return Problem(
            f"llama.cpp's converter does not know what the tensor {found[1]} is for",
            "Use the published checkpoint of this architecture, or a newer llama.cpp: "
            "ggufkit build --source DIR",
        )
    last = tail[-1].strip() if tail else ""
    if found := re.fullmatch(
        r"""KeyError: (?:'([a-z]\w*)'|["']could not find any of: (\[.*\])["'])""", last
    ):
        return Problem(
            f"config.json lacks {found[1] or f'all of {found[2]}'}, "
            "which llama.cpp's converter needs",
            "Take config.json from the published checkpoint of this architecture, "
            "or add the value that the model was trained with",
        )
    return None


def quantize_problem(tail: Sequence[str]) -> Problem | None:
    """A failure of llama-quantize that has a plain explanation, or None."""
    text = "\n".join(tail)
    if "requires an imatrix" in text or "Missing importance matrix" in text:
        return Problem(
            "this type needs an importance matrix",
            "Make one with llama-imatrix and name it with --imatrix, or take a larger type",
        )
    if found := re.search(
        r"warning: (\S+) +- ncols +(\d+) not divisible by (\d+) .*"
        r"no tensor type fallback is defined for type (\w+)",
        text,
    ):
        return Problem(
            f"tensor {found[1]} has rows of {found[2]}, which blocks of {found[3]} cannot fill, "
            f"and no tensor type fallback is defined for type {found[4]}",
            "Take another type, such as q4_0 or q2_k",
        )
    if "iostream error" in text:
        return Problem(
            "the result could not be written",
            "Look whether the disk is full, and whether its directory may be written to",
        )
    if found := re.search(r"requantizing from type (\w+) is disabled", text):
        return Problem(
            f"it is quantized already (to {found[1]})",
            "Start from a float GGUF or the checkpoint, or accept the loss with --allow-requantize",
        )
    return None


class Percentages:
    """Watches text with progress bars such as ``Writing:  12%|`` as it comes."""

    _BAR = re.compile(r"Writing: +(\d+)%")

    def __init__(self, on_percent: Callable[[int], None]) -> None:
        self._on_percent = on_percent
        self._rest = ""

    def feed(self, text: str) -> None:
        """Take the next piece of text."""
        self._rest += text
        end = 0
        for found in self._BAR.finditer(self._rest):
            end = found.end()
            self._on_percent(int(found[1]))
        # Long enough for a mark that came half; all else is of no use.
        self._rest = self._rest[end:][-16:]


# Builds.
_STEP = re.compile(r"^\[ *(\d+)(?:/(\d+)|%)\]")


class BuildSteps:
    """Watches ``[12/345]`` of ninja or ``[ 12%]`` of make as it comes."""

    def __init__(self, on_step: Callable[[int, int, str], None]) -> None:
        self._on_step = on_step
        self._lines = _Lines()

    def feed(self, text: str) -> None:
        """Take the next piece of text."""
        for line in self._lines.feed(text):
            if found := _STEP.match(line):
                what = line[found.end() :].rpartition("/")[2].strip()
                self._on_step(int(found[1]), int(found[2] or 100), what)


_VERSION = re.compile(r"^version: .*\bcommit (\w+)\)|^version: \d+ \((\w+)\)", re.MULTILINE)


def parse_version(text: str) -> str:
    """The commit in what ``--version`` prints.

    Raises:
        ToolOutputError: if there is none.
    """
    found = _VERSION.search(text)
    if not found:
        raise ToolOutputError(f"the tool does not say its commit: {text.strip()[:200]}")
    return found[1] or found[2]


def parse_devices(text: str) -> tuple[str, ...]:
    """The lines of ``llama-bench --list-devices``; none for a CPU alone.

    Raises:
        ToolOutputError: if there is no list.
    """
    _, head, listed = text.partition("Available devices:")
    if not head:
        raise ToolOutputError(f"llama-bench printed no list of devices: {text.strip()[:200]}")
    lines = [line.strip() for line in listed.splitlines() if line.strip()]
    return () if lines == ["(none)"] else tuple(lines)


_CPU_FEATURE = re.compile(r"(\w+) = 1\b")


def parse_system_info(text: str) -> tuple[str, ...]:
    """CPU features in use, from the line ``system_info: ... | CPU : AVX2 = 1 | ...``.

    Raises:
        ToolOutputError: if there is no such line.
    """
    for line in text.splitlines():
        if "system_info:" in line and "CPU :" in line:
            return tuple(_CPU_FEATURE.findall(line.partition("CPU :")[2]))
    raise ToolOutputError("the tool printed no 'system_info: ... CPU : ...'")
