"""Parsers of what the native tools print. Pure: text in, values out.

A line that should be there and is not raises :class:`ToolOutputError`; no
number is ever made up.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ggufkit.errors import ToolOutputError
from ggufkit.values import GGUFFile

_QUANTIZED = re.compile(
    r"\[ *(?P<number>\d+)/ *(?P<total>\d+)\] +(?P<name>\S+) +- \[(?P<shape>[\d, ]+)\], "
    r"type = +(?P<source>\w+), (?P<rest>.*)"
)
_CONVERTING = re.compile(r"converting to (\w+) \.\.")
_WOULD_BE = re.compile(r"-> +[\d.]+ MiB \((\w+)\)")
_FALLBACK = re.compile(
    r"warning: (?P<name>\S+) +- ncols +(?P<columns>\d+) not divisible by +\d+ "
    r"\(required for type +(?P<wanted>\w+)\).*-> falling back to +(?P<got>\w+)"
)
_ESTIMATE = re.compile(r"\[(\d+)\](-?[\d.]+|-?nan|inf),")
_CHUNKS = re.compile(r"(?:calculating perplexity|computing) over (\d+) chunks, n_ctx=(\d+)")
_FINAL = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
_TOO_SHORT = re.compile(r"tokenizes to only (\d+) tokens")
_VERSION = re.compile(r"^version: .*\bcommit (\w+)\)", re.MULTILINE)
_NINJA = re.compile(r"^\[(\d+)/(\d+)\]")
_MAKE = re.compile(r"^\[ *(\d+)%\]")
_TQDM = re.compile(r"Writing: +(\d+)%")


@dataclass(frozen=True)
class TensorPlan:
    """What llama-quantize does to one tensor."""

    name: str
    source_type: str
    type: str


@dataclass(frozen=True)
class Fallback:
    """A tensor that could not have the type its mixture wants for it."""

    name: str
    wanted: str
    type: str


@dataclass(frozen=True)
class Quantized:
    """What llama-quantize said of a run or a dry run.

    Attributes:
        tensors: all tensors, in file order.
        fallbacks: those that could not have the type wanted.
    """

    tensors: tuple[TensorPlan, ...]
    fallbacks: tuple[Fallback, ...]

    def fallback_counts(self) -> dict[str, int]:
        """Type fallen back to, and how many tensors did."""
        return dict(Counter(f.type for f in self.fallbacks))

    def bits_per_weight_asked(self, written: GGUFFile) -> float:
        """Bits per weight if every tensor had the type that was wanted for it."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        wanted = {f.name: f.wanted for f in self.fallbacks}
        bits = 0.0
        for tensor in written.tensors:
            kind = GGMLQuantizationType[wanted.get(tensor.name, tensor.type).upper()]
            block, nbytes = GGML_QUANT_SIZES[kind]
            bits += 8 * nbytes / block * tensor.parameters
        return bits / written.parameters


def parse_tensor_line(line: str) -> tuple[int, int, TensorPlan] | None:
    """One tensor's line: its number, the total, and what happens to it."""
    match = _QUANTIZED.match(line)
    if not match:
        return None
    rest = match["rest"]
    became = _CONVERTING.search(rest) or _WOULD_BE.search(rest)
    type = became[1] if became else match["source"]
    return int(match["number"]), int(match["total"]), TensorPlan(match["name"], match["source"], type)


def parse_quantize(lines: Iterable[str]) -> Quantized:
    """The output of llama-quantize, with or without ``--dry-run``.

    Raises:
        ToolOutputError: if not every tensor announced was seen.
    """
    tensors: list[TensorPlan] = []
    fallbacks = []
    total = 0
    for line in lines:
        if parsed := parse_tensor_line(line):
            _, total, tensor = parsed
            tensors.append(tensor)
        elif match := _FALLBACK.match(line):
            fallbacks.append(Fallback(match["name"], match["wanted"], match["got"]))
    if not total or len(tensors) != total:
        raise ToolOutputError(f"llama-quantize named {len(tensors)} of {total} tensors")
    return Quantized(tuple(tensors), tuple(fallbacks))


def quantize_failure(lines: Iterable[str]) -> tuple[str, str]:
    """What llama-quantize's last words mean: a message and a hint."""
    text = "\n".join(lines)
    if "requires an importance matrix" in text or "Missing importance matrix" in text:
        return (
            "this type needs an importance matrix",
            "Make one with llama-imatrix and give it: ggufkit quantize ... --imatrix FILE",
        )
    if match := re.search(r"requantizing from type (\w+) is disabled", text):
        return (
            f"the file is quantized already (to {match[1]})",
            "Start from an F16, BF16 or F32 file, or accept the loss with --allow-requantize",
        )
    match = re.search(r"failed to quantize: (.+)", text)
    return (match[1] if match else "llama-quantize failed", "")


@dataclass(frozen=True)
class Perplexity:
    """llama-perplexity's result: the final estimate, its error, and all estimates."""

    perplexity: float
    error: float
    chunks: int
    context: int
    estimates: tuple[float, ...]


class PerplexityReader:
    """Reads llama-perplexity's output as it comes, in pieces of any size."""

    def __init__(self) -> None:
        self._text = ""
        self._seen = 0
        self.estimates: list[float] = []
        self.total: int | None = None

    def feed(self, text: str) -> bool:
        """Take more output; true if there is a new estimate."""
        self._text += text
        if self.total is None and (match := _CHUNKS.search(self._text)):
            self.total = int(match[1])
        before = len(self.estimates)
        for match in _ESTIMATE.finditer(self._text, self._seen):
            self.estimates.append(float(match[2]))
            self._seen = match.end()
        return len(self.estimates) > before

    def result(self) -> Perplexity:
        """The result, once the tool has ended.

        Raises:
            ToolOutputError: if the final estimate is missing.
        """
        chunks = _CHUNKS.search(self._text)
        final = _FINAL.search(self._text)
        if not chunks or not final:
            last = self._text.strip().splitlines()[-1:] or ["nothing"]
            raise ToolOutputError(f"llama-perplexity gave no final estimate; it ended with: {last[0]}")
        return Perplexity(
            float(final[1]), float(final[2]), int(chunks[1]), int(chunks[2]), tuple(self.estimates)
        )

    def too_short(self) -> int | None:
        """Tokens of the text, if the tool refused it as too short."""
        match = _TOO_SHORT.search(self._text)
        return int(match[1]) if match else None


def parse_version(text: str) -> str:
    """The commit that a tool was built from, as it prints it.

    Raises:
        ToolOutputError: if it prints none.
    """
    match = _VERSION.search(text)
    if not match:
        raise ToolOutputError(f"no commit in the version text: {text.strip()[:200]!r}")
    return match[1]


def build_share(line: str) -> float | None:
    """Share done, 0 to 1, from a line of ninja or make."""
    if match := _NINJA.match(line):
        return int(match[1]) / int(match[2])
    if match := _MAKE.match(line):
        return int(match[1]) / 100
    return None


def convert_share(line: str) -> float | None:
    """Share written, 0 to 1, from a line of the converter's bar."""
    match = _TQDM.search(line)
    return int(match[1]) / 100 if match else None


def convert_failure(lines: Iterable[str]) -> tuple[str, str]:
    """What the converter's last words mean: a message and a hint."""
    text = "\n".join(lines)
    if match := re.search(r"Model (\S+) is not supported", text):
        return (
            f"llama.cpp's converter does not know the architecture '{match[1]}'",
            "Only architectures that llama.cpp runs can become a GGUF",
        )
    if "BPE pre-tokenizer was not recognized" in text:
        return (
            "llama.cpp's converter does not recognise the tokenizer of this checkpoint",
            "Its tokenizer.json must be that of a model family which llama.cpp knows",
        )
    last = [line for line in text.splitlines() if line.strip()][-1:] or ["no output"]
    return (f"llama.cpp's converter failed: {last[0].strip()}", "")


def parse_devices(text: str) -> tuple[str, ...]:
    """Names of the GPU devices that ``llama-bench --list-devices`` sees."""
    _, found, rest = text.partition("Available devices:")
    if not found:
        raise ToolOutputError("llama-bench listed no devices section")
    lines = (line.strip() for line in rest.splitlines())
    return tuple(line for line in lines if line and line != "(none)")


def parse_cpu_features(text: str) -> tuple[str, ...]:
    """CPU features that a build uses, from llama.cpp's ``system_info`` line."""
    match = re.search(r"system_info: .*?CPU : (.*)", text)
    if not match:
        raise ToolOutputError("no system_info line")
    return tuple(re.findall(r"(\w+) = 1", match[1]))
