"""How the next token is chosen: by llama.cpp's own samplers, one chain for each answer.

Logits stay where llama.cpp keeps them. Only their place is handed around, and a
number leaves it when log-probabilities are asked for.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ggufkit.errors import GgufkitError, UsageError
from ggufkit.llamacpp.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RANDOM_SEED = 0xFFFFFFFF
"""``LLAMA_DEFAULT_SEED``: another one each time."""
MAX_GRAMMAR_NBYTES = 128 << 10
"""llama.cpp reads grammars by recursion; a longer one could exhaust the stack."""
MAX_GRAMMAR_DEPTH = 256
_COLDEST = 1e-4
"""Below this temperature the likeliest token wins anyway, and logits would overflow."""
_BIAS_LIMIT = 1000.0


class GrammarError(GgufkitError):
    """No token fits what the grammar wants next."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the defaults are llama.cpp's.

    The order is llama.cpp's too: bias, penalties, DRY, top-k, typical, top-p,
    min-p, temperature, and a draw.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_k: choose among this many; 0 for all.
        top_p: choose among the most likely that sum up to this.
        min_p: leave out tokens less likely than this share of the likeliest.
        typical_p: locally typical sampling; 1 for none.
        repeat_penalty: above 1, tokens of late become less likely.
        presence_penalty: taken off the logit of a token that occurred.
        frequency_penalty: taken off for each time that it occurred.
        penalty_window: how many tokens back the penalties look, prompt included.
        dry_multiplier: strength of the DRY penalty on repeated sequences; 0 for none.
        dry_base: its growth with the length of the repetition.
        dry_allowed_length: repetitions up to this long are free.
        logit_bias: added to the logits of tokens; minus infinity forbids one.
        seed: of the draw; None for another one each time.
        grammar: GBNF that the answer must follow; empty for none.

    Raises:
        UsageError: if a number makes no sense.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    grammar: str = ""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            # A NaN is in no range.
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}, and must be from {low:g} to {high:g}")
        if self.seed is not None and not 0 <= self.seed <= RANDOM_SEED:
            raise UsageError(f"seed is {self.seed}, and must be from 0 to {RANDOM_SEED}")
        for token, bias in self.logit_bias.items():
            if bias != -math.inf and not abs(bias) <= _BIAS_LIMIT:
                raise UsageError(f"the bias of token {token} is {bias}, and must be a small number")
        _check_grammar(self.grammar)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _COLDEST

    @property
    def remembers(self) -> bool:
        """Whether the choice depends on the tokens before."""
        penalties = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or self.dry_multiplier != 0


_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (0, 1 << 30),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repeat_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "penalty_window": (0, 1 << 20),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "dry_allowed_length": (0, 1 << 20),
}


def _check_grammar(grammar: str) -> None:
    if len(grammar.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_NBYTES:
        raise UsageError(f"the grammar is longer than {MAX_GRAMMAR_NBYTES >> 10} KiB")
    if "\0" in grammar:
        raise UsageError("the grammar contains a zero byte")
    depth = 0
    for character in grammar:
        depth += (character == "(") - (character == ")")
        if depth > MAX_GRAMMAR_DEPTH:
            raise UsageError(f"the grammar nests more than {MAX_GRAMMAR_DEPTH} parentheses")


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely it was, before any sampling parameter.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
    """

    token: int
    logprob: float


class Logits:
    """The outputs of one context's last batch.

    Args:
        library: the binding.
        context: the context's pointer.
        vocabulary: of the model.
    """

    def __init__(self, library: ModuleType, context: Any, vocabulary: Vocabulary) -> None:
        self._place = holding(library, "llama_get_logits_ith", ctypes.c_void_p)
        self._context = context
        self._row = ctypes.c_float * vocabulary.size

    def view(self, index: int) -> "npt.NDArray[np.float32]":
        """Logits of the output at this index of the batch; gone at the next batch."""
        import numpy as np

        place = self._place(self._context, index)
        if not place:
            raise IndexError(f"the batch has no output at {index}")
        row: Any = self._row.from_address(place)
        found: npt.NDArray[np.float32] = np.frombuffer(row, dtype=np.float32)
        return found

    def logprobs(self, index: int, chosen: int, count: int) -> tuple[TokenLogprob, ...]:
        """The chosen token first, then the likeliest ``count`` of all, best first."""
        import numpy as np

        logits = self.view(index).astype(np.float64)
        logits -= logits.max()
        logits -= np.log(np.exp(logits).sum())
        best = _top(logits, count)
        return tuple(TokenLogprob(int(t), float(logits[t])) for t in (chosen, *best))


def _top(values: Any, count: int) -> list[int]:
    import numpy as np

    if count == 0:
        return []
    found = np.argpartition(values, -count)[-count:]
    return [int(t) for t in found[np.argsort(-values[found], kind="stable")]]


@cache
def holding(library: ModuleType, name: str, result: Any = None) -> Any:
    """A function of the library that is called without letting go of Python's lock.

    Taking the lock back costs up to 5 ms if another thread computes in Python;
    calls of microseconds are better off keeping it.

    Args:
        library: the binding.
        name: of the function.
        result: ctypes type of the result, if another than the binding's.
    """
    known = getattr(library, name)
    prototype = ctypes.PYFUNCTYPE(result or known.restype, *known.argtypes)
    return prototype((name, _keeping_lock(library)))


@cache
def _keeping_lock(library: ModuleType) -> ctypes.PyDLL:
    return ctypes.PyDLL(library._lib._name, handle=library._lib._handle)


class Sampler:
    """Chooses the tokens of one answer. Not for two threads at once.

    Args:
        library: the binding.
        context: the context's pointer.
        logits: of the same context.
        vocabulary: of the model.
        params: how to choose.

    Raises:
        UsageError: if the grammar or a biased token cannot be.
    """

    def __init__(
        self,
        library: ModuleType,
        context: Any,
        logits: Logits,
        vocabulary: Vocabulary,
        params: SamplingParams,
    ) -> None:
        self._library = library
        self._context = context
        self._logits = logits
        self._vocabulary = vocabulary
        self._params = params
        self._chain: Any = None
        self._grammar: Any = None
        self._sample = holding(library, "llama_sampler_sample")
        for token in params.logit_bias:
            if not 0 <= token < vocabulary.size:
                raise UsageError(f"the vocabulary has no token {token}")
        if params.grammar:
            self._grammar = self._make_grammar(params.grammar)
        if params.grammar or not (params.greedy and not params.remembers and not self._biases()):
            self._chain = self._make_chain()

    def _biases(self) -> dict[int, float]:
        """The caller's, and tokens that the model's file wants suppressed."""
        count = ctypes.c_int32(0)
        tokens = self._library.llama_vocab_get_suppress_tokens(
            self._vocabulary.pointer, ctypes.byref(count)
        )
        suppressed = {int(tokens[i]): -math.inf for i in range(count.value)}
        return {**self._params.logit_bias, **suppressed}

    def _make_grammar(self, text: str) -> Any:
        from ggufkit.llamacpp.runtime import drain_errors

        drain_errors()
        found = self._library.llama_sampler_init_grammar(
            self._vocabulary.pointer, text.encode("utf-8", "replace"), b"root"
        )
        if not found:
            raise UsageError(
                f"llama.cpp cannot read the grammar: {drain_errors() or 'it has no rule root'}",
                "GBNF is described in grammars/README.md of llama.cpp",
            )
        return found

    def _make_chain(self) -> Any:
        lib, p = self._library, self._params
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for part in self._parts(p):
            lib.llama_sampler_chain_add(chain, part)
        return chain

    def _parts(self, p: SamplingParams) -> list[Any]:
        lib, size = self._library, self._vocabulary.size
        parts = []
        if biases := self._biases():
            spelled = (lib.llama_logit_bias * len(biases))(*biases.items())
            parts.append(lib.llama_sampler_init_logit_bias(size, len(biases), spelled))
        if p.remembers:
            parts.append(
                lib.llama_sampler_init_penalties(
                    size,
                    p.penalty_window,
                    p.repeat_penalty,
                    p.frequency_penalty,
                    p.presence_penalty,
                )
            )
        if p.dry_multiplier:
            breakers = (ctypes.c_char_p * 4)(b"\n", b":", b'"', b"*")
            parts.append(
                lib.llama_sampler_init_dry(
                    self._vocabulary.pointer,
                    p.dry_multiplier,
                    p.dry_base,
                    p.dry_allowed_length,
                    p.penalty_window,
                    breakers,
                    len(breakers),
                )
            )
        if p.greedy:
            return [*parts, lib.llama_sampler_init_greedy()]
        if p.top_k:
            parts.append(lib.llama_sampler_init_top_k(p.top_k))
        if p.typical_p < 1:
            parts.append(lib.llama_sampler_init_typical(p.typical_p, 1))
        if p.top_p < 1:
            parts.append(lib.llama_sampler_init_top_p(p.top_p, 1))
        if p.min_p > 0:
            parts.append(lib.llama_sampler_init_min_p(p.min_p, 1))
        seed = RANDOM_SEED if p.seed is None else p.seed
        temperature = lib.llama_sampler_init_temp(p.temperature)
        return [*parts, temperature, lib.llama_sampler_init_dist(seed)]

    def prime(self, prompt: Sequence[int]) -> None:
        """Show it the prompt, whose last tokens count for the penalties."""
        if self._chain and self._params.remembers and self._params.penalty_window:
            for token in prompt[-self._params.penalty_window :]:
                self._library.llama_sampler_accept(self._chain, token)

    def sample(self, index: int) -> int:
        """Choose, and remember the choice.

        Args:
            index: which token of the last batch the choice comes after.

        Raises:
            GrammarError: if the grammar leaves nothing to choose.
        """
        if self._grammar:
            return self._sample_by_grammar(index)
        if self._chain:
            return int(self._sample(self._chain, self._context, index))
        return int(self._logits.view(index).argmax())

    def logprobs(self, index: int, chosen: int, count: int) -> tuple[TokenLogprob, ...]:
        """The chosen token first, then the likeliest ``count`` of all, best first."""
        return self._logits.logprobs(index, chosen, count)

    def _sample_by_grammar(self, index: int) -> int:
        # As llama.cpp's own tools do: to ask the grammar about one token is cheap,
        # about the whole vocabulary it is not. So it is asked about all only if
        # the token chosen freely does not fit.
        token = self._choose(index, by_grammar=False)
        if not self._fits(token):
            token = self._choose(index, by_grammar=True)
            # Accepting what does not fit would end the process.
            if not self._fits(token):
                raise GrammarError("no token of the vocabulary continues what the grammar wants")
        self._library.llama_sampler_accept(self._grammar, token)
        self._library.llama_sampler_accept(self._chain, token)
        return token

    def _choose(self, index: int, *, by_grammar: bool) -> int:
        import numpy as np

        lib = self._library
        logits = self._logits.view(index)
        data = np.empty(len(logits), dtype=[("id", "i4"), ("logit", "f4"), ("p", "f4")])
        data["id"] = np.arange(len(logits), dtype=np.int32)
        data["logit"] = logits
        data["p"] = 0
        start = data.ctypes.data_as(lib.llama_token_data_p)
        candidates = lib.llama_token_data_array(start, len(logits), -1, False)
        if by_grammar:
            lib.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        lib.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        return int(candidates.data[candidates.selected].id)

    def _fits(self, token: int) -> bool:
        lib = self._library
        one = lib.llama_token_data(token, 1.0, 0.0)
        candidates = lib.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        lib.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        return bool(one.logit != -math.inf)

    def close(self) -> None:
        """Free its memory."""
        for name in ("_chain", "_grammar"):
            part = getattr(self, name)
            setattr(self, name, None)
            if part:
                self._library.llama_sampler_free(part)
