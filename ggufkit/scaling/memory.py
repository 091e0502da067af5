"""How much memory the AWQ step will need, from shapes alone.

The model is never held: what counts is one block in float32 with what it sees,
the embedding, and the hidden states of all sequences as far as they are not on
disk.
"""

import math

from ggufkit.checkpoint.config import required_size
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import GgufkitError
from ggufkit.llamacpp import host
from ggufkit.scaling.families import Family
from ggufkit.scaling.groups import block_count, groups_of
from ggufkit.scaling.guard import POSITIONS
from ggufkit.scaling.streaming import HIDDEN_NBYTES_IN_MEMORY, TOKENS_AT_ONCE

_RUNTIME_NBYTES = 700 << 20
"""Python with torch and transformers, and their buffers."""
_GIB = 1 << 30


def forecast(index: CheckpointIndex, family: Family, *, sequences: int, length: int) -> int:
    """Peak resident memory of search and comparison, in bytes.

    Args:
        index: the checkpoint.
        family: its family.
        sequences: number of calibration sequences.
        length: tokens of each.
    """
    block = max(_block_nbytes(index, family, number) for number in range(block_count(index)))
    outside = tuple(f"{family.blocks}.{n}." for n in range(block_count(index)))
    around = [t for name, t in index.tensors.items() if not name.startswith(outside)]
    vocabulary = max(t.shape[0] for t in around)
    # The comparison with the original also holds the output matrix and logits of both.
    outer = 4 * sum(math.prod(t.shape) for t in around) + 4 * 2 * POSITIONS * vocabulary
    hidden = 4 * sequences * length * _width(index)
    step = 4 * 8 * TOKENS_AT_ONCE * _width(index)
    return (
        _RUNTIME_NBYTES + block + outer + min(hidden, HIDDEN_NBYTES_IN_MEMORY) + min(hidden, step)
    )


def _block_nbytes(index: CheckpointIndex, family: Family, number: int) -> int:
    prefix = f"{family.blocks}.{number}."
    shapes = [t.shape for name, t in index.tensors.items() if name.startswith(prefix)]
    # Weights; a candidate of the largest map: scaled, stored, and its error.
    weights = 4 * (sum(map(math.prod, shapes)) + 4 * max(map(math.prod, shapes)))
    # Second moments: summed in float64, with a step's product beside them. Those
    # of experts are made one after the other, and one is looked at at a time.
    widths = [g.inputs for g in groups_of(index, family, number)]
    own = [g.inputs for g in groups_of(index, family, number) if g.expert is None]
    kept = 8 * sum(width * width for width in own)
    return weights + kept + (8 + 4 + 4) * max(widths) ** 2


def _width(index: CheckpointIndex) -> int:
    return required_size(index.config, "hidden_size", "n_embd")


def require_memory(nbytes: int, what: str) -> None:
    """Refuse work that will not fit into the memory that is free.

    Raises:
        GgufkitError: if it will not.
    """
    free = host.available_memory_nbytes()
    if free is not None and free < nbytes:
        raise GgufkitError(
            f"{what} needs about {nbytes / _GIB:.1f} GiB of memory, but only "
            f"{free / _GIB:.1f} GiB are free",
            "End other programs, or take fewer or shorter sequences with "
            "--calibration-samples and --calibration-length",
        )
