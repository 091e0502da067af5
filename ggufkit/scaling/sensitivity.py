"""How much the loss minds an error in the outputs of a group, token by token.

To second order the loss minds an error e of some outputs by (gᵀe)² with g its
gradient there; with errors of unknown direction that is |g|² |e|². So each
token's inputs may count by the squared gradient of what is made of them (the
diagonal Fisher information of the outputs). It takes one forward and one
backward pass, block by block: hidden states between blocks go to a file, and
each block runs again when its gradient is due.
"""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.progress import Progress
from ggufkit.scaling.families import Family
from ggufkit.scaling.groups import block_count, groups_of
from ggufkit.scaling.statistics import is_linear, quick_products
from ggufkit.scaling.streaming import LoadedBlock, streamed_model

if TYPE_CHECKING:
    import torch


def token_weights(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    progress: Progress,
    *,
    scratch: Path,
    trust_remote_code: bool = False,
) -> "dict[str, torch.Tensor]":
    """Weights of all tokens for each group.

    Args:
        index: the checkpoint.
        family: its family.
        sequences: token ids, int64, shape (sequences, tokens).
        progress: told block by block.
        scratch: a directory for hidden states, of all blocks.
        trust_remote_code: let transformers run the checkpoint's own code.

    Returns:
        By name of the group: float32, shape (sequences * tokens,), mean 1.
        Groups of experts are left out.
    """
    import torch

    blocks = block_count(index)
    found: dict[str, torch.Tensor] = {}
    with (
        progress.task("sensitivity", 2 * blocks, "blocks") as task,
        quick_products(),
        streamed_model(
            index, family, scratch, gradients=True, trust_remote_code=trust_remote_code
        ) as model,
        tempfile.NamedTemporaryFile(dir=scratch, prefix=".states-") as file,
    ):
        states: list[torch.Tensor] = []
        calls: list[LoadedBlock] = []
        last: list[torch.Tensor] = []

        def forward(block: LoadedBlock, hidden: "torch.Tensor") -> "torch.Tensor":
            if not states:
                everything = torch.from_file(
                    file.name, shared=True, size=blocks * hidden.numel()
                ).view(blocks, *hidden.shape)
                states.extend(everything)
            states[block.number].copy_(hidden)
            calls.append(block)
            hidden = block.forward(hidden)
            if block.number == blocks - 1:
                last.append(hidden.clone())
            task.update(block.number + 1)
            return hidden

        model.run(sequences, forward)
        gradient = model.loss_gradient(sequences, last.pop())
        for number in reversed(range(blocks)):
            with model.loaded(calls[number]) as block, ExitStack() as stack:
                seen = _watch(index, family, block, stack)
                block.backward(states[number], gradient)
            for name, parts in seen.items():
                if not parts:
                    continue
                weights = torch.cat(parts)
                found[name] = weights / weights.mean().clamp(min=1e-30)
            task.update(2 * blocks - number)
    return found


def _watch(
    index: CheckpointIndex, family: Family, block: LoadedBlock, stack: ExitStack
) -> "Mapping[str, list[torch.Tensor]]":
    """Gather the squared gradients of each group's outputs, step by step."""
    prefix = f"{family.blocks}.{block.number}."
    seen: dict[str, list[torch.Tensor]] = {}
    for group in groups_of(index, family, block.number):
        if group.expert is not None:
            continue
        parts = seen.setdefault(group.name, [])
        modules = [
            block.module.get_submodule(family.in_model(path))
            for name in group.consumers
            if ".experts." not in (path := name.removeprefix(prefix).removesuffix(".weight"))
        ]
        for module in filter(is_linear, modules):
            stack.callback(module.register_full_backward_hook(_Adder(parts)).remove)
    return seen


class _Adder:
    """Adds what one map of a group tells to what the others told of the same step."""

    def __init__(self, parts: "list[torch.Tensor]") -> None:
        self._parts = parts
        self._step = 0

    def __call__(self, module: Any, of_inputs: Any, of_outputs: Any) -> None:
        gradient = of_outputs[0]
        squares = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(1)
        if self._step == len(self._parts):
            self._parts.append(squares)
        else:
            self._parts[self._step] += squares
        self._step += 1
