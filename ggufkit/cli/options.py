"""Options that several verbs share, and what they become."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ggufkit.values import (
    AwqOptions,
    Calibration,
    FetchOptions,
    RoundingOptions,
    VerifyOptions,
)

_Command = TypeVar("_Command", bound=Callable[..., Any])

out_option = click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also put the files into this directory.",
)

leak_option = click.option(
    "--allow-leak", is_flag=True, help="Measure even on text that a model was calibrated on."
)


def fetch_options(command: _Command) -> _Command:
    """Options that say how a model is found; the command gets ``fetch``."""
    return gathered(
        command,
        "fetch",
        FetchOptions,
        ("hub", "revision", "trust_remote_code", "allow_pickle"),
        click.option(
            "--hub",
            type=click.Choice(["huggingface", "modelscope"]),
            help="Hub of a bare ORG/NAME.  [default: $GGUFKIT_HUB or huggingface]",
        ),
        click.option("--revision", help="Branch, tag or commit to fetch."),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings."
        ),
        click.option("--allow-pickle", is_flag=True, help="Accept pickled .bin weights."),
    )


def calibration_options(command: _Command) -> _Command:
    """Options that say what is looked at; the command gets ``calibration``."""
    default = Calibration()

    return gathered(
        command,
        "calibration",
        Calibration,
        ("calibration", "calibration_samples", "calibration_length", "column", "seed"),
        click.option(
            "--calibration",
            metavar="TEXT",
            default=default.text,
            show_default=True,
            help="Text that AWQ, GPTQ and --imatrix auto look at: a name or a file.",
        ),
        click.option(
            "--calibration-samples",
            type=click.IntRange(min=1),
            default=default.samples,
            show_default=True,
            help="Sequences taken from it.",
        ),
        click.option(
            "--calibration-length",
            type=click.IntRange(min=8),
            default=default.length,
            show_default=True,
            help="Tokens of each sequence.",
        ),
        click.option("--column", help="Column of text or chats in a file of rows."),
        click.option("--seed", type=int, help="Choose sequences by chance, not evenly."),
    )


def awq_options(command: _Command) -> _Command:
    """Options that say how scales are found and kept; the command gets ``awq_options``."""
    default = AwqOptions()

    def wrapped(*args: Any, **given: Any) -> Any:
        options = AwqOptions(
            given.pop("awq_backend"),
            given.pop("awq_dtype") or default.dtype,
            given.pop("sensitivity"),
            given.pop("clip"),
            given.pop("scales"),
        )
        return command(*args, awq_options=options, **given)

    return decorate(
        wrapped,
        command,
        click.option(
            "--scales",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Fold in the scales of this file instead of searching.",
        ),
        click.option(
            "--awq-backend",
            type=click.Choice(["ggufkit", "autoawq"]),
            default=default.backend,
            show_default=True,
            help="Whose search finds the scales.",
        ),
        click.option(
            "--sensitivity",
            is_flag=True,
            help="Let each token count by the squared gradient of the loss (a backward pass).",
        ),
        click.option(
            "--clip",
            is_flag=True,
            help="Clip weights too where the objective gains. This changes the function.",
        ),
        click.option(
            "--awq-dtype",
            type=click.Choice(["keep", "f16", "f32"]),
            help="How changed tensors are stored. With keep and 16 bits scales are powers of "
            "two, which lose nothing.  [default: keep; f16 for converting 16 bits]",
        ),
    )


def rounding_options(command: _Command) -> _Command:
    """Options that say how weights are rounded; the command gets ``rounding``."""
    default = RoundingOptions()

    return gathered(
        command,
        "rounding",
        RoundingOptions,
        ("rounding", "refine"),
        click.option(
            "--rounding",
            type=click.Choice(["ggml", "gptq"]),
            default=default.method,
            show_default=True,
            help="Round as llama-quantize does, or with error feedback on the calibration text.",
        ),
        click.option(
            "--refine",
            is_flag=True,
            help="After GPTQ, learn block scales on the divergence from the original (slow).",
        ),
    )


def verify_options(command: _Command) -> _Command:
    """Options that say how a GGUF is compared with its checkpoint; the command gets ``verify``."""
    return gathered(
        command,
        "verify",
        VerifyOptions,
        ("verified", "allowed"),
        click.option(
            "--verify/--no-verify",
            "verified",
            default=True,
            show_default=True,
            help="Compare the float GGUF with the checkpoint before anything is published.",
        ),
        click.option(
            "--allow-difference",
            "allowed",
            metavar="NAME",
            multiple=True,
            help="Let a difference of this name pass, noted in the manifest; may be repeated.",
        ),
    )


def gathered(
    command: _Command, name: str, make: Callable[..., Any], given: tuple[str, ...], *options: Any
) -> _Command:
    """Hang options on a command that gets one value of them.

    Args:
        command: the command.
        name: of the value among its arguments.
        make: makes it of the options, in their order.
        given: the options' names.
        options: the options.
    """

    def wrapped(*args: Any, **values: Any) -> Any:
        value = make(*(values.pop(option) for option in given))
        return command(*args, **{name: value}, **values)

    return decorate(wrapped, command, *options)


def decorate(wrapped: Any, command: _Command, *options: Any) -> _Command:
    """Hang options on what calls the command with fewer of them."""
    # click hangs the options of later decorators on this attribute.
    wrapped.__click_params__ = getattr(command, "__click_params__", [])
    wrapped.__doc__ = command.__doc__
    for option in reversed(options):
        wrapped = option(wrapped)
    decorated: _Command = wrapped
    return decorated
