"""What llama.cpp says of a GGUF, in a process of its own: whether it opens, tokens, predictions.

A file that llama.cpp gives up on ends that process, and no other.
"""

from contextlib import suppress
from pathlib import Path

from ggufkit import settings
from ggufkit.errors import GgufkitError, ToolError
from ggufkit.llamacpp import template
from ggufkit.llamacpp.runtime import load_llama_cpp
from ggufkit.llamacpp.template import StoppedClock
from ggufkit.llamacpp.workers import WorkerEndedError, serve, time_limit, worker
from ggufkit.values import Json

_TEMPLATE_SECONDS = 10.0
LOGITS = "gguf-logits.npy"
"""File of predictions, in the directory that was asked for."""


class UnusableGGUFError(ToolError):
    """A GGUF that llama.cpp cannot open or run."""


class CannotObserveError(ToolError):
    """The Python binding does not work with the native build, so nothing can be asked."""


def check_opens(gguf: Path) -> None:
    """See that llama.cpp opens a GGUF, before anybody is given it.

    Where the binding does not fit the native build (somebody's own llama.cpp), nobody
    can tell, and the file passes.

    Raises:
        UnusableGGUFError: if it does not, with llama.cpp's reason.
    """
    with suppress(CannotObserveError):
        ask({"gguf": str(gguf.absolute())}, gguf)


def warm_up() -> None:
    """Start the process, so that it is ready when it is asked."""
    worker(__spec__.name).warm_up()


def ask(request: dict[str, Json], gguf: Path) -> dict[str, Json]:
    """Ask llama.cpp about a GGUF.

    Args:
        request: ``gguf``; and, each if wanted, ``texts`` and ``prompts`` to be tokenized,
            ``conversations`` (``messages`` and ``tools``) to be rendered, ``tokens`` and
            ``positions`` to predict at, with a directory ``out`` for the predictions.
        gguf: the file, for errors.

    Returns:
        Values of JSON: ``end`` (ids that end an answer), ``window``, ``ids`` of each text
        (None: it cannot be expressed), ``begin`` and ``finish`` (what is put around a
        text), ids of ``prompts``, ``conversations`` (``text`` or ``refused``), ``finite``
        (whether predictions are; absent for models that predict no tokens).

    Raises:
        UnusableGGUFError: if llama.cpp cannot open or run it.
        CannotObserveError: if the binding does not work with the native build.
    """
    hint = "The model may be of a kind that this llama.cpp does not run"
    try:
        answer = worker(__spec__.name).ask({"threads": settings.threads(), **request})
    except WorkerEndedError as error:
        raise UnusableGGUFError(
            f"llama.cpp cannot run {gguf.name}; it ended with: {error.message}", hint
        ) from error
    if "unavailable" in answer:
        raise CannotObserveError(
            f"a GGUF cannot be compared with its checkpoint: {answer['unavailable']}",
            "Run: ggufkit build. Or leave the comparison out: --no-verify",
        )
    if "error" in answer:
        raise UnusableGGUFError(answer["error"], answer["hint"] or hint)
    if answer.get("finite") is False:
        raise UnusableGGUFError(
            f"{gguf.name} predicts values that are not finite numbers",
            "The weights hold NaN or infinite values, or overflow in half precision",
        )
    return answer


# The process.


def main() -> None:
    """Answer what comes on stdin, until it ends."""
    unavailable: list[str] = []

    def prepare() -> None:
        vars(template)["datetime"] = StoppedClock
        try:
            load_llama_cpp()
        except GgufkitError as error:
            unavailable.append(error.message)

    def answer(request: Json) -> dict[str, Json]:
        if unavailable:
            return {"unavailable": unavailable[0]}
        try:
            return _observe(request)
        except GgufkitError as error:
            return {"error": error.message, "hint": error.hint}

    serve(answer, prepare)


def _observe(request: Json) -> dict[str, Json]:
    import numpy as np

    from ggufkit.llamacpp.logits import ExactModel

    with ExactModel(Path(request["gguf"]), threads=int(request["threads"])) as model:
        if len(request) == 2:
            return {}
        answer: dict[str, Json] = {
            "end": sorted(model.vocabulary.end_tokens),
            "window": model.window,
        }
        if "texts" in request:
            answer["ids"] = [model.tokens(text) for text in request["texts"]]
            answer["begin"], answer["finish"] = model.around()
        if "prompts" in request:
            answer["prompts"] = [model.tokens(text) for text in request["prompts"]]
        if "tokens" in request and model.predicts:
            logits = model.logits(request["tokens"], request["positions"])
            answer["finite"] = bool(np.isfinite(logits).all())
            if "out" in request:
                np.save(Path(request["out"]) / LOGITS, logits)
    if "conversations" in request:
        answer["conversations"] = _render(Path(request["gguf"]), request["conversations"])
    return answer


def _render(gguf: Path, conversations: Json) -> list[dict[str, Json]]:
    """Conversations by the GGUF's own template."""
    from ggufkit.llamacpp.conversing import model_template
    from ggufkit.llamacpp.gguf import read_gguf
    from ggufkit.llamacpp.metadata import Metadata

    metadata = Metadata(read_gguf(gguf))
    found: list[dict[str, Json]] = []
    try:
        chat_template = model_template(metadata)
    except GgufkitError as error:
        return [{"refused": error.message} for _ in conversations]
    for conversation in conversations:
        try:
            with time_limit(_TEMPLATE_SECONDS):
                text = chat_template.render(conversation["messages"], tools=conversation["tools"])
            found.append({"text": text})
        except TimeoutError as error:
            return [{"refused": f"the chat template does not end: {error}"}] * len(conversations)
        except GgufkitError as error:
            found.append({"refused": error.message})
    return found


if __name__ == "__main__":
    main()
