"""``make bench``: what ggufkit costs on top of the bare tools.

Each measurement is a whole process. Ours and the bare tools' run in turn, so
that a machine whose speed drifts does not favour one of them; medians and
ratios are shown. Nothing here is a test: the goals stand beside the figures.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.processes import GGUFKIT, PYTHON, checked, mib
from ggufkit import settings, sources
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.values import Checkpoint


@dataclass(frozen=True)
class Cost:
    """Seconds and peak resident memory of one way to do something."""

    seconds: float
    peak_rss_nbytes: int


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    what: str
    figure: str
    goal: str
    met: bool | None


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each way")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    build = toolchain.find_build()
    with tempfile.TemporaryDirectory(prefix="ggufkit-bench-") as scratch:
        rows = measure(build, Path(scratch), options.runs)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"\nllama.cpp {build.commit}, {build.cpu}, {settings.threads()} threads")
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"{row.what:<44} {row.figure:<26} {row.goal:<24} {verdict}")


def measure(build: NativeBuild, scratch: Path, runs: int) -> list[Row]:
    found = sources.resolve("demo", models_dir=scratch / "models")
    assert isinstance(found, Checkpoint)
    ours, bare = in_turn(
        lambda n: ours_convert(found.path, scratch / f"ours-{n}", "--no-verify"),
        lambda n: bare_convert(build, found.path, scratch / f"bare-{n}"),
        runs,
    )
    help_runs = [checked([*GGUFKIT, "--help"]) for _ in range(2 * runs + 1)][1:]
    help_seconds = statistics.median(run.seconds for run in help_runs)
    options = ("--awq", "--calibration", "pydoc")
    awq = ours_convert(found.path, scratch / "awq", *options, keep=True)
    time_ratio = statistics.median(a.seconds / b.seconds for a, b in zip(ours, bare, strict=True))
    memory_ratio = peak(ours) / peak(bare)
    return [
        Row("ggufkit --help", f"{help_seconds:.3f} s", "under 0.25 s", help_seconds < 0.25),
        Row(
            "convert --no-verify / converter + llama-quantize",
            f"{time_ratio:.3f} ({seconds(ours):.1f} / {seconds(bare):.1f} s)",
            "at most 1.10",
            time_ratio <= 1.10,
        ),
        Row(
            "its peak memory / larger bare tool",
            f"{memory_ratio:.3f} ({mib(peak(ours))} / {mib(peak(bare))})",
            "at most 1.2",
            memory_ratio <= 1.2,
        ),
        Row("convert --awq to Q4_0, the whole way", f"{awq.seconds:.1f} s", "", None),
        Row("its peak memory", mib(awq.peak_rss_nbytes), "", None),
        Row("of that the AWQ search", f"{awq_seconds(scratch / 'awq-kept'):.1f} s", "", None),
    ]


def in_turn(
    first: Callable[[int], Cost], second: Callable[[int], Cost], runs: int
) -> tuple[list[Cost], list[Cost]]:
    """Both ways in turn; the first round warms up and does not count."""
    pairs = [(first(n), second(n)) for n in range(runs + 1)][1:]
    return [a for a, _ in pairs], [b for _, b in pairs]


def ours_convert(checkpoint: Path, models: Path, *options: str, keep: bool = False) -> Cost:
    command = [*GGUFKIT, "--models-dir", models, "convert", checkpoint, "--type", "q4_0", *options]
    ran = checked(command)
    if keep:
        shutil.move(models, models.with_name(f"{models.name}-kept"))
    else:
        shutil.rmtree(models)
    return Cost(ran.seconds, ran.peak_rss_nbytes)


def bare_convert(build: NativeBuild, checkpoint: Path, directory: Path) -> Cost:
    directory.mkdir()
    floats, out = directory / "f32.gguf", directory / "q4_0.gguf"
    converter = build.scripts / "convert_hf_to_gguf.py"
    command = [PYTHON, converter, checkpoint, "--outfile", floats, "--outtype", "f32"]
    converted = checked([*command, "--model-name", "bare"])
    threads = str(settings.threads())
    quantized = checked([build.tool("llama-quantize"), floats, out, "Q4_0", threads])
    shutil.rmtree(directory)
    return Cost(
        converted.seconds + quantized.seconds,
        max(converted.peak_rss_nbytes, quantized.peak_rss_nbytes),
    )


def awq_seconds(models: Path) -> float:
    (manifest,) = models.glob("*/awq-*/manifest.json")
    told: float = json.loads(manifest.read_text(encoding="utf-8"))["seconds"]
    return told


def seconds(costs: list[Cost]) -> float:
    return statistics.median(cost.seconds for cost in costs)


def peak(costs: list[Cost]) -> int:
    return max(cost.peak_rss_nbytes for cost in costs)


main()
