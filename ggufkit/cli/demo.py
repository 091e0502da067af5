"""``ggufkit demo``: the whole way on the embedded model."""

import click

from ggufkit.cli.session import Session, json_option, nbytes_text, pass_session
from ggufkit.values import DemoResult


@click.command("demo")
@json_option
@pass_session
def command(session: Session, as_json: bool) -> None:
    """Make, measure and talk to the embedded model, SmolLM2-135M-Instruct.

    It needs the package index and nothing else. What was made before is reused.
    """
    from ggufkit import pipeline

    result = pipeline.demo(models_dir=session.models_dir, progress=session.progress)
    session.emit(as_json, result, lambda: _print(session, result))


def _print(session: Session, result: DemoResult) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = session.console
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("size", "bpw asked", "bpw got", "PPL", "tokens/s"):
        table.add_column(title, justify="right")
    for file, told in zip(result.files, result.measured, strict=True):
        table.add_row(
            file.label,
            nbytes_text(file.nbytes),
            f"{file.bits_per_weight_asked:.2f}",
            f"{file.bits_per_weight:.2f}",
            f"{told.perplexity:.4f} ± {told.error:.4f}",
            f"{told.tokens_per_second:.0f}",
        )
    console.print(table)
    told = result.measured[0]
    awq, both = (f"{100 * share:.0f} %" for share in result.recovered)
    console.print(
        f"Of what Q4_0 loses, AWQ wins back {awq}, and {both} together with the importance "
        f"matrix that its pass yields, at the same size. It looked at {result.calibration}; "
        f"measured on {told.text}, {told.tokens} tokens that it never saw."
    )
    for note in dict.fromkeys(note for file in result.files for note in file.notes):
        console.print(f"note: {note}")
    console.print(f"\n[bold green]>[/] {escape(result.question)}")
    console.print(escape(result.answer))
    console.print(f"\nModelfile for Ollama: {escape(str(result.modelfile))}", soft_wrap=True)
    console.print("go on with: ggufkit chat", soft_wrap=True)
