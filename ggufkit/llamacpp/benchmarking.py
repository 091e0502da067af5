"""llama-bench: its command line, and its answer read without guessing.

The pinned tool is ``tools/llama-bench/llama-bench.cpp``. Each setting gets a
process of its own, so that the peak of its memory is known as well.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ggufkit.errors import ToolOutputError, UsageError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.values import Json

PROMPT = "prompt"
GENERATION = "generation"


@dataclass(frozen=True)
class BenchSetting:
    """One thing to measure.

    Attributes:
        work: ``PROMPT`` (tokens read at once) or ``GENERATION`` (one by one).
        tokens: tokens read or generated.
        depth: tokens that are in the context before.
        threads: CPU threads.
        batch: tokens per logical batch.
        ubatch: tokens per physical batch.
        flash_attention: ``auto``, ``on`` or ``off``.
        gpu_layers: layers to put on a GPU; -1 for all.
    """

    work: str
    tokens: int
    depth: int
    threads: int
    batch: int
    ubatch: int
    flash_attention: str
    gpu_layers: int


@dataclass(frozen=True)
class BenchOutput:
    """What llama-bench measured in one setting.

    Attributes:
        tokens_per_second: mean over the repetitions.
        tokens_per_second_deviation: their standard deviation; 0 for a single one.
        flash_attention: whether it was on.
        seconds: wall time of the tool, loading and warm-up included.
        peak_rss_nbytes: peak resident memory of the tool.
    """

    tokens_per_second: float
    tokens_per_second_deviation: float
    flash_attention: bool
    seconds: float
    peak_rss_nbytes: int


def bench(
    build: NativeBuild,
    model: Path,
    setting: BenchSetting,
    *,
    repetitions: int,
    log: Path,
    on_pass: Callable[[int], None] | None = None,
) -> BenchOutput:
    """Measure one setting with llama-bench, after a warm-up.

    Args:
        build: whose llama-bench to run.
        model: the GGUF.
        setting: what to measure.
        repetitions: how often.
        log: gets what it prints.
        on_pass: called as each repetition begins with the number of passes that are
            done; the warm-up is one.

    Raises:
        UsageError: if llama-bench would take the file's name for several.
        ToolError: if it fails, or prints something that cannot be understood.
    """
    if "," in model.name:
        raise UsageError(
            f"llama-bench takes the comma in {model.name} for the end of the name",
            "Give the file another name, or a link without a comma",
        )
    printed: list[str] = []
    watch = Passes(on_pass)

    def on_text(piece: str) -> None:
        printed.append(piece)
        watch.feed(piece)

    ran = toolchain.run(
        [build.tool("llama-bench"), *arguments(model, setting, repetitions)],
        cwd=model.absolute().parent,  # a comma in a directory's name would split the path too
        on_text=on_text,
        log=log,
    )
    if ran.returncode != 0:
        raise toolchain.explain_failure(ran, f"measuring {model.name}", log)
    return parse_bench(
        "".join(printed),
        setting,
        repetitions,
        seconds=ran.seconds,
        peak_rss_nbytes=ran.peak_rss_nbytes,
    )


def arguments(model: Path, setting: BenchSetting, repetitions: int) -> list[str]:
    """The arguments of llama-bench for one setting, to be run beside the model."""
    prompt = setting.tokens if setting.work == PROMPT else 0
    generation = setting.tokens if setting.work == GENERATION else 0
    return [
        *("-m", model.name, "-p", str(prompt), "-n", str(generation), "-d", str(setting.depth)),
        *("-t", str(setting.threads), "-b", str(setting.batch), "-ub", str(setting.ubatch)),
        *("-fa", setting.flash_attention, "-ngl", str(setting.gpu_layers)),
        # Only the log of -v says what became of flash attention when it was left to choose.
        *("-r", str(repetitions), "-o", "jsonl", "--progress", "-v"),
    ]


_PASS = re.compile(r"^llama-bench: benchmark 1/1: (?:prompt|generation) run (\d+)/\d+$", re.M)


class Passes:
    """Watches llama-bench's text as it comes and tells how many passes are done."""

    def __init__(self, on_pass: Callable[[int], None] | None) -> None:
        self._on_pass = on_pass
        self._rest = ""

    def feed(self, text: str) -> None:
        """Take the next piece of text."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self._on_pass and (found := _PASS.match(line)):
                # The warm-up is a pass too, and this one only begins: i - 1 + 1 are done.
                self._on_pass(int(found[1]))


_ATTENTION_SET = re.compile(r"^llama_context: flash_attn += (\w+)$", re.M)
_ATTENTION_FOUND = re.compile(
    r"^resolve_fused_ops: Flash Attention (enabled|not supported, set to disabled)$", re.M
)


def parse_bench(
    text: str, setting: BenchSetting, repetitions: int, *, seconds: float, peak_rss_nbytes: int
) -> BenchOutput:
    """Read what ``llama-bench -o jsonl -v`` printed for one setting.

    Args:
        text: stdout and stderr.
        setting: what was asked for.
        repetitions: how many were asked for.
        seconds: wall time of the tool.
        peak_rss_nbytes: its peak resident memory.

    Raises:
        ToolOutputError: if there is not just one result, it is of another setting, or
            a figure is missing or no positive number.
    """
    lines = [line for line in text.splitlines() if line.startswith('{"build_commit"')]
    if len(lines) != 1:
        last = text.strip().rpartition("\n")[2]
        raise ToolOutputError(
            f"llama-bench printed {len(lines)} results instead of one; its last line: {last[:200]}"
        )
    told = _object(lines[0])
    _require_setting(told, setting, lines[0])
    mean = _number(told, "avg_ts", lines[0])
    samples = told.get("samples_ts")
    if mean <= 0 or not isinstance(samples, list) or len(samples) != repetitions:
        raise ToolOutputError(
            f"llama-bench was to measure {repetitions} times, but says: {lines[0]}"
        )
    return BenchOutput(
        tokens_per_second=mean,
        tokens_per_second_deviation=_number(told, "stddev_ts", lines[0]),
        flash_attention=_flash_attention(text),
        seconds=seconds,
        peak_rss_nbytes=peak_rss_nbytes,
    )


def _object(line: str) -> Mapping[str, Json]:
    try:
        told = json.loads(line)
    except ValueError as error:
        raise ToolOutputError(f"llama-bench printed no JSON ({error}): {line}") from error
    if not isinstance(told, dict):
        raise ToolOutputError(f"llama-bench printed no JSON object: {line}")
    return told


def _require_setting(told: Mapping[str, Json], setting: BenchSetting, line: str) -> None:
    asked = {
        "n_prompt": setting.tokens if setting.work == PROMPT else 0,
        "n_gen": setting.tokens if setting.work == GENERATION else 0,
        "n_depth": setting.depth,
        "n_threads": setting.threads,
        "n_batch": setting.batch,
        "n_ubatch": setting.ubatch,
        "n_gpu_layers": setting.gpu_layers,
    }
    for key, value in asked.items():
        if told.get(key) != value:
            raise ToolOutputError(
                f"llama-bench was asked for {key} {value}, but measured {told.get(key)}: {line}"
            )


def _number(told: Mapping[str, Json], key: str, line: str) -> float:
    value = told.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ToolOutputError(f"llama-bench printed no number as {key}: {line}")
    return float(value)


def _flash_attention(text: str) -> bool:
    """Whether flash attention was on, by what the context said of itself."""
    settings = set(_ATTENTION_SET.findall(text))
    if settings <= {"enabled", "disabled"} and len(settings) == 1:
        return settings == {"enabled"}
    found = set(_ATTENTION_FOUND.findall(text))
    if settings != {"auto"} or len(found) != 1:
        raise ToolOutputError(
            "llama-bench did not say whether flash attention was on "
            f"(flash_attn = {', '.join(sorted(settings)) or 'nothing'})"
        )
    return found == {"enabled"}
