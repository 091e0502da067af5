"""The command line: one file per verb, found by its name.

A verb's file holds a click command called ``command``; it parses, calls the
function of the same name in :mod:`ggufkit.pipeline`, and renders. Nothing
heavy may be imported before a command runs: ``ggufkit --help`` must be instant.
"""

import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import click

from ggufkit import __version__, settings
from ggufkit.cli.session import Session
from ggufkit.errors import GgufkitError

_NOT_VERBS = {"markdown", "options", "running", "session", "tables", "terminal"}
_INTERRUPTED = 130
"""The shell's exit code for a program that Ctrl-C ended."""


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        names = (m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_VERBS)
        return sorted(name.replace("_", "-") for name in names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            from difflib import get_close_matches

            near = get_close_matches(name, self.list_commands(ctx), 1)
            suggestion = f"Did you mean '{near[0]}'?" if near else "See: ggufkit --help"
            raise click.UsageError(f"there is no command '{name}'. {suggestion}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ggufkit")
@click.option(
    "--models-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where models are kept.  [default: $GGUFKIT_MODELS or ./models]",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress and no talk, only results.")
@click.pass_context
def root(ctx: click.Context, models_dir: Path | None, quiet: bool) -> None:
    """Turn checkpoints into quantized, measured GGUF files, and run them.

    \b
    Start with:
      ggufkit build                             build llama.cpp, once
      ggufkit convert MODEL --awq --type q4_0   make a GGUF
      ggufkit ppl wikitext                      measure it
      ggufkit chat                              talk to it
    """  # noqa: D301 - click takes the control character itself
    ctx.obj = Session(models_dir or settings.models_dir(), quiet)


def _fail(message: str, hint: str, code: int) -> int:
    colour = sys.stderr.isatty()
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True, color=colour)
    if hint:
        click.echo(click.style("hint: ", fg="cyan", bold=True) + hint, err=True, color=colour)
    return code


def execute(args: list[str] | None = None) -> int:
    """Run a command line and return its exit code.

    The only place where errors become text: 1 for errors that say what to do,
    2 for wrong usage, 3 for broken bytes, 130 after Ctrl-C. Anything that is
    not a :class:`GgufkitError` is a bug and keeps its traceback.
    """
    try:
        result = root.main(args, prog_name="ggufkit", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except GgufkitError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except click.UsageError as error:
        where = f"{error.ctx.command_path} --help" if error.ctx else "ggufkit --help"
        return _fail(error.format_message(), f"See: {where}", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), "", error.exit_code)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _fail(
            "interrupted", "Nothing half-made was published; run it again to go on", _INTERRUPTED
        )


def main() -> None:
    """Entry point of the ``ggufkit`` command."""
    sys.exit(execute())
