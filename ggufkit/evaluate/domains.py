"""Texts of several domains, such as prose, code and Chinese, and where a model loses most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ggufkit.errors import GgufkitError, SourceError
from ggufkit.progress import SILENT, Progress
from ggufkit.texts.files import CONTAINER_SUFFIXES
from ggufkit.texts.load import load_text
from ggufkit.values import Comparison, EvalResult, Text


def load_domains(
    directory: Path,
    *,
    context: int,
    column: str | None = None,
    cache: Path,
    progress: Progress = SILENT,
) -> tuple[Text, ...]:
    """The texts in a directory: each file is a domain, called as the file without its ending.

    Args:
        directory: holds UTF-8, parquet, arrow, feather or JSON lines files; names
            that begin with a dot do not count.
        context: tokens per chunk, of which a text has to hold two.
        column: the column of files that have columns.
        cache: as for :func:`~ggufkit.texts.load.load_text`.
        progress: who to tell.

    Raises:
        SourceError: if there is no file, or names every file that cannot be used.
    """
    if not directory.is_dir():
        raise SourceError(f"{directory} is not a directory", "Name a folder with a text per domain")
    paths = [path for path in sorted(directory.iterdir()) if not path.name.startswith(".")]
    if not paths:
        raise SourceError(f"there is no text in {directory}", "Put a text per domain into it")
    found: dict[str, Text] = {}
    wrong: list[str] = []
    for path in paths:
        try:
            if path.stem in found:
                raise SourceError(f"{path} is another text called {path.stem}")
            own = column if path.suffix.lower() in CONTAINER_SUFFIXES else None
            # Absolute, so that a file called as a built-in text is still the file.
            spec = str(path.absolute())
            text = load_text(spec, column=own, cache=cache, progress=progress)
            check_length(text, context)
            found[path.stem] = replace(text, name=path.stem)
        except GgufkitError as error:
            wrong.append(f"{error.message}. {error.hint}".rstrip(". "))
    if wrong:
        told = "\n  ".join(wrong)
        raise SourceError(
            f"{len(wrong)} of {len(paths)} texts in {directory} cannot be used:\n  {told}",
            "Repair these files, or take them out of the directory",
        )
    return tuple(found.values())


def check_length(text: Text, context: int) -> None:
    """Refuse what is too short whatever the tokenizer: a token is a byte at least.

    Raises:
        GgufkitError: if a text cannot hold two contexts.
    """
    if text.nbytes + 1 < 2 * context:  # one token may be put before the text
        raise GgufkitError(
            f"{text.name} is too short: its {text.nbytes} bytes are fewer tokens than "
            f"the {2 * context} that a context of {context} needs",
            "Use a longer text, or a smaller --context",
        )


@dataclass(frozen=True)
class Worst:
    """The domain on which a model loses most.

    Attributes:
        model: the model.
        text: name of the domain.
        measure: ``divergence`` (mean KL divergence from the reference, nats per
            token) or ``log_perplexity`` (rise over the first model, nats per token).
        loss: on this domain.
        elsewhere: its mean over the other domains.
    """

    model: Path
    text: str
    measure: str
    loss: float
    elsewhere: float


def worst_by_divergence(rows: Sequence[Comparison]) -> tuple[Worst, ...]:
    """For each candidate the text on which it is farthest from the reference."""
    return _worst("divergence", [(row.model, row.text, row.divergence) for row in rows])


def worst_by_perplexity(rows: Sequence[EvalResult]) -> tuple[Worst, ...]:
    """For each model but the first the text on which its perplexity rises most over the first's.

    Perplexities of different texts say nothing of each other; their ratios to
    those of another model on the same texts do.
    """
    if not rows:
        return ()
    first = {row.text: row.perplexity for row in rows if row.model == rows[0].model}
    return _worst(
        "log_perplexity",
        [
            (row.model, row.text, math.log(row.perplexity / first[row.text]))
            for row in rows
            if row.model != rows[0].model
        ],
    )


def _worst(measure: str, losses: Sequence[tuple[Path, str, float]]) -> tuple[Worst, ...]:
    by_model: dict[Path, dict[str, float]] = {}
    for model, text, loss in losses:
        by_model.setdefault(model, {})[text] = loss
    found = []
    for model, by_text in by_model.items():
        if len(by_text) < 2:
            continue
        text = max(by_text, key=lambda name: by_text[name])
        others = [loss for name, loss in by_text.items() if name != text]
        found.append(Worst(model, text, measure, by_text[text], sum(others) / len(others)))
    return tuple(found)
