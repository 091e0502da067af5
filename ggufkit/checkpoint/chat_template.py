"""Which chat template a checkpoint has.

There are four places for it, from four years. Which of them counts is what
transformers' tokenizers decide (``PreTrainedTokenizerBase._from_pretrained``,
5.23.0): files of Jinja text hide whatever ``tokenizer_config.json`` says. The
converter of llama.cpp has another order, and so has transformers for processors,
so nothing but this module may decide it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ggufkit.errors import CheckpointError, IntegrityError
from ggufkit.values import Json

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSOR_CONFIG = "processor_config.json"
PROCESSOR_TEMPLATE = "chat_template.json"

DEFAULT = "default"
"""Name of the template of plain conversations."""
TOOL_USE = "tool_use"
"""Name of the one for conversations with functions."""

_KEY = "chat_template"
_MAX_NBYTES = 64 << 20
"""A tokenizer's config names all added tokens; those of templates are far smaller."""


@dataclass(frozen=True)
class CheckpointTemplates:
    """The chat templates of a checkpoint.

    Attributes:
        default: Jinja text that transformers uses for a plain conversation; empty
            if there is none.
        named: all by name, the default too.
        source: name of the file that the default comes from, relative to the
            checkpoint; empty if there is none.
    """

    default: str = ""
    named: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    source: str = ""

    @property
    def for_tools(self) -> str:
        """The template that transformers uses when there are functions."""
        return self.named.get(TOOL_USE, self.default)


def read_templates(path: Path) -> CheckpointTemplates:
    """The chat templates of a checkpoint, by the precedence of transformers' tokenizers.

    Of a checkpoint whose tokenizer has none, the processor's counts: models that
    see images keep theirs there.

    Args:
        path: the checkpoint's directory.

    Raises:
        CheckpointError: if a file that counts cannot be read, or a template is
            no text.
        IntegrityError: if such a file is far too large.
    """
    for found in (_from_files, _from_tokenizer_config, _from_processor):
        if templates := found(path):
            return templates
    return CheckpointTemplates()


def _made(named: Mapping[str, str], source: str) -> CheckpointTemplates:
    default = named.get(DEFAULT)
    named = MappingProxyType(dict(sorted(named.items())))
    return CheckpointTemplates(default or "", named, "" if default is None else source)


def _from_files(path: Path) -> CheckpointTemplates | None:
    """Jinja files. If there are any, nothing else counts."""
    directory = path / TEMPLATE_DIRECTORY
    further = {f.name.removesuffix(".jinja"): f for f in directory.glob("*.jinja")}
    files = {DEFAULT: path / TEMPLATE_FILE}
    # transformers keeps names of templates and of its own files in one mapping, where
    # "file" stands for chat_template.jinja: a template of that name takes its place.
    if hiding := further.pop("file", None):
        files[DEFAULT] = hiding
    files |= further
    named = {name: _text(file) for name, file in files.items() if file.is_file()}
    return _made(named, files[DEFAULT].relative_to(path).as_posix()) if named else None


def _from_tokenizer_config(path: Path) -> CheckpointTemplates | None:
    file = path / TOKENIZER_CONFIG
    return _of_value(file, _object(file).get(_KEY)) if file.is_file() else None


def _from_processor(path: Path) -> CheckpointTemplates | None:
    """The processor's template, where its own config goes before the file."""
    for file in (path / PROCESSOR_CONFIG, path / PROCESSOR_TEMPLATE):
        if file.is_file() and (found := _of_value(file, _object(file).get(_KEY))):
            return found
    return None


def _of_value(file: Path, value: Json) -> CheckpointTemplates | None:
    """Templates as JSON has them: one, several by name, or a list of such."""
    if value is None:
        return None
    if isinstance(value, str):
        return _made({DEFAULT: value}, file.name)
    if isinstance(value, list):
        value = {_name(file, row): row.get("template") for row in value}
    if not isinstance(value, dict):
        raise _wrong(file, f"is {json.dumps(value)[:40]}")
    for name, text in value.items():
        if not isinstance(text, str):
            raise _wrong(file, f"has no text for '{name}'")
    return _made(value, file.name)


def _name(file: Path, row: Json) -> str:
    name = row.get("name") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise _wrong(file, "is a list, and one of its entries has no name")
    return name


def _wrong(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{_KEY} of {file} {what}",
        'A template is text; several are a list of {"name": ..., "template": ...}',
    )


def _object(file: Path) -> dict[str, Json]:
    try:
        value = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not valid JSON: {error}", "Fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object", "Fetch the file again")
    return value


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_NBYTES:
            raise IntegrityError(f"{file} is larger than {_MAX_NBYTES >> 20} MiB")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 text: {error}", "Fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
