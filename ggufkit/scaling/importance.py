"""The mean square of every input of every linear map, as a file.

It is what an importance matrix holds, by the checkpoint's tensor names. The
pass that gathers second moments for AWQ has it for nothing; without AWQ a pass
of its own gathers it alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import IntegrityError
from ggufkit.foreign import writing
from ggufkit.progress import Progress
from ggufkit.scaling.families import Family
from ggufkit.scaling.fold import Scales
from ggufkit.scaling.groups import all_groups, block_count
from ggufkit.scaling.statistics import BlockVisit, InputSquares, visit_blocks

if TYPE_CHECKING:
    import torch

IMPORTANCE_FILE = "importance.safetensors"
_FORMAT = "ggufkit-importance-1"
_MEAN, _TOKENS = ":mean_square", ":tokens"

Importance = Mapping[str, InputSquares]


def gather_importance(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    directory: Path,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write ``importance.safetensors`` of a checkpoint as it is.

    Args:
        index: the checkpoint.
        family: its family, for where its blocks are.
        sequences: token ids, int64, shape (sequences, tokens).
        directory: where to write.
        progress: told block by block.
        trust_remote_code: let transformers run the checkpoint's own code.
    """
    found: dict[str, InputSquares] = {}
    with progress.task("importance matrix", block_count(index), "blocks") as task:

        def visit(block: BlockVisit) -> None:
            found.update(block.squares())
            task.update(block.number + 1)

        visit_blocks(
            index,
            family,
            sequences,
            visit,
            scratch=directory,
            with_groups=False,
            trust_remote_code=trust_remote_code,
        )
    write_importance(directory / IMPORTANCE_FILE, found)


def after_fold(
    importance: Importance, index: CheckpointIndex, family: Family, scales: Scales
) -> dict[str, InputSquares]:
    """The importance for the folded model: what is divided by s, squared by s²."""
    folded = dict(importance)
    for group in all_groups(index, family):
        squares = group.to_inputs(scales[group.name]).square()
        for name in group.consumers:
            if name in folded:
                seen = folded[name]
                folded[name] = InputSquares(seen.mean / squares, seen.tokens)
    return folded


def write_importance(path: Path, importance: Importance) -> None:
    """Write an importance file; the same values give the same bytes."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name in sorted(importance):
        tensors[name + _MEAN] = importance[name].mean.clone()
        tensors[name + _TOKENS] = torch.tensor([importance[name].tokens])
    with writing(path):
        save_file(tensors, path, metadata={"format": _FORMAT})


def read_importance(path: Path) -> dict[str, InputSquares]:
    """Read an importance file.

    Raises:
        IntegrityError: if it is not one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise IntegrityError(f"{path} is not an importance file of ggufkit")
            names = [n.removesuffix(_MEAN) for n in file.keys() if n.endswith(_MEAN)]  # noqa: SIM118
            return {
                name: InputSquares(
                    file.get_tensor(name + _MEAN), int(file.get_tensor(name + _TOKENS))
                )
                for name in names
            }
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read as importance: {error}") from error
