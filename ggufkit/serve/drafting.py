"""Guessing ahead: a small model proposes tokens, and the large one checks several at once.

To compute three tokens costs a model little more than one, because its weights
are read once for all of them. So a small model with the same vocabulary writes a
few tokens ahead, and the large one computes its own choice after each of them in
one batch. As long as it chooses what was guessed, the choices count; the first
that differs counts too, and what was guessed behind it is taken back. Every token
is chosen by the large model's sampler from the large model's logits, in order, so
the answer has the distribution that it has without guesses (Leviathan et al. 2023,
where the guess is certain of its token).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ggufkit.errors import UsageError
from ggufkit.llamacpp.batching import (
    BatchContext,
    ContextOptions,
    Decoded,
    Model,
    ModelOptions,
)
from ggufkit.llamacpp.images import Projector
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.progress import SILENT, Progress
from ggufkit.serve.engine import Backend, Engine, EngineOptions, common_prefix

DEFAULT_COUNT = 4
"""Tokens that are guessed ahead at most."""
_LEAST_LOGPROB = math.log(0.6)
"""A token that the small model itself believes in less is not worth a try."""


@dataclass(frozen=True)
class DraftOptions:
    """A small model that guesses ahead for a large one.

    Attributes:
        path: its GGUF.
        count: tokens to guess ahead at most.
    """

    path: Path
    count: int = DEFAULT_COUNT


class Drafter:
    """Guesses the next tokens of answers. For the engine's thread alone.

    Args:
        backend: the small model, with a sequence for each of the large one's; this
            owns it and closes it.
        count: tokens to guess ahead at most.
        size: tokens of the large model's vocabulary.
        model: closed together with this, if given.
    """

    def __init__(
        self, backend: Backend, *, count: int, size: int, model: Model | None = None
    ) -> None:
        self._backend = backend
        self._model = model
        self._size = min(size, backend.vocabulary.size)
        self._ends = backend.vocabulary.end_tokens
        self._held: list[list[int]] = [[] for _ in range(backend.sequences)]
        self._sampler = backend.sampler(SamplingParams(temperature=0))
        self.count = count

    def warm_up(self) -> None:
        """Get ready."""
        self._backend.warm_up()

    def guess(self, wanted: Mapping[int, tuple[Sequence[int], int]]) -> dict[int, list[int]]:
        """Guess what comes next.

        Of what it does not know yet it reads one batch, so that a long prompt does
        not hold up others; there are guesses when it has read all.

        Args:
            wanted: by sequence, its tokens and how many guesses there may be.

        Returns:
            Guesses by sequence; none where it has none.
        """
        places = self._catch_up({s: tokens for s, (tokens, most) in wanted.items() if most > 0})
        guesses: dict[int, list[int]] = {}
        while places:
            going = {}
            for sequence, place in places.items():
                token = self._likely(place)
                if token is None:
                    continue
                guess = guesses.setdefault(sequence, [])
                guess.append(token)
                if len(guess) < min(self.count, wanted[sequence][1]) and token not in self._ends:
                    going[sequence] = token
            places = self._read({sequence: [token] for sequence, token in going.items()})
        return guesses

    def _likely(self, place: int) -> int | None:
        token = self._sampler.sample(place)
        if token >= self._size:
            return None
        (found, *_) = self._sampler.logprobs(place, token, 0)
        return token if found.logprob >= _LEAST_LOGPROB else None

    def _catch_up(self, wanted: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """Read what is new; the places to guess at where that was all."""
        unread: dict[int, list[int]] = {}
        for sequence, tokens in wanted.items():
            held = self._held[sequence]
            # The last token is read in any case: what comes after it is the question.
            known = min(common_prefix(held, tokens), len(tokens) - 1)
            if known < len(held):
                self._forget(sequence, known)
            new = tokens[known:]
            if min(new) >= 0 and max(new) < self._size and len(tokens) < self._backend.context:
                unread[sequence] = list(new)
        return self._read(unread)

    def _forget(self, sequence: int, start: int) -> None:
        if not self._backend.forget(sequence, start):
            self._backend.forget(sequence)
            start = 0
        del self._held[sequence][start:]

    def _read(self, unread: Mapping[int, list[int]]) -> dict[int, int]:
        if not unread:
            return {}
        backend, places = self._backend, dict[int, int]()
        read: dict[int, list[int]] = {}
        backend.clear()
        for sequence, tokens in sorted(unread.items(), key=lambda item: backend.rank(item[0])):
            part = tokens[: backend.room]
            if not part:
                break
            whole = len(part) == len(tokens)
            held = self._held[sequence]
            place = backend.add(sequence, len(held), part, output=whole)
            read[sequence] = part
            if whole:
                places[sequence] = place
        if backend.decode() is not Decoded.DONE:
            # There is no room, or it is ending. To guess is a favour: begin anew.
            self._held = [[] for _ in self._held]
            backend.forget_all()
            return {}
        for sequence, part in read.items():
            self._held[sequence] += part
        return places

    def abort(self) -> None:
        """End what is being computed."""
        self._backend.abort()

    def close(self) -> None:
        """Free it."""
        self._sampler.close()
        self._backend.close()
        if self._model is not None:
            self._model.close()


def open_engine(
    model: Model,
    context: ContextOptions,
    limits: EngineOptions,
    *,
    draft: DraftOptions | None = None,
    loading: ModelOptions,
    projector: Projector | None = None,
    check: Callable[[BatchContext], None] = lambda context: None,
    progress: Progress = SILENT,
) -> Engine:
    """An engine over a model, with a small one that guesses ahead if there is one.

    Args:
        model: the model; it is closed after the engine.
        context: its context.
        limits: of the engine.
        draft: the small model.
        loading: how the model was loaded.
        projector: what it sees with.
        check: looks at the context before anything is begun.
        progress: told what is not as asked for.

    Raises:
        UsageError: if the small model does not fit.
        ToolError: if there is no room for the context, or it cannot be loaded.
    """
    outputs = 1 if draft is None else 1 + draft.count
    backend = BatchContext(model, replace(context, outputs=outputs), projector)
    try:
        check(backend)
        if draft is None:
            return Engine(backend, limits)
        drafter = open_drafter(model, draft, options=loading, context=context, progress=progress)
        return Engine(backend, limits, drafter)
    except BaseException:
        backend.close()
        raise


def open_drafter(
    target: Model,
    draft: DraftOptions,
    *,
    options: ModelOptions,
    context: ContextOptions,
    progress: Progress = SILENT,
) -> Drafter:
    """Load a small model that guesses for a large one.

    Args:
        target: the large model.
        draft: the small one.
        options: how the large one was loaded; the small one stays on this machine.
        context: the large one's.
        progress: told what is not as asked for.

    Raises:
        UsageError: if their vocabularies differ, or tokens cannot be taken back.
        ToolError: if it cannot be loaded.
    """
    layers = 0 if options.rpc else options.gpu_layers
    own = replace(options, gpu_layers=layers, rpc=(), split=(), adapters={})
    model = Model(draft.path, own, build=target.build, progress=progress)
    try:
        _check_same_words(target, model)
        if not (target.forgets_parts and model.forgets_parts):
            raise UsageError(
                "guessing ahead needs models that can take tokens back, and recurrent ones cannot",
                "Leave out --draft",
            )
        backend = BatchContext(model, context)
        return Drafter(backend, count=draft.count, size=target.vocabulary.size, model=model)
    except BaseException:
        model.close()
        raise


def _check_same_words(target: Model, draft: Model) -> None:
    """One may have a few unused tokens more at its end, as padded vocabularies do."""
    large, small = target.metadata.tokens, draft.metadata.tokens
    common = min(len(large), len(small))
    if large[:common] != small[:common] or target.vocabulary.bos != draft.vocabulary.bos:
        raise UsageError(
            f"{draft.path.name} has another vocabulary than {target.path.name}",
            "Guess with a smaller model of the same family",
        )
