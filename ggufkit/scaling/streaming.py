"""A model that runs without ever being in memory as a whole.

transformers' own forward runs over all sequences at once, with its own masks
and position embeddings, so every family is computed as its authors meant it.
But each block loads its weights when its turn comes, works in small steps and
drops them again: memory holds one block and the hidden states, which move to
disk when they are many.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.checkpoint.tensors import TensorReader
from ggufkit.errors import CheckpointError
from ggufkit.foreign import foreign
from ggufkit.llamacpp import host
from ggufkit.scaling.families import EXPERT, Family
from ggufkit.scaling.groups import expert_count

if TYPE_CHECKING:
    import torch

TOKENS_AT_ONCE = 2048
"""Tokens of a forward step inside a block: enough to keep the cores busy."""
HIDDEN_NBYTES_IN_MEMORY = 1 << 30
"""Hidden states above this size live in a file."""


_OTHER_VERSION = (
    "Fetch config.json again; if it is as published, the model may need another version of "
    "transformers, or code of its own: --trust-remote-code"
)


def load_torch() -> None:
    """Import torch so that its threads sleep when they have nothing to do.

    By default they wait by spinning, for the very cores on which ggml's threads
    round candidates in between. The setting is read when torch loads; it must not
    reach the programs that are started later.
    """
    name = "OMP_WAIT_POLICY"
    ours = name not in os.environ
    os.environ.setdefault(name, "passive")
    try:
        import torch  # noqa: F401
    finally:
        if ours:
            del os.environ[name]


class _SeenError(Exception):
    """Ends a forward pass that has shown what was wanted."""


def steps(hidden: "torch.Tensor", within: slice | None = None) -> Iterator[slice]:
    """The sequences of hidden states, a few at a time."""
    count, length = hidden.shape[:2]
    chosen = range(count)[within or slice(None)]
    at_once = max(1, TOKENS_AT_ONCE // length)
    for first in chosen[::at_once]:
        yield slice(first, min(first + at_once, chosen.stop))


class LoadedBlock:
    """A block with its weights in memory.

    Attributes:
        number: position of the block.
        module: transformers' module.
        weights: float32 parameters by checkpoint name, as the file has them.
    """

    def __init__(
        self,
        number: int,
        module: Any,
        run: Callable[..., Any],
        weights: "Mapping[str, torch.Tensor]",
        arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    ) -> None:
        self.number = number
        self.module = module
        self.weights = weights
        self._run = run
        self._args, self._kwargs = arguments

    def forward(self, hidden: "torch.Tensor", within: slice | None = None) -> "torch.Tensor":
        """Run the block over hidden states, shape (sequences, tokens, width), in place.

        Args:
            hidden: those of all sequences.
            within: the sequences to run over; all of them if None.
        """
        for part in steps(hidden, within):
            hidden[part] = self.step(hidden[part], part, len(hidden))
        return hidden

    def input_of(self, path: str, hidden: "torch.Tensor", within: slice) -> "torch.Tensor":
        """What a map of the block sees; nothing that comes after it is run.

        Args:
            path: of the map, inside the block's module.
            hidden: hidden states before the block, of all sequences; left alone.
            within: the sequences to run, few enough for one step.

        Returns:
            Shape (tokens, inputs).
        """
        seen: list[torch.Tensor] = []

        def stop(module: Any, inputs: "tuple[torch.Tensor, ...]") -> None:
            seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
            raise _SeenError

        watch = self.module.get_submodule(path).register_forward_pre_hook(stop)
        try:
            self.step(hidden[within], within, len(hidden))
        except _SeenError:
            return seen[0]
        finally:
            watch.remove()
        raise LookupError(f"the block does not use {path}")

    def backward(self, states: "torch.Tensor", gradient: "torch.Tensor") -> None:
        """Turn the gradient at the block's output into that at its input, in place.

        Args:
            states: hidden states before the block, shape (sequences, tokens, width).
            gradient: of the loss with respect to those after it, same shape.
        """
        import torch

        for part in steps(states):
            before = states[part].clone().requires_grad_()
            with torch.enable_grad():
                after = self.step(before, part, len(states))
                torch.autograd.backward(after, gradient[part])
            assert before.grad is not None
            gradient[part] = before.grad

    def step(self, hidden: "torch.Tensor", part: slice, count: int) -> "torch.Tensor":
        """Run the block over some of ``count`` sequences; their hidden states after it."""
        args = [_of_sequences(a, part, count) for a in self._args]
        kwargs = {k: _of_sequences(a, part, count) for k, a in self._kwargs.items()}
        with foreign(f"transformers fails in block {self.number}", _OTHER_VERSION):
            result = self._run(hidden, *args, **kwargs)
        after: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return after


EachBlock = Callable[[LoadedBlock, "torch.Tensor"], "torch.Tensor"]
"""Takes a block and the hidden states before it; gives those after it."""
TokenLoss = Callable[[int, "torch.Tensor"], "torch.Tensor"]
"""Takes the number of a sequence and its logits; gives what its tokens add to a loss."""


class StreamedModel:
    """A causal language model whose blocks are read when they are needed.

    Args:
        index: the checkpoint.
        family: its family.
        reader: reads its tensors.
        scratch: a directory for hidden states that are too many for memory.
        trust_remote_code: let transformers run the checkpoint's own code.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        family: Family,
        reader: TensorReader,
        scratch: Path,
        trust_remote_code: bool,
    ) -> None:
        self._index = index
        self._family = family
        self._reader = reader
        self._scratch = scratch
        self._model = _empty_model(index, trust_remote_code)
        self._blocks = list(self._model.get_submodule(family.blocks))
        self._forwards = [block.forward for block in self._blocks]

    def run(self, sequences: "torch.Tensor", each: EachBlock) -> None:
        """Run all blocks over sequences of token ids, int64, shape (sequences, tokens)."""
        decoder = self._model.get_decoder()
        self._load_around(decoder)
        last = len(self._blocks) - 1

        def until_last(block: LoadedBlock, hidden: "torch.Tensor") -> "torch.Tensor":
            hidden = each(block, hidden)
            # Nothing reads what comes after the last block.
            return hidden[:1] if block.number == last else hidden

        with self._stepping(until_last), self._running():
            decoder(input_ids=sequences, use_cache=False)

    def logits(
        self, sequences: "torch.Tensor", each: EachBlock, positions: "torch.Tensor"
    ) -> "torch.Tensor":
        """Logits at some positions; float32, shape (sequences, positions, vocabulary)."""
        self._load_around(self._model)
        # Code that comes with a checkpoint may not know how to leave some out.
        own = type(self._model).__module__.startswith("transformers.")
        keep = {"logits_to_keep": positions} if own else {}
        with self._stepping(each), self._running():
            logits = self._model(input_ids=sequences, use_cache=False, **keep).logits
        chosen: torch.Tensor = logits if own else logits[:, positions]
        return chosen.float()

    def loss_gradient(
        self, sequences: "torch.Tensor", final: "torch.Tensor", loss: "TokenLoss | None" = None
    ) -> "torch.Tensor":
        """Gradient of a summed loss with respect to the last hidden states.

        Args:
            sequences: token ids, int64, shape (sequences, tokens).
            final: hidden states after the last block, shape (sequences, tokens, width).
            loss: what is summed; None for that of the next tokens.
        """
        import torch

        gradient = torch.empty_like(final)
        for number, tokens in enumerate(sequences):
            leaf = final[number : number + 1].clone().requires_grad_()
            with torch.enable_grad():
                logits = self.logits_after(tokens, leaf)
                if loss is None:
                    summed = torch.nn.functional.cross_entropy(
                        logits[:-1], tokens[1:], reduction="sum"
                    )
                else:
                    summed = loss(number, logits)
                torch.autograd.backward(summed)
            assert leaf.grad is not None
            gradient[number] = leaf.grad[0]
        return gradient

    def logits_after(self, tokens: "torch.Tensor", final: "torch.Tensor") -> "torch.Tensor":
        """Logits that hidden states after the last block lead to.

        Args:
            tokens: ids of one sequence, int64, shape (tokens,).
            final: its hidden states, shape (1, tokens, width).

        Returns:
            float32, shape (tokens, vocabulary).
        """
        self._load_around(self._model)
        last = len(self._blocks) - 1
        for position, block in enumerate(self._blocks):
            block.forward = lambda hidden, *_, at=position, end=final, **__: (
                end if at == last else hidden
            )
        try:
            logits: torch.Tensor = self._model(input_ids=tokens[None], use_cache=False).logits[0]
        finally:
            for block, forward in zip(self._blocks, self._forwards, strict=True):
                block.forward = forward
        return logits.float()

    def _running(self) -> AbstractContextManager[None]:
        name = self._index.path.name
        return foreign(f"transformers cannot run {name}", _OTHER_VERSION)

    @contextmanager
    def loaded(self, block: LoadedBlock) -> Iterator[LoadedBlock]:
        """A block that ran before, with its weights once more."""
        block.weights = self._load_block(block.number)
        yield block
        block.weights = {}
        block.module.to_empty(device="meta")

    @contextmanager
    def _stepping(self, each: EachBlock) -> Iterator[None]:
        for number, block in enumerate(self._blocks):
            # The model keeps calling its blocks as it always does.
            block.forward = self._step(number, each)
        try:
            yield
        finally:
            for block, forward in zip(self._blocks, self._forwards, strict=True):
                block.forward = forward

    def _step(self, number: int, each: EachBlock) -> Callable[..., "torch.Tensor"]:
        module, run = self._blocks[number], self._forwards[number]

        def step(hidden: "torch.Tensor", *args: Any, **kwargs: Any) -> "torch.Tensor":
            weights = self._load_block(number)
            block = LoadedBlock(number, module, run, weights, (args, kwargs))
            hidden = each(block, self.hold(hidden))
            block.weights = {}
            module.to_empty(device="meta")
            host.return_freed_memory()
            return hidden

        return step

    def hold(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """The hidden states, in a file if they are many."""
        import torch

        if hidden.nbytes <= HIDDEN_NBYTES_IN_MEMORY or hasattr(hidden, "is_in_file"):
            return hidden
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix=".hidden-") as file:
            # The map outlives the name, so nothing stays behind whatever happens.
            held = torch.from_file(file.name, shared=True, size=hidden.numel()).view_as(hidden)
        held.copy_(hidden)
        held.is_in_file = True  # type: ignore[attr-defined]
        return held

    def _load_around(self, module: Any) -> None:
        """Load what is not in blocks: embeddings, last norm, output matrix."""
        import torch

        names = {id(p): n for n, p in self._model.named_parameters(remove_duplicate=False)}
        inside = tuple(f"{self._family.blocks}.{n}." for n in range(len(self._blocks)))
        for owner in module.modules():
            for key, parameter in list(owner.named_parameters(recurse=False)):
                name = names[id(parameter)]
                if name.startswith(inside) or not parameter.is_meta:
                    continue
                if name in self._index.tensors:
                    value = load_finite(self._reader, name)
                    # The rows of an embedding may be padded.
                    self._require_shape(name, value.shape[1:], parameter.shape[1:])
                    if value.ndim == 1:
                        self._require_shape(name, value.shape, parameter.shape)
                elif owner is self._model.get_output_embeddings():
                    value = self._model.get_input_embeddings().weight
                else:
                    raise CheckpointError(f"{self._index.path.name} has no tensor {name}")
                setattr(owner, key, torch.nn.Parameter(value, requires_grad=False))

    def _load_block(self, number: int) -> "dict[str, torch.Tensor]":
        import torch

        family, module = self._family, self._blocks[number]
        prefix = f"{family.blocks}.{number}."
        weights: dict[str, torch.Tensor] = {}
        loaded: dict[str, torch.Tensor] = {}
        for name, _ in module.named_parameters():
            file = prefix + family.in_file(name)
            if file in self._index.tensors:
                loaded[name] = weights[file] = load_finite(self._reader, file)
        if family.experts and (experts := expert_count(self._index, family, number)):
            loaded |= self._load_experts(number, experts, weights)
        missing = [name for name, _ in module.named_parameters() if name not in loaded]
        if missing:
            raise CheckpointError(
                f"{self._index.path.name} has no tensors for {prefix}{missing[0]}",
                "AWQ knows its experts as transformers 5 and later keep them",
            )
        for name, parameter in module.named_parameters():
            self._require_shape(prefix + name, loaded[name].shape, parameter.shape)
        module.load_state_dict(loaded, assign=True, strict=False)
        return weights

    def _require_shape(self, name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(shape) != tuple(wanted):
            found, expected = (" x ".join(map(str, s)) or "nothing" for s in (shape, wanted))
            raise CheckpointError(
                f"tensor {name} of {self._index.path.name} is {found}, and its config makes it "
                f"{expected}",
                "Config and weights are of two models, or damaged: fetch both again",
            )

    def _load_experts(
        self, number: int, experts: int, weights: "dict[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Fill the tensors that hold all experts; ``weights`` gets views of them."""
        import torch

        spec, family = self._family.experts, self._family
        assert spec is not None

        def name(expert: int, part: str) -> str:
            path = spec.path.replace(EXPERT, str(expert))
            return family.tensor(number, f"{path}.{part}")

        width, inputs = self._index.tensors[name(0, spec.gate)].shape
        gate_up = torch.empty(experts, 2 * width, inputs)
        down = torch.empty(experts, inputs, width)
        for expert in range(experts):
            for part, place in (
                (spec.gate, gate_up[expert, :width]),
                (spec.up, gate_up[expert, width:]),
                (spec.down, down[expert]),
            ):
                weights[name(expert, part)] = place.copy_(
                    load_finite(self._reader, name(expert, part))
                )
        return {f"{spec.module}.gate_up_proj": gate_up, f"{spec.module}.down_proj": down}


@contextmanager
def streamed_model(
    index: CheckpointIndex,
    family: Family,
    scratch: Path,
    *,
    gradients: bool = False,
    trust_remote_code: bool = False,
) -> "Iterator[StreamedModel]":
    """The model of a checkpoint, for as long as it is needed; see :class:`StreamedModel`.

    Only with ``gradients`` can blocks run backward.
    """
    import torch

    mode = torch.no_grad() if gradients else torch.inference_mode()
    with TensorReader(index) as reader, mode:
        yield StreamedModel(index, family, reader, scratch, trust_remote_code)


def _empty_model(index: CheckpointIndex, trust_remote_code: bool) -> Any:
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    path = f"{index.path.name}/config.json"
    with foreign(f"transformers cannot read {path}", _OTHER_VERSION):
        config = AutoConfig.from_pretrained(index.path, trust_remote_code=trust_remote_code)
    # Parameters are empty; buffers such as rotary frequencies are real.
    making = foreign(f"transformers cannot make the model of {path}", _OTHER_VERSION)
    with making, init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
    return model.eval().requires_grad_(False)


def load_finite(reader: TensorReader, name: str) -> "torch.Tensor":
    """A tensor as float32.

    Raises:
        CheckpointError: if it holds NaN or infinite values; names it.
    """
    tensor = reader.load(name).float()
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"tensor {name} holds NaN or infinite values",
            "The checkpoint is damaged; fetch it again",
        )
    return tensor


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
