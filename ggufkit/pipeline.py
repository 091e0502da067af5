"""The library: what the command line's verbs do, in the same words.

Every function takes values and a :class:`~ggufkit.progress.Progress`, and
returns values; nothing here prints. Rooms are imported inside the functions,
so that importing this module costs nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from ggufkit import settings
from ggufkit.errors import GgufkitError, IntegrityError, UsageError
from ggufkit.progress import SILENT, Progress
from ggufkit.values import (
    Artifact,
    AwqOptions,
    AwqResult,
    BenchOptions,
    Calibration,
    Checkpoint,
    ComparisonReport,
    DemoResult,
    EvalResult,
    FetchOptions,
    Json,
    QuantizeResult,
    QuantRecipe,
    RoundingOptions,
    SpeedResult,
    TaskDifference,
    TaskResult,
    Text,
    VerifyOptions,
    to_json,
)

if TYPE_CHECKING:
    from ggufkit.doctor import Finding
    from ggufkit.evaluate.leaks import LeakGuard
    from ggufkit.evaluate.report.values import ModelFile, Report, WrittenReport
    from ggufkit.evaluate.results import Results
    from ggufkit.library import ModelEntry
    from ggufkit.llamacpp.batching import ContextOptions, ModelOptions
    from ggufkit.llamacpp.building import BuildReport
    from ggufkit.llamacpp.rpc import Offer
    from ggufkit.llamacpp.toolchain import Converter, NativeBuild
    from ggufkit.ollama import Modelfile
    from ggufkit.quantize.inspect import Inspection
    from ggufkit.serve.api.options import ServeOptions
    from ggufkit.serve.batch import BatchOptions, BatchReport
    from ggufkit.serve.chat import Conversation, Style
    from ggufkit.serve.drafting import DraftOptions
    from ggufkit.serve.hosting import Hosted
    from ggufkit.serve.model import Sampling
    from ggufkit.store import Store
    from ggufkit.verify.values import Verification

DEFAULT_TYPES = ("q4_k_m",)


def convert(
    model: str,
    *,
    types: Sequence[str] = DEFAULT_TYPES,
    awq: bool = False,
    awq_options: AwqOptions | None = None,
    imatrix: Path | Literal["auto"] | None = None,
    rounding: RoundingOptions | None = None,
    guard: bool = False,
    out: Path | None = None,
    calibration: Calibration | None = None,
    keep_intermediate: bool = False,
    verify: VerifyOptions | None = None,
    models_dir: Path | None = None,
    fetch: FetchOptions | None = None,
    progress: Progress = SILENT,
) -> list[QuantizeResult]:
    """Make GGUFs of one or many types out of a checkpoint.

    Args:
        model: a directory, ``hf:ORG/NAME``, ``ms:ORG/NAME``, ``ORG/NAME``,
            ``demo``, or a GGUF (which is quantized as it is).
        types: quantization types, in any case.
        awq: fold activation-aware scales in first, searched for each type.
        awq_options: how scales are found and kept.
        imatrix: quantize with an importance matrix: ``auto`` for one of the
            calibration text, which AWQ's own pass yields, or a file.
        rounding: how weights are rounded onto the grid of their type.
        guard: make each file with AWQ or other rounding without it as well, measure
            all on calibration text that was held back, and keep the best.
        out: also put the files into this directory.
        calibration: what AWQ, rounding and the importance matrix look at.
        keep_intermediate: keep the float GGUF that the types are made from.
        verify: how the float GGUF is compared with the checkpoint before anything is
            published; see :func:`verify`.
        models_dir: the models directory.
        fetch: how the model is found and fetched.
        progress: who to tell.

    Returns:
        One result per type, in the order asked for.
    """
    from ggufkit.conversion import Conversion, rounding_notes
    from ggufkit.llamacpp import toolchain
    from ggufkit.llamacpp.packing import require_packable
    from ggufkit.quantize.types import is_float, parse_type
    from ggufkit.store import Store

    wanted = list(dict.fromkeys(parse_type(t) for t in types))
    rounding = rounding or RoundingOptions()
    gptq = rounding.method == "gptq"
    for type in [t for t in wanted if gptq and not is_float(t)]:
        require_packable(type)
    build = toolchain.find_build()
    store = Store(models_dir or settings.models_dir())
    fetch = fetch or FetchOptions()
    verify = _checked(verify)
    if not awq and (awq_options or AwqOptions()) != AwqOptions():
        raise UsageError("the options of AWQ's search need AWQ", "Add --awq")
    if guard and not (awq or gptq):
        raise UsageError("--guard needs AWQ or GPTQ", "Add --awq or --rounding gptq")
    started = _early_start(model, store, build, fetch, verify)
    try:
        source = _resolve(model, store, fetch, progress)
    except BaseException:
        if started:
            started.close()
        raise
    if isinstance(source, Path):
        if awq or gptq or imatrix == "auto":
            raise UsageError(
                f"{source.name} is a GGUF; AWQ, GPTQ and --imatrix auto work on a checkpoint",
                "Give the checkpoint it was made from, or leave out --awq, --rounding gptq and "
                "--imatrix auto",
            )
        return quantize(
            source, types=wanted, out=out, imatrix=imatrix, models_dir=store.root, progress=progress
        )
    if awq and isinstance(imatrix, Path):
        raise UsageError(
            f"{imatrix} was made of the model before scales are folded in",
            "Use --imatrix auto, which makes one of the folded model",
        )
    job = Conversion(
        *(store, build, source, fetch, calibration or Calibration(), wanted, progress),
        awq=awq_options or AwqOptions(),
        imatrix=imatrix,
        rounding=rounding,
        guard=guard,
        verify=verify,
        converter=started,
    )
    scales: dict[str, Artifact] = {}
    results = []
    try:
        job.check_importance()
        for type in filter(is_float, wanted if awq or gptq else ()):
            name = "AWQ" if awq else "GPTQ"
            progress.say(f"{type} rounds to floats: {name} has nothing to win, converted plainly")
        if gptq:
            job.require_known_blocks()
        if awq:
            scales = job.scales_for([t for t in wanted if not is_float(t)])
        for type in wanted:
            made = job.make(type, scales.get(type))
            notes = (*source.notes, *made.manifest.facts.get("mended", ()))
            if guard and not is_float(type):
                made, told = job.guarded(type, made, scales.get(type))
                notes = (*notes, told)
            notes += rounding_notes(made)
            results.append(_result_of(made, _place(store, made, out), notes))
    finally:
        job.close()
        if not keep_intermediate:
            job.remove_intermediates()
    return results


def _early_start(
    model: str, store: "Store", build: "NativeBuild", fetch: FetchOptions, verify: VerifyOptions
) -> "Converter | None":
    """Start what imports for seconds while the checkpoint is hashed, if it has to be.

    A checkpoint whose digest is known was most likely converted before; what is wrong
    with a broken one is for others to say.
    """
    from ggufkit.checkpoint.index import checkpoint_files, open_checkpoint
    from ggufkit.llamacpp import observing
    from ggufkit.llamacpp.toolchain import Converter

    path = Path(model).expanduser()
    if not (path / "config.json").is_file():
        return None
    try:
        open_checkpoint(
            path,
            trust_remote_code=fetch.trust_remote_code,
            allow_pickle=fetch.allow_pickle,
        )
        if store.knows(checkpoint_files(path)):
            return None
    except (GgufkitError, OSError):
        return None
    observing.warm_up()
    if verify.enabled and not fetch.trust_remote_code:
        from ggufkit.verify import check

        check.warm_up()
    return Converter(build, store.log("convert"))


def awq(
    model: str,
    *,
    out: Path,
    type: str,
    awq_options: AwqOptions | None = None,
    imatrix: bool = False,
    calibration: Calibration | None = None,
    models_dir: Path | None = None,
    fetch: FetchOptions | None = None,
    progress: Progress = SILENT,
) -> AwqResult:
    """Fold activation-aware scales into a checkpoint, and stop there.

    The result is an ordinary float checkpoint with the same function: nothing
    is quantized yet.

    Args:
        model: as for :func:`convert`, but not a GGUF.
        out: directory of the new checkpoint; must not hold anything else.
        type: the quantization type that the scales are searched for.
        awq_options: how scales are found and kept.
        imatrix: search for use with an importance matrix, and write that of the
            folded model into ``awq/`` in the result.
        calibration: what AWQ looks at.
        models_dir: the models directory.
        fetch: how the model is found and fetched.
        progress: who to tell.
    """
    from ggufkit.conversion import Conversion
    from ggufkit.llamacpp import toolchain
    from ggufkit.quantize.types import is_float, parse_type
    from ggufkit.store import Store

    wanted = parse_type(type)
    if is_float(wanted):
        raise UsageError(
            f"{wanted} rounds to floats: AWQ has nothing to win there",
            "Name the type that you will quantize to, such as --type q4_0",
        )
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UsageError(f"{out} exists and is not empty", "Name a new directory with -o")
    store = Store(models_dir or settings.models_dir())
    fetch = fetch or FetchOptions()
    source = _resolve(model, store, fetch, progress)
    if isinstance(source, Path):
        raise UsageError(f"{source.name} is a GGUF; AWQ works on a checkpoint")
    build = toolchain.find_build()
    job = Conversion(
        *(store, build, source, fetch, calibration or Calibration(), [], progress),
        awq=awq_options or AwqOptions(),
        imatrix="auto" if imatrix else None,
    )
    scales = job.scales_for([wanted])[wanted]
    job.publish_folded(scales, out)
    for note in job.prepared.notes:
        progress.warn(note)
    facts = scales.manifest.facts
    return AwqResult(
        path=out,
        scales=out / "awq" / "scales.safetensors",
        type=wanted,
        calibration=facts["calibration"],
        tokens=facts["tokens"],
        groups=facts["groups"],
        groups_left_alone=facts["groups_left_alone"],
        objective_ratio=(
            facts["objective"] / facts["objective_plain"] if "objective" in facts else None
        ),
        rows_clipped=facts["rows_clipped"],
        divergence=facts["divergence"],
        seconds=scales.manifest.seconds,
        reused=scales.reused,
    )


def quantize(
    gguf: Path,
    *,
    types: Sequence[str],
    out: Path | None = None,
    imatrix: Path | None = None,
    allow_requantize: bool = False,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> list[QuantizeResult]:
    """Quantize a GGUF with llama-quantize to one or many types.

    Args:
        gguf: the file, best of all F32, F16 or BF16.
        types: quantization types, in any case.
        out: also put the files into this directory.
        imatrix: importance matrix, as llama-imatrix writes it.
        allow_requantize: accept a file that is quantized already (it loses more).
        models_dir: the models directory.
        progress: who to tell.
    """
    from ggufkit import library
    from ggufkit.evaluate import leaks
    from ggufkit.llamacpp import toolchain
    from ggufkit.llamacpp.gguf import read_gguf
    from ggufkit.llamacpp.metadata import warn_of_vocabulary
    from ggufkit.quantize import stages
    from ggufkit.quantize.imatrix import read_imatrix
    from ggufkit.quantize.types import parse_type, require_importance, space_forecast, stem_of
    from ggufkit.store import Store, require_space

    wanted = list(dict.fromkeys(parse_type(t) for t in types))
    header = read_gguf(gguf, arrays=False)
    warn_of_vocabulary(header, progress)
    build = toolchain.find_build()
    store = Store(models_dir or settings.models_dir())
    stem = stem_of(gguf)
    if imatrix:
        read_imatrix(imatrix)
    else:
        maps = [t for t in header.tensors if len(t.shape) > 1 and t.name.startswith("blk.")]
        for type in wanted:
            require_importance(type, (t.shape[0] for t in maps))
    require_space(store.root, space_forecast(header.parameters, wanted), f"quantizing {gguf.name}")
    calibrated = leaks.calibrations_of(store, gguf, library.manifest_of(gguf))
    if imatrix:
        calibrated = (*(calibrated or ()), *leaks.records_of_imatrix(store, imatrix))
    results = []
    for type in wanted:
        recipe = QuantRecipe(type, imatrix=store.digest(imatrix).sha256 if imatrix else "")
        artifact = stages.quantize(
            store,
            build,
            model=stem,
            inputs={"gguf": store.digest(gguf, progress).sha256},
            recipe=recipe,
            stem=stem,
            origin=str(gguf),
            source=lambda: gguf,
            imatrix=imatrix,
            allow_requantize=allow_requantize,
            calibrated=None if calibrated is None else to_json(calibrated),
            progress=progress,
        )
        results.append(_result_of(artifact, _place(store, artifact, out)))
    return results


def ppl(
    text: str | Sequence[str],
    models: Sequence[Path],
    *,
    domains: Path | None = None,
    context: int = 512,
    chunks: int | None = None,
    gpu_layers: int = 0,
    allow_leak: bool = False,
    column: str | None = None,
    text_dir: Path | None = None,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> list[EvalResult]:
    """Measure the perplexity of models on texts with llama-perplexity.

    Args:
        text: name or file of a text, or of several.
        models: GGUFs, measured one after the other.
        domains: a directory of further texts, one for each domain.
        context: tokens per chunk.
        chunks: how many chunks of each text at most; None for all.
        gpu_layers: layers to put on a GPU.
        allow_leak: measure even on text that a model was calibrated on, and say so.
        column: the texts' column, if files have several.
        text_dir: offline copies of named texts.
        models_dir: the models directory, where results are kept.
        progress: told the running estimate.

    Returns:
        A result for each model on each text, text by text.

    Raises:
        GgufkitError: if a text is too short, or a model was calibrated on it.
    """
    from ggufkit.evaluate import perplexity
    from ggufkit.llamacpp import toolchain
    from ggufkit.store import Store

    if context < 8 or (chunks is not None and chunks < 1):
        raise UsageError("a context needs at least 8 tokens, and at least 1 chunk")
    _check_files(models, progress)  # a broken one is told before hours of work on others
    build = toolchain.find_build()
    store = Store(models_dir or settings.models_dir())
    specs = [text] if isinstance(text, str) else text
    read = _texts(specs, domains, context, column, text_dir, progress)
    guard = _leak_guard(store, allow_leak, progress)
    leaks = {(part.digest, model): guard.check(model, part) for part in read for model in models}
    found: dict[tuple[str, Path], EvalResult] = {}
    # Of several texts the shortest is most likely to turn out too short: that comes first.
    for part in sorted(read, key=lambda part: part.nbytes):
        for model in models:
            leak = leaks[part.digest, model]
            found[part.digest, model] = perplexity.measure(
                store,
                build,
                model,
                part,
                context=context,
                chunks=chunks,
                gpu_layers=gpu_layers,
                overlap=leak.overlap,
                notes=leak.notes,
                progress=progress,
            )
    return [found[part.digest, model] for part in read for model in models]


def _check_files(models: Sequence[Path], progress: Progress) -> None:
    """Read the headers of GGUFs, for errors and for what is to be known before work."""
    from ggufkit.llamacpp.gguf import read_gguf
    from ggufkit.llamacpp.metadata import warn_of_vocabulary

    for model in dict.fromkeys(models):
        warn_of_vocabulary(read_gguf(model, arrays=False), progress)


def _texts(
    specs: Sequence[str],
    domains: Path | None,
    context: int,
    column: str | None,
    text_dir: Path | None,
    progress: Progress,
) -> tuple[Text, ...]:
    """The texts that somebody names, and those in a directory of domains; none twice."""
    from ggufkit.evaluate.domains import check_length, load_domains
    from ggufkit.texts.load import load_text

    cache = settings.cache_dir()
    found = [
        load_text(
            spec,
            column=column,
            text_dir=text_dir or settings.text_dir(),
            cache=cache,
            progress=progress,
        )
        for spec in specs
    ]
    for text in found:
        check_length(text, context)
    if domains:
        found += load_domains(
            domains, context=context, column=column, cache=cache, progress=progress
        )
    if not found:
        raise UsageError("there is no text to measure with", "Name one, or a folder of --domains")
    first: dict[str, Text] = {}
    for text in found:
        first.setdefault(text.digest, text)
    return tuple(first.values())


def _leak_guard(store: "Store", allow: bool, progress: Progress) -> "LeakGuard":
    from ggufkit.evaluate.leaks import LeakGuard
    from ggufkit.library import manifest_of

    return LeakGuard(store, manifest_of, settings.cache_dir(), allow, progress)


def bench(
    models: Sequence[Path],
    *,
    options: BenchOptions | None = None,
    again: bool = False,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> list[SpeedResult]:
    """Measure how fast models read and write, with llama-bench.

    Args:
        models: GGUFs, measured one after the other.
        options: what to measure.
        again: measure anew what was measured before.
        models_dir: the models directory, where results are kept.
        progress: told what is measured and how far it is.

    Returns:
        Per model one result for each setting, prompts first.
    """
    from ggufkit.evaluate.speed import Bench
    from ggufkit.llamacpp import toolchain
    from ggufkit.store import Store

    store = Store(models_dir or settings.models_dir())
    speed = Bench(
        store,
        toolchain.find_build(),
        options or BenchOptions(),
        again=again,
        progress=progress,
    )
    _check_files(models, progress)
    for model in models:
        speed.settings(model)  # what cannot be measured is told before time is spent on others
    return [result for model in models for result in speed.measure(model)]


def compare(
    reference: Path,
    models: Sequence[Path],
    *,
    texts: Sequence[str] = ("wikitext",),
    domains: Path | None = None,
    context: int = 512,
    chunks: int | None = None,
    gpu_layers: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
    reference_cache: Path | None = None,
    allow_leak: bool = False,
    column: str | None = None,
    text_dir: Path | None = None,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> ComparisonReport:
    """Compare models with a reference: divergence, perplexity, and what is real of it.

    All read the same chunks in this process; chunks and figures are those of
    ``llama-perplexity --kl-divergence``, but no file of logits is written.

    Args:
        reference: the GGUF that the others are measured against, most often F32 or F16.
        models: the candidates' GGUFs.
        texts: names or files of texts; each is a comparison of its own.
        domains: a directory of further texts, one for each domain.
        context: tokens per chunk.
        chunks: how many chunks of each text at most; None for all.
        gpu_layers: layers to put on a GPU.
        confidence: of the verdicts.
        seed: of the bootstrap behind them.
        reference_cache: directory of compact references: what is there is used
            instead of reading with the reference (divergences are then lower
            bounds), what is missing is written.
        allow_leak: compare even on text that a model was calibrated on, and say so.
        column: the texts' column, if files have several.
        text_dir: offline copies of named texts.
        models_dir: the models directory, where results are kept.
        progress: who to tell.
    """
    from ggufkit.evaluate import comparison
    from ggufkit.llamacpp import toolchain
    from ggufkit.store import Store

    if context < 8 or (chunks is not None and chunks < 1):
        raise UsageError("a context needs at least 8 tokens, and at least 1 chunk")
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence lies between 0 and 1, and {confidence} does not")
    if not models:
        raise UsageError("there is no model to compare with the reference", "Name one or more")
    _check_files((reference, *models), progress)
    store = Store(models_dir or settings.models_dir())
    setting = comparison.Setting(context, chunks, gpu_layers, confidence, seed, reference_cache)
    comparer = comparison.Comparer(
        store, toolchain.find_build(), reference, list(dict.fromkeys(models)), setting, progress
    )
    read = _texts(texts, domains, context, column, text_dir, progress)
    guard = _leak_guard(store, allow_leak, progress)
    leaks = {(text.digest, m): guard.check(m, text) for text in read for m in (reference, *models)}
    return comparer.compare(read, leaks)


def task(
    name: str,
    file: Path,
    models: Sequence[Path],
    *,
    questions: int | None = None,
    gpu_layers: int = 0,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[list[TaskResult], list[TaskDifference]]:
    """Ask models questions with given answers, with llama-perplexity.

    Args:
        name: ``hellaswag``, ``winogrande``, ``multiple-choice`` or ``truthful-qa``.
        file: the questions, in the tool's own format or as published in JSON.
        models: GGUFs, asked one after the other.
        questions: ask only so many, chosen as by chance; None for all.
        gpu_layers: layers to put on a GPU.
        models_dir: the models directory, where results are kept.
        progress: told question by question.

    Returns:
        A result for each model, and for each but the first how it differs from
        the first.
    """
    from ggufkit.evaluate import tasks
    from ggufkit.evaluate.questions import choose, read_questions
    from ggufkit.llamacpp import toolchain
    from ggufkit.store import Store

    _check_files(models, progress)  # a broken one is told before hours of work on others
    build = toolchain.find_build()
    store = Store(models_dir or settings.models_dir())
    data = read_questions(file, name, progress)
    if questions:
        data = choose(data, questions)
    sheets = [
        tasks.measure(store, build, model, name, data, gpu_layers=gpu_layers, progress=progress)
        for model in models
    ]
    return [sheet.result for sheet in sheets], tasks.differences(sheets)


def report(
    models: Sequence[Path] = (),
    *,
    out: Path | None = None,
    tolerance: float = 0.05,
    force: bool = False,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> "WrittenReport":
    """Write stored results as one HTML page, and as Markdown beside it.

    Nothing is measured anew. What cannot be compared is kept apart, and what is
    left out is said.

    Args:
        models: GGUFs to show; their references come along. None for all that have
            results.
        out: the page; None for ``report.html`` in the models directory.
        tolerance: share of perplexity that a recommended file may cost.
        force: replace files that are no reports.
        models_dir: the models directory, where results are kept.
        progress: told while files are hashed.

    Raises:
        SourceError: if nothing about these models' quality is stored.
        UsageError: if a file is in the way, or nothing can be written there.
        DiskSpaceError: if the disk is full; then neither file has changed.
    """
    from ggufkit.evaluate.report import html, markdown, plots, write
    from ggufkit.evaluate.report.values import WrittenReport

    page = out or (models_dir or settings.models_dir()) / "report.html"
    write.check_targets(page, force=force)
    plots.require_matplotlib()
    found = gather_report(models, tolerance=tolerance, models_dir=models_dir, progress=progress)
    write.write_report(page, html.render(found), markdown.render(found))
    return WrittenReport(page, write.twin_of(page), found)


def gather_report(
    models: Sequence[Path] = (),
    *,
    tolerance: float = 0.05,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> "Report":
    """What :func:`report` shows, as a value; nothing is drawn or written.

    Args:
        models: as for :func:`report`.
        tolerance: as for :func:`report`.
        models_dir: as for :func:`report`.
        progress: as for :func:`report`.

    Raises:
        SourceError: if nothing about these models' quality is stored.
    """
    from ggufkit.evaluate.report.gather import gather
    from ggufkit.evaluate.results import read_results
    from ggufkit.store import Store

    store = Store(models_dir or settings.models_dir())
    results = read_results(store)
    files = _model_files(store, models, results, progress)
    manifests = [artifact.manifest for artifact in store.artifacts()]
    manifests += [file.manifest for file in files if file.manifest]
    return gather(
        results,
        files,
        makers={digest.sha256: m for m in manifests for digest in m.outputs.values()},
        tolerance=tolerance,
        only={store.digest(model, progress).sha256 for model in models} if models else None,
    )


def _model_files(
    store: "Store", models: Sequence[Path], results: "Results", progress: Progress
) -> list["ModelFile"]:
    """The files that results may belong to: those named, those kept here, those measured."""
    from ggufkit import library
    from ggufkit.errors import SourceError
    from ggufkit.evaluate import leaks
    from ggufkit.evaluate.report.values import ModelFile
    from ggufkit.llamacpp.gguf import read_gguf

    kept = library.list_models(store)
    names = [entry.name for entry in kept]
    specs = {e.path: e.name if names.count(e.name) == 1 else str(e.path) for e in kept}
    measured = [path for path in sorted(results.paths) if path.is_file()]
    places = {path.resolve(): path for path in reversed((*specs, *models, *measured))}
    files: dict[str, ModelFile] = {}
    for path in reversed(places.values()):
        # Hashing a large file that nothing was measured of would be a waste.
        if not results.may_be(path.stat().st_size):
            continue
        digest = store.digest(path, progress).sha256
        manifest, header, calibrated = library.manifest_of(path), None, None
        with suppress(IntegrityError, SourceError):
            header = read_gguf(path, arrays=False)
            calibrated = leaks.calibrations_of(store, path, manifest)
        spec = specs.get(path, str(path))
        files.setdefault(digest, ModelFile(path, digest, header, manifest, spec, calibrated))
    return list(files.values())


def verify(
    gguf: Path,
    *,
    against: str | None = None,
    allowed: Sequence[str] = (),
    models_dir: Path | None = None,
    fetch: FetchOptions | None = None,
    progress: Progress = SILENT,
) -> "Verification":
    """Compare a GGUF with the checkpoint that it was made from.

    Opened by llama.cpp; tokens, vocabulary and end tokens; the chat template; and, for a
    float GGUF, the function: predictions of both within float rounding.

    Args:
        gguf: the file. Of a quantized one the distance is a figure and no error.
        against: the checkpoint, as for :func:`convert`; None for the one that the file's
            manifest names if it is there, else the file is only opened and run.
        allowed: names of differences that are no errors.
        models_dir: the models directory.
        fetch: how the checkpoint is found and fetched.
        progress: who to tell.

    Raises:
        ToolError: if llama.cpp cannot open or run the file.
    """
    from ggufkit import library
    from ggufkit.checkpoint.config import suspicious_keys
    from ggufkit.checkpoint.index import open_checkpoint
    from ggufkit.checkpoint.prepare import prepare_checkpoint
    from ggufkit.llamacpp.gguf import read_gguf
    from ggufkit.llamacpp.metadata import warn_of_vocabulary
    from ggufkit.llamacpp.toolchain import convert_checkpoint, find_build
    from ggufkit.store import Store
    from ggufkit.verify.check import Verifier, require_names, verify_opens_only

    names = require_names(allowed)
    fetch = fetch or FetchOptions()
    header = read_gguf(gguf, arrays=False)
    warn_of_vocabulary(header, progress)
    if against is None:
        manifest = library.manifest_of(gguf)
        origin = str(manifest.facts.get("origin") or "") if manifest else ""
        if not (origin and Path(origin, "config.json").is_file()):
            return verify_opens_only(gguf)
        against = origin
    store = Store(models_dir or settings.models_dir())
    source = _resolve(against, store, fetch, progress)
    if isinstance(source, Path):
        raise UsageError(
            f"{source.name} is a GGUF; a GGUF is compared with a checkpoint",
            "Two GGUFs are compared by: ggufkit compare",
        )
    opened = open_checkpoint(
        source.path,
        trust_remote_code=fetch.trust_remote_code,
        allow_pickle=fetch.allow_pickle,
    )
    with TemporaryDirectory(prefix="ggufkit-") as scratch, ExitStack() as stack:
        prepared = prepare_checkpoint(opened, Path(scratch) / source.name)
        verifier = stack.enter_context(
            Verifier(
                prepared.index,
                original=source.path,
                trust_remote_code=fetch.trust_remote_code,
                stored=header.matrix_type,
                allowed=names,
            )
        )

        def suspects() -> Mapping[str, Json]:
            report = Path(scratch) / "config.json"
            convert_checkpoint(
                find_build(),
                prepared.path,
                Path(scratch) / "vocabulary.gguf",
                outtype="f16",
                name=source.name,
                vocab_only=True,
                options=prepared.converter_options,
                report=report,
                log=store.log("convert"),
            )
            read = json.loads(report.read_bytes())
            found: dict[str, Json] = suspicious_keys(read, prepared.index.config)
            return found

        stack.enter_context(progress.task("comparing with the checkpoint"))
        return verifier.check(gguf, suspects)


def _checked(verify: VerifyOptions | None) -> VerifyOptions:
    from ggufkit.verify.check import require_names

    options = verify or VerifyOptions()
    require_names(options.allowed)
    return options


def _resolve(
    model: str, store: "Store", fetch: FetchOptions, progress: Progress
) -> Checkpoint | Path:
    from ggufkit import sources

    return sources.resolve(
        model,
        models_dir=store.root,
        hub=fetch.hub,
        revision=fetch.revision,
        trust_remote_code=fetch.trust_remote_code,
        allow_pickle=fetch.allow_pickle,
        progress=progress,
    )


def _result_of(artifact: Artifact, path: Path, notes: tuple[str, ...] = ()) -> QuantizeResult:
    from ggufkit.quantize.stages import result_of
    from ggufkit.verify.values import notes_of

    return result_of(artifact, path, (*notes, *notes_of(artifact.manifest.facts)))


def _place(store: "Store", artifact: Artifact, out: Path | None) -> Path:
    """Where the user finds an artifact's GGUF."""
    file = artifact.file(".gguf")
    linked = store.link(file)
    return store.export(artifact, file, out) if out else linked


def build(
    backend: str = "cpu",
    *,
    source: Path | None = None,
    force: bool = False,
    install_binding: bool = True,
    cmake_args: Sequence[str] = (),
    progress: Progress = SILENT,
) -> "BuildReport":
    """Build llama.cpp's tools and libraries, and install the binding on them.

    Args:
        backend: such as ``cpu`` or ``cuda``.
        source: a llama.cpp checkout instead of the pinned source.
        force: build again even if there is a build.
        install_binding: install llama-cpp-python into this environment.
        cmake_args: further arguments for CMake.
        progress: who to tell.
    """
    from ggufkit.llamacpp import building

    return building.build(
        backend,
        source=source,
        force=force,
        install_binding=install_binding,
        cmake_args=cmake_args,
        progress=progress,
    )


def doctor(*, models_dir: Path | None = None) -> tuple["Finding", ...]:
    """Look at all that ggufkit runs on; see :func:`ggufkit.doctor.examine`."""
    from ggufkit.doctor import examine

    return examine(models_dir)


def inspect(gguf: Path, *, progress: Progress = SILENT) -> "Inspection":
    """Look at a GGUF; see :func:`ggufkit.quantize.inspect.inspect`."""
    _check_files([gguf], progress)
    from ggufkit import library
    from ggufkit.quantize.inspect import inspect as look

    return look(gguf, library.manifest_of(gguf))


def models(*, models_dir: Path | None = None) -> tuple["ModelEntry", ...]:
    """What lies in the models directory, the newest first."""
    from ggufkit import library
    from ggufkit.store import Store

    return library.list_models(Store(models_dir or settings.models_dir()))


def find_model(spec: str | None, models_dir: Path | None = None) -> Path:
    """The GGUF that somebody means; see :func:`ggufkit.library.find_model`."""
    from ggufkit import library

    return library.find_model(spec, models_dir or settings.models_dir())


def chat(
    model: Path,
    *,
    system: str | None = None,
    sampling: "Sampling | None" = None,
    style: "Style | None" = None,
    options: "ModelOptions | None" = None,
    context: "ContextOptions | None" = None,
    scales: Mapping[str, float] | None = None,
    chat_template: str | None = None,
    mmproj: Path | None = None,
    draft: "DraftOptions | None" = None,
    progress: Progress = SILENT,
) -> "Conversation":
    """Load a GGUF and begin a conversation with it; close it when done.

    Args:
        model: the GGUF.
        system: the system message; None leaves it to the chat template.
        sampling: how tokens are chosen.
        style: whether there is a chat template, and what surrounds messages.
        options: how the model is loaded: GPU layers, LoRA adapters.
        context: size and kind of the context, threads.
        scales: of LoRA adapters, by name; 1 where nothing is said.
        chat_template: a Jinja file, or the name of one of llama.cpp's own.
        mmproj: GGUF of the projector that it sees images with.
        draft: a small model that guesses ahead for it.
        progress: told warnings.

    Raises:
        NoTemplateError: if the model has no chat template, and none is given.
    """
    from ggufkit.serve.chat import Conversation
    from ggufkit.serve.model import ChatModel

    loaded = ChatModel(
        model,
        options=options,
        context=context,
        scales=scales,
        chat_template=chat_template,
        template_needed=not (style and style.completion),
        mmproj=mmproj,
        draft=draft,
        progress=progress,
    )
    return Conversation(loaded, system=system, sampling=sampling, style=style)


def run(
    model: Path,
    prompts: Path | bytes,
    out: "Path | Callable[[Mapping[str, Any]], None]",
    *,
    options: "BatchOptions | None" = None,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> "BatchReport":
    """Answer a file of prompts in batches, and go on where an earlier run ended.

    Args:
        model: the GGUF.
        prompts: JSON Lines; see :func:`ggufkit.serve.rows.read_rows`.
        out: file that answers are added to as they come, or what takes them.
        options: how.
        models_dir: the models directory, where digests are remembered.
        progress: told the rate, and how long it will take.

    Raises:
        UsageError: if there are rows that cannot be answered; before any work.
        NoTemplateError: if the model has no chat template, and none is given.
    """
    from ggufkit.serve import batch
    from ggufkit.store import Store

    name = "the prompts"
    if isinstance(prompts, Path):
        if isinstance(out, Path) and out.exists() and out.samefile(prompts):
            raise UsageError(f"{out} holds the prompts", "Name another file for the answers")
        name = str(prompts)
        try:
            prompts = prompts.read_bytes()
        except OSError as error:
            raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    store = Store(models_dir or settings.models_dir())
    return batch.run(
        model,
        prompts,
        out,
        name=name,
        options=options or batch.BatchOptions(),
        file_digest=lambda path: store.digest(path, progress).sha256,
        progress=progress,
    )


def serve(
    models: Mapping[str, Path],
    *,
    options: "ServeOptions | None" = None,
    on_start: "Callable[[str, Hosted], None]" = lambda address, first: None,
    progress: Progress = SILENT,
) -> None:
    """Serve models over HTTP, as OpenAI's clients expect it, until told to end.

    Args:
        models: GGUFs by the name that clients call them; the first is loaded at
            once, others when they are asked for.
        options: address, keys, limits, and how models are loaded.
        on_start: called with the address and the first model when all is ready.
        progress: told what is loaded, and warnings.

    Raises:
        UsageError: if the address cannot be listened on, or a package is missing.
        GgufkitError: if the first model cannot be loaded.
    """
    try:
        from ggufkit.serve.api.run import run as serve_until_end
    except ModuleNotFoundError as error:
        raise UsageError(
            f"to serve, the package '{error.name}' is needed", "pip install 'ggufkit[serve]'"
        ) from error
    serve_until_end(models, options, progress=progress, on_start=on_start)


def rpc(
    host: str = "127.0.0.1",
    port: int = 50052,
    *,
    threads: int | None = None,
    cache: bool = False,
    on_start: "Callable[[Offer], None]" = lambda offer: None,
    on_client: Callable[[bool], None] = lambda came: None,
    progress: Progress = SILENT,
) -> None:
    """Lend this machine to models that run elsewhere, until interrupted.

    Args:
        host: address to listen on, or its name; IPv4.
        port: to listen on.
        threads: where the CPU computes; None for the setting's.
        cache: keep large tensors on disk, so that they are sent only once.
        on_start: called from another thread with what is offered.
        on_client: called with True when a client comes, with False when it goes.
        progress: warned if others can reach it.

    Raises:
        UsageError: if the address cannot be listened on.
        ToolError: if the native build has no server, or it ends by itself.
    """
    from ggufkit.llamacpp import rpc as servers
    from ggufkit.llamacpp import toolchain

    address = servers.address(host)
    build = toolchain.find_build()
    if not servers.is_loopback(address):
        progress.warn(
            "llama.cpp's RPC knows no passwords and trusts its clients: whoever reaches "
            f"{host}:{port} can use this machine, and may break into it; let only a network "
            "reach it that you trust"
        )
    servers.serve(
        build,
        host=address,
        port=port,
        threads=threads or settings.threads(),
        cache=cache,
        on_start=on_start,
        on_client=on_client,
    )


def modelfile(
    model: Path,
    *,
    out: Path | None = None,
    system: str | None = None,
    context: int | None = None,
    force: bool = False,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[Path, "Modelfile"]:
    """Write an Ollama Modelfile for a GGUF.

    Args:
        model: the GGUF.
        out: the file to write; None for ``Modelfile`` beside the GGUF.
        system: the system message; None for the chat template's own.
        context: ``num_ctx``; None for the trained context, within reason.
        force: replace another file of that name.
        models_dir: the models directory, where the model's origin is looked up.
        progress: told what could not be carried over.

    Returns:
        The file and what it holds.

    Raises:
        UsageError: if there is another file of that name.
    """
    from ggufkit.store import write_atomically

    target = out or model.parent / "Modelfile"
    value = describe_for_ollama(
        model,
        target.parent,
        system=system,
        context=context,
        models_dir=models_dir,
        progress=progress,
    )
    text = value.render()
    if not force and target.exists() and target.read_bytes() != text.encode():
        raise UsageError(
            f"{target} exists and says something else",
            "Replace it with --force, or name another file with -o",
        )
    write_atomically(target, text)
    return target, value


def describe_for_ollama(
    model: Path,
    directory: Path,
    *,
    system: str | None = None,
    context: int | None = None,
    models_dir: Path | None = None,
    progress: Progress = SILENT,
) -> "Modelfile":
    """The Modelfile that :func:`modelfile` writes, as a value.

    Args:
        model: the GGUF.
        directory: where the Modelfile will lie.
        system: as for :func:`modelfile`.
        context: as for :func:`modelfile`.
        models_dir: as for :func:`modelfile`.
        progress: as for :func:`modelfile`.
    """
    import json

    from ggufkit import library
    from ggufkit.llamacpp.gguf import read_gguf
    from ggufkit.llamacpp.metadata import warn_of_vocabulary
    from ggufkit.ollama import modelfile_for
    from ggufkit.store import Store

    header = read_gguf(model)
    warn_of_vocabulary(header, progress)
    config = library.generation_config(Store(models_dir or settings.models_dir()), model)
    try:
        generation = json.loads(config.read_text(encoding="utf-8")) if config else {}
    except ValueError as error:
        raise IntegrityError(f"{config} is not JSON: {error}") from error
    if not isinstance(generation, dict):
        raise IntegrityError(f"{config} does not hold a JSON object", "Fetch the file again")
    return modelfile_for(
        header,
        directory=directory,
        system=system,
        generation_config=generation,
        context=context,
        progress=progress,
    )


DEMO_CALIBRATION = "pydoc-calibration"
DEMO_TEXT = "pydoc-measure"
DEMO_CHUNKS = 48
DEMO_QUESTION = "Why is the sky blue? Answer in one sentence."


def demo(*, models_dir: Path | None = None, progress: Progress = SILENT) -> DemoResult:
    """Run the whole way on the embedded model: make, measure, talk, export.

    Calibration and measuring text are different topics of Python's own
    documentation, so that nothing but the package index is needed.

    Args:
        models_dir: the models directory.
        progress: who to tell.
    """
    from ggufkit.serve.model import Sampling

    plain = convert("demo", types=["f32", "q4_0"], models_dir=models_dir, progress=progress)
    ways: tuple[Literal["auto"] | None, ...] = (None, "auto")
    scaled = [
        convert(
            "demo",
            types=["q4_0"],
            awq=True,
            imatrix=imatrix,
            calibration=Calibration(DEMO_CALIBRATION),
            models_dir=models_dir,
            progress=progress,
        )[0]
        for imatrix in ways
    ]
    files = (*plain, *scaled)
    measured = ppl(
        DEMO_TEXT,
        [f.path for f in files],
        chunks=DEMO_CHUNKS,
        models_dir=models_dir,
        progress=progress,
    )
    best = files[-1].path
    reference, rounded, *better = (m.perplexity for m in measured)
    sampling = Sampling(temperature=0, max_tokens=96)
    with chat(best, sampling=sampling, progress=progress) as conversation:
        answer = "".join(conversation.ask(DEMO_QUESTION))
    written, _ = modelfile(
        best,
        out=best.with_name(f"{best.stem}.Modelfile"),
        force=True,
        models_dir=models_dir,
        progress=progress,
    )
    return DemoResult(
        files=files,
        measured=tuple(measured),
        recovered=tuple((rounded - own) / (rounded - reference) for own in better),
        calibration=DEMO_CALIBRATION,
        question=DEMO_QUESTION,
        answer=answer.strip(),
        modelfile=written,
    )
