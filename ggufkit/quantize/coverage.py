"""Whether an importance matrix is of the model that is quantized, and how much of it it covers.

llama-quantize takes any: a tensor without an entry is rounded as without a
matrix, with no more than a remark among hundreds of lines, and the result is
called as if it had one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError
from ggufkit.llamacpp.output import TensorPlan
from ggufkit.quantize.imatrix import ImatrixEntry
from ggufkit.values import Json

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_OUTSIDE = ("output.weight", "token_embd.weight")
"""Tensors outside the blocks that may have an entry; most matrices have none for them."""
_HINT = "Make one of this very model with llama-imatrix; for a checkpoint, --imatrix auto does it"


@dataclass(frozen=True)
class Coverage:
    """For which tensors an importance matrix has something.

    Attributes:
        entries: number of entries of the matrix.
        tensors: tensors in the model's blocks that are quantized.
        without: those of them that have no entry.
        experts: experts that have entries, over all blocks.
        unused: those of them that no token of the calibration text came to, such as
            ``expert 3 of blk.0``.
        foreign: entries for tensors that the model lacks.
    """

    entries: int
    tensors: int
    without: tuple[str, ...] = ()
    experts: int = 0
    unused: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Json]:
        """What a manifest keeps: counts, and one example of each."""
        found: dict[str, Json] = {
            "entries": self.entries,
            "tensors": self.tensors,
            "covered": self.tensors - len(self.without),
            "experts": self.experts,
            "experts_unused": len(self.unused),
            "foreign": len(self.foreign),
        }
        examples = {"without": self.without, "unused": self.unused, "foreign": self.foreign}
        return found | {"examples": {key: names[0] for key, names in examples.items() if names}}


def coverage_of(entries: Mapping[str, ImatrixEntry], planned: Sequence[TensorPlan]) -> Coverage:
    """What a matrix covers of the tensors that are going to be quantized.

    Args:
        entries: of the matrix.
        planned: what llama-quantize will do to each tensor of the model.
    """
    quantized = [t.name for t in planned if t.type != t.from_type]
    blocks = [name for name in quantized if _BLOCK.search(name)] or quantized
    used = {name: entries[name] for name in blocks if name in entries}
    experts: set[tuple[str, int]] = set()
    unused: dict[tuple[str, int], None] = {}
    without = [name for name in blocks if name not in used]
    for name, entry in used.items():
        if len(entry.counts or ()) > 1:
            block = name.rpartition(".ffn_")[0]
            experts.update((block, n) for n in range(len(entry.counts or ())))
            unused.update(dict.fromkeys((block, n) for n in entry.unused))
        elif entry.unused:
            without.append(name)
    names = {tensor.name for tensor in planned}
    return Coverage(
        entries=len(entries),
        tensors=len(blocks),
        without=tuple(without),
        experts=len(experts),
        unused=tuple(f"expert {number} of {block}" for block, number in unused),
        foreign=tuple(name for name in entries if name not in names),
    )


def require_same_model(
    imatrix: Path,
    entries: Mapping[str, ImatrixEntry],
    planned: Sequence[TensorPlan],
    coverage: Coverage,
) -> None:
    """Refuse a matrix that was made of another model.

    Raises:
        CheckpointError: if it has nothing for any tensor, or for fewer than half of
            them, or sizes differ.
    """
    if not coverage.tensors:
        return
    covered = coverage.tensors - len(coverage.without)
    if not covered:
        raise _other_model(
            imatrix,
            f"it has no entry for any of the {coverage.tensors} tensors that are quantized, such "
            f"as {coverage.without[0]}; what it has is for {', '.join(list(entries)[:1])}",
        )
    for tensor in planned:
        expected = prod((tensor.shape[0], *tensor.shape[2:]))
        entry = entries.get(tensor.name)
        # llama-quantize passes over the embedding's, whatever its size is.
        if entry and entry.values != expected and not tensor.name.startswith("token_embd"):
            raise _other_model(
                imatrix,
                f"its entry for {tensor.name} has {entry.values} values, the tensor {expected} "
                "inputs",
            )
    if 2 * covered < coverage.tensors:
        raise _other_model(
            imatrix,
            f"it has entries for {covered} of the {coverage.tensors} tensors that are quantized, "
            f"and none for {coverage.without[0]}",
        )


def check_against_checkpoint(
    imatrix: Path, entries: Mapping[str, ImatrixEntry], index: CheckpointIndex
) -> None:
    """Refuse a matrix that cannot be of a checkpoint, before that is converted.

    Only what needs no converter is checked: names, number of blocks, widths. The
    rest follows when there is a GGUF.

    Raises:
        CheckpointError: if it was made of another model.
    """
    blocks = {name: int(found[1]) for name in entries if (found := _BLOCK.search(name))}
    if not blocks and not set(_OUTSIDE) & set(entries):
        raise _other_model(
            imatrix,
            f"its entries are not named as tensors of a GGUF, such as {next(iter(entries))}",
        )
    count = _blocks_of(index)
    last = max(blocks, key=lambda name: blocks[name], default="")
    if count and last and blocks[last] >= count:
        raise _other_model(
            imatrix, f"it has an entry for {last}, and {index.path.name} has {count} blocks"
        )
    widths = {size for tensor in index.tensors.values() for size in tensor.shape}
    strange = [name for name in blocks if entries[name].width not in (None, *widths)]
    # A few may be split or reshaped by the converter.
    if 2 * len(strange) > len(blocks):
        raise _other_model(
            imatrix,
            f"its entry for {strange[0]} is of {entries[strange[0]].width} inputs, and no tensor "
            f"of {index.path.name} has as many",
        )


def _blocks_of(index: CheckpointIndex) -> int:
    """Blocks that a GGUF of a checkpoint may have, those of extra heads included; 0 if unknown."""
    config = index.config.get("text_config") or index.config
    if not isinstance(config, dict):
        return 0
    counts = [config.get(key) for key in ("num_hidden_layers", "n_layer", "num_layers")]
    own = next((count for count in counts if isinstance(count, int)), 0)
    extra = [config.get(key) for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers")]
    return own + sum(count for count in extra if isinstance(count, int)) if own else 0


def _other_model(imatrix: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{imatrix} is not of this model: {why}", _HINT)


def coverage_notes(facts: Mapping[str, Json]) -> tuple[str, ...]:
    """What a user is to know of the matrix that a file was quantized with.

    Args:
        facts: of the stage that wrote the file.
    """
    found = facts.get("imatrix")
    if not found:
        return ()
    examples = found["examples"]
    notes = []
    if (lacking := found["tensors"] - found["covered"]) > 0:
        notes.append(
            f"the importance matrix has entries for {found['covered']} of {found['tensors']} "
            f"tensors; {lacking} are rounded as without one, such as {examples['without']}"
        )
    if found["experts_unused"]:
        notes.append(
            f"the importance matrix's text never came to {found['experts_unused']} of "
            f"{found['experts']} experts, which are rounded as without one, such as "
            f"{examples['unused']}"
        )
    if found["foreign"]:
        notes.append(
            f"the importance matrix has {found['foreign']} entries for tensors that this model "
            f"lacks, such as {examples['foreign']}"
        )
    return tuple(notes)
