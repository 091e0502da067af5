"""``ggufkit report``: one page that shows which file to take, and why."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ggufkit.cli.session import Session, json_option, pass_session

if TYPE_CHECKING:
    from rich.console import Console

    from ggufkit.evaluate.report.values import WrittenReport


@click.command("report")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The page; Markdown goes beside it.  [default: report.html in the models directory]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True, max=100),
    default=5.0,
    show_default=True,
    metavar="PERCENT",
    help="Perplexity that a recommended file may cost.",
)
@click.option("--force", is_flag=True, help="Replace files that are no reports.")
@json_option
@pass_session
def command(
    session: Session,
    models: tuple[str, ...],
    out: Path | None,
    tolerance: float,
    force: bool,
    as_json: bool,
) -> None:
    """Write stored results as one HTML page, and as Markdown.

    The page shows quality against size and speed and says which file to take. It
    loads nothing from anywhere. What ppl, compare, bench and task have measured
    is shown; nothing is measured anew. Without MODEL it shows all models of the
    models directory that have results.
    """
    from ggufkit import pipeline

    written = pipeline.report(
        [pipeline.find_model(m, session.models_dir) for m in models],
        out=out,
        tolerance=tolerance / 100,
        force=force,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    session.emit(as_json, written, lambda: _print(session.console, written))


def _print(console: "Console", written: "WrittenReport") -> None:
    for study in written.report.studies:
        pick = study.recommendation
        console.print(f"{study.title}: {pick.headline}", markup=False, soft_wrap=True)
        if pick.file:
            console.print(f"  {pick.file}", markup=False, style="bold", soft_wrap=True)
    console.print(f"{written.page}\n{written.markdown}", markup=False, soft_wrap=True)
