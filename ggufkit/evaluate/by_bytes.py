"""Two models with different vocabularies: what the same bytes of a text cost each.

Both tokenize the whole text. Where both have the end of a token, the text may be
cut: chunks are as long as fit into both contexts, and of each chunk what lies
behind the common cut that is nearest to its middle is scored. So both are asked
for the probability of the very same bytes after the very same bytes.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import numpy.typing as npt

from ggufkit import settings
from ggufkit.errors import GgufkitError
from ggufkit.evaluate.divergence import Meter, Tokens
from ggufkit.evaluate.perplexity import name_in_store
from ggufkit.llamacpp.scoring import Scorer
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Progress, Task
from ggufkit.store import Store
from ggufkit.values import BytesComparison, Json, Text

STAGE = "compare-bytes"
_VERSION = 1

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ByBytes:
    """A result, and what it is made of.

    Attributes:
        comparison: the result, yet without file sizes and verdicts.
        differences: bits per byte, model minus reference, chunk by chunk.
    """

    comparison: BytesComparison
    differences: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cuts:
    """Where a text is cut, in bytes; each array of shape (chunks,).

    Attributes:
        begin: of each chunk.
        middle: where its scored part begins.
        end: behind its last byte.
    """

    begin: Offsets
    middle: Offsets
    end: Offsets


def measure(
    store: Store,
    build: NativeBuild,
    model: tuple[Path, str],
    reference: tuple[Path, str],
    text: Text,
    *,
    context: int,
    chunks: int | None,
    gpu_layers: int,
    progress: Progress,
) -> ByBytes:
    """Bits per byte of two models on the same parts of a text.

    Args:
        store: keeps the result.
        build: whose libraries to run.
        model: the candidate's GGUF and its digest.
        reference: the reference's.
        text: what is read.
        context: tokens per chunk at most.
        chunks: how many chunks at most; None for all.
        gpu_layers: layers to put on a GPU.
        progress: who to tell.

    Raises:
        GgufkitError: if the text is too short, or a model's tokens do not spell it.
    """

    def work(_: Path) -> dict[str, Json]:
        return _work(build, model[0], reference[0], text, context, chunks, gpu_layers, progress)

    artifact = store.run(
        STAGE,
        version=_VERSION,
        model=name_in_store(store, model[0]),
        inputs={"model": model[1], "reference": reference[1], "text": text.digest},
        options={"context": context, "chunks": chunks, "gpu_layers": gpu_layers},
        tool={"llama.cpp": build.commit, "backend": build.backend},
        work=work,
        progress=progress,
    )
    facts = artifact.manifest.facts
    nbytes, bits, reference_bits = (
        np.array(facts[k], np.float64) for k in ("chunk_nbytes", "chunk_bits", "reference_bits")
    )
    comparison = BytesComparison(
        model=model[0],
        reference=reference[0],
        text=text.name,
        context=context,
        chunks=len(nbytes),
        nbytes=int(nbytes.sum()),
        bits_per_byte=float(bits.sum() / nbytes.sum()),
        reference_bits_per_byte=float(reference_bits.sum() / nbytes.sum()),
        vocabulary_difference="",
        file_nbytes=0,
        reference_file_nbytes=0,
        seconds=facts["seconds"],
        reused=artifact.reused,
    )
    # Weighted, so that their mean is the difference of the figures above.
    differences = (bits - reference_bits) / nbytes.mean()
    return ByBytes(comparison, differences)


def _work(
    build: NativeBuild,
    model: Path,
    reference: Path,
    text: Text,
    context: int,
    chunks: int | None,
    gpu_layers: int,
    progress: Progress,
) -> dict[str, Json]:
    started = monotonic()
    raw = text.path.read_bytes()
    with ExitStack() as stack:
        scorers = [
            stack.enter_context(
                Scorer(path, context=context, gpu_layers=gpu_layers, whole_chunks=True, build=build)
            )
            for path in (model, reference)
        ]
        tokens = [_without_bos(scorer, scorer.tokenize(raw)) for scorer in scorers]
        pairs = zip(scorers, tokens, strict=True)
        ends = [_token_ends(scorer, own, raw.removesuffix(b"\n"), text) for scorer, own in pairs]
        cuts = cut(ends[0], ends[1], context - 1, chunks)
        if not len(cuts.begin):
            raise GgufkitError(
                f"{text.name} does not fill a context of {context} tokens between places where "
                f"{model.name} and {reference.name} both end a token",
                "Use a longer text, or another context",
            )
        found = []
        for scorer, own, own_ends in zip(scorers, tokens, ends, strict=True):
            title = f"bits per byte of {scorer.path.stem} on {text.name}"
            with progress.task(title, len(cuts.begin), "chunks") as task:
                found.append(_bits(scorer, own, own_ends, cuts, task))
    return {
        "text": text.name,
        "context": context,
        "chunks": len(cuts.begin),
        "chunk_nbytes": [int(n) for n in cuts.end - cuts.middle],
        "chunk_bits": found[0],
        "reference_bits": found[1],
        "seconds": round(monotonic() - started, 3),
    }


def _without_bos(scorer: Scorer, tokens: Tokens) -> Tokens:
    return tokens[1:] if scorer.bos is not None and tokens[:1] == [scorer.bos] else tokens


def _token_ends(scorer: Scorer, tokens: Tokens, raw: bytes, text: Text) -> Offsets:
    """The byte behind each token of a text.

    Raises:
        GgufkitError: if the tokens spell something else than the text.
    """
    pieces = {int(token): scorer.piece(int(token)) for token in np.unique(tokens)}
    spelled = b"".join(pieces[int(token)] for token in tokens)
    extra = len(spelled) - len(raw)
    if spelled[max(0, extra) :] != raw or spelled[: max(0, extra)].strip(b" "):
        raise GgufkitError(
            f"the tokens of {scorer.path.name} do not spell {text.name} back, so what a byte "
            "costs cannot be told",
            "Its tokenizer changes or drops characters; compare models of one vocabulary",
        )
    # A space that the tokenizer puts before the text is none of its bytes.
    lengths = np.array([len(pieces[int(token)]) for token in tokens], np.int64)
    ends: Offsets = np.maximum(0, np.cumsum(lengths) - extra)
    return ends


def cut(one: Offsets, other: Offsets, room: int, chunks: int | None) -> Cuts:
    """Cut a text where two tokenizations both end a token.

    Args:
        one: the byte behind each token of the first, ascending.
        other: the same of the second.
        room: tokens of a chunk at most, in either.
        chunks: how many chunks at most; None for all.
    """
    common = np.intersect1d(one, other)
    common = common[common > 0]
    begin: list[int] = []
    middle: list[int] = []
    end: list[int] = []
    at = 0
    while chunks is None or len(begin) < chunks:
        lasts = [int(np.searchsorted(e, at, side="right")) + room - 1 for e in (one, other)]
        if lasts[0] >= len(one) or lasts[1] >= len(other):
            break  # the rest fills no context
        limit = min(one[lasts[0]], other[lasts[1]])
        inside = common[(common > at) & (common <= limit)]
        if len(inside) < 2:
            # One token of the one is a whole context of the other; pass over it.
            after = common[common > at]
            if not len(after):
                break
            at = int(after[0])
            continue
        stop = int(inside[-1])
        half = inside[:-1]
        begin.append(at)
        middle.append(int(half[np.abs(half - (at + stop) / 2).argmin()]))
        end.append(stop)
        at = stop
    return Cuts(*(np.array(values, np.int64) for values in (begin, middle, end)))


def _bits(scorer: Scorer, tokens: Tokens, ends: Offsets, cuts: Cuts, task: Task) -> list[float]:
    """What the scored bytes of each chunk cost."""
    found = []
    with Meter(scorer.vocabulary, settings.threads()) as meter:
        for n, places in enumerate(zip(cuts.begin, cuts.middle, cuts.end, strict=True)):
            first, middle, last = (int(np.searchsorted(ends, p, side="right")) for p in places)
            chunk = tokens[first:last]
            if scorer.bos is not None:
                # In front, not in place of a token as llama-perplexity has it: no byte may go.
                chunk = np.concatenate([np.array([scorer.bos], np.int32), chunk])
            at = len(chunk) - (last - middle)
            nats = 0.0
            for (block,) in scorer.read([chunk], at - 1):
                targets = chunk[block.first + 1 : block.first + 1 + len(block.logits)]
                nats += float(meter.negative_log_likelihood(block.logits, targets).sum())
            if not np.isfinite(nats):
                tensor = scorer.first_broken_tensor(chunk)
                raise GgufkitError(
                    f"{scorer.path.name} gives logits that are no finite numbers in chunk {n + 1}"
                    + (f"; the first tensor with one is {tensor}" if tensor else ""),
                    "Its weights are damaged or overflow; convert or quantize it again",
                )
            found.append(nats / np.log(2))
            task.update(n + 1)
    return found
