"""The stages that make GGUFs: convert, plan, quantize.

Each looks for its result in the store first. An intermediate (the float GGUF)
is asked for only by work that has to be done.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit import settings
from ggufkit.checkpoint.config import required_size
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.checkpoint.prepare import Prepared
from ggufkit.errors import CheckpointError, ToolOutputError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.gguf import read_gguf, write_skeleton
from ggufkit.llamacpp.observing import check_opens
from ggufkit.llamacpp.output import QuantizeOutput
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT, Progress
from ggufkit.quantize.coverage import (
    Coverage,
    coverage_notes,
    coverage_of,
    require_same_model,
)
from ggufkit.quantize.imatrix import read_imatrix
from ggufkit.store import Store
from ggufkit.values import (
    Artifact,
    Checkpoint,
    GGUFFile,
    Json,
    QuantizeResult,
    QuantRecipe,
    VerifyOptions,
    rounding_of,
)

if TYPE_CHECKING:
    from ggufkit.quantize.imatrix import Floats

_CONVERT_VERSION = 3
_PLAN_VERSION = 3
_QUANTIZE_VERSION = 3


@dataclass(frozen=True)
class PlannedTensor:
    """What becomes of a tensor of a checkpoint.

    Attributes:
        gguf_names: its name in the GGUF, or several if the converter splits it;
            the experts of a block share one.
        type: ggml type that llama-quantize will give it, such as ``q5_K``; empty
            if it leaves the tensor as it is.
    """

    gguf_names: tuple[str, ...]
    type: str


Compare = Callable[[Path, Json], Json]
"""Compares a float GGUF with its checkpoint, given what the converter read of the config;
facts for the manifest."""
StartedConverter = Callable[[], toolchain.Converter | None]
Verifying = Callable[[], AbstractContextManager[Compare]]


def _opens(gguf: Path, _: Json) -> Json:
    check_opens(gguf)
    return "skipped"


_OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""The intermediate keeps the checkpoint's precision: it must lose nothing."""


def outtype_of(index: CheckpointIndex) -> str:
    """The converter's output type that loses nothing of the checkpoint."""
    return _OUTTYPES.get(index.dtype, "f32")


def convert(
    store: Store,
    build: NativeBuild,
    checkpoint: Checkpoint,
    prepared: Prepared,
    scales: Artifact | None,
    fold: Callable[[Path], None] | None,
    progress: Progress,
    *,
    outtype: str | None = None,
    verifying: Verifying | None = None,
    verify: VerifyOptions | None = None,
    converter: StartedConverter = lambda: None,
) -> Artifact:
    """Convert a checkpoint, as it is or with scales folded in, to a float GGUF.

    Args:
        store: the models directory.
        build: whose converter to run.
        checkpoint: what to convert.
        prepared: the same with what could be mended.
        scales: the scales folded in, or None.
        fold: writes the folded checkpoint into a directory; None without scales.
        progress: told how far it is.
        outtype: the converter's output type; None or empty for the one that
            loses nothing of the checkpoint.
        verifying: entered before the converter starts; what it gives compares the GGUF
            with the checkpoint and returns facts for the manifest, or raises. None to
            see only that llama.cpp opens it.
        verify: what ``verifying`` was made with.
        converter: gives one that waits for its task, if there is one.
    """
    suffix = "-awq" if scales else ""
    outtype = outtype or outtype_of(prepared.index)

    def work(directory: Path) -> dict[str, Json]:
        source, report = prepared.path, directory / ".config.json"
        if fold:
            source = directory / ".source" / checkpoint.name
            fold(source)
        out = directory / f"{checkpoint.name}{suffix}-{outtype.upper()}.gguf"
        with verifying() if verifying else nullcontext(_opens) as compare:
            ran = toolchain.convert_checkpoint(
                build,
                source,
                out,
                outtype=outtype,
                name=checkpoint.name,
                options=prepared.converter_options,
                report=report,
                started=converter(),
                log=store.log("convert"),
                progress=progress,
            )
            if fold:
                # Not kept until publishing: disk is what a 7B model is short of.
                shutil.rmtree(source.parent)
            read = json.loads(report.read_bytes())
            with store.hashing(out):
                verification = compare(out, read)
        return {
            "peak_rss_nbytes": ran.peak_rss_nbytes,
            "mended": [*prepared.notes, *_filled_notes(read)],
            "config": read,
            "verification": verification,
        }

    return store.run(
        "convert",
        version=_CONVERT_VERSION,
        model=checkpoint.name,
        inputs={"checkpoint": checkpoint.digest, "scales": scales_digest(scales)},
        options={
            **{"outtype": outtype, "name": checkpoint.name},
            **(verify.key if verify else {}),
        },
        tool={"llama.cpp": build.commit},
        work=work,
        progress=progress,
    )


def _filled_notes(report: Mapping[str, Json]) -> list[str]:
    """What the config lacked and llama.cpp needs, in words."""
    return [
        f"config.json lacks {key}; {json.dumps(value)} was taken from {source}"
        for key, (value, source) in report["filled"].items()
        if source.startswith("transformers")
    ]


SCALES_FILE = "scales.safetensors"


def scales_file(scales: Artifact) -> Path:
    """The file of scales in an artifact."""
    return scales.path / SCALES_FILE


def scales_digest(scales: Artifact | None) -> str:
    """What identifies scales in a stage's inputs; empty without scales."""
    return scales.manifest.outputs[SCALES_FILE].sha256 if scales else ""


def plan(
    store: Store,
    build: NativeBuild,
    checkpoint: Checkpoint,
    prepared: Prepared,
    type: str,
    progress: Progress,
    *,
    imatrix: bool = False,
    meanwhile: Callable[[], object] | None = None,
    converter: StartedConverter = lambda: None,
) -> dict[str, PlannedTensor]:
    """Ask llama-quantize which ggml type each tensor of a checkpoint will get.

    The question is put to ``--dry-run`` with a GGUF of the right names, shapes
    and metadata but no data, so it costs no conversion. With an importance
    matrix llama-quantize mixes otherwise, whatever the matrix says.

    ``converter`` gives one that waits for its task, if there is one.
    ``meanwhile`` is called beside the converter, a process of seconds, if that
    has to run; it is for what the caller will need anyway.

    Returns:
        What becomes of each tensor, by its name in the checkpoint.
    """
    inputs = {"checkpoint": checkpoint.digest}
    tool = {"llama.cpp": build.commit}

    def write_vocab(directory: Path) -> dict[str, Json]:
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(meanwhile or (lambda: None))
            toolchain.convert_checkpoint(
                build,
                prepared.path,
                directory / "vocab.gguf",
                outtype="f16",
                name=checkpoint.name,
                vocab_only=True,
                options=prepared.converter_options,
                started=converter(),
                log=store.log("convert"),
                progress=progress,
            )
            beside.result()
        return {}

    def write_plan(directory: Path) -> dict[str, Json]:
        vocab = store.run(
            "vocab",
            version=_PLAN_VERSION,
            model=checkpoint.name,
            inputs=inputs,
            options={"name": checkpoint.name},
            tool=tool,
            work=write_vocab,
            progress=progress,
        )
        names = _gguf_names(vocab.file(".gguf"), prepared.index)
        skeleton = directory / ".skeleton.gguf"
        tensors = _skeleton_tensors(prepared.index, names)
        write_skeleton(vocab.file(".gguf"), skeleton, tensors)
        level = directory / ".level-imatrix.gguf"
        if imatrix:
            _write_level_imatrix(level, tensors)
        ran = toolchain.quantize(
            build,
            skeleton.absolute(),
            skeleton.absolute(),
            type,
            imatrix=level if imatrix else None,
            dry_run=True,
            threads=settings.threads(),
            log=store.log("quantize"),
        )
        types = {tensor.name: tensor.type for tensor in ran.tensors}
        planned = {hf: [told, types.get(told[0], "")] for hf, told in names.items()}
        (directory / "plan.json").write_text(json.dumps(planned, indent=1), encoding="utf-8")
        return {}

    artifact = store.run(
        "plan",
        version=_PLAN_VERSION,
        model=checkpoint.name,
        inputs=inputs,
        options={"type": type, "imatrix": imatrix},
        tool=tool,
        work=write_plan,
        progress=progress,
    )
    planned = json.loads(artifact.file(".json").read_text(encoding="utf-8"))
    return {hf: PlannedTensor(tuple(told), type) for hf, (told, type) in planned.items()}


_EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


_SPLIT = {"attention.wqkv.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight")}
"""What the converter takes apart, by the ends of names (InternLM2)."""


def _gguf_names(vocab: Path, index: CheckpointIndex) -> dict[str, tuple[str, ...]]:
    """GGUF names of the checkpoint's tensors, as the converter gives them.

    The maps of all experts become one tensor, so they have one name.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = read_gguf(vocab, arrays=False).metadata["general.architecture"]
    arch = next((a for a, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise CheckpointError(f"the gguf package does not know the architecture '{architecture}'")
    blocks = required_size(index.config, "num_hidden_layers", "n_layer")
    names = get_tensor_name_map(arch, blocks)
    found: dict[str, tuple[str, ...]] = {}
    for name in index.tensors:
        together = _EXPERT_NUMBER.sub(".experts.", name)
        mapped = names.get_name(together, try_suffixes=(".weight", ".bias"))
        if mapped and not (name == "lm_head.weight" and index.config.get("tie_word_embeddings")):
            found[name] = (mapped,)
        for end, parts in _SPLIT.items():
            if name.endswith(end):
                block = next(p for p in name.split(".") if p.isdigit())
                found[name] = tuple(f"blk.{block}.{part}" for part in parts)
    return found


def _skeleton_tensors(
    index: CheckpointIndex, names: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape (columns first) and type of each tensor of the GGUF to come."""
    members: dict[str, list[str]] = {}
    for hf, told in names.items():
        members.setdefault(told[0], []).append(hf)
    # GPT-2 keeps its linear maps as (inputs, outputs), the others the other way round.
    transposed = "GPT2LMHeadModel" in index.architectures
    tensors = []
    for name, parts in members.items():
        shape = index.tensors[parts[0]].shape
        columns_first = shape if transposed and _is_map(parts[0]) else tuple(reversed(shape))
        if _EXPERT_NUMBER.search(parts[0]):
            columns_first = (*columns_first, len(parts))
        tensors.append((name, columns_first, "F32" if len(shape) == 1 else "F16"))
    return tensors


def _is_map(name: str) -> bool:
    return ".h." in name or name.startswith("h.")


def _write_level_imatrix(path: Path, tensors: list[tuple[str, tuple[int, ...], str]]) -> None:
    """An importance matrix for which all inputs are alike."""
    import numpy as np

    from ggufkit.quantize.imatrix import write_imatrix

    entries = {
        name: [(np.ones(shape[0], np.float32), 1)] * (shape[2] if len(shape) > 2 else 1)
        for name, shape, _ in tensors
        if len(shape) > 1
    }
    write_imatrix(path, entries, dataset="", chunk_tokens=1, chunks=1)


def imatrix_entries(
    planned: "Mapping[str, PlannedTensor]", squares: "Mapping[str, tuple[Floats, int]]"
) -> "dict[str, list[tuple[Floats, int]]]":
    """Entries of an importance matrix by GGUF name, from those by checkpoint name.

    Experts of one GGUF tensor are put in the order of their numbers.
    """
    entries: dict[str, dict[int, tuple[Floats, int]]] = {}
    for name, seen in squares.items():
        number = _EXPERT_NUMBER.search(name)
        for gguf_name in planned[name].gguf_names if name in planned else ():
            entries.setdefault(gguf_name, {})[int(number[1]) if number else 0] = seen
    return {name: [parts[n] for n in sorted(parts)] for name, parts in entries.items()}


def quantize(
    store: Store,
    build: NativeBuild,
    *,
    model: str,
    inputs: Mapping[str, Json],
    recipe: QuantRecipe,
    stem: str,
    origin: str,
    source: Callable[[], Path],
    imatrix: Path | None = None,
    allow_requantize: bool = False,
    calibrated: Sequence[Json] | None = None,
    verify: VerifyOptions | None = None,
    verification: Callable[[], Json] | None = None,
    own_imatrix: bool = False,
    mended: Callable[[], Sequence[str]] = tuple,
    progress: Progress,
) -> Artifact:
    """Quantize a GGUF to one type with llama-quantize.

    Args:
        store: the models directory.
        build: whose llama-quantize to run.
        model: name of the model.
        inputs: digests that identify what ``source`` would give.
        recipe: type and overrides.
        stem: file name before the type.
        origin: where the model came from, for people.
        source: gives the GGUF to quantize; called only if there is work.
        imatrix: importance matrix, whose digest the recipe holds.
        allow_requantize: let already quantized tensors be quantized again.
        calibrated: on what texts the file is calibrated, for the manifest; None if
            that is not known. See :mod:`ggufkit.evaluate.leaks`.
        verify: how the source is compared with its checkpoint.
        verification: what came of it; called after ``source``.
        own_imatrix: whether the matrix was made here, of this very model.
        mended: what was mended in the source's checkpoint; called after ``source``.
        progress: told how far it is, and warned of what the matrix does not cover.

    Raises:
        CheckpointError: if the matrix was made of another model.
    """

    def work(directory: Path) -> dict[str, Json]:
        out = directory / f"{stem}-{recipe.type}.gguf"

        def run(*, dry_run: bool = False) -> QuantizeOutput:
            return toolchain.quantize(
                build,
                gguf,
                out.absolute(),
                recipe.type,
                imatrix=imatrix,
                tensor_types=recipe.tensor_types,
                allow_requantize=allow_requantize,
                dry_run=dry_run,
                threads=settings.threads(),
                log=store.log("quantize"),
                progress=SILENT if dry_run else progress,
            )

        gguf = source().absolute()
        covered = _covered(imatrix, run(dry_run=True), own=own_imatrix) if imatrix else None
        told = run()
        with store.hashing(out):
            check_opens(out)
        written = read_gguf(out, arrays=False)
        facts: dict[str, Json] = {
            **({} if verification is None else {"verification": verification()}),
            "bits_per_weight": written.bits_per_weight,
            "bits_per_weight_asked": told.bits_per_weight_asked(written),
            "fallbacks": told.fallbacks,
            "tensors": len(written.tensors),
            "nbytes": written.nbytes,
            "peak_rss_nbytes": told.peak_rss_nbytes,
            "origin": origin,
            "mended": list(mended()),
            **({} if calibrated is None else {"calibrated": list(calibrated)}),
            **_imatrix_facts(covered, told),
            **_experts_facts(recipe.type, written),
        }
        for note in notes_of(facts):
            progress.warn(note)
        return facts

    return store.run(
        "quantize",
        version=_QUANTIZE_VERSION,
        model=model,
        inputs=inputs,
        options={
            **{"recipe": recipe, "stem": stem, "allow_requantize": allow_requantize},
            **(verify.key if verify else {}),
        },
        tool={"llama.cpp": build.commit},
        work=work,
        progress=progress,
    )


def _covered(imatrix: Path, planned: QuantizeOutput, *, own: bool) -> Coverage:
    """What a matrix covers, by its file and llama-quantize's plan; before the work."""
    entries = read_imatrix(imatrix)
    covered = coverage_of(entries, planned.tensors)
    if not own:
        require_same_model(imatrix, entries, planned.tensors, covered)
    return covered


def _imatrix_facts(covered: Coverage | None, told: QuantizeOutput) -> dict[str, Json]:
    """What a matrix covers, after llama-quantize's own remarks were compared with it."""
    if covered is None:
        return {}
    inside = {name for name in told.without_importance if "blk." in name}
    if unexpected := sorted(inside - set(covered.without)):
        raise ToolOutputError(
            f"llama-quantize made no use of the importance matrix's entry for {unexpected[0]}"
        )
    return {"imatrix": covered.facts}


_EXPERTS_ALONE = "MXFP4_MOE"


def _experts_facts(type: str, written: GGUFFile) -> dict[str, Json]:
    """Whether a type that is for experts found none."""
    none = type == _EXPERTS_ALONE and all(t.type != "MXFP4" for t in written.tensors)
    return {"no_experts": True} if none else {}


def notes_of(facts: Mapping[str, Json]) -> tuple[str, ...]:
    """What a user is to know of a quantized file beside its numbers."""
    notes = coverage_notes(facts)
    if facts.get("no_experts"):
        notes += (
            f"{_EXPERTS_ALONE} puts the maps of experts alone into MXFP4 (4.25 bits per weight); "
            "this model has none, so all that is quantized became Q8_0, and the file has "
            f"{facts['bits_per_weight']:.2f} bits per weight",
        )
    return notes


def result_of(artifact: Artifact, path: Path, notes: tuple[str, ...] = ()) -> QuantizeResult:
    """The row to report for a quantize artifact, its file shown at ``path``."""
    facts = artifact.manifest.facts
    recipe = artifact.manifest.options["recipe"]
    return QuantizeResult(
        path=path,
        type=recipe["type"],
        awq=bool(artifact.manifest.inputs.get("scales")),
        imatrix=bool(recipe["imatrix"]),
        rounding=rounding_of(facts),
        bits_per_weight_asked=facts["bits_per_weight_asked"],
        bits_per_weight=facts["bits_per_weight"],
        fallbacks=facts["fallbacks"],
        tensors=facts["tensors"],
        nbytes=facts["nbytes"],
        seconds=artifact.manifest.seconds,
        reused=artifact.reused,
        notes=(*notes, *notes_of(facts)),
    )
