"""Write a checkpoint that differs from another in some of its tensors.

The file is written tensor by tensor: its header follows from names, dtypes
and shapes alone, so memory holds one tensor at a time.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ggufkit.checkpoint.index import SHARD_INDEX, CheckpointIndex, TensorEntry, companion_files
from ggufkit.checkpoint.tensors import read_tensor, require_safetensors, torch_dtypes
from ggufkit.errors import CheckpointError
from ggufkit.progress import SILENT, Progress, Task
from ggufkit.values import Json

if TYPE_CHECKING:
    import torch

ALIGNMENT = 8
COPY_NBYTES = 16 * 1024 * 1024


def write_checkpoint(
    index: CheckpointIndex,
    out_dir: Path,
    replace: Mapping[str, "Callable[[torch.Tensor], torch.Tensor]"],
    *,
    dtypes: Mapping[str, str] | None = None,
    add: "Mapping[str, torch.Tensor] | None" = None,
    drop_config_keys: Iterable[str] = ("quantization_config",),
    config_changes: Mapping[str, Json] | None = None,
    progress: Progress = SILENT,
) -> None:
    """Write a checkpoint with some tensors replaced, all else as it was.

    Shard names, tensor order and metadata stay, and dtypes unless asked; tokenizer, templates,
    licence and model card are copied byte for byte, and so is ``config.json``
    unless a key of it changes.

    Args:
        index: the original.
        out_dir: where to write; made if missing.
        replace: tensor name to a function that takes the original tensor (in
            its dtype) and gives one of the same shape.
        dtypes: replaced tensors that are stored in another dtype than before.
        add: further tensors, appended to the last shard in their own dtype.
        drop_config_keys: keys to leave out of ``config.json``.
        config_changes: keys of ``config.json`` to set.
        progress: who to tell.

    Raises:
        CheckpointError: a result is not finite in the tensor's dtype, or the
            weights are pickled.
        ValueError: ``replace`` names no tensor, ``add`` names an existing one,
            or a result has another shape.
    """
    require_safetensors(index)
    added = dict(add or {})
    if unknown := [name for name in replace if name not in index.tensors]:
        raise ValueError(f"no such tensor to replace: {unknown}")
    if present := [name for name in added if name in index.tensors]:
        raise ValueError(f"tensor to add is there already: {present}")
    out_dir.mkdir(parents=True, exist_ok=True)
    _copy_companions(index, out_dir, tuple(drop_config_keys), dict(config_changes or {}))
    with progress.task("write", index.nbytes, "bytes") as task:
        done = 0
        for shard in index.shards:
            extra = added if shard == index.shards[-1] else {}
            done = _write_shard(
                index, shard, out_dir / shard, replace, dtypes or {}, extra, task, done
            )
    if (out_dir / SHARD_INDEX).is_file():
        written = {name: entry.shard for name, entry in index.tensors.items()}
        _correct_shard_index(
            out_dir / SHARD_INDEX,
            written | dict.fromkeys(added, index.shards[-1]),
            sum(t.nbytes for t in added.values()),
        )


def safetensors_header(
    rows: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """The length and JSON header of a safetensors file.

    Args:
        rows: name, dtype, shape and size in bytes of each tensor, in file order.
        metadata: the ``__metadata__`` entry; left out if empty.
    """
    header: dict[str, Json] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, nbytes in rows:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    index: CheckpointIndex,
    shard: str,
    target: Path,
    replace: Mapping[str, "Callable[[torch.Tensor], torch.Tensor]"],
    dtypes: Mapping[str, str],
    added: "Mapping[str, torch.Tensor]",
    task: Task,
    done: int,
) -> int:
    entries = index.of_shard(shard)
    rows = []
    for e in entries:
        dtype = dtypes.get(e.name, e.dtype) if e.name in replace else e.dtype
        rows.append((e.name, dtype, e.shape, math.prod(e.shape) * torch_dtypes()[dtype].itemsize))
    rows += [(n, _dtype_name(t), tuple(t.shape), t.nbytes) for n, t in added.items()]
    with target.open("wb") as out, (index.path / shard).open("rb") as original:
        out.write(safetensors_header(rows, index.metadata[shard]))
        for entry in entries:
            if entry.name in replace:
                dtype = dtypes.get(entry.name, entry.dtype)
                _write_tensor(out, _replaced(original, entry, replace[entry.name], dtype))
            else:
                _copy_bytes(original, out, entry)
            done += entry.nbytes
            task.update(done, entry.name)
        for tensor in added.values():
            _write_tensor(out, tensor)
    return done


def _replaced(
    original: BinaryIO,
    entry: TensorEntry,
    function: "Callable[[torch.Tensor], torch.Tensor]",
    dtype: str,
) -> "torch.Tensor":
    result = function(read_tensor(original, entry))
    if tuple(result.shape) != entry.shape:
        raise ValueError(f"'{entry.name}' was {entry.shape}, is {tuple(result.shape)}")
    result = result.to(torch_dtypes()[dtype])
    if result.is_floating_point() and not bool(result.isfinite().all()):
        raise CheckpointError(
            f"Tensor '{entry.name}' holds values that are not finite in {dtype}",
            "The original weights may be damaged; otherwise use a checkpoint in BF16 or F32",
        )
    return result


def _write_tensor(out: BinaryIO, tensor: "torch.Tensor") -> None:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    out.write(flat.view(torch.uint8).numpy().data)


def _copy_bytes(original: BinaryIO, out: BinaryIO, entry: TensorEntry) -> None:
    original.seek(entry.start)
    left = entry.nbytes
    while left:
        block = original.read(min(left, COPY_NBYTES))
        if not block:
            raise CheckpointError(f"{entry.shard} changed while it was read", "Run it again")
        out.write(block)
        left -= len(block)


def _dtype_name(tensor: "torch.Tensor") -> str:
    return next(name for name, dtype in torch_dtypes().items() if dtype == tensor.dtype)


def _copy_companions(
    index: CheckpointIndex, out_dir: Path, drop: tuple[str, ...], changes: dict[str, Json]
) -> None:
    for file in companion_files(index.path):
        target = out_dir / file.relative_to(index.path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    config = {k: v for k, v in index.config.items() if k not in drop} | changes
    if config != index.config:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (out_dir / "config.json").write_text(text, encoding="utf-8")


def _correct_shard_index(path: Path, weight_map: Mapping[str, str], nbytes: int) -> None:
    """Let the index name what was written, ``nbytes`` more than before."""
    content = json.loads(path.read_bytes())
    if content["weight_map"] == weight_map:
        return
    content["weight_map"] = dict(weight_map)
    total = content.get("metadata", {}).get("total_size")
    if isinstance(total, int):
        content["metadata"]["total_size"] = total + nbytes
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
