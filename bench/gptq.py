"""``make bench-gptq``: what rounding with error feedback costs and what it is worth.

Each type plain, with an importance matrix, with AWQ, and rounded with feedback (with
and without AWQ), all calibrated on one text and compared with F32 on another. Files
and figures stay in --models-dir, so a bench that was ended goes on where it was.
"""

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.processes import GGUFKIT, printed
from ggufkit import pipeline, settings
from ggufkit.library import manifest_of
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.store import Store
from ggufkit.values import Comparison, ComparisonReport

TYPES = ("q4_0", "q3_k_m", "q2_k", "q4_k_m")
_MATRIX = ["--imatrix", "auto"]
_GPTQ = [*_MATRIX, "--rounding", "gptq"]
_MORE = ["--calibration-samples", "64"]
WAYS = {
    "plain": [],
    "imatrix": _MATRIX,
    "AWQ": ["--awq", *_MATRIX],
    "GPTQ": _GPTQ,
    "AWQ + GPTQ": ["--awq", *_GPTQ],
    "GPTQ, refined": [*_GPTQ, "--refine"],
    "GPTQ, 64 sequences": [*_GPTQ, *_MORE],
    "GPTQ, 64 sequences, refined": [*_GPTQ, *_MORE, "--refine"],
}
AGAINST = "imatrix"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gptq", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="pydoc-calibration", help="name or file")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--measure", default="pydoc-measure", help="name or file")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--models-dir", type=Path, help="keep everything here")
    parser.add_argument("--skip-microformer", action="store_true")
    options = parser.parse_args()
    build = toolchain.find_build()
    print(f"llama.cpp {build.commit}, {build.cpu}, {settings.threads()} threads")
    with tempfile.TemporaryDirectory(prefix="ggufkit-bench-") as scratch:
        if options.types:
            print_table(options, options.models_dir or Path(scratch))
        if not options.skip_microformer:
            print_microformer(build, Path(scratch))


def print_table(options: argparse.Namespace, models: Path) -> None:
    reference = convert(options.model, models, "f32", [])
    print(f"\ncalibrated on {options.samples} x 512 tokens of {Path(options.calibration).name},")
    print(f"measured on {options.chunks} chunks of {Path(options.measure).name}\n")
    header = ("type", "way", "MiB", "perplexity", "gap won back", "mean KL divergence")
    print(f"| {' | '.join(header)} | of {AGAINST}'s | verdict | seconds (CPU) |")
    print("|---" * 9 + "|")
    calibration = ["--calibration", options.calibration]
    calibration += ["--calibration-samples", str(options.samples)]
    for type in options.types:
        files = {
            way: convert(options.model, models, type, [*calibration, *WAYS[way]])
            for way in options.ways
        }
        told = pipeline.compare(
            reference,
            list(files.values()),
            texts=[options.measure],
            chunks=options.chunks,
            models_dir=models,
        )
        print_type(type, files, told, models)


def convert(model: str, models: Path, type: str, arguments: Sequence[str]) -> Path:
    command = [*GGUFKIT, "--models-dir", models, "convert", model, "--type", type]
    (result,) = printed([*command, *arguments, "--json"])
    # What a link points to: the next way may take over its name.
    return Path(result["path"]).resolve()


def print_type(type: str, files: Mapping[str, Path], told: ComparisonReport, models: Path) -> None:
    by_path = {comparison.model: comparison for comparison in told.comparisons}
    rows = {way: by_path[file] for way, file in files.items()}
    first, *_ = rows.values()
    base = math.exp(first.reference_log_perplexity)
    plain = rows.get("plain")
    print(f"| {type.upper()} | F32 | | {base:.4f} | | | | | |")
    for way, row in rows.items():
        against = rows.get(AGAINST)
        share = f"{row.divergence / against.divergence:.2f}" if against else ""
        print(
            f"| {type.upper()} | {way} | {row.file_nbytes / (1 << 20):.1f} "
            f"| {math.exp(row.log_perplexity):.4f} | {won(row, plain)} "
            f"| {row.divergence:.5f} ± {row.divergence_error:.5f} | {share} "
            f"| {verdict(row, against, told)} | {cost(row.model, models)} |",
            flush=True,
        )


def won(row: Comparison, plain: Comparison | None) -> str:
    if plain is None or row is plain:
        return ""
    base = math.exp(row.reference_log_perplexity)
    gap = math.exp(plain.log_perplexity) - base
    return f"{100 * (gap - math.exp(row.log_perplexity) + base) / gap:.0f} %" if gap > 0 else ""


def verdict(row: Comparison, against: Comparison | None, told: ComparisonReport) -> str:
    """What the chunks that both read say, for divergence and for perplexity."""
    if against is None or row is against:
        return ""
    found = []
    for pair in told.differences:
        judged = pair.difference
        if {judged.model, judged.other} != {row.model, against.model}:
            continue
        opposite = {"better": "worse", "worse": "better"}
        as_asked = judged.model == row.model
        said = judged.verdict if as_asked else opposite.get(judged.verdict, judged.verdict)
        found.append(f"{'KL' if judged.measure == 'divergence' else 'perplexity'} {said}")
    return ", ".join(found)


def cost(file: Path, models: Path) -> str:
    """Seconds of search, rounding and refinement; of the processor's cores in the last two."""
    manifest = manifest_of(file)
    assert manifest is not None
    seconds = cpu = 0.0
    for artifact in Store(models).artifacts("awq"):
        outputs = artifact.manifest.outputs.values()
        if any(output.sha256 == manifest.inputs.get("scales") for output in outputs):
            seconds += artifact.manifest.seconds
    if rounding := manifest.facts.get("rounding"):
        for step in (rounding, rounding.get("refinement")):
            if step:
                seconds += step["seconds"]
                cpu += step["cpu_seconds"]
    return f"{seconds:.0f}" + (f" ({cpu:.0f})" if cpu else "") if seconds else ""


def print_microformer(build: NativeBuild, scratch: Path) -> None:
    """Mean divergence of a true float32 model, all maps of its blocks in one type."""
    # These bring torch, which the table above leaves to its processes.
    import torch
    from transformers import GPT2LMHeadModel

    from bench import microformer
    from ggufkit.checkpoint.index import open_checkpoint
    from ggufkit.llamacpp.ggml import Ggml
    from ggufkit.progress import SILENT
    from ggufkit.scaling.awq import SCALES_FILE
    from ggufkit.scaling.families import family_of
    from ggufkit.scaling.fold import changes_of, read_scales
    from ggufkit.scaling.rounding import read_rounded, round_model

    path = microformer.fetch(scratch / "microformer")
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    looked_at, measured = (microformer.sample(model) for _ in range(2))
    with torch.inference_mode():
        reference = model(measured).logits.log_softmax(-1)
    ggml = Ggml(build.bin, settings.threads())
    index = open_checkpoint(path)
    family = family_of(index.config)
    maps = [name for name, t in index.tensors.items() if ".h." in name and len(t.shape) == 2]
    print(f"\n{microformer.REQUIREMENT}, {looked_at.numel()} tokens sampled from it looked at,")
    print("as many measured; mean KL divergence\n")
    print(
        "| type | plain | AWQ | imatrix | AWQ + imatrix | GPTQ | AWQ + GPTQ | GPTQ of imatrix's |"
    )
    print("|---" * 8 + "|")
    for type in ("q4_0", "q2_k", "q3_k", "q4_k"):
        place = scratch / type
        told = [
            microformer.divergence(model, reference, measured, weights)
            for weights in microformer.rounded(path, type, looked_at, ggml, place)
        ]
        matrix = told[2]
        scales = read_scales(place / str(True) / SCALES_FILE)
        for changes in ({}, changes_of(index, family, scales)):
            out = place / f"rounded-{len(changes)}"
            plan = dict.fromkeys(maps, type)
            round_model(
                *(index, family, looked_at, plan, out, ggml, SILENT),
                threads=settings.threads(),
                changes=changes,
            )
            weights = original | {name: changes[name](original[name]) for name in changes}
            for name, packed in read_rounded(out):
                columns = original[name].shape[0]
                rows = ggml.dequantize(ggml.type(type), packed, columns)
                weights[name] = torch.from_numpy(rows).T.contiguous()
            told.append(microformer.divergence(model, reference, measured, weights))
        figures = " | ".join(f"{kl:.5f}" for kl in told)
        share = told[4] / matrix
        print(f"| {type.upper()} | {figures} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
