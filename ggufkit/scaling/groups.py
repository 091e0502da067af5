"""The groups of one block of one checkpoint, with all names and indices made out."""

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from ggufkit.checkpoint.config import required_size
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError
from ggufkit.scaling.families import EXPERT, AttentionShape, Family, Group

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlockGroup:
    """A group of one block.

    Attributes:
        name: of its scales: ``<blocks>.<block>.<group>``, and an expert's number.
        kind: the group's name in its family.
        producer: checkpoint name of what makes the input, without parameter.
        consumers: checkpoint names of the weights that read it.
        rows: which outputs of the producer, int64, shape (scales,); None: all.
        spread: which scale each input takes, int64, shape (inputs,); None: its own.
        outputs: number of all outputs of the producer.
        expert: number of the expert whose own group it is, or None.
    """

    name: str
    kind: str
    producer: str
    consumers: tuple[str, ...]
    rows: "torch.Tensor | None"
    spread: "torch.Tensor | None"
    outputs: int
    expert: int | None = None

    @property
    def width(self) -> int:
        """Number of scales."""
        return self.outputs if self.rows is None else len(self.rows)

    @property
    def inputs(self) -> int:
        """Number of inputs of the consumers."""
        return self.width if self.spread is None else len(self.spread)

    def to_inputs(self, scales: "torch.Tensor") -> "torch.Tensor":
        """One value per input of the consumers, from one per scale."""
        return scales if self.spread is None else scales[self.spread]

    def from_inputs(self, values: "torch.Tensor") -> "torch.Tensor":
        """One value per scale, from one per input: the mean of those that share it."""
        import torch

        if self.spread is None:
            return values
        sums = torch.zeros(self.width).index_add_(0, self.spread, values)
        return sums / torch.bincount(self.spread, minlength=self.width)


def block_count(index: CheckpointIndex) -> int:
    """Number of blocks of the model."""
    return required_size(index.config, "num_hidden_layers", "n_layer")


def attention_shape(index: CheckpointIndex) -> AttentionShape:
    """Heads and their width, from the config."""
    query_heads = required_size(index.config, "num_attention_heads", "n_head")
    hidden = required_size(index.config, "hidden_size", "n_embd")
    return AttentionShape(
        query_heads=query_heads,
        kv_heads=required_size(index.config, "num_key_value_heads", default=query_heads),
        value_dim=required_size(
            index.config, "v_head_dim", "head_dim", default=max(1, hidden // query_heads)
        ),
    )


def expert_count(index: CheckpointIndex, family: Family, block: int) -> int:
    """How many experts a block has."""
    if family.experts is None:
        return 0
    up = f"{family.experts.path}.{family.experts.up}"
    names = (family.tensor(block, _numbered(up, expert)) for expert in count())
    return next(number for number, name in enumerate(names) if name not in index.tensors)


def groups_of(index: CheckpointIndex, family: Family, block: int) -> list[BlockGroup]:
    """The groups that a block has: those whose tensors are all there.

    Raises:
        CheckpointError: if it has none, or a group's shapes do not fit together.
    """
    experts = range(expert_count(index, family, block))
    found = []
    for group in family.groups:
        own = EXPERT in group.producer
        for expert in experts if own else (None,):
            bound = _bind(index, family, block, group, expert, experts)
            if bound:
                found.append(bound)
    if not found:
        raise CheckpointError(
            f"block {block} of {index.path.name} has none of the tensors that AWQ scales",
            "The checkpoint is damaged, or not of the architecture that its config names",
        )
    return found


def all_groups(index: CheckpointIndex, family: Family) -> list[BlockGroup]:
    """The groups of all blocks, in order."""
    return [g for block in range(block_count(index)) for g in groups_of(index, family, block)]


def _numbered(name: str, expert: int | None) -> str:
    return name if expert is None else name.replace(EXPERT, str(expert))


def _bind(
    index: CheckpointIndex,
    family: Family,
    block: int,
    group: Group,
    expert: int | None,
    experts: range,
) -> BlockGroup | None:
    names = [
        _numbered(consumer, e)
        for consumer in group.consumers
        for e in (experts if EXPERT in consumer and expert is None else (expert,))
    ]
    consumers = tuple(family.tensor(block, name) for name in names)
    producer = family.tensor(block, _numbered(group.producer, expert))
    if any(name not in index.tensors for name in (producer, *consumers)):
        return None
    dimension = 1 if family.transposed and len(index.tensors[producer].shape) == 2 else 0
    outputs = index.tensors[producer].shape[dimension]
    shape = attention_shape(index)
    bound = BlockGroup(
        name=f"{family.blocks}.{block}.{group.name}" + ("" if expert is None else f".{expert}"),
        kind=group.name,
        producer=producer.removesuffix(".weight"),
        consumers=consumers,
        rows=group.rows(shape, outputs) if group.rows else None,
        spread=group.spread(shape) if group.spread else None,
        outputs=outputs,
        expert=expert,
    )
    for consumer in consumers:
        columns = index.tensors[consumer].shape[0 if family.transposed else 1]
        if columns != bound.inputs:
            raise CheckpointError(
                f"{consumer} has {columns} inputs, but {producer} makes {bound.inputs} for it",
                "The config does not fit the weights; fetch the checkpoint again",
            )
    return bound
