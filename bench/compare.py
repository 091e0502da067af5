"""``make bench-compare``: what ``compare`` costs beside llama-perplexity's way.

llama-perplexity needs a run that saves the reference's logits and one for each
candidate. Whole processes in turn; medians of ratios. Further: what scoring adds to
bare decoding, and peak memory with a vocabulary of 150,000.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from bench.perplexity import run_perplexity
from bench.processes import GGUFKIT, checked, mib
from ggufkit import pipeline, settings
from ggufkit.evaluate.divergence import Meter
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.scoring import Scorer
from ggufkit.llamacpp.toolchain import NativeBuild, ToolRun
from ggufkit.texts.load import load_text

TYPES = ("q4_0", "q8_0", "q4_k_m")
CONTEXT = 512
WIDE = 150_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.compare", description=__doc__)
    parser.add_argument("--model", default="demo", help="a checkpoint, or an F32 GGUF")
    parser.add_argument("--measure", default="pydoc-measure", help="name or file")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each way")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    options = parser.parse_args()
    build = toolchain.find_build()
    print(f"llama.cpp {build.commit}, {build.cpu}, {settings.threads()} threads")
    text = load_text(options.measure, cache=settings.cache_dir()).path
    with tempfile.TemporaryDirectory(prefix="ggufkit-bench-") as scratch:
        models = Path(scratch) / "models"
        if not options.skip_speed:
            reference = Path(options.model)
            if reference.suffix != ".gguf":
                (made,) = pipeline.convert(options.model, types=["f32"], models_dir=models)
                reference = made.path
            files = [q.path for q in pipeline.quantize(reference, types=TYPES, models_dir=models)]
            print_overhead(build, reference, files[0], text, options.chunks)
            for candidates, goal in ((files[:1], 1.15), (files, 1.10)):
                print_ratio(build, reference, candidates, text, options, Path(scratch), goal)
        if not options.skip_memory:
            print_memory(build, text, Path(scratch))


def print_overhead(
    build: NativeBuild, reference: Path, candidate: Path, text: Path, chunks: int
) -> None:
    """The same chunks, decoded and then scored, each timed by itself."""
    decoding = scoring = 0.0
    with (
        Scorer(reference, context=CONTEXT, build=build) as one,
        Scorer(candidate, context=CONTEXT, build=build) as other,
        Meter(one.vocabulary, settings.threads()) as meter,
    ):
        tokens = one.tokenize(text.read_bytes())
        for number in range(chunks + 1):
            chunk = tokens[number * CONTEXT : (number + 1) * CONTEXT]
            started = monotonic()
            ((ours,),) = one.read([chunk])
            ((theirs,),) = other.read([chunk])
            decoded = monotonic()
            meter.score(ours.logits, [theirs.logits], chunk[ours.first + 1 :])
            if number:  # the first warms up
                decoding += decoded - started
                scoring += monotonic() - decoded
    tell("scoring / bare decoding", scoring / decoding, 0.10, f"{scoring:.2f} / {decoding:.2f} s")


def print_ratio(
    build: NativeBuild,
    reference: Path,
    candidates: Sequence[Path],
    text: Path,
    options: argparse.Namespace,
    scratch: Path,
    goal: float,
) -> None:
    """``compare`` as a process, and the processes of llama-perplexity."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(options.runs + 1):
        ours.append(compare(reference, candidates, text, options.chunks, scratch / "run").seconds)
        theirs.append(
            timed(lambda: bare(build, reference, candidates, text, options.chunks, scratch))
        )
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    tell(
        f"compare, {len(candidates)} candidates / {len(candidates) + 1} runs of llama-perplexity",
        statistics.median(ratios),
        goal,
        f"{statistics.median(ours[1:]):.1f} / {statistics.median(theirs[1:]):.1f} s, "
        f"ratios {', '.join(f'{r:.3f}' for r in ratios)}",
    )


def compare(
    reference: Path, candidates: Sequence[Path], text: Path, chunks: int, models: Path
) -> ToolRun:
    command = [*GGUFKIT, "--models-dir", models, "compare", reference, *candidates]
    ran = checked([*command, "--text", text, "-c", str(CONTEXT), "--chunks", str(chunks)])
    shutil.rmtree(models)
    return ran


def bare(
    build: NativeBuild,
    reference: Path,
    candidates: Sequence[Path],
    text: Path,
    chunks: int,
    scratch: Path,
) -> None:
    logits = scratch / "logits.bin"
    run_perplexity(build, reference, text, chunks, ["--save-all-logits", str(logits)])
    for candidate in candidates:
        arguments = ["--kl-divergence-base", str(logits), "--kl-divergence"]
        run_perplexity(build, candidate, text, chunks, arguments)
    logits.unlink()


def timed(work: Callable[[], None]) -> float:
    started = monotonic()
    work()
    return monotonic() - started


def print_memory(build: NativeBuild, text: Path, scratch: Path) -> None:
    """Peak memory of few and of many chunks with a large vocabulary, less the files' size."""
    from tests.factory import make_checkpoint

    checkpoint = make_checkpoint(scratch / "narrow", hidden=64, intermediate=128)
    (narrow,) = pipeline.convert(str(checkpoint), types=["f32"], models_dir=scratch / "models")
    reference = widen(narrow.path, scratch / "wide-F32.gguf", WIDE)
    (made,) = pipeline.quantize(reference, types=["q8_0"], models_dir=scratch / "models")
    files = reference.stat().st_size + made.path.stat().st_size
    peaks = [
        compare(reference, [made.path], text, chunks, scratch / "run").peak_rss_nbytes
        for chunks in (4, 32)
    ]
    rest = max(peaks) - files
    tell(
        f"peak memory less the models, vocabulary {WIDE:,}, GB",
        rest / 1e9,
        1.5,
        f"{mib(peaks[0])} with 4 chunks, {mib(peaks[1])} with 32; models {mib(files)}",
    )


def widen(gguf: Path, out: Path, vocabulary: int) -> Path:
    """A copy of an F32 GGUF whose vocabulary is filled up with tokens that no text has."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(gguf)
    known = len(reader.fields["tokenizer.ggml.tokens"].data)
    extra = vocabulary - known
    fill = {
        "tokenizer.ggml.tokens": [f"<never {n}>" for n in range(extra)],
        "tokenizer.ggml.scores": [-1e6] * extra,
        "tokenizer.ggml.token_type": [5] * extra,  # unused
    }
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name in fill:
            writer.add_array(name, [*value, *fill[name]])
        elif name == f"{architecture}.vocab_size":
            writer.add_uint32(name, vocabulary)
        elif field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, field.types[0])
    random = np.random.default_rng(0)
    for tensor in reader.tensors:
        values = np.asarray(tensor.data)
        if tensor.name in ("token_embd.weight", "output.weight"):
            more = random.normal(0, values.std(), (extra, values.shape[1]))
            values = np.concatenate([values, more.astype(np.float32)])
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def tell(what: str, figure: float, goal: float, how: str) -> None:
    verdict = "met" if figure <= goal else "MISSED"
    print(f"{what:<60} {figure:.3f}  at most {goal:.2f}  {verdict}  ({how})", flush=True)


if __name__ == "__main__":
    main()
