"""Whole processes, as the measurements run them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import ToolRun

PYTHON = sys.executable
GGUFKIT = (PYTHON, "-m", "ggufkit", "--quiet")


def checked(command: Sequence[str | Path]) -> ToolRun:
    """Run it, and give up if it fails."""
    ran = toolchain.run(command)
    if ran.returncode != 0:
        sys.exit("\n".join(["failed:", *map(str, command), *ran.tail]))
    return ran


def mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.0f} MiB"
