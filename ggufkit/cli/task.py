"""``ggufkit task``: how many questions models answer rightly."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ggufkit.cli.session import Session, json_option, nbytes_text, pass_session
from ggufkit.values import TaskDifference, TaskResult

if TYPE_CHECKING:
    from rich.console import Console

_NAMES = ("hellaswag", "winogrande", "multiple-choice", "truthful-qa")


@click.command("task")
@click.argument("name", type=click.Choice(_NAMES))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--questions", type=click.IntRange(min=1), help="Ask only so many, chosen as by chance."
)
@click.option(
    "-ngl", "--gpu-layers", type=int, default=0, show_default=True, help="Layers on the GPU."
)
@json_option
@pass_session
def command(
    session: Session,
    name: str,
    file: Path,
    models: tuple[str, ...],
    questions: int | None,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Ask questions with given answers, with llama-perplexity.

    FILE is in llama-perplexity's own format, or in the JSON that HellaSwag,
    Winogrande, TruthfulQA, ARC and MMLU are published in. With several models,
    each is compared with the first, question by question. Without MODEL the
    newest GGUF of the models directory is asked.
    """
    from ggufkit import pipeline

    found = [pipeline.find_model(m, session.models_dir) for m in models or (None,)]
    if not models:
        session.progress.say(f"asking the newest model: {found[0]}")
    results, differences = pipeline.task(
        name,
        file,
        found,
        questions=questions,
        gpu_layers=gpu_layers,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    session.emit(
        as_json,
        {"results": results, "differences": differences},
        lambda: _print(session.console, results, differences),
    )


def _print(
    console: "Console", results: Sequence[TaskResult], differences: Sequence[TaskDifference]
) -> None:
    from rich.table import Table

    told = results[0]
    guessed = f"; guessing gives {100 * told.chance:.1f} %" if told.chance is not None else ""
    console.print(
        f"{told.task} on {told.data}: {told.questions} questions{guessed}", soft_wrap=True
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("score", "95 % interval", "file", "seconds"):
        table.add_column(title, justify="right")
    if differences:
        table.add_column("against the first")
    for number, row in enumerate(results):
        table.add_row(
            row.model.stem,
            f"{100 * row.score:.2f} %",
            f"{100 * row.low:.2f} to {100 * row.high:.2f} %",
            nbytes_text(row.file_nbytes),
            "reused" if row.reused else f"{row.seconds:.0f}",
            *([_verdict(differences[number - 1]) if number else ""] if differences else []),
        )
    console.print(table)


def _verdict(found: TaskDifference) -> str:
    return (
        f"{found.verdict}: {found.only_model} right that it has wrong, "
        f"{found.only_other} the other way (p = {found.p_value:.3g})"
    )
