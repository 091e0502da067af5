"""``make bench-awq``: what AWQ costs and what it is worth.

Cost: whole processes, this search beside AutoAWQ's own (repaired, through
``--awq-backend autoawq``) on the same model and the same calibration tokens.
Worth: perplexity and KL divergence against F32 for each type, plain, with AWQ,
with an importance matrix, and with both, on a text that was not calibrated on.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.perplexity import perplexity, quality
from bench.processes import GGUFKIT, checked, mib, printed
from ggufkit import settings, sources
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.texts.load import load_text
from ggufkit.values import Checkpoint

TYPES = ("q4_0", "q2_k", "q3_k_m", "iq4_xs", "q4_k_m", "q5_k_m")
WAYS = {
    "plain": [],
    "AWQ": ["--awq"],
    "imatrix": ["--imatrix", "auto"],
    "AWQ + imatrix": ["--awq", "--imatrix", "auto"],
}
AUTOAWQ = "AutoAWQ"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.awq", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="pydoc-calibration", help="name or file")
    parser.add_argument("--measure", default="pydoc-measure", help="name or file")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--skip-microformer", action="store_true")
    parser.add_argument("--skip-cost", action="store_true")
    parser.add_argument("--skip-autoawq", action="store_true", help="it takes minutes")
    options = parser.parse_args()
    build = toolchain.find_build()
    print(f"llama.cpp {build.commit}, {build.cpu}, {settings.threads()} threads")
    with tempfile.TemporaryDirectory(prefix="ggufkit-bench-") as scratch:
        models = Path(scratch) / "models"
        found = sources.resolve(options.model, models_dir=models)
        assert isinstance(found, Checkpoint)
        calibration = ["--calibration", options.calibration]
        if not options.skip_cost:
            print_cost(build, found, Path(scratch), options, calibration)
            print_growth(found, Path(scratch), calibration)
        if options.types:
            print_quality(build, found, models, options, calibration)
        if not options.skip_microformer:
            # It brings torch, which the other measurements leave to their processes.
            from bench.microformer import print_microformer

            print_microformer(build, Path(scratch))


def print_cost(
    build: NativeBuild,
    model: Checkpoint,
    scratch: Path,
    options: argparse.Namespace,
    calibration: Sequence[str],
) -> None:
    """The whole AWQ step: statistics, search, comparison with the original, fold."""
    print("\nthe AWQ step as a whole process\n")
    ways = {f"ggufkit, {t}": ["--type", t] for t in ("q4_0", "q4_k_m", "q5_k_m")}
    if not options.skip_autoawq:
        ways[AUTOAWQ] = ["--type", "q4_0", "--awq-backend", "autoawq"]
    told = {
        way: checked(
            [
                *(*GGUFKIT, "--models-dir", scratch / f"cost-{number}", "awq", model.path),
                *("-o", scratch / f"folded-{number}", *arguments, *calibration),
            ]
        )
        for number, (way, arguments) in enumerate(ways.items())
    }
    print("| way | seconds | peak memory | AutoAWQ's time / this | memory / AutoAWQ's |")
    print("|---|---|---|---|---|")
    for way, ran in told.items():
        ratios = "| |"
        if (other := told.get(AUTOAWQ)) and way != AUTOAWQ:
            memory = ran.peak_rss_nbytes / other.peak_rss_nbytes
            ratios = f"| {other.seconds / ran.seconds:.1f} | {memory:.2f} |"
        print(f"| {way} | {ran.seconds:.1f} | {mib(ran.peak_rss_nbytes)} {ratios}", flush=True)
    print_function(build, model, scratch, options, list(ways))
    for number in range(len(ways)):
        shutil.rmtree(scratch / f"cost-{number}")
        shutil.rmtree(scratch / f"folded-{number}")


def print_function(
    build: NativeBuild,
    model: Checkpoint,
    scratch: Path,
    options: argparse.Namespace,
    ways: Sequence[str],
) -> None:
    """Perplexity in F32: folding scales must not change it."""
    text = load_text(options.measure, cache=settings.cache_dir()).path
    folded = {way: scratch / f"folded-{number}" for number, way in enumerate(ways)}
    print("\nperplexity in F32, nothing quantized\n")
    print("| checkpoint | perplexity |")
    print("|---|---|")
    for name, path in {"original": model.path, **folded}.items():
        file = convert(path, scratch / "floats", "f32", [])
        print(f"| {name} | {perplexity(build, file, text, options.chunks):.4f} |", flush=True)
        shutil.rmtree(scratch / "floats")


def print_growth(model: Checkpoint, scratch: Path, calibration: Sequence[str]) -> None:
    """Seconds of the search by number of blocks and of calibration tokens."""
    print("\nhow the search grows (Q4_0, seconds of the stage alone)\n")
    print("| blocks | sequences of 512 | seconds |")
    print("|---|---|---|")
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    blocks = config["num_hidden_layers"]
    for count, samples in (
        *((blocks // 3, 16), (2 * blocks // 3, 16), (blocks, 16)),
        *((blocks, 32), (blocks, 64)),
    ):
        part = scratch / f"{model.name}-{count}-{samples}"
        shutil.copytree(model.path, part)
        # The search reads the blocks that the config names and no more.
        (part / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
        found = printed(
            [
                *(*GGUFKIT, "--models-dir", scratch / "growth", "awq", part, "-o", part / "out"),
                *("--type", "q4_0", "--calibration-samples", str(samples), *calibration),
                "--json",
            ]
        )
        print(f"| {count} | {samples} | {found['seconds']:.1f} |", flush=True)
        shutil.rmtree(part)
        shutil.rmtree(scratch / "growth")


def print_quality(
    build: NativeBuild,
    model: Checkpoint,
    models: Path,
    options: argparse.Namespace,
    calibration: Sequence[str],
) -> None:
    text = load_text(options.measure, cache=settings.cache_dir()).path
    reference = convert(model.path, models, "f32", [])
    logits = models / "logits.bin"
    base = perplexity(build, reference, text, options.chunks, logits)
    print(f"\n{model.name}, calibrated on {Path(options.calibration).name}, measured on")
    print(f"{options.chunks} chunks of {Path(options.measure).name}; F32 {base:.4f}\n")
    print("| type | way | MiB | perplexity | gap won back | mean KL divergence |")
    print("|---|---|---|---|---|---|")
    for type in options.types:
        plain = None
        for way, arguments in WAYS.items():
            file = convert(model.path, models, type, [*arguments, *calibration])
            told = quality(build, file, text, options.chunks, logits)
            plain = plain or told
            gap = plain.perplexity - base
            won = f"{100 * (plain.perplexity - told.perplexity) / gap:.0f} %" if gap > 0 else ""
            print(
                f"| {type.upper()} | {way} | {told.nbytes / (1 << 20):.1f} "
                f"| {told.perplexity:.4f} | {won} "
                f"| {told.divergence:.5f} ± {told.divergence_error:.5f} |",
                flush=True,
            )


def convert(model: Path, models: Path, type: str, arguments: Sequence[str]) -> Path:
    command = [*GGUFKIT, "--models-dir", models, "convert", model, "--type", type]
    (result,) = printed([*command, *arguments, "--json"])
    return Path(result["path"])


if __name__ == "__main__":
    main()
