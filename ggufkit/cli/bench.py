"""``ggufkit bench``: how fast models are here."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ggufkit.cli.session import Session, json_option, nbytes_text, pass_session
from ggufkit.values import FLASH_ATTENTION, BenchOptions, SpeedResult

if TYPE_CHECKING:
    from rich.console import Console

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DEFAULT = BenchOptions()
_NOISY = 0.1


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in value.split(","))) if value else ()
    except ValueError:
        raise click.BadParameter(f"'{value}' is not a list of numbers such as 1,2,4") from None


def _words(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(value.split(",")))
    if unknown := [word for word in words if word not in FLASH_ATTENTION]:
        raise click.BadParameter(f"'{unknown[0]}' is none of {', '.join(FLASH_ATTENTION)}")
    return words


def _list(
    short: str, long: str, default: tuple[int, ...], text: str
) -> Callable[[_Command], _Command]:
    shown = ",".join(map(str, default)) or None
    return click.option(
        *(short, long),
        metavar="N,...",
        callback=_numbers,
        default=shown,
        show_default=bool(shown),
        help=text,
    )


@click.command("bench")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_list("-p", "--prompt", _DEFAULT.prompt, "Tokens read at once; 0 for none.")
@_list("-n", "--generation", _DEFAULT.generation, "Tokens generated one by one; 0 for none.")
@_list("-d", "--depth", _DEFAULT.depth, "Tokens in the context before that.")
@_list("-t", "--threads", _DEFAULT.threads, "CPU threads.  [default: physical cores]")
@_list("-b", "--batch", _DEFAULT.batch, "Tokens per logical batch.")
@_list("-ub", "--ubatch", _DEFAULT.ubatch, "Tokens per physical batch.")
@click.option(
    *("-fa", "--flash-attention"),
    metavar="auto,on,off",
    callback=_words,
    default=",".join(_DEFAULT.flash_attention),
    show_default=True,
    help="Flash attention; auto is on where the backend can do it.",
)
@_list(
    *("-ngl", "--gpu-layers", _DEFAULT.gpu_layers),
    "Layers on the GPU, -1 for all.  [default: all, if there is a GPU]",
)
@click.option(
    *("-r", "--repetitions"),
    type=click.IntRange(min=1),
    default=_DEFAULT.repetitions,
    show_default=True,
    help="Measurements of each, after a warm-up.",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Also vary threads, depth, ubatch, flash attention and GPU, one at a time.",
)
@click.option("--again", is_flag=True, help="Measure anew what was measured before.")
@json_option
@pass_session
def command(
    session: Session,
    models: tuple[str, ...],
    prompt: tuple[int, ...],
    generation: tuple[int, ...],
    depth: tuple[int, ...],
    threads: tuple[int, ...],
    batch: tuple[int, ...],
    ubatch: tuple[int, ...],
    flash_attention: tuple[str, ...],
    gpu_layers: tuple[int, ...],
    repetitions: int,
    sweep: bool,
    again: bool,
    as_json: bool,
) -> None:
    """Measure speed with llama-bench, and memory bandwidth beside it.

    Options take lists, such as -t 1,2,4; every combination is measured, in a
    run of its own. Without MODEL the newest GGUF of the models directory is
    measured.
    """
    from ggufkit import pipeline

    options = BenchOptions(
        prompt=tuple(n for n in prompt if n),
        generation=tuple(n for n in generation if n),
        depth=depth,
        threads=threads,
        batch=batch,
        ubatch=ubatch,
        flash_attention=flash_attention,
        gpu_layers=gpu_layers,
        repetitions=repetitions,
        sweep=sweep,
    )
    found = [pipeline.find_model(m, session.models_dir) for m in models or (None,)]
    if not models:
        session.progress.say(f"measuring the newest model: {found[0]}")
    results = pipeline.bench(
        found,
        options=options,
        again=again,
        models_dir=session.models_dir,
        progress=session.progress,
    )
    session.emit(as_json, results, lambda: _print(session.console, results))


def _print(console: "Console", results: Sequence[SpeedResult]) -> None:
    for model, rows in groupby(results, key=lambda row: row.model):
        _print_model(console, str(model), list(rows))
    if any(row.tokens_per_second_deviation > _NOISY * row.tokens_per_second for row in results):
        console.print(
            "some measurements differ by more than 10 % among themselves: other programs were at "
            "work; measure again, with --again, when they are not",
            soft_wrap=True,
        )
    if any(row.bandwidth_share is not None for row in results):
        console.print(
            "share: bytes of weights and of the KV cache that are read for the tokens generated, "
            "of what memory gave to as many threads",
            soft_wrap=True,
        )


def _print_model(console: "Console", name: str, rows: Sequence[SpeedResult]) -> None:
    from rich.table import Table

    # The batches matter to who changed them, GPU layers to who has a GPU.
    batches = len({(row.batch, row.ubatch) for row in rows}) > 1
    gpu = any(row.gpu_layers for row in rows)
    table = Table(box=None, pad_edge=False)
    table.add_column("test")
    for title in ("threads", *(["batch"] if batches else []), "flash", *(["ngl"] if gpu else [])):
        table.add_column(title, justify="right")
    for title in ("tokens/s", "memory", "bandwidth", "share"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            _test(row),
            str(row.threads),
            *([f"{row.batch}/{row.ubatch}"] if batches else []),
            "on" if row.flash_attention else "off",
            *(["all" if row.gpu_layers < 0 else str(row.gpu_layers)] if gpu else []),
            f"{row.tokens_per_second:.2f} ± {row.tokens_per_second_deviation:.2f}",
            nbytes_text(row.peak_rss_nbytes),
            f"{row.bandwidth / 1e9:.1f} GB/s" if row.bandwidth else "",
            f"{100 * row.bandwidth_share:.0f} %" if row.bandwidth_share is not None else "",
        )
    reused = sum(row.reused for row in rows)
    told = f"; {reused} of {len(rows)} measured before" if reused else ""
    console.print(f"[bold]{name}[/]", soft_wrap=True)
    console.print(f"  {nbytes_text(rows[0].file_nbytes)}, on {rows[0].machine}{told}")
    console.print(table)


def _test(row: SpeedResult) -> str:
    kind = "pp" if row.work == "prompt" else "tg"
    return f"{kind}{row.tokens}" + (f" @ {row.depth}" if row.depth else "")
