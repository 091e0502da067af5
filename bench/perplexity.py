"""llama-perplexity itself, for the benchmarks that stand beside it."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ggufkit import settings
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild

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
    output = run_perplexity(build, model, text, chunks, arguments)
    divergence = found(r"Mean\s+KLD:" + _NUMBER, output)
    return Quality(
        float(found(r"Mean PPL\(Q\)\s*:" + _NUMBER, output)[1]),
        float(divergence[1]),
        float(divergence[2]),
        float(found(r"Same top p:\s+([\d.]+)", output)[1]) / 100,
        model.stat().st_size,
    )


def perplexity(
    build: NativeBuild, model: Path, text: Path, chunks: int, logits: Path | None = None
) -> float:
    """The final estimate; with ``logits``, they are saved there."""
    arguments = ["--save-all-logits", str(logits)] if logits else []
    output = run_perplexity(build, model, text, chunks, arguments)
    return float(found(r"Final estimate: PPL = ([\d.]+)", output)[1])


def run_perplexity(
    build: NativeBuild, model: Path, text: Path, chunks: int, arguments: list[str]
) -> str:
    pieces: list[str] = []
    tool = build.tool("llama-perplexity")
    ran = toolchain.run(
        [
            *(tool, "-m", model, "-f", text, "-c", "512", "--chunks", str(chunks)),
            *("-t", str(settings.threads()), *arguments),
        ],
        on_text=pieces.append,
    )
    if ran.returncode:
        sys.exit("\n".join(ran.tail))
    return "".join(pieces)


def found(pattern: str, output: str) -> re.Match[str]:
    match = re.search(pattern, output)
    if match is None:
        sys.exit(f"llama-perplexity did not print {pattern}:\n{output[-2000:]}")
    return match
