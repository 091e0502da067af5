"""``make bench-verify``: what comparing with the checkpoint costs a conversion.

Each way is a whole process, or two for the bare tools, and all take turns: the bare
converter and llama-quantize, ``convert --no-verify``, ``convert``. Ratios of each round,
then their median.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

from bench import qwen_coder
from bench.processes import GGUFKIT, PYTHON, checked
from ggufkit import settings, sources
from ggufkit.checkpoint.index import open_checkpoint
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.quantize.stages import outtype_of
from ggufkit.values import Checkpoint

GOALS = {"smollm2": (1.10, 1.60), "qwen": (1.10, 1.15)}
"""Of ``--no-verify`` and of the default, as times the bare tools'."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.verify", description=__doc__)
    parser.add_argument("--model", choices=sorted(GOALS), default="smollm2")
    parser.add_argument("--type", help="default: q4_0 for smollm2, q4_k_m for qwen")
    parser.add_argument("--runs", type=int, default=5, help="counted rounds")
    options = parser.parse_args()
    type = options.type or ("q4_0" if options.model == "smollm2" else "q4_k_m")
    build = toolchain.find_build()
    with tempfile.TemporaryDirectory(prefix="ggufkit-bench-", dir=settings.cache_dir()) as scratch:
        place = Path(scratch)
        path = _checkpoint(options.model, place)
        rounds = [_round(build, path, type, place) for _ in range(options.runs + 1)][1:]
        figures = _convert(path, type, place, keep=True)
    bare = statistics.median(r[0] for r in rounds)
    print(f"\n{options.model} to {type}: converter and llama-quantize {bare:.1f} s")
    for n, what in enumerate(("convert --no-verify", "convert"), 1):
        ratio = statistics.median(r[n] / r[0] for r in rounds)
        goal = GOALS[options.model][n - 1]
        verdict = "met" if ratio <= goal else "MISSED"
        seconds = statistics.median(r[n] for r in rounds)
        print(f"{what:<20} {seconds:6.1f} s, {ratio:.2f} times (at most {goal:.2f}: {verdict})")
    print(json.dumps(figures, indent=1))


def _checkpoint(model: str, scratch: Path) -> Path:
    if model == "qwen":
        return qwen_coder.qwen_coder(qwen_coder.cache())
    found = sources.resolve("demo", models_dir=scratch / "models")
    assert isinstance(found, Checkpoint)
    return found.path


def _round(build: NativeBuild, path: Path, type: str, place: Path) -> tuple[float, float, float]:
    """Seconds of the bare tools, without and with comparing."""
    bare = _bare(build, path, type, place / "bare")
    plain = _convert(path, type, place, "--no-verify")
    return bare, plain["wall"], _convert(path, type, place)["wall"]


def _bare(build: NativeBuild, path: Path, type: str, directory: Path) -> float:
    directory.mkdir()
    floats, out = directory / "floats.gguf", directory / "out.gguf"
    converter = [PYTHON, build.scripts / "convert_hf_to_gguf.py", path, "--outfile", floats]
    outtype = outtype_of(open_checkpoint(path))
    converted = checked([*converter, "--outtype", outtype, "--model-name", "bare"])
    command = [build.tool("llama-quantize"), floats, out, type.upper(), str(settings.threads())]
    quantized = checked(command)
    shutil.rmtree(directory)
    return converted.seconds + quantized.seconds


def _convert(path: Path, type: str, place: Path, *options: str, keep: bool = False) -> dict:
    """Wall seconds of a conversion; what was compared, if that is kept."""
    models = place / "ours"
    command = [*GGUFKIT, "--models-dir", models, "convert", path, "--type", type, *options]
    ran = checked(command)
    figures = {}
    if keep:
        (manifest,) = models.glob("*/quantize-*/manifest.json")
        figures = json.loads(manifest.read_text(encoding="utf-8"))["facts"]["verification"]
    shutil.rmtree(models)
    return {"wall": ran.seconds, **figures}


main()
