"""``make bench-evaluation``: ten quantizations against F32, by ``compare`` and by llama-perplexity.

The same chunks of the same text; verdicts are against the row above.
"""

import argparse
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.perplexity import perplexity, quality
from ggufkit import pipeline, settings
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.texts.load import load_text
from ggufkit.values import Difference

TYPES = ("q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_1", "q4_0", "iq4_xs", "q3_k_m", "q2_k")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.evaluation", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--measure", default="pydoc-measure", help="name or file")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--types", nargs="*", default=TYPES)
    options = parser.parse_args()
    build = toolchain.find_build()
    print(f"llama.cpp {build.commit}, {settings.threads()} threads")
    with tempfile.TemporaryDirectory(prefix="ggufkit-bench-") as scratch:
        models = Path(scratch) / "models"
        (made,) = pipeline.convert(options.model, types=["f32"], models_dir=models)
        text = load_text(options.measure, cache=settings.cache_dir()).path
        print_table(build, made.path, text, options.types, options.chunks, models)
        shutil.rmtree(models)

        import torch
        from transformers import GPT2LMHeadModel

        from bench import microformer

        checkpoint = microformer.fetch(Path(scratch) / "microformer")
        reference = microformer.as_gguf(build, checkpoint, Path(scratch) / "microformer-F32.gguf")
        torch.manual_seed(0)
        model = GPT2LMHeadModel.from_pretrained(checkpoint)
        text = Path(scratch) / "sampled.txt"
        sampled = microformer.sample(model.eval(), options.chunks, 512)
        text.write_text(microformer.as_text(sampled), encoding="utf-8")
        print_table(build, reference, text, options.types, options.chunks, models)


def print_table(
    build: NativeBuild, reference: Path, text: Path, types: Sequence[str], chunks: int, models: Path
) -> None:
    quantized = pipeline.quantize(reference, types=types, models_dir=models)
    files = [made.path for made in quantized]
    report = pipeline.compare(reference, files, texts=[str(text)], chunks=chunks, models_dir=models)
    logits = models / "logits.bin"
    base = perplexity(build, reference, text, chunks, logits)
    print(f"\n{reference.stem}, {chunks} chunks of 512 tokens of {text.name}; F32 {base:.4f}\n")
    print(
        "| type | MiB | perplexity | llama-perplexity | mean KL divergence | llama-perplexity "
        "| same top token | llama-perplexity | 99 % KL | against F32 | against the row above |"
    )
    print("|" + "---|" * 11)
    differences = [pair.difference for pair in report.differences]
    pairs = {(d.model, d.other): d for d in differences if d.measure == "divergence"}
    above = None
    for made, told in zip(quantized, report.comparisons, strict=True):
        tool = quality(build, made.path, text, chunks, logits)
        (verdict,) = {d.verdict for d in told.verdicts}
        print(
            f"| {made.type} | {made.nbytes / (1 << 20):.1f} "
            f"| {math.exp(told.log_perplexity):.4f} | {tool.perplexity:.4f} "
            f"| {told.divergence:.6f} ± {told.divergence_error:.6f} "
            f"| {tool.divergence:.6f} ± {tool.divergence_error:.6f} "
            f"| {100 * told.agreement:.2f} % | {100 * tool.agreement:.2f} % "
            f"| {told.divergence_percentiles['99']:.4f} | {verdict} "
            f"| {_verdict(pairs, made.path, above)} |",
            flush=True,
        )
        above = made.path
    logits.unlink()


def _verdict(pairs: dict[tuple[Path, Path], Difference], model: Path, above: Path | None) -> str:
    if above is None:
        return ""
    if told := pairs.get((model, above)):
        return told.verdict
    opposite = {"better": "worse", "worse": "better"}
    verdict = pairs[above, model].verdict
    return opposite.get(verdict, verdict)


if __name__ == "__main__":
    main()
