"""``ggufkit models``: what lies in the models directory."""

import click

from ggufkit.cli.session import Session, json_option, nbytes_text, pass_session


@click.command("models")
@json_option
@pass_session
def command(session: Session, as_json: bool) -> None:
    """List the models directory, the newest first."""
    from ggufkit import pipeline

    entries = pipeline.models(models_dir=session.models_dir)

    def human() -> None:
        from rich.markup import escape

        if not entries:
            session.console.print(f"no models in {session.models_dir}")
        for entry in entries:
            session.console.print(f"[bold]{escape(entry.name)}[/]", soft_wrap=True)
            line = f"  {entry.label}, {entry.bits_per_weight:.2f} bits per weight, "
            line += f"{nbytes_text(entry.nbytes)}, {entry.created[:16].replace('T', ' ')} UTC"
            line += f", from {entry.origin}" if entry.origin else ""
            session.console.print(escape(line), soft_wrap=True)
            if entry.problem:
                session.console.print(f"  [red]broken: {escape(entry.problem)}[/]", soft_wrap=True)

    session.emit(as_json, entries, human)
