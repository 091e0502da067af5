"""``ggufkit inspect``: what a GGUF holds."""

from typing import TYPE_CHECKING

import click

from ggufkit.cli.session import Session, json_option, nbytes_text, pass_session
from ggufkit.values import verification_in_words

if TYPE_CHECKING:
    from ggufkit.quantize.inspect import Inspection
    from ggufkit.values import Json


_SHOWN_ELSEWHERE = {
    f"general.{key}" for key in ("architecture", "name", "license", "alignment", "type")
}
_LONG_VALUE = 200


@click.command("inspect")
@click.argument("gguf")
@click.option("--tensors", is_flag=True, help="List all tensors.")
@json_option
@pass_session
def command(session: Session, gguf: str, tensors: bool, as_json: bool) -> None:
    """Show what a GGUF holds and how it was made.

    GGUF is a file, or a name that `ggufkit models` lists.
    """
    from ggufkit import pipeline

    path = pipeline.find_model(gguf, session.models_dir)
    seen = pipeline.inspect(path, progress=session.progress)
    session.emit(as_json, seen, lambda: _print(session, seen, tensors))


def _print(session: Session, seen: "Inspection", tensors: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = session.console
    console.print(f"[bold]{escape(str(seen.path))}[/]", soft_wrap=True)
    rows = Table(box=None, show_header=False, pad_edge=False)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for title, value in _facts(seen):
        if value:
            rows.add_row(title, escape(_plain(value)))
    console.print(rows)
    shares = Table(box=None, pad_edge=False)
    shares.add_column("type")
    for title in ("tensors", "parameters", "bytes", "share"):
        shares.add_column(title, justify="right")
    total = sum(share.nbytes for share in seen.types)
    for share in seen.types:
        shares.add_row(
            share.type,
            str(share.tensors),
            f"{share.parameters:,}",
            nbytes_text(share.nbytes),
            f"{100 * share.nbytes / max(1, total):.1f} %",
        )
    if seen.types:
        console.print(shares)
    told = {key: value for key, value in seen.provenance.items() if key not in _SHOWN_ELSEWHERE}
    if told:
        origin = Table(box=None, pad_edge=False)
        origin.add_column("metadata", style="dim", overflow="fold")
        origin.add_column("", overflow="fold")
        for key, value in told.items():
            origin.add_row(escape(_plain(key)), escape(_plain(str(value))[:_LONG_VALUE]))
        console.print(origin)
    if tensors:
        listed = Table(box=None, pad_edge=False)
        listed.add_column("tensor", overflow="fold")
        for title in ("shape", "type"):
            listed.add_column(title, no_wrap=True)
        listed.add_column("bytes", justify="right", no_wrap=True)
        for tensor in seen.tensors:
            shape = " x ".join(str(n) for n in tensor.shape)
            name = escape(_plain(tensor.name))
            listed.add_row(name, shape, tensor.type, nbytes_text(tensor.nbytes))
        console.print(listed)


def _plain(text: str) -> str:
    """Text out of a file, without the characters that would command a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _spread(value: "Json") -> str:
    """A number, or the range of numbers that differ from block to block."""
    if isinstance(value, list) and value:
        low, high = min(value), max(value)
        return _spread(low) if low == high else f"{_spread(low)} to {_spread(high)}"
    return f"{value:.10g}" if isinstance(value, float) else str(value or "")


def _facts(seen: "Inspection") -> list[tuple[str, str]]:
    template = seen.chat_template
    shape = [
        f"{seen.blocks} blocks" if seen.blocks else "",
        f"width {seen.embedding_length}" if seen.embedding_length else "",
        f"heads {_spread(seen.heads)}" if seen.heads else "",
    ]
    if seen.heads and seen.kv_heads:
        shape[-1] += f" ({_spread(seen.kv_heads)} key/value)"
    facts = [
        ("name", seen.name),
        ("architecture", seen.architecture),
        ("parameters", f"{seen.parameters:,}"),
        ("size", f"{nbytes_text(seen.nbytes)}, {seen.bits_per_weight:.2f} bits per weight"),
        ("split", f"one of {seen.split} files; tensors and sizes are those of this one"
         if seen.split > 1 else ""),
        ("context", f"{seen.context_length} tokens" if seen.context_length else ""),
        ("shape", ", ".join(filter(None, shape))),
        ("rope base", _spread(seen.rope_base)),
        ("tokenizer", f"{seen.tokenizer or 'unnamed'}, {seen.vocabulary:,} tokens"),
        ("special", "  ".join(f"{role} {text}" for role, text in seen.special_tokens.items())),
        ("template", f"{len(template)} characters: {template.splitlines()[0][:40]}..." if template
         else "none: chat needs --chat-template"),
        ("license", seen.license),
    ]  # fmt: skip
    if seen.manifest is None:
        return [*facts, ("made by", "unknown: no manifest of ggufkit")]
    made = seen.manifest
    how = f"ggufkit {made.stage} {made.key[:12]}, {made.created}"
    tool = ", ".join(f"{name} {what}" for name, what in made.tool.items())
    inputs = ", ".join(f"{role} {str(what)[:12]}" for role, what in made.inputs.items() if what)
    origin = str(made.facts.get("origin") or "")
    return [
        *facts,
        ("made by", how),
        ("with", tool),
        ("from", inputs),
        ("origin", origin),
        ("verified", verification_in_words(made.facts)),
    ]
