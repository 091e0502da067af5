"""What is in a checkpoint directory, without reading any weights.

Only the JSON files and the headers of the safetensors shards are read, with
bounds, so a broken or hostile checkpoint is refused before anything costly or
dangerous happens. Format: https://github.com/huggingface/safetensors#format
(eight bytes little-endian length, a JSON header, then the tensors' bytes).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ggufkit.checkpoint.quantization import check_not_quantized
from ggufkit.errors import CheckpointError, IntegrityError, SourceError
from ggufkit.values import Json

SHARD_INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
"""Holds all weights, if there is such a file; transformers looks for it first."""
MAX_HEADER_NBYTES = 100_000_000
"""The safetensors library's own limit."""
MAX_JSON_NBYTES = 256 * 1024 * 1024

BITS: dict[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
}  # fmt: skip
"""Width of each safetensors dtype in bits."""

ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
)
COMPANION_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".py"})
COMPANION_STEMS = ("license", "licence", "notice", "copying", "use_policy")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: the checkpoint's name for it.
        shard: file name of its shard.
        dtype: safetensors' spelling, such as ``BF16``.
        shape: rows first, as in torch.
        start: offset of its first byte, from the start of the file.
        nbytes: its size.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointIndex:
    """What a checkpoint directory holds.

    Attributes:
        path: the directory.
        config: ``config.json``.
        shards: file names of the safetensors shards, in order.
        tensors: name to entry, in order of shards and of bytes within them.
        metadata: the ``__metadata__`` of each shard.
        pickles: file names of pickled weights, if there are no safetensors.
    """

    path: Path
    config: dict[str, Json]
    shards: tuple[str, ...]
    tensors: dict[str, TensorEntry]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    pickles: tuple[str, ...] = ()

    @property
    def architectures(self) -> tuple[str, ...]:
        """Class names, such as ``LlamaForCausalLM``."""
        return tuple(self.config["architectures"])

    @property
    def dtype(self) -> str:
        """The dtype of most weights, in safetensors' spelling; empty for pickles."""
        counts: Counter[str] = Counter()
        for entry in self.tensors.values():
            counts[entry.dtype] += entry.parameters
        return counts.most_common(1)[0][0] if counts else ""

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(t.parameters for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (of the pickle files, if these hold the weights)."""
        pickled = sum((self.path / name).stat().st_size for name in self.pickles)
        return pickled + sum(t.nbytes for t in self.tensors.values())

    def of_shard(self, shard: str) -> list[TensorEntry]:
        """The tensors of one shard, in order of their bytes."""
        return [t for t in self.tensors.values() if t.shard == shard]


def open_checkpoint(
    path: Path | str, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> CheckpointIndex:
    """Look into a checkpoint directory and refuse what cannot be handled.

    Args:
        path: the directory.
        trust_remote_code: accept a checkpoint that brings its own Python code.
        allow_pickle: accept pickled ``.bin`` weights if there are no others.

    Raises:
        SourceError: there is no such directory.
        CheckpointError: something is missing, or of a kind that is refused.
        IntegrityError: a file is truncated or malformed.
    """
    directory = Path(path)
    config = open_config(directory, trust_remote_code=trust_remote_code)
    shards, weight_map = _find_shards(directory)
    if not shards:
        _check_not_adapter(directory)
        return CheckpointIndex(
            directory, config, (), {}, pickles=_find_pickles(directory, allow_pickle)
        )
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, dict[str, str]] = {}
    for shard in shards:
        entries, metadata[shard] = read_safetensors_header(directory / shard)
        for entry in entries:
            if entry.name in tensors:
                raise CheckpointError(
                    f"Tensor '{entry.name}' is in two shards of {directory}: "
                    f"{tensors[entry.name].shard} and {shard}",
                    f"Remove the files that {SHARD_INDEX} does not name, or fetch the model again",
                )
            tensors[entry.name] = entry
    if absent := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(
            f"{len(absent)} tensor(s) named in {directory / SHARD_INDEX} are in no shard, "
            f"the first is '{absent[0]}'",
            "Fetch the model again: index and shards do not belong together",
        )
    kinds = {name: (entry.dtype, len(entry.shape)) for name, entry in tensors.items()}
    check_not_quantized(directory, config, kinds)
    if any(".lora_A." in name for name in tensors):
        raise _adapter(directory)
    return CheckpointIndex(directory, config, shards, tensors, metadata)


def open_config(path: Path, *, trust_remote_code: bool = False) -> dict[str, Json]:
    """Check all but the weights, so that a download can stop before them.

    Returns:
        ``config.json``.

    Raises:
        SourceError, CheckpointError, IntegrityError: as :func:`open_checkpoint`.
    """
    _check_directory(path)
    config = _read_config(path)
    if (path / SHARD_INDEX).is_file() and not (path / WHOLE).is_file():
        # Names show most kinds of quantized weights before they are fetched.
        names = dict.fromkeys(_weight_map(path / SHARD_INDEX), ("", 0))
        check_not_quantized(path, config, names)
    if not trust_remote_code:
        _check_no_remote_code(path, config)
    _check_tokenizer(path)
    return config


def read_safetensors_header(path: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Returns:
        Its tensors in order of their bytes, and its ``__metadata__``.

    Raises:
        IntegrityError: the file is truncated or its header is malformed.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise _truncated(path, 8, size)
        if length > MAX_HEADER_NBYTES:
            raise IntegrityError(
                f"{path} claims a header of {length:,} bytes (the limit is {MAX_HEADER_NBYTES:,})",
                "It is not a safetensors file, or it is damaged: fetch it again",
            )
        if size < 8 + length:
            raise _truncated(path, 8 + length, size)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        entries = [_entry(path.name, name, row, 8 + length) for name, row in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} has a malformed safetensors header: {error}", "Fetch the file again"
        ) from error
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    _check_layout(path, entries, 8 + length, size)
    return entries, {str(k): str(v) for k, v in metadata.items()}


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint that matter, sorted by name: weights and companions."""
    shards, _ = _find_shards(path)
    weights = [path / n for n in (shards or _find_pickles(path, allow_pickle=True))]
    return sorted([*weights, *companion_files(path)])


def companion_files(path: Path) -> list[Path]:
    """Everything beside the weights: config, tokenizer, templates, licence, model card."""
    found = [p for p in path.iterdir() if p.is_file() and _is_companion(p)]
    extra = path / "additional_chat_templates"
    found += extra.glob("*.jinja") if extra.is_dir() else []
    return sorted(found)


def digest_checkpoint(path: Path, digest_file: Callable[[Path], str]) -> str:
    """SHA-256 (hex) over the sorted names and digests of the files that matter.

    Args:
        path: the checkpoint's directory.
        digest_file: gives the SHA-256 (hex) of a file.
    """
    total = sha256()
    for file in checkpoint_files(path):
        total.update(f"{file.relative_to(path).as_posix()}\0{digest_file(file)}\n".encode())
    return total.hexdigest()


def _is_companion(path: Path) -> bool:
    # The manifest is the store's: it is about the directory, not part of the model.
    if path.name.startswith(".") or path.name == "manifest.json":
        return False
    if path.suffix in WEIGHT_SUFFIXES:
        return False
    return path.suffix in COMPANION_SUFFIXES or path.name.lower().startswith(COMPANION_STEMS)


def _check_directory(path: Path) -> None:
    if not path.exists():
        raise SourceError(f"There is no {path}", "Check the path, or name a model: hf:ORG/NAME")
    if not path.is_dir():
        raise SourceError(
            f"{path} is a file, not a checkpoint directory",
            "Name the directory that holds config.json and the safetensors files",
        )
    names = sorted(p.name for p in path.iterdir())
    if not names:
        raise CheckpointError(f"{path} is empty", "Download the model into it first")
    if "config.json" in names:
        return
    if ADAPTER_CONFIG in names:
        raise _adapter(path)
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        raise CheckpointError(
            f"{path} has no config.json, but GGUF files", f"Name the file: {path / ggufs[0]}"
        )
    raise CheckpointError(
        f"{path} has no config.json",
        "A Hugging Face checkpoint is needed: config.json, tokenizer files, *.safetensors",
    )


def _check_not_adapter(path: Path) -> None:
    if (path / ADAPTER_CONFIG).is_file() and not any(path.glob("pytorch_model*.bin")):
        raise _adapter(path)


def _adapter(path: Path) -> CheckpointError:
    """The error for an adapter, with the command that makes a model of it."""
    base = ""
    if (path / ADAPTER_CONFIG).is_file():
        settings = read_json(path / ADAPTER_CONFIG)
        named = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        base = f" of {named}" if isinstance(named, str) and named else ""
    merge = (
        f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{path}')"
        ".merge_and_unload().save_pretrained('MERGED')"
    )
    return CheckpointError(
        f"{path} is a LoRA adapter{base}, not a whole model: it holds no weights of its own",
        f'Merge it into its base model: python -c "{merge}", then copy the tokenizer files '
        "into MERGED and convert that",
    )


def read_json(path: Path) -> Any:
    """The value of a JSON file of a checkpoint.

    Raises:
        IntegrityError: it is absurdly large.
        CheckpointError: it is not JSON.
    """
    try:
        if (nbytes := path.stat().st_size) > MAX_JSON_NBYTES:
            raise IntegrityError(f"{path} is too large for a JSON file ({nbytes:,} bytes)")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}", "Fetch the file again"
        ) from error


def _read_config(path: Path) -> dict[str, Json]:
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path / 'config.json'} is not a JSON object", "Fetch the file again"
        )
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise CheckpointError(
            f"{path / 'config.json'} names no architectures",
            'It must say, for example, "architectures": ["LlamaForCausalLM"]',
        )
    return config


def _check_no_remote_code(path: Path, config: dict[str, Json]) -> None:
    found = [("config.json", config)]
    tokenizer_config = path / "tokenizer_config.json"
    if tokenizer_config.is_file():
        found.append((tokenizer_config.name, read_json(tokenizer_config)))
    for name, values in found:
        auto_map = values.get("auto_map") if isinstance(values, dict) else None
        if auto_map:
            files = ", ".join(_code_files(auto_map))
            raise CheckpointError(
                f"{path} brings Python code of its own: {name} (auto_map) would run {files}",
                "Read that code; if you trust it, add --trust-remote-code",
            )


def _code_files(auto_map: Any) -> list[str]:
    """File names behind references such as ``modeling_x.Class`` or ``ORG/REPO--module.Class``."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    files = set()
    for reference in flat:
        if isinstance(reference, str):
            repository, _, rest = reference.rpartition("--")
            file = rest.rpartition(".")[0].replace(".", "/") + ".py"
            files.add(f"{file} of {repository}" if repository else file)
    return sorted(files) or ["unnamed files"]


def _check_tokenizer(path: Path) -> None:
    if any((path / n).is_file() for n in TOKENIZER_FILES) or any(path.glob("*.tiktoken")):
        return
    raise CheckpointError(
        f"{path} has no tokenizer files (none of {', '.join(TOKENIZER_FILES)})",
        "Copy them from the original model into the directory",
    )


def _find_shards(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the safetensors shards, and the index's map of tensor to shard."""
    index = path / SHARD_INDEX
    if not index.is_file():
        names = sorted(p.name for p in path.glob("*.safetensors"))
        # The converter and transformers read only files called model*; others
        # (consolidated.safetensors, adapters) repeat weights or belong to other programs.
        return tuple(n for n in names if n.startswith("model")), {}
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    if WHOLE not in shards and (path / WHOLE).is_file():
        # An index that was left behind, of other files: transformers does not read it.
        return (WHOLE,), {}
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of its {len(shards)} shards: {', '.join(missing)}",
            "Download the missing file, or fetch the model again",
        )
    return tuple(shards), weight_map


def _weight_map(index: Path) -> dict[str, str]:
    """Shard by tensor name, as an index file says."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", "Fetch the file again")
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        if not re.fullmatch(r"[^/\\]+\.safetensors", shard):
            raise IntegrityError(
                f"{index} names '{shard}', which is not a shard in the same directory",
                "Do not use this checkpoint: it points out of its own directory",
            )
    return {str(k): str(v) for k, v in weight_map.items()}


def _find_pickles(path: Path, allow_pickle: bool) -> tuple[str, ...]:
    pickles = sorted(p.name for p in path.glob("pytorch_model*.bin"))
    if not pickles:
        raise CheckpointError(
            f"{path} has no weights (no model*.safetensors)", "Fetch the model again"
        )
    if not allow_pickle:
        raise CheckpointError(
            f"{path} has pickled weights only ({pickles[0]}): "
            "loading a pickle can run any code that its author put there",
            "Look for a safetensors version; if you trust the author, add --allow-pickle",
        )
    return tuple(pickles)


def _truncated(path: Path, needed: int, found: int) -> IntegrityError:
    return IntegrityError(
        f"{path} is truncated: it needs {needed:,} bytes and has {found:,}",
        "The download was cut short: fetch the file again",
    )


def _entry(shard: str, name: str, row: Any, base: int) -> TensorEntry:
    dtype, shape, (begin, end) = row["dtype"], row["shape"], row["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"'{name}' has the unknown dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"'{name}' has a shape or an offset that is not a natural number")
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"'{name}' has {end - begin} bytes, which is not {dtype} {shape}")
    return TensorEntry(name, shard, dtype, tuple(shape), base + begin, end - begin)


def _check_layout(path: Path, entries: list[TensorEntry], base: int, size: int) -> None:
    """The tensors must fill the rest of the file, without gaps or overlaps."""
    position = base
    for entry in entries:
        if entry.start != position:
            raise IntegrityError(
                f"{path} has a malformed safetensors header: gap or overlap at '{entry.name}'",
                "Fetch the file again",
            )
        position += entry.nbytes
    if size < position:
        raise _truncated(path, position, size)
    if size > position:
        raise IntegrityError(
            f"{path} has {size - position:,} bytes more than its header accounts for",
            "Fetch the file again",
        )
