"""A GGUF without a pre-tokenizer is told of, whatever verb takes it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit import pipeline
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.batching import Model
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Silent
from tests.factory import make_checkpoint, write_demo_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def whole(native: NativeBuild, demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the demo model's byte-level vocabulary, F16."""
    place = tmp_path_factory.mktemp("old")
    tokenizer = write_demo_tokenizer(demo_gguf, place / "tokenizer")
    small = {"layers": 1, "hidden": 32, "intermediate": 32, "heads": 2, "kv_heads": 1}
    checkpoint = make_checkpoint(place / "checkpoint", tokenizer=tokenizer, **small)  # type: ignore[arg-type]
    out = place / "whole.gguf"
    toolchain.convert_checkpoint(
        native, checkpoint, out, outtype="f16", name="old", log=place / "log"
    )
    return out


@pytest.fixture(scope="module")
def old(whole: Path) -> Path:
    """The same as a converter of 2023 wrote it."""
    key = b"tokenizer.ggml.pre"
    data = whole.read_bytes()
    assert data.count(key) == 1
    path = whole.with_name("old.gguf")
    path.write_bytes(data.replace(key, b"tokenizer.ggml.prx"))
    return path


VERBS = {
    "quantize": ("--type", "q8_0"),
    "convert": ("--type", "q8_0"),
    "inspect": (),
    "modelfile": ("-o", "-"),
    "ppl": ("-c", 64, "--chunks", 1),
    "bench": ("-p", 8, "-n", 0, "-r", 1),
    "compare": ("-c", 64, "--chunks", 8),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_tells(run_cli: Run, whole: Path, old: Path, tmp_path: Path, verb: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Words of a text that is long enough to be measured with. " * 200)
    before = {"ppl": [text], "compare": [old]}.get(verb, [])
    after = ["--text", text] if verb == "compare" else []
    told = {}
    for model in (whole, old):
        first = [model] if verb == "compare" else before
        code, _, err = run_cli(
            *("--models-dir", tmp_path / "models", verb, *first, model, *after, *VERBS[verb])
        )
        assert code == 0, err
        told[model.name] = err.count("has no pre-tokenizer")
    assert told == {"whole.gguf": 0, "old.gguf": 1}


class Warnings(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, message: str) -> None:
        self.told.append(message)


def test_whatever_runs_it_tells(whole: Path, old: Path) -> None:
    """Conversations, batches of prompts and the server all load this."""
    for path in (whole, old):
        progress = Warnings()
        Model(path, progress=progress).close()
        lacking = [line for line in progress.told if "has no pre-tokenizer" in line]
        assert len(lacking) == (path == old)


def test_other_vocabularies_need_none(tiny_gguf: Path) -> None:
    header = read_gguf(tiny_gguf, arrays=False)
    assert header.metadata["tokenizer.ggml.model"] == "llama"
    header.metadata.pop("tokenizer.ggml.pre")
    assert not Metadata(header).lacks_pre_tokenizer
    progress = Warnings()
    pipeline.inspect(tiny_gguf, progress=progress)
    assert progress.told == []
