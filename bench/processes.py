"""Whole processes, as the measurements run them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import ToolRun
from ggufkit.values import Json

PYTHON = sys.executable
GGUFKIT = (PYTHON, "-m", "ggufkit", "--quiet")


def checked(command: Sequence[str | Path]) -> ToolRun:
    """Run it, and give up if it fails."""
    ran = toolchain.run(command)
    if ran.returncode != 0:
        sys.exit("\n".join(["failed:", *map(str, command), *ran.tail]))
    return ran


def printed(command: Sequence[str | Path]) -> Json:
    """Run it, and read the JSON that it prints; its talk goes on to the terminal."""
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if ran.returncode != 0:
        sys.exit("\n".join(["failed:", *map(str, command)]))
    return json.loads(ran.stdout)


def mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.0f} MiB"
