"""How likely a model finds a given text, token by token."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from ggufkit.errors import ToolError
from ggufkit.llamacpp.batching import BatchContext, ContextOptions, Decoded, Model
from ggufkit.llamacpp.sampling import SamplingParams
from ggufkit.serve.requests import ChosenToken, ClosedError

_AT_ONCE = 64
"""Tokens of a batch. Each has an output, a row as wide as the vocabulary."""


class TextScorer(Protocol):
    """What gives log-probabilities of a text; see :class:`Scorer`."""

    def score(
        self, tokens: Sequence[int], top: int, wanted: Callable[[], bool]
    ) -> list[ChosenToken]:
        """Log-probabilities of all tokens but the first."""

    def close(self) -> None:
        """Free it."""


class Scorer:
    """Log-probabilities of texts, in a context of its own that is made when first asked for.

    For any thread; one text at a time.

    Args:
        model: whose opinion is asked; close the scorer first.
        options: of the model's other context.
    """

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self._model = model
        self._options = options
        self._context: BatchContext | None = None
        self._lock = threading.Lock()
        self._closed = False

    def score(
        self, tokens: Sequence[int], top: int, wanted: Callable[[], bool] = lambda: True
    ) -> list[ChosenToken]:
        """Log-probabilities of all tokens but the first, which nothing comes before.

        Args:
            tokens: the text; no more than the context holds.
            top: how many of the likeliest tokens are told at each place.
            wanted: asked now and then; if not, the work ends early.

        Raises:
            ClosedError: if it is closed, or not wanted any more.
            ToolError: if llama.cpp fails.
        """
        with self._lock:
            return self._score(self._ready(), tokens, top, wanted)

    def _ready(self) -> BatchContext:
        if self._closed:
            raise ClosedError("the model is being unloaded")
        if self._context is None:
            options = self._options
            self._context = BatchContext(
                self._model,
                ContextOptions(
                    context=options.context,
                    # There may be as many outputs in a batch as there are sequences.
                    sequences=_AT_ONCE,
                    batch=_AT_ONCE,
                    threads=options.threads,
                    batch_threads=options.batch_threads,
                    flash_attention=options.flash_attention,
                    key_type=options.key_type,
                    value_type=options.value_type,
                ),
            )
        return self._context

    def _score(
        self, context: BatchContext, tokens: Sequence[int], top: int, wanted: Callable[[], bool]
    ) -> list[ChosenToken]:
        scores, vocabulary = list[ChosenToken](), self._model.vocabulary
        context.forget_all()
        sampler = context.sampler(SamplingParams(temperature=0))
        try:
            for start in range(0, len(tokens) - 1, _AT_ONCE):
                if self._closed or not wanted():
                    raise ClosedError("the work was given up")
                nexts = tokens[start + 1 : start + 1 + _AT_ONCE]
                context.clear()
                places = [
                    context.add(0, start + n, [tokens[start + n]], output=True)
                    for n in range(len(nexts))
                ]
                if context.decode() is not Decoded.DONE:
                    raise ToolError("llama.cpp could not score the text")
                for place, token in zip(places, nexts, strict=True):
                    first, *best = sampler.logprobs(place, token, top)
                    piece = vocabulary.piece(token, special=True)
                    scores.append(ChosenToken(token, piece, first.logprob, tuple(best)))
        finally:
            sampler.close()
        return scores

    def close(self) -> None:
        """Free its memory, as soon as nothing is computed any more."""
        self._closed = True
        with self._lock:
            if self._context is not None:
                self._context.close()
                self._context = None
