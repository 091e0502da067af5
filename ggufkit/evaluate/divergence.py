"""How far one model's predictions are from another's, token by token.

The definitions are those of ``kl_divergence`` in llama.cpp's
``tools/perplexity/perplexity.cpp``: with p the reference's and q the candidate's
distribution of the next token, and t the token that the text has there,

- negative log likelihood: -log q(t), in nats;
- KL divergence: sum over all tokens of p (log p - log q), in nats;
- difference of probability: q(t) - p(t);
- same top: whether both have the same likeliest token.

llama.cpp rounds the reference to 16 bits, cut off at 16 nats below the likeliest
token; here it is float32 and whole. Rows are worked on in pieces that stay in a
core's cache, by several threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

_PIECE = 1 << 16
"""Logits worked on at once by one thread (256 KiB)."""


@dataclass(frozen=True)
class TokenScores:
    """Candidate beside reference for each scored token; all of one shape.

    Attributes:
        nll_reference: negative log likelihood by the reference, nats; float32.
        nll: the same by the candidate.
        divergence: KL divergence of the candidate from the reference, nats; float32.
        delta_p: probability of the text's token, candidate minus reference; float32.
        same_top: whether the likeliest token is the same; bool.
    """

    nll_reference: npt.NDArray[np.float32]
    nll: npt.NDArray[np.float32]
    divergence: npt.NDArray[np.float32]
    delta_p: npt.NDArray[np.float32]
    same_top: npt.NDArray[np.bool_]

    @classmethod
    def empty(cls, *shape: int) -> Self:
        """Scores of this shape, not filled in."""
        floats = [np.empty(shape, np.float32) for _ in range(4)]
        return cls(floats[0], floats[1], floats[2], floats[3], np.empty(shape, np.bool_))

    @staticmethod
    def nbytes(tokens: int) -> int:
        """Bytes of a chunk with this many scored tokens."""
        return tokens * (4 * 4 + 1)

    def to_bytes(self) -> bytes:
        """Scores of shape (chunks, tokens): chunk by chunk, one array after the other."""
        arrays = [getattr(self, f.name) for f in fields(self)]
        arrays = [a.astype(a.dtype.newbyteorder("<")) for a in arrays]
        return b"".join(a[n].tobytes() for n in range(len(self.nll)) for a in arrays)

    @classmethod
    def from_bytes(cls, raw: bytes, chunks: int) -> Self:
        """Scores that :meth:`to_bytes` gave, of shape (chunks, tokens)."""
        rows = np.frombuffer(raw, np.uint8).reshape(chunks, -1)
        tokens = rows.shape[1] // cls.nbytes(1)
        raw_floats = np.ascontiguousarray(rows[:, : 16 * tokens])
        floats = raw_floats.view("<f4").astype(np.float32).reshape(chunks, 4, tokens)
        same = rows[:, 16 * tokens :].astype(np.bool_)
        return cls(floats[:, 0], floats[:, 1], floats[:, 2], floats[:, 3], same)

    def put(self, chunk: int, first: int, part: "TokenScores") -> None:
        """Copy scores of neighbouring tokens of one chunk to where they belong."""
        for f in fields(self):
            values = getattr(part, f.name)
            getattr(self, f.name)[chunk, first : first + len(values)] = values

    def are_finite(self) -> npt.NDArray[np.bool_]:
        """Whether all figures of a chunk are numbers, for each chunk; shape (chunks,)."""
        parts = (self.nll_reference, self.nll, self.divergence, self.delta_p)
        rows = zip(*(np.isfinite(part).all(axis=1) for part in parts), strict=True)
        return np.array([all(row) for row in rows])


@dataclass(frozen=True)
class CompactReference:
    """What a reference said, without most of its unlikely tokens.

    The likeliest tokens have their log probabilities; of all others only the
    sum of their probabilities is known.

    Attributes:
        nll: negative log likelihood of the text's token, nats; shape (rows,), float32.
        rest: log of the probability of all tokens that are left out; shape (rows,).
        tokens: ids of the likeliest tokens, ascending; shape (rows, kept), unsigned.
        log_p: their log probabilities; shape (rows, kept), float32.
    """

    nll: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    log_p: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.nll)

    @property
    def top(self) -> npt.NDArray[np.intp]:
        """The likeliest token of each row, the first of several."""
        best = self.log_p.argmax(axis=1)[:, None]
        return np.take_along_axis(self.tokens, best, axis=1)[:, 0].astype(np.intp)

    def rows(self, part: slice) -> "CompactReference":
        """Some rows of it."""
        return CompactReference(*(getattr(self, f.name)[part] for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence["CompactReference"]) -> Self:
        """All rows of some, one after the other."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


class _Rows:
    """A few rows of logits, made into a softmax in memory that is used again and again.

    Attributes:
        shifted: logits minus the largest of their row.
        exponentials: of ``shifted``.
        log_sum: log of the row's sum of exponentials; float64.
        top: the likeliest token of each row, the first of several.
    """

    def __init__(self, rows: int, vocabulary: int) -> None:
        self._shifted = np.empty((rows, vocabulary), np.float32)
        self._exponentials = np.empty((rows, vocabulary), np.float32)

    def load(self, logits: Logits, targets: Tokens) -> None:
        count = np.arange(len(logits))
        self.shifted = self._shifted[: len(logits)]
        self.exponentials = self._exponentials[: len(logits)]
        self.top = logits.argmax(axis=1)
        np.subtract(logits, logits[count, self.top][:, None], out=self.shifted)
        np.exp(self.shifted, out=self.exponentials)
        self.sum = self.exponentials.sum(axis=1).astype(np.float64)
        self.log_sum = np.log(self.sum)
        self.nll = self.log_sum - self.shifted[count, targets]


class Meter:
    """Scores rows of logits.

    Args:
        vocabulary: columns of the logits.
        threads: how many work.
    """

    def __init__(self, vocabulary: int, threads: int) -> None:
        self.vocabulary = vocabulary
        self._piece = max(1, _PIECE // vocabulary)
        self._threads = threads
        self._pool = ThreadPoolExecutor(max_workers=threads)
        self._scratch = [
            (_Rows(self._piece, vocabulary), _Rows(self._piece, vocabulary)) for _ in range(threads)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def score(
        self,
        reference: "Logits | CompactReference",
        candidates: Sequence[Logits],
        targets: Tokens,
    ) -> list[TokenScores]:
        """Score some candidates against the reference.

        Against a compact reference the divergences are lower bounds: by the log sum
        inequality, tokens taken together give at most what they give one by one.

        Args:
            reference: logits, shape (rows, vocabulary), or a compact reference of them.
            candidates: logits, shape (rows, vocabulary).
            targets: the text's token after each row, shape (rows,).

        Returns:
            One for each candidate, of shape (rows,); where logits are not finite,
            figures are not either.
        """
        found = [TokenScores.empty(len(targets)) for _ in candidates]

        def work(rows: slice, scratch: tuple[_Rows, _Rows]) -> None:
            ours, theirs = scratch
            if isinstance(reference, CompactReference):
                kept = reference.rows(rows)
                nll, top = kept.nll.astype(np.float64), kept.top
            else:
                ours.load(reference[rows], targets[rows])
                nll, top = ours.nll, ours.top
            for logits, scores in zip(candidates, found, strict=True):
                theirs.load(logits[rows], targets[rows])
                scores.nll_reference[rows] = nll
                scores.nll[rows] = theirs.nll
                scores.delta_p[rows] = np.exp(-theirs.nll) - np.exp(-nll)
                scores.same_top[rows] = theirs.top == top
                if isinstance(reference, CompactReference):
                    scores.divergence[rows] = _lower_bound(kept, theirs)
                else:
                    scores.divergence[rows] = _divergence(ours, theirs)

        self._share_out(work, len(targets))
        return found

    def compact(self, reference: Logits, targets: Tokens, kept: int) -> CompactReference:
        """Keep the likeliest tokens of each row, and what the others sum up to."""
        rows = len(targets)
        dtype: type = np.uint16 if self.vocabulary <= 1 << 16 else np.uint32
        made = CompactReference(
            np.empty(rows, np.float32),
            np.empty(rows, np.float32),
            np.empty((rows, kept), dtype),
            np.empty((rows, kept), np.float32),
        )

        def work(part: slice, scratch: tuple[_Rows, _Rows]) -> None:
            ours = scratch[0]
            ours.load(reference[part], targets[part])
            tokens = np.sort(ours.shifted.argpartition(-kept, axis=1)[:, -kept:], axis=1)
            made.nll[part] = ours.nll
            made.tokens[part] = tokens
            shifted = np.take_along_axis(ours.shifted, tokens, axis=1)
            made.log_p[part] = shifted - ours.log_sum[:, None]
            made.rest[part] = np.log(_sum_of_others(ours, tokens)) - ours.log_sum

        self._share_out(work, rows)
        return made

    def negative_log_likelihood(self, logits: Logits, targets: Tokens) -> npt.NDArray[np.float64]:
        """What each of the text's tokens costs by one model, nats; shape (rows,)."""
        found = np.empty(len(targets))

        def work(rows: slice, scratch: tuple[_Rows, _Rows]) -> None:
            scratch[0].load(logits[rows], targets[rows])
            found[rows] = scratch[0].nll

        self._share_out(work, len(targets))
        return found

    def _share_out(self, work: Callable[[slice, tuple[_Rows, _Rows]], None], rows: int) -> None:
        def some(first: int) -> None:
            step = self._piece * self._threads
            # Logits that are no numbers are found by what comes out.
            with np.errstate(all="ignore"):
                for start in range(first * self._piece, rows, step):
                    work(slice(start, min(start + self._piece, rows)), self._scratch[first])

        list(self._pool.map(some, range(self._threads)))


def _divergence(ours: _Rows, theirs: _Rows) -> npt.NDArray[np.float64]:
    """KL divergence of each row; ``theirs.shifted`` is used up."""
    # log p - log q differs from the difference of shifted logits by a constant.
    difference = np.subtract(ours.shifted, theirs.shifted, out=theirs.shifted)
    weighted = np.multiply(difference, ours.exponentials, out=difference).sum(axis=1)
    found: npt.NDArray[np.float64] = weighted / ours.sum + theirs.log_sum - ours.log_sum
    return found


def _lower_bound(kept: CompactReference, theirs: _Rows) -> npt.NDArray[np.float64]:
    tokens = kept.tokens.astype(np.intp)
    log_q = np.take_along_axis(theirs.shifted, tokens, axis=1) - theirs.log_sum[:, None]
    found = (np.exp(kept.log_p) * (kept.log_p - log_q)).sum(axis=1)
    rest_q = np.log(_sum_of_others(theirs, tokens)) - theirs.log_sum
    bound: npt.NDArray[np.float64] = found + np.exp(kept.rest) * (kept.rest - rest_q)
    return bound


def _sum_of_others(rows: _Rows, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Sum of the exponentials of all other tokens; these are set to 0 on the way.

    Taking the kept ones from the whole would leave nothing but rounding.
    """
    np.put_along_axis(rows.exponentials, tokens, 0, axis=1)
    tiny = float(np.finfo(np.float32).tiny)  # the logarithm of nothing is no number
    found: npt.NDArray[np.float64] = np.maximum(rows.exponentials.sum(axis=1), tiny)
    return found
