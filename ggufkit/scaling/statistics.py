"""What the linear maps of a model see: one streaming pass over a text.

For each group of scales it gathers the second moment of its input, and for each
linear map the mean square of each input, which is what an importance matrix
holds. Products are made in the quickest precision the processor has (bfloat16
factors summed in float32, where it has instructions for that) and summed over
steps in float64; see :func:`quick_products` for what that costs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import CheckpointError
from ggufkit.scaling.families import EXPERT, Experts, Family
from ggufkit.scaling.groups import BlockGroup, groups_of
from ggufkit.scaling.streaming import LoadedBlock, streamed_model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GroupStatistics:
    """What the consumers of a group see.

    Attributes:
        gram: second moment E[x xᵀ], float32, shape (inputs, inputs).
        mean_abs: E|x|, float32, shape (inputs,).
        tokens: number of inputs seen.
    """

    gram: "torch.Tensor"
    mean_abs: "torch.Tensor"
    tokens: int


@dataclass(frozen=True)
class InputSquares:
    """E[x²] of each input of a linear map, float32, shape (inputs,), over ``tokens``."""

    mean: "torch.Tensor"
    tokens: int


@dataclass(frozen=True)
class BlockVisit:
    """A block with its weights loaded and its statistics gathered.

    Attributes:
        number: position of the block.
        weights: float32 parameters by checkpoint name, as the file has them.
        groups: the block's groups.
        statistics: gives those of a group; an expert's are made when asked for.
        squares: gives E[x²] by the checkpoint name of a map's weight.
    """

    number: int
    weights: "Mapping[str, torch.Tensor]"
    groups: tuple[BlockGroup, ...]
    statistics: Callable[[BlockGroup], GroupStatistics]
    squares: "Callable[[], Mapping[str, InputSquares]]"


@contextmanager
def quick_products() -> Iterator[None]:
    """Let float32 matrix products use bfloat16 factors where that is quicker.

    Each factor is rounded to 8 bits, each product is summed in float32, so that
    a sum over thousands of tokens is off by about 1e-4 of itself: far less than
    what another calibration text would change.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def visit_blocks(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    visit: Callable[[BlockVisit], None],
    *,
    scratch: Path,
    wanted: Callable[[int], bool] = lambda _: True,
    with_groups: bool = True,
    token_weights: "Mapping[str, torch.Tensor] | None" = None,
    trust_remote_code: bool = False,
) -> None:
    """Run the model over the sequences and call ``visit`` after each block.

    Args:
        index: the checkpoint.
        family: its family.
        sequences: token ids, int64, shape (sequences, tokens).
        visit: called for the wanted blocks, in order, while their weights are loaded.
        scratch: a directory for hidden states that are too many for memory.
        wanted: which blocks to gather statistics for and to visit; the others
            only run forward, so an interrupted search goes on where it stopped.
        with_groups: whether second moments are wanted, not only mean squares.
        token_weights: how often each token counts, by name of the group, float32,
            shape (sequences * tokens,); once if it is not there.
        trust_remote_code: let transformers run the checkpoint's own code.

    Raises:
        CheckpointError: if a weight or activation is not finite (named).
    """

    def each(block: LoadedBlock, hidden: "torch.Tensor") -> "torch.Tensor":
        if not wanted(block.number):
            return block.forward(hidden)
        groups = tuple(groups_of(index, family, block.number)) if with_groups else ()
        with _Gathering(family, block, groups, token_weights or {}) as gathering:
            hidden = block.forward(hidden)
        visit(
            BlockVisit(block.number, block.weights, groups, gathering.statistics, gathering.squares)
        )
        return hidden

    with (
        quick_products(),
        streamed_model(index, family, scratch, trust_remote_code=trust_remote_code) as model,
    ):
        model.run(sequences, each)


class _Moments:
    """Sums what one map, or the maps of one group, see over the steps of a block.

    Args:
        where: name for errors.
        width: number of inputs.
        whole: gather the second moment, not only its diagonal.
        weights: how often each token to come counts, in their order.
    """

    def __init__(
        self, where: str, width: int, whole: bool, weights: "torch.Tensor | None" = None
    ) -> None:
        import torch

        self._weights = weights

        self._where = where
        self._tokens = 0
        self._abs = torch.zeros(width, dtype=torch.float64)
        self._sum = torch.zeros((width, width) if whole else (width,), dtype=torch.float64)

    def __call__(self, module: Any, inputs: tuple["torch.Tensor", ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        weights = self._weights
        self.add(x, None if weights is None else weights[self._tokens : self._tokens + len(x)])

    def add(self, x: "torch.Tensor", weight: "torch.Tensor | None" = None) -> None:
        """Add inputs, last dimension their width; each counts ``weight`` times."""
        import torch

        x = x.reshape(-1, x.shape[-1]).float()
        self._tokens += x.shape[0]
        self._abs += x.abs().sum(0, dtype=torch.float64)
        if weight is not None:
            x = x * weight.sqrt()[:, None]
        self._sum += x.T @ x if self._sum.ndim == 2 else x.square().sum(0, dtype=torch.float64)

    def statistics(self) -> GroupStatistics:
        return GroupStatistics(self._mean(self._sum), self._mean(self._abs), self._tokens)

    def squares(self) -> InputSquares:
        diagonal = self._sum.diagonal() if self._sum.ndim == 2 else self._sum
        return InputSquares(self._mean(diagonal), self._tokens)

    def _mean(self, total: "torch.Tensor") -> "torch.Tensor":
        mean = (total / max(1, self._tokens)).float()
        if not bool(mean.isfinite().all()):
            raise CheckpointError(
                f"the activations of {self._where} overflow or are not numbers",
                "The checkpoint is broken for this text; look at it with another text or dtype",
            )
        return mean


class _Gathering:
    """Watches a block while it runs."""

    def __init__(
        self,
        family: Family,
        block: LoadedBlock,
        groups: tuple[BlockGroup, ...],
        token_weights: "Mapping[str, torch.Tensor]",
    ) -> None:
        self._token_weights = token_weights
        self._family = family
        self._block = block
        self._prefix = f"{family.blocks}.{block.number}."
        self._of_group: dict[str, _Moments] = {}
        self._of_map: dict[str, _Moments] = {}
        self._experts: _ExpertInputs | None = None
        self._groups = groups
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        family, tensors = self._family, self._block.weights
        for group in self._groups:
            if group.expert is None:
                weights = self._token_weights.get(group.name)
                moments = _Moments(group.name, group.inputs, whole=True, weights=weights)
                self._of_group[group.name] = moments
                self._of_map |= dict.fromkeys(group.consumers, moments)
                self._watch(self._module_of(group.consumers[0]), moments)
        for name, module in self._block.module.named_modules():
            weight = f"{self._prefix}{family.in_file(name)}.weight"
            if weight in tensors and weight not in self._of_map and is_linear(module):
                width = tensors[weight].shape[0 if family.transposed else 1]
                moments = self._of_map[weight] = _Moments(weight, width, whole=False)
                self._watch(module, moments)
            elif family.experts and name == family.experts.module and _has_experts(module):
                self._experts = _ExpertInputs(family.experts, module, family, self._block)
                watch = module.register_forward_pre_hook(self._experts, with_kwargs=True)
                self._stack.callback(watch.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watch(self, module: Any, moments: _Moments) -> None:
        self._stack.callback(module.register_forward_pre_hook(moments).remove)

    def _module_of(self, weight: str) -> Any:
        name = weight.removeprefix(self._prefix).removesuffix(".weight")
        return self._block.module.get_submodule(self._family.in_model(name))

    def statistics(self, group: BlockGroup) -> GroupStatistics:
        if group.expert is None:
            return self._of_group[group.name].statistics()
        assert self._experts is not None
        return self._experts.statistics(group.expert)

    def squares(self) -> dict[str, InputSquares]:
        found = {name: moments.squares() for name, moments in self._of_map.items()}
        return found | (self._experts.squares() if self._experts else {})


def is_linear(module: Any) -> bool:
    """Whether a module is a linear map."""
    # transformers' Conv1D is a linear map with its weight the other way round.
    return type(module).__name__ in ("Linear", "Conv1D")


def _has_experts(module: Any) -> bool:
    return hasattr(module, "gate_up_proj")


class _ExpertInputs:
    """Remembers what went to which expert, to work it out expert by expert.

    The error of an expert's output reaches the block's times the router's
    weight, so each token counts by the square of that.
    """

    def __init__(self, spec: Experts, module: Any, family: Family, block: LoadedBlock) -> None:
        self.module = module
        self._spec = spec
        self._family = family
        self._block = block
        self._inputs: list[torch.Tensor] = []
        self._chosen: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, chosen, weights = (*args, *kwargs.values())
        self._inputs.append(x.reshape(-1, x.shape[-1]))
        self._chosen.append(chosen.reshape(self._inputs[-1].shape[0], -1))
        self._weights.append(weights.reshape(self._chosen[-1].shape))

    def _routed(self, expert: int) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        for x, chosen, weights in zip(self._inputs, self._chosen, self._weights, strict=True):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                yield x[token], weights[token, place].float()

    def _weight(self, expert: int, part: str) -> tuple[str, "torch.Tensor"]:
        path = self._spec.path.replace(EXPERT, str(expert))
        name = self._family.tensor(self._block.number, f"{path}.{part}")
        return name, self._block.weights[name]

    def statistics(self, expert: int) -> GroupStatistics:
        """Of the input of an expert's down map."""
        return self._hidden(expert, whole=True).statistics()

    def _hidden(self, expert: int, *, whole: bool) -> _Moments:
        gate, up = (self._weight(expert, p)[1] for p in (self._spec.gate, self._spec.up))
        name, down = self._weight(expert, self._spec.down)
        moments = _Moments(name, down.shape[1], whole)
        for x, weight in self._routed(expert):
            hidden = self.module.act_fn(x @ gate.T) * (x @ up.T)
            moments.add(hidden, weight.square() if whole else None)
        return moments

    def squares(self) -> dict[str, InputSquares]:
        """Of the inputs of all maps of all experts."""
        found = {}
        for expert in range(self.module.gate_up_proj.shape[0]):
            name, gate = self._weight(expert, self._spec.gate)
            moments = _Moments(name, gate.shape[1], whole=False)
            for x, _ in self._routed(expert):
                moments.add(x)
            found[name] = found[self._weight(expert, self._spec.up)[0]] = moments.squares()
            down = self._weight(expert, self._spec.down)[0]
            found[down] = self._hidden(expert, whole=False).squares()
        return found
