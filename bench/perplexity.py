"""llama-perplexity itself, for the benchmarks that stand beside it."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ggufkit import settings
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild

TRIES = 3
_NUMBER = r"\s+(-?[\d.]+)\s+±\s+([\d.]+)"


@dataclass(frozen=True)
class Quality:
    """One file against F32: perplexity, mean KL divergence, agreement; its size."""

    perplexity: float
    divergence: float
    divergence_error: float
    agreement: float
    nbytes: int


def quality(build: NativeBuild, model: Path, text: Path, chunks: int, logits: Path) -> Quality:
    """What ``--kl-divergence`` prints, against saved logits of the reference."""
    arguments = ["--kl-divergence-base", str(logits), "--kl-divergence"]
    last = r"Same top p:\s+([\d.]+)"
    output = run_perplexity(build, model, text, chunks, arguments, last)
    divergence = found(r"Mean\s+KLD:" + _NUMBER, output)
    return Quality(
        float(found(r"Mean PPL\(Q\)\s*:" + _NUMBER, output)[1]),
        float(divergence[1]),
        float(divergence[2]),
        float(found(last, output)[1]) / 100,
        model.stat().st_size,
    )


def perplexity(
    build: NativeBuild, model: Path, text: Path, chunks: int, logits: Path | None = None
) -> float:
    """The final estimate; with ``logits``, they are saved there."""
    arguments = ["--save-all-logits", str(logits)] if logits else []
    last = r"Final estimate: PPL = ([\d.]+)"
    output = run_perplexity(build, model, text, chunks, arguments, last)
    return float(found(last, output)[1])


def run_perplexity(
    build: NativeBuild, model: Path, text: Path, chunks: int, arguments: list[str], last: str = ""
) -> str:
    """What it printed, ``last`` (a pattern) included: it may end without its last lines."""
    tool = build.tool("llama-perplexity")
    command = [
        *(tool, "-m", model, "-f", text, "-c", "512", "--chunks", str(chunks)),
        *("-t", str(settings.threads()), *arguments),
    ]
    output = ""
    for _ in range(TRIES):
        pieces: list[str] = []
        ran = toolchain.run(command, on_text=pieces.append)
        if ran.returncode:
            sys.exit("\n".join(ran.tail))
        output = "".join(pieces)
        if re.search(last, output):
            break
    return output


def found(pattern: str, output: str) -> re.Match[str]:
    match = re.search(pattern, output)
    if match is None:
        sys.exit(f"llama-perplexity did not print {pattern}:\n{output[-2000:]}")
    return match
