"""Both answers side by side: what differs, by name and with an example."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ggufkit.llamacpp.metadata import Metadata
from ggufkit.values import Json
from ggufkit.verify.probe import sliding_window
from ggufkit.verify.values import Mismatch

MEAN_LIMIT, MOST_LIMIT = 1e-4, 1e-2
"""KL divergence in nats that float rounding may cause: on average, and at one position."""
_FAR = 1.0
"""Mean KL divergence in nats from which a quantized file is suspicious."""
_FAR_WINDOW = 1024
"""Windows from here on are beyond what the probe reads; a difference there is a warning."""
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6
"""``LLAMA_TOKEN_TYPE_*``."""


def lines(expected: Sequence[Json], got: Sequence[list[int] | None]) -> list[Mismatch]:
    """Lines of text that become other tokens: ordinary ones are an error, others a warning.

    Args:
        expected: kind, text and ids of each line, by the checkpoint's tokenizer.
        got: ids by the GGUF's; None where it cannot express the line.
    """
    counts: Counter[str] = Counter(kind for kind, _, _ in expected)
    different = [
        (kind, text, a, b) for (kind, text, a), b in zip(expected, got, strict=True) if a != b
    ]
    found = []
    for name, error, kinds in (("tokens", True, ("plain",)), ("unusual-text", False, _UNUSUAL)):
        rows = [row for row in different if row[0] in kinds]
        if not rows:
            continue
        shares = [
            f"{sum(row[0] == kind for row in rows)} of {counts[kind]} {_LINES[kind]}"
            for kind in kinds
            if any(row[0] == kind for row in rows)
        ]
        _, text, a, b = min(rows, key=lambda row: len(row[1]))
        found.append(
            Mismatch(
                name,
                error,
                f"{', '.join(shares)} become other tokens; {_short(text)} is {_ids(a, b)} in the "
                f"checkpoint, {_ids(b, a)} in the GGUF",
            )
        )
    return found


_LINES = {
    "plain": "lines of text",
    "blank": "lines that begin with a blank",
    "rare": "lines of rare characters",
    "added": "lines with added tokens in the text",
    "control": "lines with control tokens spelled in the text",
    "prompt": "rendered conversations",
}
_UNUSUAL = ("blank", "rare", "added", "control", "prompt")


def vocabulary(expected: Json, metadata: Metadata) -> list[Mismatch]:
    """Tokens with another text or of another kind, and special tokens with other ids.

    Args:
        expected: ``texts`` by id, ``added`` tokens and ``special`` ids of the checkpoint.
        metadata: of the GGUF, read with its arrays.
    """
    found = []
    texts, tokens = expected["texts"], metadata.tokens
    added = {token["id"]: token["content"] for token in expected["added"]}
    model = metadata.get("tokenizer.ggml.model")
    different = [
        (number, added.get(number, text), tokens[number] if number < len(tokens) else None)
        for number, text in enumerate(texts)
        if text is not None
        and not _same_piece(
            added.get(number, text), tokens[number] if number < len(tokens) else None, model
        )
    ]
    if different:
        number, a, b = different[0]
        found.append(
            Mismatch(
                "vocabulary",
                True,
                f"{len(different)} of {len(texts)} tokens have another text; token {number} is "
                f"{_short(a)} in the checkpoint, {_short(b)} in the GGUF",
            )
        )
    return found + _kinds(expected["added"], metadata) + _special(expected["special"], metadata)


def _same_piece(a: str, b: str | None, model: Json) -> bool:
    if a == b or b is None:
        return a == b
    if model == "bert":
        # WordPiece is stored with its word beginnings marked, not its continuations.
        return b in (a.removeprefix("##"), "\u2581" + a)
    # SentencePiece keeps blanks as U+2581; added tokens are spelled plainly.
    return a.replace(" ", "\u2581") == b or a == b.replace("\u2581", " ")


def _kinds(added: Sequence[Json], metadata: Metadata) -> list[Mismatch]:
    """Special tokens must be control tokens, or spelled-out ones are not recognised."""
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    wrong = [
        token
        for token in added
        if token["special"]
        and token["id"] < len(kinds)
        and kinds[token["id"]] not in (_CONTROL, _USER_DEFINED, _UNUSED, _BYTE, 2)
    ]
    if not wrong:
        return []
    return [
        Mismatch(
            "token-kinds",
            True,
            f"{len(wrong)} special tokens of the checkpoint are ordinary text in the GGUF, such "
            f"as {_short(wrong[0]['content'])} ({wrong[0]['id']})",
        )
    ]


_SPECIAL = {"bos": "bos", "unk": "unknown"}
"""transformers' names of special tokens to those of the format."""


def _special(expected: Mapping[str, int | None], metadata: Metadata) -> list[Mismatch]:
    got = metadata.special_tokens
    wrong = {
        name: (expected[name], got[key][0])
        for name, key in _SPECIAL.items()
        if expected.get(name) is not None and key in got and got[key][0] != expected[name]
    }
    return [
        Mismatch(
            "vocabulary",
            True,
            f"the {name.upper()} token is {a} in the checkpoint and {b} in the GGUF",
        )
        for name, (a, b) in wrong.items()
    ]


def around(expected: Json, begin: list[int], finish: list[int]) -> list[Mismatch]:
    """Whether the same tokens are put before and after a text."""
    if (expected["begin"], expected["end"]) == (begin, finish):
        return []
    return [
        Mismatch(
            "begin-end",
            True,
            f"the checkpoint puts {_around(expected['begin'], expected['end'])} around a text, "
            f"the GGUF {_around(begin, finish)}",
        )
    ]


def _around(begin: list[int], finish: list[int]) -> str:
    parts = [f"{ids} {where}" for ids, where in ((begin, "before"), (finish, "behind")) if ids]
    return " and ".join(parts) or "nothing"


def end_tokens(wanted: Sequence[int], got: Sequence[int], metadata: Metadata) -> list[Mismatch]:
    """Tokens that end an answer in the checkpoint, and not in the GGUF.

    Args:
        wanted: ids of config and generation config.
        got: ids that the runtime ends an answer at.
        metadata: of the GGUF.
    """
    # What is beyond the vocabulary can never be sampled.
    missing = [n for n in wanted if n not in got and n < len(metadata.tokens)]
    if not missing:
        return []
    tokens = metadata.tokens
    spelled = [f"{_short(tokens[n])} ({n})" for n in missing]
    return [
        Mismatch(
            "end-tokens",
            True,
            f"answers end at {', '.join(spelled)} in the checkpoint; nothing in the GGUF says so",
        )
    ]


def conversations(expected: Sequence[Json], got: Sequence[Json]) -> list[Mismatch]:
    """Conversations that are rendered as another prompt.

    Args:
        expected: ``name``, ``texts`` (one for each form of the conversation that the
            checkpoint's template takes) and why it ``refused`` another form.
        got: ``text`` by the GGUF's template, or why it ``refused``.
    """
    different = [
        (a, b)
        for a, b in zip(expected, got, strict=True)
        # Where a template refuses a form, the runtime may know one that it takes.
        if (b["text"] not in a["texts"] if "text" in b else a["texts"] and not a["refused"])
        and (a["texts"] or "refused" not in b)
    ]
    if not different and expected and not any("text" in row for row in got):
        reason = str(got[0].get("refused") or expected[0]["refused"])
        return [Mismatch("template", False, f"no conversation can be rendered: {reason[:200]}")]
    if not different:
        return []
    a, b = different[0]
    text, prompt = next(iter(a["texts"]), None), b.get("text")
    return [
        Mismatch(
            "template",
            True,
            f"{len(different)} of {len(expected)} conversations become another prompt; "
            f"'{a['name']}' is {_from_difference(text, prompt, a['refused'])} in the checkpoint, "
            f"{_from_difference(prompt, text, b.get('refused', ''))} in the GGUF",
        )
    ]


def _from_difference(text: str | None, other: str | None, refused: str) -> str:
    """A text from shortly before where it differs from another."""
    if text is None:
        return f"refused ({refused[:120]})"
    against = other or ""
    at = next((n for n, (x, y) in enumerate(zip(text, against, strict=False)) if x != y), None)
    at = min(len(text), len(against)) if at is None else at
    return f"{'...' if at > 10 else ''}{_short(text[max(0, at - 10) :])}"


# The function.


def divergences(
    exact: npt.NDArray[np.float32], other: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """KL divergence of predictions from exact ones, in nats, shape (positions,).

    Where one vocabulary is padded to more tokens, the common ones are compared.
    """
    common = min(exact.shape[1], other.shape[1])
    result = np.empty(len(exact))
    for n, (p, q) in enumerate(zip(exact[:, :common], other[:, :common], strict=True)):
        p, q = _log_softmax(p), _log_softmax(q)
        result[n] = float((np.exp(p) * (p - q)).sum())
    return result


def _log_softmax(row: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = row.astype(np.float64) - float(row.max())
    logs: npt.NDArray[np.float64] = shifted - math.log(float(np.exp(shifted).sum()))
    return logs


def function(
    exact: npt.NDArray[np.float32],
    rounded: npt.NDArray[np.float32] | None,
    got: npt.NDArray[np.float32],
    positions: Sequence[int],
    suspects: Callable[[], Mapping[str, Any]],
) -> tuple[list[Mismatch], dict[str, float]]:
    """Predictions of checkpoint and GGUF.

    Args:
        exact: the checkpoint's, float32, shape (positions, vocabulary).
        rounded: the same with what ggml rounds to half precision rounded; None if it
            rounds nothing there.
        got: the GGUF's.
        positions: where they were made.
        suspects: gives config keys that the converter does not read, and their values.

    Returns:
        What differs, and the figures: ``kl_mean`` and ``kl_max`` of the GGUF from what
        ggml would compute of the checkpoint, their limits, ``kl_rounding`` (mean
        divergence that rounding alone causes), ``positions``.
    """
    # What ggml rounds is rounded on both sides, and counted once more for what the
    # order of rounding changes.
    found = divergences(exact if rounded is None else rounded, got)
    noise = divergences(exact, rounded) if rounded is not None else np.zeros(1)
    mean_limit, most_limit = MEAN_LIMIT + float(noise.mean()), MOST_LIMIT + float(noise.max())
    figures = {
        "positions": float(len(found)),
        "kl_mean": float(found.mean()),
        "kl_max": float(found.max()),
        "kl_mean_limit": mean_limit,
        "kl_max_limit": most_limit,
        "kl_rounding": float(noise.mean()),
    }
    if np.isfinite(found).all() and found.mean() <= mean_limit and found.max() <= most_limit:
        return [], figures
    worst = int(np.nanargmax(found)) if np.isfinite(found).any() else 0
    message = (
        f"predictions differ: mean KL divergence {found.mean():.2e} nats (at most "
        f"{mean_limit:.1e}), {found.max():.2e} after token {positions[worst] + 1}"
    )
    if unread := suspects():
        message += "; the converter does not read " + ", ".join(
            f"{key}={_value(value)}" for key, value in unread.items()
        )
    return [Mismatch("function", True, message)], figures


def far(figures: Mapping[str, float]) -> list[Mismatch]:
    """A quantized GGUF that is further away than quantization usually brings it."""
    if figures.get("kl_mean", 0.0) < _FAR:
        return []
    return [
        Mismatch(
            "function",
            False,
            f"predictions are {figures['kl_mean']:.1f} nats away from the checkpoint's; "
            "quantization seldom does that, another model does",
        )
    ]


def window(config: Json, computed: int, read: int) -> list[Mismatch]:
    """A sliding window that llama.cpp does not compute, beyond what the probe has read.

    Args:
        config: the checkpoint's ``config.json``.
        computed: the window that llama.cpp says it computes with; 0 for none.
        read: tokens of the probe.
    """
    wanted = sliding_window(config)
    if not wanted or wanted < read or computed == wanted:
        return []
    what = f"one of {computed}" if computed else "none"
    return [
        Mismatch(
            "window",
            wanted < _FAR_WINDOW,
            f"the checkpoint's attention reaches back {wanted} tokens in a sliding window and "
            f"llama.cpp computes {what}: answers differ beyond {wanted} tokens",
        )
    ]


def keys(predictions: Json) -> list[Mismatch]:
    """Tensors that the config demands and that are not there, or that nothing uses."""
    found = []
    for key, error, what in (
        ("missing_keys", True, "are missing or renamed: transformers fills them with noise"),
        ("mismatched_keys", True, "have another shape than the config says"),
        ("unexpected_keys", False, "are not used by the model that the config names"),
    ):
        names = predictions.get(key) or []
        if names:
            found.append(
                Mismatch("tensors", error, f"{len(names)} tensors {what}, such as {names[0]}")
            )
    return found


def _short(text: str | None) -> str:
    if text is None:
        return "missing"
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _ids(ids: Sequence[int] | None, other: Sequence[int] | None) -> str:
    """Some ids from shortly before where they differ from others."""
    if ids is None:
        return "not to be expressed"
    pairs = enumerate(zip(ids, other or (), strict=False))
    at = next((n for n, (x, y) in pairs if x != y), min(len(ids), len(other or ())))
    first = max(0, at - 3)
    shown = " ".join(map(str, ids[first : first + 8]))
    return f"[{'... ' * (first > 0)}{shown}{' ...' * (len(ids) > first + 8)}]"


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
