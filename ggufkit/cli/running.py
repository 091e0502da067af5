"""Options of the verbs that run a model, by the names that llama.cpp's users know."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from ggufkit.cli.options import decorate
from ggufkit.errors import UsageError

if TYPE_CHECKING:
    from ggufkit.serve.model import Sampling

_Command = TypeVar("_Command", bound=Callable[..., Any])

_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Layers(click.ParamType[int | str]):
    """A number of layers, ``all`` or ``auto``; -1 is all."""

    name = "layers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Read it."""
        text = str(value).lower()
        if text in ("all", "auto"):
            return text
        if text.removeprefix("-").isdigit():
            return int(text) if int(text) >= 0 else "all"
        self.fail(f"'{value}' is neither a number nor 'all' nor 'auto'", param, ctx)


class _Adapter(click.ParamType[tuple[Path, float]]):
    name = "adapter"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float]:
        text = str(value)
        name, colon, scale = text.rpartition(":")
        if colon and not Path(text).exists():
            try:
                return Path(name), float(scale)
            except ValueError:
                self.fail(f"'{scale}' is not the scale of an adapter", param, ctx)
        return Path(text), 1.0


class _Shares(click.ParamType[tuple[float, ...]]):
    name = "shares"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"'{value}' is not numbers with commas between them", param, ctx)


def sampling_options(command: _Command) -> _Command:
    """How answers are chosen; the command gets ``sampling``."""

    def wrapped(*args: Any, **given: Any) -> Any:
        return command(*args, sampling=_sampling(given), **given)

    return decorate(
        wrapped,
        command,
        click.option(
            *("-n", "--max-tokens", "--predict"),
            type=click.IntRange(min=1),
            help="Length of an answer at most, in tokens.",
        ),
        click.option(
            "--temp", type=click.FloatRange(min=0), help="Temperature; 0 takes the likeliest."
        ),
        click.option("--top-k", type=click.IntRange(min=0), help="Choose among this many tokens."),
        click.option(
            "--top-p", type=click.FloatRange(0, 1), help="Choose among this much probability."
        ),
        click.option("--min-p", type=click.FloatRange(0, 1), help="Leave out what is less likely."),
        click.option(
            "--repeat-penalty", type=click.FloatRange(min=0, min_open=True), help="1 for none."
        ),
        click.option("--presence-penalty", type=float, help="0 for none."),
        click.option("--frequency-penalty", type=float, help="0 for none."),
        click.option("-s", "--seed", type=click.IntRange(0, 0xFFFFFFFE), help="Of the sampling."),
        click.option(
            *("-r", "--stop", "--reverse-prompt"),
            multiple=True,
            metavar="TEXT",
            help="End an answer where it comes to this; may be given several times.",
        ),
        click.option("--grammar", metavar="GBNF", help="Grammar that answers must follow."),
        click.option("--grammar-file", type=_FILE, help="The same from a file."),
        click.option(
            *("-j", "--json-schema"),
            metavar="JSON",
            help="JSON schema that answers must follow; {} for any object.",
        ),
        click.option("--json-schema-file", type=_FILE, help="The same from a file."),
    )


def _sampling(given: dict[str, Any]) -> "Sampling":
    from ggufkit.serve.model import Sampling

    return Sampling(
        temperature=given.pop("temp"),
        top_k=given.pop("top_k"),
        top_p=given.pop("top_p"),
        min_p=given.pop("min_p"),
        repeat_penalty=given.pop("repeat_penalty"),
        max_tokens=given.pop("max_tokens"),
        presence_penalty=given.pop("presence_penalty"),
        frequency_penalty=given.pop("frequency_penalty"),
        seed=given.pop("seed"),
        grammar=_grammar(*(given.pop(name) for name in _GRAMMARS)),
        stop=given.pop("stop"),
    )


_GRAMMARS = ("grammar", "grammar_file", "json_schema", "json_schema_file")


def _grammar(
    grammar: str | None, grammar_file: Path | None, schema: str | None, schema_file: Path | None
) -> str:
    found = [n for n in (grammar, grammar_file, schema, schema_file) if n is not None]
    if len(found) > 1:
        raise UsageError(
            "more than one grammar is given",
            "Give one of --grammar, --grammar-file, --json-schema, --json-schema-file",
        )
    if grammar_file:
        return grammar_file.read_text(encoding="utf-8")
    if schema_file:
        schema = schema_file.read_text(encoding="utf-8")
    if schema is None:
        return grammar or ""
    from ggufkit.llamacpp.runtime import schema_grammar

    try:
        return schema_grammar(json.loads(schema))
    except ValueError as error:
        raise UsageError(
            f"the JSON schema is not JSON: {error}", "In a shell, put it between single quotes"
        ) from error


def model_options(command: _Command) -> _Command:
    """How the model is loaded; the command gets ``options`` and ``scales`` of adapters."""

    def wrapped(*args: Any, **given: Any) -> Any:
        from ggufkit.llamacpp.batching import ModelOptions

        adapters = given.pop("lora")
        options = ModelOptions(
            gpu_layers=given.pop("gpu_layers"),
            adapters={str(path): path for path, _ in adapters},
            split=given.pop("tensor_split"),
            rpc=_endpoints(given.pop("rpc")),
        )
        scales = {str(path): scale for path, scale in adapters}
        return command(*args, options=options, scales=scales, **given)

    return decorate(
        wrapped,
        command,
        click.option(
            *("-ngl", "--gpu-layers"),
            type=Layers(),
            metavar="N|all|auto",
            help="Layers to put on the GPU, or with --rpc on servers; auto for as many as fit.  "
            "[default: 0; all with --rpc]",
        ),
        click.option(
            *("-ts", "--tensor-split"),
            type=_Shares(),
            default=(),
            metavar="N,...",
            help="How much of them each server and GPU gets.  [default: by free memory]",
        ),
        click.option(
            "--lora",
            type=_Adapter(),
            multiple=True,
            metavar="FILE[:SCALE]",
            help="Apply a LoRA adapter (GGUF); may be given several times.",
        ),
        click.option(
            "--rpc",
            metavar="HOST:PORT,...",
            help="Put layers on other machines, where `ggufkit rpc` runs.",
        ),
    )


def draft_options(command: _Command) -> _Command:
    """A small model that guesses ahead; the command gets ``draft``."""

    def wrapped(*args: Any, **given: Any) -> Any:
        path, count = given.pop("draft"), given.pop("draft_max")
        if path is None:
            return command(*args, draft=None, **given)
        from ggufkit.serve.drafting import DraftOptions

        options = DraftOptions(path) if count is None else DraftOptions(path, count)
        return command(*args, draft=options, **given)

    return decorate(
        wrapped,
        command,
        click.option(
            *("-md", "--draft"),
            type=_FILE,
            metavar="GGUF",
            help="Small model of the same vocabulary that guesses ahead, for speed.",
        ),
        click.option(
            "--draft-max",
            type=click.IntRange(1, 16),
            help="Tokens that it guesses ahead at most.  [default: 4]",
        ),
    )


def _endpoints(text: str | None) -> tuple[str, ...]:
    return tuple(e.strip() for e in text.split(",")) if text else ()


def context_options(command: _Command) -> _Command:
    """How large the context is and how it is computed; the command gets ``context_options``."""

    def wrapped(*args: Any, **given: Any) -> Any:
        from ggufkit.llamacpp.batching import ContextOptions

        attention: Literal["auto", "on", "off"] = given.pop("flash_attention")
        options = ContextOptions(
            context=given.pop("context"),
            threads=given.pop("threads"),
            batch_threads=given.pop("threads_batch"),
            flash_attention=attention,
            key_type=given.pop("cache_type_k"),
            value_type=given.pop("cache_type_v"),
        )
        return command(*args, context_options=options, **given)

    return decorate(
        wrapped,
        command,
        click.option(
            *("-c", "--context", "--ctx-size"),
            type=click.IntRange(min=16),
            help="Tokens of context.  [default: as trained, at most 8192]",
        ),
        click.option("-t", "--threads", type=click.IntRange(min=1), help="[default: all cores]"),
        click.option(
            *("-tb", "--threads-batch"),
            type=click.IntRange(min=1),
            help="Threads for prompts.  [default: as -t]",
        ),
        click.option(
            *("-fa", "--flash-attn", "flash_attention"),
            type=click.Choice(["on", "off", "auto"]),
            default="auto",
            show_default=True,
            help="Flash attention.",
        ),
        click.option(
            *("-ctk", "--cache-type-k"),
            type=click.Choice(_CACHE_TYPES),
            default="f16",
            show_default=True,
            metavar="TYPE",
            help="How keys are stored.",
        ),
        click.option(
            *("-ctv", "--cache-type-v"),
            type=click.Choice(_CACHE_TYPES),
            default="f16",
            show_default=True,
            metavar="TYPE",
            help="How values are stored; other than floats needs flash attention.",
        ),
    )
