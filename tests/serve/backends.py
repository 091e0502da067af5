"""A backend without a model: it keeps the books that llama.cpp keeps, and checks them.

The next token is a function of all tokens of a sequence, so an answer comes out
right only if exactly its tokens were computed, in order, whatever was shared,
trimmed or set back on the way.
"""

import math
import threading
from collections.abc import Sequence

from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp.batching import Decoded
from ggufkit.llamacpp.images import Seen
from ggufkit.llamacpp.sampling import SamplingParams, TokenLogprob
from ggufkit.serve.requests import Adapters

SIZE = 256
END = 0


def after(tokens: Sequence[int]) -> int:
    """The token that comes next: never the end."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return 97 + value % 26


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """The answer to a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(after(tokens))
    return tokens[len(prompt) :]


class Letters:
    """A vocabulary of bytes; token 0 ends an answer."""

    size = SIZE
    end_tokens = frozenset({END})

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"" if token == END else bytes([token])


class Scripted:
    """Samples what comes next, or from the front of a script."""

    def __init__(self, backend: "FakeBackend", script: Sequence[int]) -> None:
        self._backend = backend
        self._script = list(script)
        self.primed: list[int] = []
        self.closed = False

    def prime(self, prompt: Sequence[int]) -> None:
        self.primed = list(prompt)

    def sample(self, index: int) -> int:
        assert not self.closed
        next_token = self._backend.outputs[index]
        return self._script.pop(0) if self._script else next_token

    def logprobs(self, index: int, chosen: int, count: int) -> tuple[TokenLogprob, ...]:
        others = [TokenLogprob(n, math.log(0.1)) for n in range(count)]
        return (TokenLogprob(chosen, math.log(0.5)), *others)

    def close(self) -> None:
        assert not self.closed, "freed twice"
        self.closed = True


class FakeBackend:
    """Sequences over a pool of cells that may belong to several of them.

    Args:
        context: tokens of a sequence at most.
        cells: tokens of all together.
        sequences: how many there are.
        batch: tokens of a batch.
        can_trim: whether the end of a sequence can be taken back.
        gated: whether each batch waits for :meth:`allow`.
    """

    def __init__(
        self,
        *,
        context: int = 64,
        cells: int = 256,
        sequences: int = 8,
        batch: int = 16,
        can_trim: bool = True,
        gated: bool = False,
    ) -> None:
        self.context, self.cells = context, cells
        self.sequences, self.batch = sequences, batch
        self.at_once = sequences
        self.can_trim = self.can_share = can_trim
        self.embedding_context = 16
        self.vocabulary = Letters()
        self.held: list[list[tuple[object, int]]] = [[] for _ in range(sequences)]
        self.outputs: dict[int, int] = {}
        self.batches: list[list[tuple[int, int]]] = []
        self.seen: list[tuple[int, tuple[int, ...]]] = []
        self.samplers: list[Scripted] = []
        self.scripts: dict[int, list[int]] = {}
        self.adapters: Adapters = ()
        self.used_adapters: list[Adapters] = []
        self.copied = 0
        self.failing = 0
        self.crashing = False
        self.aborted = threading.Event()
        self.closed = False
        self._gate = threading.Semaphore(0) if gated else None
        self._batch: list[tuple[int, int, tuple[int, ...], bool]] = []

    def allow(self, batches: int) -> None:
        """Let so many batches through."""
        assert self._gate is not None
        self._gate.release(batches)

    @property
    def room(self) -> int:
        return self.batch - sum(len(tokens) for _, _, tokens, _ in self._batch)

    def warm_up(self) -> None:
        pass

    def clear(self) -> None:
        self._batch = []

    def rank(self, sequence: int) -> int:
        return -sequence

    def add(self, sequence: int, position: int, tokens: Sequence[int], *, output: bool) -> int:
        assert 0 < len(tokens) <= self.room
        ahead = sum(len(t) for s, _, t, _ in self._batch if s == sequence)
        assert position == len(self.held[sequence]) + ahead, "positions must go on"
        self._batch.append((sequence, position, tuple(tokens), output))
        return self.batch - self.room - 1

    def decode(self) -> Decoded:
        if self._gate is not None:
            while not self._gate.acquire(timeout=0.01):
                if self.aborted.is_set():
                    return Decoded.ABORTED
        if self.crashing:
            raise RuntimeError("a bug")
        if self.failing:
            self.failing -= 1
            raise ToolError("the computation failed")
        used = {id(cell) for held in self.held for cell, _ in held}
        if len(used) + self.batch - self.room > self.cells:
            return Decoded.FULL
        place = -1
        self.outputs = {}
        for sequence, _, tokens, output in self._batch:
            self.held[sequence] += [(object(), token) for token in tokens]
            assert len(self.held[sequence]) <= self.context
            place += len(tokens)
            if output:
                self.outputs[place] = after([token for _, token in self.held[sequence]])
        self.batches.append([(s, len(tokens)) for s, _, tokens, _ in self._batch])
        self.used_adapters.append(self.adapters)
        return Decoded.DONE

    def see(self, sequence: int, position: int, image: Seen) -> Decoded:
        assert position == len(self.held[sequence]), "positions must go on"
        used = {id(cell) for held in self.held for cell, _ in held}
        if len(used) + len(image.tokens) > self.cells:
            return Decoded.FULL
        self.held[sequence] += [(object(), token) for token in image.tokens]
        self.seen.append((sequence, image.tokens))
        return Decoded.DONE

    def forget(self, sequence: int, start: int = 0) -> bool:
        if start and not self.can_trim:
            return False
        del self.held[sequence][start:]
        return True

    def copy(self, source: int, target: int, count: int) -> None:
        assert self.can_share
        assert not self.held[target]
        self.held[target] = self.held[source][:count]
        self.copied += count

    def forget_all(self) -> None:
        self.held = [[] for _ in range(self.sequences)]

    def sampler(self, params: SamplingParams) -> Scripted:
        if params.grammar:
            raise UsageError("no grammars here")
        made = Scripted(self, self.scripts.get(params.seed or 0, ()))
        self.samplers.append(made)
        return made

    def check_adapters(self, adapters: Adapters) -> None:
        if any(name == "unknown" for name, _ in adapters):
            raise UsageError("there is no such adapter")

    def use_adapters(self, adapters: Adapters) -> None:
        self.adapters = adapters

    def embed(self, tokens: Sequence[int]) -> list[float]:
        return [float(sum(tokens)), float(len(tokens))]

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        assert all(sampler.closed for sampler in self.samplers), "a sampler leaks"
        self.closed = True
