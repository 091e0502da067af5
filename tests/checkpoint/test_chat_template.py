"""Which chat template a checkpoint has, held against transformers."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ggufkit.checkpoint.chat_template import CheckpointTemplates, read_templates
from ggufkit.errors import CheckpointError
from tests.factory import make_checkpoint

ABSENT = object()
CONFIGURED = {
    "absent": ABSENT,
    "null": None,
    "text": "of the config",
    "empty": "",
    "list": [
        {"name": "default", "template": "listed"},
        {"name": "tool_use", "template": "listed, with tools"},
    ],
    "list-without-default": [
        {"name": "chat", "template": "listed"},
        {"name": "rag", "template": "listed, with documents"},
    ],
    "mapping": {"default": "mapped", "rag": "mapped, with documents"},
}
FILE = {"none": None, "text": "of the file", "empty": ""}
FURTHER: dict[str, dict[str, str]] = {
    "none": {},
    "rag": {"rag": "of the directory"},
    "default": {"default": "the directory's default", "tool_use": "of the directory"},
    "file": {"file": "which has the name of a name"},
    "both": {"file": "which has the name of a name", "default": "the directory's default"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a config, without weights or template."""
    made = make_checkpoint(tmp_path_factory.mktemp("plain") / "made", hidden=32, layers=1)
    for weights in made.glob("*.safetensors"):
        weights.unlink()
    _configure(made, ABSENT)
    return made


@pytest.fixture
def checkpoint(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "checkpoint"))


def _configure(checkpoint: Path, value: Any, name: str = "tokenizer_config.json") -> None:
    path = checkpoint / name
    config = json.loads(path.read_text()) if path.exists() else {}
    config.pop("chat_template", None)
    config |= {} if value is ABSENT else {"chat_template": value}
    path.write_text(json.dumps(config))


def _write(checkpoint: Path, configured: str, file: str, further: str) -> None:
    _configure(checkpoint, CONFIGURED[configured])
    if (text := FILE[file]) is not None:
        (checkpoint / "chat_template.jinja").write_text(text)
    for name, text in FURTHER[further].items():
        (checkpoint / "additional_chat_templates").mkdir(exist_ok=True)
        (checkpoint / f"additional_chat_templates/{name}.jinja").write_text(text)


def _of_transformers(checkpoint: Path) -> dict[str, str]:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(checkpoint).chat_template
    if found is None:
        return {}
    return {"default": found} if isinstance(found, str) else dict(found)


@pytest.mark.parametrize(
    ("configured", "file", "further"), list(itertools.product(CONFIGURED, FILE, FURTHER))
)
def test_it_is_the_one_that_transformers_takes(
    checkpoint: Path, configured: str, file: str, further: str
) -> None:
    _write(checkpoint, configured, file, further)
    theirs = _of_transformers(checkpoint)
    ours = read_templates(checkpoint)
    assert dict(ours.named) == theirs
    assert ours.default == theirs.get("default", "")
    assert ours.for_tools == theirs.get("tool_use", ours.default)
    assert bool(ours.source) == ("default" in theirs)
    if ours.source.endswith(".jinja"):
        assert (checkpoint / ours.source).read_text() == ours.default


def test_files_hide_the_config_even_if_none_of_them_is_the_default(checkpoint: Path) -> None:
    _write(checkpoint, "text", "none", "rag")
    assert read_templates(checkpoint) == CheckpointTemplates("", {"rag": "of the directory"}, "")


@pytest.mark.parametrize(
    ("files", "default", "source"),
    [
        ({"chat_template.json": "old"}, "old", "chat_template.json"),
        ({"processor_config.json": "newer"}, "newer", "processor_config.json"),
        (
            {"chat_template.json": "old", "processor_config.json": "newer"},
            "newer",
            "processor_config.json",
        ),
        (
            {"chat_template.json": "old", "processor_config.json": ABSENT},
            "old",
            "chat_template.json",
        ),
    ],
)
def test_a_processor_s_counts_where_the_tokenizer_has_none(
    checkpoint: Path, files: dict[str, Any], default: str, source: str
) -> None:
    from transformers import ProcessorMixin

    for name, value in files.items():
        _configure(checkpoint, value, name)
    assert _of_transformers(checkpoint) == {}
    theirs, _ = ProcessorMixin.get_processor_dict(checkpoint)
    assert theirs["chat_template"] == default
    found = read_templates(checkpoint)
    assert (found.default, found.source) == (default, source)


def test_a_tokenizer_s_goes_before_a_processor_s(checkpoint: Path) -> None:
    # transformers' processors take the older file here, and its tokenizers the newer one.
    from transformers import ProcessorMixin

    _configure(checkpoint, "of the processor", "chat_template.json")
    _write(checkpoint, "absent", "text", "none")
    theirs, _ = ProcessorMixin.get_processor_dict(checkpoint)
    assert theirs["chat_template"] == "of the processor"
    assert _of_transformers(checkpoint) == {"default": "of the file"}
    assert read_templates(checkpoint).default == "of the file"


def test_a_checkpoint_without_any_has_none(checkpoint: Path) -> None:
    assert read_templates(checkpoint) == CheckpointTemplates()
    (checkpoint / "tokenizer_config.json").unlink()
    assert read_templates(checkpoint) == CheckpointTemplates()


def _broken(name: str, content: bytes) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_broken("tokenizer_config.json", b"{"), "tokenizer_config.json is not valid JSON"),
        (_broken("tokenizer_config.json", b"[1]"), "tokenizer_config.json is not a JSON object"),
        (_broken("tokenizer_config.json", b"[" * 99_999), "tokenizer_config.json is not valid"),
        (_broken("tokenizer_config.json", b"\xff\xfe{}"), "tokenizer_config.json is not UTF-8"),
        (_broken("tokenizer_config.json", b'{"chat_template": 5}'), "is 5"),
        (_broken("tokenizer_config.json", b'{"chat_template": false}'), "is false"),
        (_broken("tokenizer_config.json", b'{"chat_template": ["x"]}'), "entries has no name"),
        (
            _broken("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
            "no text for 'default'",
        ),
        (
            _broken("tokenizer_config.json", b'{"chat_template": {"rag": 1}}'),
            "no text for 'rag'",
        ),
        (_broken("chat_template.jinja", b"\xff"), "chat_template.jinja is not UTF-8"),
        (_broken("additional_chat_templates/x.jinja", b"\xff"), "x.jinja is not UTF-8"),
        (_broken("chat_template.json", b"nothing"), "chat_template.json is not valid JSON"),
        (_broken("processor_config.json", b'{"chat_template": 1.5}'), "is 1.5"),
    ],
)
def test_what_cannot_be_read_is_an_error_by_name(
    checkpoint: Path, break_it: Callable[[Path], None], message: str
) -> None:
    break_it(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        read_templates(checkpoint)


def test_what_does_not_count_may_be_broken(checkpoint: Path) -> None:
    _configure(checkpoint, "of the config")
    (checkpoint / "chat_template.json").write_text("nothing")
    assert read_templates(checkpoint).default == "of the config"
