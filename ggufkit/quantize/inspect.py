"""What a GGUF holds, in the words that people look for."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata, split_count
from ggufkit.values import GGUFFile, Json, RunManifest, TensorInfo


@dataclass(frozen=True)
class TypeShare:
    """How many tensors, elements and bytes a type has."""

    type: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A GGUF, looked at.

    Attributes:
        path: the file.
        nbytes: its size.
        architecture: such as ``llama``.
        name: ``general.name``, if it has one.
        parameters: number of elements of all tensors.
        bits_per_weight: over all tensors.
        types: by share of bytes, the largest first.
        context_length: tokens it was trained for.
        embedding_length: width of the residual stream.
        blocks: number of blocks.
        heads: query heads.
        kv_heads: key/value heads.
        vocabulary: number of tokens.
        tokenizer: model and pre-tokenizer.
        special_tokens: text by role, such as ``eos``.
        chat_template: the template's text, or empty.
        rope_base: base frequency of the rotary embedding, if it has one.
        license: ``general.license``, if it has one.
        split: number of files that the model is split into.
        provenance: keys of ``general``, ``quantize`` and ``ggufkit`` that say where it came from.
        manifest: how ggufkit made it, if it did.
        tensors: all tensors.
    """

    path: Path
    nbytes: int
    architecture: str
    name: str
    parameters: int
    bits_per_weight: float
    types: tuple[TypeShare, ...]
    context_length: int | None
    embedding_length: int | None
    blocks: int | None
    heads: Json
    kv_heads: Json
    vocabulary: int
    tokenizer: str
    special_tokens: dict[str, str]
    chat_template: str
    rope_base: float | None
    license: str
    split: int
    provenance: dict[str, Json]
    manifest: RunManifest | None
    tensors: tuple[TensorInfo, ...]


def inspect(path: Path, manifest: RunManifest | None = None) -> Inspection:
    """Look at a GGUF.

    Args:
        path: the file.
        manifest: how it was made, if that is known.

    Raises:
        SourceError: if there is no such file.
        IntegrityError: if it is not a GGUF, or a broken one.
    """
    header = read_gguf(path)
    keys = header.metadata
    look = Metadata(header)
    own = look.of_architecture
    model = [str(keys[k]) for k in ("tokenizer.ggml.model", "tokenizer.ggml.pre") if k in keys]
    return Inspection(
        path=path,
        nbytes=header.nbytes,
        architecture=look.architecture or "unknown",
        name=str(keys.get("general.name", "")),
        parameters=header.parameters,
        bits_per_weight=header.bits_per_weight,
        types=_shares(header),
        context_length=look.trained_context,
        embedding_length=own("embedding_length"),
        blocks=own("block_count"),
        heads=own("attention.head_count"),
        kv_heads=own("attention.head_count_kv"),
        vocabulary=len(look.tokens),
        tokenizer=", ".join(model),
        special_tokens={role: text for role, (_, text) in look.special_tokens.items() if text},
        chat_template=look.chat_template,
        rope_base=own("rope.freq_base"),
        license=str(keys.get("general.license", "")),
        split=split_count(header),
        provenance={
            key: value
            for key, value in keys.items()
            if key.startswith(("general.", "quantize.", "ggufkit.")) and not isinstance(value, list)
        },
        manifest=manifest,
        tensors=header.tensors,
    )


def _shares(header: GGUFFile) -> tuple[TypeShare, ...]:
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in header.tensors:
        tensors[tensor.type] += 1
        parameters[tensor.type] += tensor.parameters
        nbytes[tensor.type] += tensor.nbytes
    return tuple(TypeShare(t, tensors[t], parameters[t], n) for t, n in nbytes.most_common())
