"""One streaming pass over the calibration text, block by block.

The model's own forward runs once over all calibration sequences, with each
block loading its weights when its turn comes and dropping them after. Memory
holds one block, its statistics and the hidden states of all sequences: never
the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.checkpoint.tensors import TensorReader
from ggufkit.errors import CheckpointError, GgufkitError
from ggufkit.scaling.families import Family

if TYPE_CHECKING:
    import torch

_TOKENS_AT_ONCE = 2048
"""Tokens of a forward step inside a block: enough to keep the cores busy."""


@dataclass(frozen=True)
class GroupStatistics:
    """What the consumers of a group see.

    Attributes:
        gram: second moment E[x xᵀ], float32, shape (inputs, inputs); summed in
            float64 over steps.
        mean_abs: E|x|, float32, shape (inputs,).
        tokens: number of inputs seen.
    """

    gram: "torch.Tensor"
    mean_abs: "torch.Tensor"
    tokens: int


@dataclass(frozen=True)
class BlockVisit:
    """A block with its weights loaded and its statistics gathered.

    Attributes:
        number: position of the block.
        weights: float32 parameters by name inside the block.
        statistics: by name of group; empty if they were not wanted.
    """

    number: int
    weights: Mapping[str, "torch.Tensor"]
    statistics: Mapping[str, GroupStatistics]


class _Gatherer:
    """Sums the statistics of one group over the steps of a block."""

    def __init__(self) -> None:
        self.tokens = 0
        self._gram: torch.Tensor | None = None
        self._abs: torch.Tensor | None = None

    def __call__(self, module: Any, inputs: tuple["torch.Tensor", ...]) -> None:
        import torch

        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        if self._gram is None or self._abs is None:
            width = x.shape[1]
            self._gram = torch.zeros(width, width, dtype=torch.float64)
            self._abs = torch.zeros(width, dtype=torch.float64)
        self._gram += x.T @ x
        self._abs += x.abs().sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]

    def result(self, where: str) -> GroupStatistics:
        assert self._gram is not None
        assert self._abs is not None
        gram = (self._gram / self.tokens).float()
        if not bool(gram.isfinite().all()):
            raise CheckpointError(
                f"the activations of {where} overflow or are not numbers",
                "The checkpoint is broken for this text; look at it with another text or dtype",
            )
        return GroupStatistics(gram, (self._abs / self.tokens).float(), self.tokens)


def visit_blocks(
    index: CheckpointIndex,
    family: Family,
    sequences: "torch.Tensor",
    visit: Callable[[BlockVisit], None],
    *,
    wanted: Callable[[int], bool] = lambda _: True,
    trust_remote_code: bool = False,
) -> None:
    """Run the model over the sequences and call ``visit`` after each block.

    Args:
        index: the checkpoint.
        family: its family.
        sequences: token ids, int64, shape (sequences, tokens).
        visit: called for the wanted blocks, in order, while their weights are loaded.
        wanted: which blocks to gather statistics for and to visit; the others
            only run forward, so an interrupted search goes on where it stopped.
        trust_remote_code: let transformers run the checkpoint's own code.

    Raises:
        CheckpointError: if a weight or activation is not finite (named).
    """
    import torch

    with TensorReader(index) as reader, torch.inference_mode():
        model = _empty_model(index, trust_remote_code)
        decoder = model.get_decoder()
        blocks = model.get_submodule(family.blocks)
        for number, block in enumerate(blocks):
            step = _BlockStep(number, block, family, reader, visit, wanted(number))
            # The model keeps calling its blocks as it always does, with masks
            # and position embeddings of its own making.
            block.forward = step.forward
        _load(decoder.get_input_embeddings(), "the embedding", reader, _embedding_name(reader))
        # Nothing reads what comes after the last block.
        decoder.norm = torch.nn.Identity()
        decoder(input_ids=sequences, use_cache=False)


def _empty_model(index: CheckpointIndex, trust_remote_code: bool) -> Any:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(index.path, trust_remote_code=trust_remote_code)
    # Parameters are empty; buffers such as rotary frequencies are real.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
    return model.eval()


def _embedding_name(reader: TensorReader) -> str:
    for name in ("model.embed_tokens.weight",):
        if name in reader.index.tensors:
            return name
    raise CheckpointError(f"{reader.index.path} has no tensor model.embed_tokens.weight")


def _load(module: Any, what: str, reader: TensorReader, name: str) -> None:
    module.load_state_dict({"weight": _finite(reader, name)}, assign=True)


def _finite(reader: TensorReader, name: str) -> "torch.Tensor":
    tensor = reader.load(name).float()
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"tensor {name} holds NaN or infinite values",
            "The checkpoint is damaged; fetch it again",
        )
    return tensor


class _BlockStep:
    """Stands in for a block's forward: load, run in steps, visit, unload."""

    def __init__(
        self,
        number: int,
        block: Any,
        family: Family,
        reader: TensorReader,
        visit: Callable[[BlockVisit], None],
        wanted: bool,
    ) -> None:
        self._number = number
        self._block = block
        self._run = block.forward
        self._family = family
        self._reader = reader
        self._visit = visit
        self._wanted = wanted

    def forward(self, hidden_states: "torch.Tensor", *args: Any, **kwargs: Any) -> "torch.Tensor":
        prefix = f"{self._family.blocks}.{self._number}."
        weights = {
            name: _finite(self._reader, prefix + name) for name, _ in self._block.named_parameters()
        }
        self._block.load_state_dict(weights, assign=True, strict=False)
        with self._gathering() as gatherers:
            hidden_states = self._in_steps(hidden_states, args, kwargs)
        if self._wanted:
            statistics = {
                name: gatherer.result(f"{prefix}{name}") for name, gatherer in gatherers.items()
            }
            self._visit(BlockVisit(self._number, weights, statistics))
        self._block.to_empty(device="meta")
        return hidden_states

    @contextmanager
    def _gathering(self) -> Iterator[dict[str, _Gatherer]]:
        gatherers: dict[str, _Gatherer] = {}
        with ExitStack() as stack:
            for group in self._family.groups if self._wanted else ():
                gatherers[group.name] = _Gatherer()
                consumer = self._block.get_submodule(group.consumers[0])
                handle = consumer.register_forward_pre_hook(gatherers[group.name])
                stack.callback(handle.remove)
            yield gatherers

    def _in_steps(
        self, hidden_states: "torch.Tensor", args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> "torch.Tensor":
        import torch

        count, length = hidden_states.shape[:2]
        at_once = max(1, _TOKENS_AT_ONCE // length)
        out = torch.empty_like(hidden_states)
        for first in range(0, count, at_once):
            part = slice(first, min(first + at_once, count))
            own_args = [_of_sequences(a, part, count) for a in args]
            own_kwargs = {k: _of_sequences(a, part, count) for k, a in kwargs.items()}
            result = self._run(hidden_states[part], *own_args, **own_kwargs)
            out[part] = result[0] if isinstance(result, tuple) else result
        return out


def _of_sequences(value: Any, part: slice, count: int) -> Any:
    """The share of some of the sequences in an argument of a block.

    Tensors with a leading dimension of all sequences are cut; those that serve
    all of them (leading dimension 1, or none) are passed on.
    """
    import torch

    if isinstance(value, tuple):
        return tuple(_of_sequences(v, part, count) for v in value)
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == count > 1:
        return value[part]
    return value


def sequences_from_text(
    text: str, index: CheckpointIndex, samples: int, length: int, *, trust_remote_code: bool = False
) -> "torch.Tensor":
    """Cut a calibration text into sequences, spread evenly over the whole text.

    Args:
        text: the text.
        index: the checkpoint whose tokenizer reads it.
        samples: how many sequences to take at most.
        length: tokens of each; begins with BOS if the tokenizer adds one.
        trust_remote_code: let transformers run the checkpoint's own code.

    Returns:
        int64, shape (sequences, length); fewer sequences than asked for if the
        text has no more.

    Raises:
        GgufkitError: if the text has fewer than two sequences in it.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(index.path, trust_remote_code=trust_remote_code)
    # The warning about texts beyond the context does not apply: it is cut.
    tokenizer.model_max_length = int(1e30)
    prefix = [t for t in tokenizer("").input_ids if t == tokenizer.bos_token_id]
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    body = length - len(prefix)
    available = len(tokens) // body
    if available < 2:
        raise GgufkitError(
            f"the calibration text has only {len(tokens)} tokens; at least {2 * body} are needed",
            "Give a longer text with --calibration, or a smaller --calibration-length",
        )
    count = min(samples, available)
    starts = [round(i * (len(tokens) - body) / max(1, count - 1)) for i in range(count)]
    return torch.tensor([prefix + tokens[start : start + body] for start in starts])
