"""The stages that make GGUFs: convert, plan, quantize.

Each looks for its result in the store first. An intermediate (the float GGUF)
is asked for only by work that has to be done.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ggufkit import settings
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.gguf import read_gguf, write_skeleton
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Progress
from ggufkit.store import Store
from ggufkit.values import Artifact, Checkpoint, Json, QuantizeResult, QuantRecipe

_CONVERT_VERSION = 1
_PLAN_VERSION = 1
_QUANTIZE_VERSION = 1

_OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""The intermediate keeps the checkpoint's precision: it must lose nothing."""


def outtype_of(index: CheckpointIndex) -> str:
    """The converter's output type that loses nothing of the checkpoint."""
    return _OUTTYPES.get(index.dtype, "f32")


def convert(
    store: Store,
    build: NativeBuild,
    checkpoint: Checkpoint,
    index: CheckpointIndex,
    scales: Artifact | None,
    fold: Callable[[Path], None] | None,
    progress: Progress,
) -> Artifact:
    """Convert a checkpoint, as it is or with scales folded in, to a float GGUF.

    Args:
        store: the models directory.
        build: whose converter to run.
        checkpoint: what to convert.
        index: its index.
        scales: the scales folded in, or None.
        fold: writes the folded checkpoint into a directory; None without scales.
        progress: told how far it is.
    """
    suffix = "-awq" if scales else ""
    outtype = outtype_of(index)

    def work(directory: Path) -> dict[str, Json]:
        source = _named(directory, checkpoint)
        if fold:
            source.unlink()
            fold(source)
        out = directory / f"{checkpoint.name}{suffix}-{outtype.upper()}.gguf"
        ran = toolchain.convert_checkpoint(
            build,
            source,
            out,
            outtype=outtype,
            name=checkpoint.name,
            log=store.log("convert"),
            progress=progress,
        )
        # Not kept until publishing: disk is what a 7B model is short of.
        shutil.rmtree(source.parent)
        return {"peak_rss_nbytes": ran.peak_rss_nbytes}

    return store.run(
        "convert",
        version=_CONVERT_VERSION,
        model=checkpoint.name,
        inputs={"checkpoint": checkpoint.digest, "scales": scales_digest(scales)},
        options={"outtype": outtype, "name": checkpoint.name},
        tool={"llama.cpp": build.commit},
        work=work,
        progress=progress,
    )


def _named(directory: Path, checkpoint: Checkpoint) -> Path:
    """A link to the checkpoint by the model's name, in scratch.

    The converter makes metadata (``general.basename``, ``general.finetune``) out
    of the directory's name, which may be anything; so it is given this one.
    """
    link = directory / ".source" / checkpoint.name
    link.parent.mkdir()
    link.symlink_to(checkpoint.path.absolute(), target_is_directory=True)
    return link


def scales_digest(scales: Artifact | None) -> str:
    """What identifies scales in a stage's inputs; empty without scales."""
    return scales.manifest.outputs["scales.safetensors"].sha256 if scales else ""


def plan(
    store: Store,
    build: NativeBuild,
    checkpoint: Checkpoint,
    index: CheckpointIndex,
    type: str,
    progress: Progress,
) -> dict[str, str]:
    """Ask llama-quantize which ggml type each tensor of a checkpoint will get.

    The question is put to ``--dry-run`` with a GGUF of the right names, shapes
    and metadata but no data, so it costs no conversion.

    Returns:
        Checkpoint tensor name to ggml type, such as ``q5_K``.
    """
    inputs = {"checkpoint": checkpoint.digest}
    tool = {"llama.cpp": build.commit}

    def write_vocab(directory: Path) -> dict[str, Json]:
        toolchain.convert_checkpoint(
            build,
            _named(directory, checkpoint),
            directory / "vocab.gguf",
            outtype="f16",
            name=checkpoint.name,
            vocab_only=True,
            log=store.log("convert"),
            progress=progress,
        )
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
        names = _gguf_names(vocab.file(".gguf"), index)
        shapes = [
            (name, tuple(reversed(index.tensors[hf].shape)), _skeleton_type(index, hf))
            for hf, name in names.items()
        ]
        skeleton = directory / ".skeleton.gguf"
        write_skeleton(vocab.file(".gguf"), skeleton, shapes)
        told = toolchain.quantize(
            build,
            skeleton.absolute(),
            skeleton.absolute(),
            type,
            dry_run=True,
            threads=settings.threads(),
            log=store.log("quantize"),
        )
        types = {tensor.name: tensor.type for tensor in told.tensors}
        planned = {hf: types[name] for hf, name in names.items() if name in types}
        (directory / "plan.json").write_text(json.dumps(planned, indent=1), encoding="utf-8")
        return {}

    artifact = store.run(
        "plan",
        version=_PLAN_VERSION,
        model=checkpoint.name,
        inputs=inputs,
        options={"type": type},
        tool=tool,
        work=write_plan,
        progress=progress,
    )
    planned: dict[str, str] = json.loads(artifact.file(".json").read_text(encoding="utf-8"))
    return planned


def _skeleton_type(index: CheckpointIndex, name: str) -> str:
    return "F32" if len(index.tensors[name].shape) == 1 else "F16"


def _gguf_names(vocab: Path, index: CheckpointIndex) -> dict[str, str]:
    """GGUF names of the checkpoint's tensors, as the converter gives them."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = read_gguf(vocab, arrays=False).metadata["general.architecture"]
    arch = next((a for a, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise CheckpointError(f"the gguf package does not know the architecture '{architecture}'")
    names = get_tensor_name_map(arch, int(index.config["num_hidden_layers"]))
    found = {}
    for name in index.tensors:
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped and not (name == "lm_head.weight" and index.config.get("tie_word_embeddings")):
            found[name] = mapped
    return found


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
        progress: told how far it is.
    """

    def work(directory: Path) -> dict[str, Json]:
        out = directory / f"{stem}-{recipe.type}.gguf"
        told = toolchain.quantize(
            build,
            source().absolute(),
            out.absolute(),
            recipe.type,
            imatrix=imatrix,
            tensor_types=recipe.tensor_types,
            allow_requantize=allow_requantize,
            threads=settings.threads(),
            log=store.log("quantize"),
            progress=progress,
        )
        written = read_gguf(out, arrays=False)
        return {
            "bits_per_weight": written.bits_per_weight,
            "bits_per_weight_asked": told.bits_per_weight_asked(written),
            "fallbacks": told.fallbacks,
            "tensors": len(written.tensors),
            "nbytes": written.nbytes,
            "peak_rss_nbytes": told.peak_rss_nbytes,
            "origin": origin,
        }

    return store.run(
        "quantize",
        version=_QUANTIZE_VERSION,
        model=model,
        inputs=inputs,
        options={"recipe": recipe, "stem": stem, "allow_requantize": allow_requantize},
        tool={"llama.cpp": build.commit},
        work=work,
        progress=progress,
    )


def result_of(
    artifact: Artifact, path: Path, awq: bool, notes: tuple[str, ...] = ()
) -> QuantizeResult:
    """The row to report for a quantize artifact, its file shown at ``path``."""
    facts = artifact.manifest.facts
    return QuantizeResult(
        path=path,
        type=artifact.manifest.options["recipe"]["type"],
        awq=awq,
        bits_per_weight_asked=facts["bits_per_weight_asked"],
        bits_per_weight=facts["bits_per_weight"],
        fallbacks=facts["fallbacks"],
        tensors=facts["tensors"],
        nbytes=facts["nbytes"],
        seconds=artifact.manifest.seconds,
        reused=artifact.reused,
        notes=notes,
    )
