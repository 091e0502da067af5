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
        from rich.table import Table

        if not entries:
            session.console.print(f"no models in {session.models_dir}")
            return
        table = Table(box=None, pad_edge=False)
        table.add_column("name", overflow="fold")
        table.add_column("type")
        table.add_column("bpw", justify="right")
        table.add_column("size", justify="right")
        table.add_column("AWQ")
        table.add_column("from")
        table.add_column("created")
        for entry in entries:
            awq = "" if entry.awq is None else "yes" if entry.awq else "no"
            source = entry.inputs.get("checkpoint") or entry.inputs.get("gguf") or ""
            table.add_row(
                escape(entry.name),
                entry.type if entry.known else "unknown",
                f"{entry.bits_per_weight:.2f}",
                nbytes_text(entry.nbytes),
                awq,
                str(entry.inputs.get("repository") or source[:12] or "no manifest"),
                entry.created[:16].replace("T", " "),
            )
        session.console.print(table)

    session.emit(as_json, entries, human)
