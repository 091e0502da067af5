"""Block scales learned on the divergence from the original model, codes held.

Rounding with error feedback looks at the outputs of one map at a time. What counts is
what the whole model says; so here the divergence of its next-token distributions from
those of the original is lowered by gradient steps on one factor for each ggml block and
one for each row. A factor goes into the block's half precision scale (and that of its
minima), so codes, types and size stay as they are. EfficientQAT (Chen et al. 2024) ends
with such a phase on the loss of the text; the divergence says more about each token.

The model is streamed: hidden states of a step are kept for each block, and gradients go
back block by block, each block's weights being loaded when its turn comes. Memory holds
one block, the hidden states of one step, and of the learned factors four floats each.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.checkpoint.config import required_size
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import IntegrityError
from ggufkit.foreign import foreign, writing
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.packing import format_of
from ggufkit.progress import Progress, Task
from ggufkit.scaling.families import Family
from ggufkit.scaling.fold import Change
from ggufkit.scaling.groups import block_count
from ggufkit.scaling.rounding import (
    BlockMap,
    block_file,
    fold_block,
    maps_of,
    read_block,
    write_block,
)
from ggufkit.scaling.rounding import forecast as rounding_forecast
from ggufkit.scaling.statistics import quick_products
from ggufkit.scaling.streaming import LoadedBlock, StreamedModel, streamed_model
from ggufkit.values import Json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Bytes = npt.NDArray[np.uint8]
    _Blocks = Mapping[int, Mapping[str, Bytes]]
    """Rounded maps by the number of their block, and by name."""

EPOCHS = 1
"""How often each sequence is looked at."""
BATCH = 4
"""Sequences of a step."""
ROW_RATE = 1e-3
"""Largest step of a row's factor."""
BLOCK_RATE = 1e-4
"""The same for a block's: there are many more of them, and text is short."""
RUN = 32
"""Tokens in a row that pieces of a text share only if they overlap."""
_WARM_UP = 3
_DECAY = 0.9, 0.99
_EPSILON = 1e-12
_STATE = ".state.safetensors"


def forecast(
    index: CheckpointIndex, family: Family, plan: Mapping[str, str], *, length: int
) -> int:
    """Peak resident memory of :func:`refine_model`, in bytes.

    Args:
        index: the checkpoint.
        family: its family.
        plan: ggml type by checkpoint name.
        length: tokens of a sequence.
    """
    step = rounding_forecast(index, family, {}, sequences=BATCH, length=length)
    maps = {
        name: type
        for name, type in plan.items()
        if name.startswith(f"{family.blocks}.") and len(index.tensors[name].shape) == 2
    }
    # Packed weights are held, and of each ggml block a factor, two moments and one to spare.
    held = sum(
        math.prod(index.tensors[name].shape)
        // format_of(type).block
        * (format_of(type).block_nbytes + 16)
        for name, type in maps.items()
    )
    width = required_size(index.config, "hidden_size", "n_embd")
    states = 4 * BATCH * length * width * block_count(index)
    vocabulary = max(t.shape[0] for t in index.tensors.values())
    # Logits of one sequence by both models, their logarithms, products and gradients.
    return step + held + states + 4 * 8 * length * vocabulary


def without(pieces: "Sequence[torch.Tensor]", others: "torch.Tensor") -> "torch.Tensor":
    """Of some pieces of text the sequences that share no run of tokens with any of some others.

    Args:
        pieces: token ids, each of shape (sequences, tokens).
        others: token ids, likewise; what they share with is left out, if it has
            :data:`RUN` tokens.
    """
    import torch

    sequences = torch.cat(list(pieces))
    seen = {tuple(run) for other in others.tolist() for run in _runs(other)}
    alone = [not any(tuple(run) in seen for run in _runs(own)) for own in sequences.tolist()]
    kept: torch.Tensor = sequences[alone]
    return kept


def _runs(tokens: list[int]) -> "Iterator[list[int]]":
    return (tokens[n : n + RUN] for n in range(len(tokens) - RUN + 1))


def refine_model(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    held_back: "torch.Tensor",
    plan: Mapping[str, str],
    rounded: Path,
    directory: Path,
    ggml: Ggml,
    progress: Progress,
    *,
    changes: Mapping[str, Change] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Json]:
    """Learn the scales of what :func:`ggufkit.scaling.rounding.round_model` rounded.

    A killed run goes on at the last step and ends with the same bytes.

    Args:
        index: the checkpoint.
        family: its family, for where its blocks are.
        sequences: token ids to learn on, int64, shape (sequences, tokens).
        held_back: others, which decide whether what was learned is kept.
        plan: ggml type by checkpoint name, as it was rounded.
        rounded: the directory of the blocks.
        directory: takes blocks with learned scales, in files of the same kind.
        ggml: the quantizer.
        progress: told step by step.
        changes: what a fold of scales does to tensors.
        trust_remote_code: let transformers run the checkpoint's own code.

    Returns:
        Facts: mean divergence in nats per token, on the sequences as they were learned
        from, and on those held back before and after.
    """
    directory.mkdir(parents=True, exist_ok=True)
    batches = [b for _ in range(EPOCHS) for b in _batches(sequences)]
    passes = 2 * len(_batches(held_back)) + 1
    with (
        progress.task("refining", len(batches) + passes, "steps") as task,
        quick_products(),
        streamed_model(
            index, family, directory, gradients=True, trust_remote_code=trust_remote_code
        ) as model,
    ):
        learner = _Learner(index, family, model, plan, rounded, ggml, changes or {})
        told = learner.learn(sequences, batches, directory / _STATE, task)
        before = learner.divergence(held_back, learner.rounded)
        task.update(len(batches) + passes // 2)
        learned = {n: learner.learned(n) for n in range(block_count(index))}
        after = learner.divergence(held_back, learned)
        kept = after < before
        for number, packed in (learned if kept else learner.rounded).items():
            write_block(block_file(directory, number), packed)
    if not kept:
        progress.warn(
            f"learned scales are not kept: on held-back text the mean divergence is {after:.5f} "
            f"with them and {before:.5f} without"
        )
    return {
        "divergence_learned": told,
        "divergence_before": before,
        "divergence_after": after,
        "kept": kept,
        "steps": len(batches),
    }


@dataclass
class _Factors:
    """What one map's scales are multiplied by: 1 + rows + blocks.

    Attributes:
        rows: shape (rows, 1).
        blocks: shape (rows, blocks of a row).
        moments: first and second moments of the gradients of both (Adam, Kingma and Ba 2015).
    """

    rows: "torch.Tensor"
    blocks: "torch.Tensor"
    moments: "list[torch.Tensor]"

    @classmethod
    def of(cls, rows: int, blocks: int) -> "_Factors":
        """Those that change nothing."""
        import torch

        shapes = (rows, 1), (rows, blocks)
        moments = [torch.zeros(shape) for shape in shapes for _ in range(2)]
        one, other = (torch.zeros(shape) for shape in shapes)
        return cls(one, other, moments)

    def parts(self) -> "dict[str, torch.Tensor]":
        """All of it, by name."""
        moments = {f"moment{n}": moment for n, moment in enumerate(self.moments)}
        return {"rows": self.rows, "blocks": self.blocks, **moments}

    @property
    def product(self) -> "torch.Tensor":
        """Shape (rows, blocks of a row)."""
        return 1 + self.rows + self.blocks

    def step(self, gradient: "torch.Tensor", number: int, share: float) -> None:
        """Go a step against a gradient, shape (rows, blocks of a row).

        Args:
            gradient: of the loss with respect to the product.
            number: of the step, from 1 on.
            share: of the largest step's size.
        """
        parts = (self.rows, gradient.sum(1, keepdim=True), ROW_RATE)
        for n, (values, slope, rate) in enumerate((parts, (self.blocks, gradient, BLOCK_RATE))):
            mean, square = self.moments[2 * n : 2 * n + 2]
            mean.lerp_(slope, 1 - _DECAY[0])
            square.lerp_(slope.square(), 1 - _DECAY[1])
            # Both began at zero, for which they are too small at first.
            along = mean / (1 - _DECAY[0] ** number)
            size = (square / (1 - _DECAY[1] ** number)).sqrt_().add_(_EPSILON)
            values.addcdiv_(along, size, value=-rate * share)


class _Learner:
    """The rounded model and its factors, beside the original."""

    def __init__(
        self,
        index: CheckpointIndex,
        family: Family,
        model: StreamedModel,
        plan: Mapping[str, str],
        rounded: Path,
        ggml: Ggml,
        changes: Mapping[str, Change],
    ) -> None:
        self._family = family
        self._model = model
        self._plan = plan
        self._ggml = ggml
        self._changes = changes
        self._last = block_count(index) - 1
        self.rounded = {n: read_block(block_file(rounded, n)) for n in range(self._last + 1)}
        self._factors = {
            name: _Factors.of(len(packed), packed.shape[1] // format_of(plan[name]).block_nbytes)
            for maps in self.rounded.values()
            for name, packed in maps.items()
        }

    def learn(
        self,
        sequences: "torch.Tensor",
        batches: "list[torch.Tensor]",
        state: Path,
        task: Task,
    ) -> list[float]:
        """Take all steps; gives the mean divergence that each epoch met."""
        import torch

        wanted = torch.cat([self._final(part) for part in _batches(sequences)])
        done, met = self._restore(state)
        per_epoch = len(batches) // EPOCHS
        for number in range(done, len(batches)):
            at = number % per_epoch * BATCH
            share = min(1.0, (number + 1) / _WARM_UP)
            share *= (1 + math.cos(math.pi * number / len(batches))) / 2
            batch = batches[number]
            met.append(self._step(batch, wanted[at : at + len(batch)], number + 1, share))
            self._save(state, met)
            task.update(number + 1, f"divergence {met[-1]:.4f}")
        epochs = [met[n * per_epoch : (n + 1) * per_epoch] for n in range(EPOCHS)]
        return [math.fsum(epoch) / len(epoch) for epoch in epochs]

    def _step(
        self, tokens: "torch.Tensor", wanted: "torch.Tensor", number: int, share: float
    ) -> float:
        """One step of all factors; gives the mean divergence before it."""
        import torch

        states: list[torch.Tensor] = []
        calls: list[LoadedBlock] = []

        def put_in(block: LoadedBlock, hidden: "torch.Tensor") -> None:
            self._put_in(block, self.rounded, factors=True)
            states.append(hidden.clone())
            calls.append(block)

        final = self._final(tokens, put_in)
        total = 0.0

        def loss(sequence: int, logits: "torch.Tensor") -> "torch.Tensor":
            nonlocal total
            with torch.no_grad():
                target = self._model.logits_after(tokens[sequence], wanted[sequence : sequence + 1])
            summed = _divergence(target, logits).sum() / tokens.numel()
            total += float(summed.detach())
            return summed

        gradient = self._model.loss_gradient(tokens, final, loss)
        for block in reversed(calls):
            with self._model.loaded(block):
                bases = self._put_in(block, self.rounded, factors=True, learn=True)
                block.backward(states[block.number], gradient)
                for map, base in bases:
                    slope = block.module.get_submodule(map.path).weight.grad
                    slope = slope.T if self._family.transposed else slope
                    factors = self._factors[map.name]
                    cells = (slope * base).view(*factors.blocks.shape, -1)
                    factors.step(cells.sum(2), number, share)
        return total

    def _put_in(
        self,
        block: LoadedBlock,
        blocks: "_Blocks",
        *,
        factors: bool = False,
        learn: bool = False,
    ) -> "list[tuple[BlockMap, torch.Tensor]]":
        """Put rounded weights into a block.

        Args:
            block: a block with the checkpoint's weights.
            blocks: what to put in.
            factors: multiply it by the factors.
            learn: let gradients of the weights be kept.

        Returns:
            The maps, and their weights without factors, shape (rows, columns).
        """
        import torch

        fold_block(block, self._changes)
        bases = []
        for map in maps_of(self._family, block, self._plan):
            packed, kind = blocks[block.number][map.name], self._ggml.type(map.type)
            columns = packed.shape[1] // kind.block_nbytes * kind.block
            weight = base = torch.from_numpy(self._ggml.dequantize(kind, packed, columns))
            if factors:
                product = self._factors[map.name].product
                weight = (base.view(*product.shape, -1) * product[..., None]).view_as(base)
            weight = weight.T.contiguous() if self._family.transposed else weight
            parameter = torch.nn.Parameter(weight, requires_grad=learn)
            block.module.get_submodule(map.path).weight = parameter
            bases.append((map, base))
        return bases

    def _final(
        self,
        tokens: "torch.Tensor",
        before: "Callable[[LoadedBlock, torch.Tensor], object] | None" = None,
    ) -> "torch.Tensor":
        """Hidden states after the last block; ``before`` is called before each."""
        final: list[torch.Tensor] = []

        def each(block: LoadedBlock, hidden: "torch.Tensor") -> "torch.Tensor":
            if before:
                before(block, hidden)
            hidden = block.forward(hidden)
            if block.number == self._last:
                final.append(hidden.clone())
            return hidden

        self._model.run(tokens, each)
        return final.pop()

    def divergence(self, sequences: "torch.Tensor", blocks: "_Blocks") -> float:
        """Mean divergence of a rounded model, in nats per token."""
        found = []
        for tokens in _batches(sequences):
            wanted = self._final(tokens)
            final = self._final(tokens, lambda block, _: self._put_in(block, blocks))
            for number, sequence in enumerate(tokens):
                one, other = (
                    self._model.logits_after(sequence, states[number : number + 1])
                    for states in (wanted, final)
                )
                found.append(float(_divergence(one, other).mean()))
        return math.fsum(found) / len(found)

    def learned(self, number: int) -> "dict[str, Bytes]":
        """The maps of a block with the factors in their scales."""
        return {
            name: _multiplied(self._plan[name], packed, self._factors[name].product)
            for name, packed in self.rounded[number].items()
        }

    def _save(self, path: Path, met: list[float]) -> None:
        from safetensors.torch import save_file

        tensors = {
            f"{name}:{part}": tensor
            for name, factors in self._factors.items()
            for part, tensor in factors.parts().items()
        }
        scratch = path.with_name(f"{path.name}.tmp")
        with writing(path):
            save_file(tensors, scratch, metadata={"met": json.dumps(met)})
        scratch.replace(path)

    def _restore(self, path: Path) -> tuple[int, list[float]]:
        """How many steps a killed run took, and what divergences it met."""
        from safetensors import safe_open

        if not path.exists():
            return 0, []
        damaged = foreign(f"{path} is damaged", f"Remove {path}", error=IntegrityError)
        with damaged, safe_open(path, framework="pt") as file:
            for name, factors in self._factors.items():
                for part, tensor in factors.parts().items():
                    tensor.copy_(file.get_tensor(f"{name}:{part}"))
            met: list[float] = json.loads(file.metadata()["met"])
        return len(met), met


def _batches(sequences: "torch.Tensor") -> "list[torch.Tensor]":
    return [sequences[first : first + BATCH] for first in range(0, len(sequences), BATCH)]


def _divergence(wanted: "torch.Tensor", logits: "torch.Tensor") -> "torch.Tensor":
    """KL divergence at each position, shape (tokens,)."""
    p, q = wanted.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _multiplied(type: str, packed: "Bytes", factors: "torch.Tensor") -> "Bytes":
    """Blocks with their half precision scales multiplied."""
    import numpy as np

    format = format_of(type)
    fields = format.unpack(packed)
    d, dmin = (
        None if half is None else (half.astype(np.float32) * factors.numpy()).astype(np.float16)
        for half in (fields.d, fields.dmin)
    )
    assert d is not None
    return format.pack(replace(fields, d=d, dmin=dmin))
