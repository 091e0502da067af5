"""The runtime on the demo model."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from gguf import GGUFWriter

from ggufkit.errors import IntegrityError, SourceError, ToolError, UsageError
from ggufkit.llamacpp import host, runtime
from ggufkit.llamacpp.pin import read_pin
from ggufkit.llamacpp.runtime import ChatModel, ContextError, Sampling
from ggufkit.llamacpp.template import Message
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Silent
from tests.chatting import patched, without_template

GREEDY = Sampling(temperature=0, max_tokens=16)


class Warnings(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, message: str) -> None:
        self.told.append(message)


@pytest.fixture(scope="module")
def model(demo_gguf: Path, native: NativeBuild) -> Iterator[ChatModel]:
    with ChatModel(demo_gguf, context=512, seed=1, build=native) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def mute(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_template(demo_gguf, tmp_path_factory.mktemp("mute") / "mute.gguf")


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def say(model: ChatModel, messages: list[Message], sampling: Sampling = GREEDY) -> str:
    return "".join(model.stream(messages, sampling))


# The library.


def test_the_library_is_that_of_the_native_build(model: ChatModel, native: NativeBuild) -> None:
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux tells what is loaded
        loaded = {line.split()[-1] for line in maps.read_text().splitlines() if ".so" in line}
        ours = [p for p in loaded if "/libllama" in p]
        assert ours
        assert {Path(p).parent for p in ours} == {native.bin.resolve()}
    assert os.environ["LLAMA_CPP_LIB_PATH"] == str(native.bin)


def test_another_version_of_the_binding_is_refused(
    native: NativeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.packages, "version", lambda name: "0.2.1")
    with pytest.raises(ToolError, match=f"is 0.2.1, but {read_pin().version} is needed") as caught:
        runtime.load_llama_cpp(native)
    assert caught.value.hint == "Run: ggufkit build"


def test_a_missing_binding_is_said(native: NativeBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(runtime.packages, "version", missing)
    with pytest.raises(ToolError, match="llama-cpp-python is not installed") as caught:
        runtime.load_llama_cpp(native)
    assert caught.value.hint == "Run: ggufkit build"


def test_another_commit_of_llama_cpp_is_refused(native: NativeBuild) -> None:
    with pytest.raises(ToolError, match=f"fits llama.cpp {read_pin().commit} alone") as caught:
        runtime.load_llama_cpp(replace(native, commit="deadbeef0"))
    assert "deadbeef0" in caught.value.message
    assert "ggufkit build" in caught.value.hint


def test_a_binding_that_runs_on_other_libraries_is_refused(
    model: ChatModel, native: NativeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "llama_cpp" in sys.modules
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/elsewhere")
    with pytest.raises(ToolError, match="imported before, with other libraries"):
        runtime.load_llama_cpp(native)


def test_layers_for_a_gpu_that_is_not_there_are_said(
    demo_gguf: Path, native: NativeBuild, model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = runtime.load_llama_cpp(native)
    monkeypatch.setattr(library, "llama_supports_gpu_offload", lambda: False)
    assert not runtime.supports_gpu_offload(native)
    for backend, message in (("cpu", "CPU-only build"), ("cuda", "is for cuda, but sees no")):
        warnings = Warnings()
        build = replace(native, backend=backend)
        layers = runtime.ALL_LAYERS
        with ChatModel(
            demo_gguf, gpu_layers=layers, context=64, build=build, progress=warnings
        ) as loaded:
            assert say(loaded, user("Hi"))
        assert len(warnings.told) == 1
        assert message in warnings.told[0]
        assert "-ngl changes nothing" in warnings.told[0]


def test_llama_cpp_is_silent(
    demo_gguf: Path, native: NativeBuild, capfd: pytest.CaptureFixture[str]
) -> None:
    with ChatModel(demo_gguf, context=64, build=native) as loaded:
        say(loaded, user("Hi"))
    assert capfd.readouterr() == ("", "")


# From messages to tokens.


def test_the_prompt_is_the_template_s(model: ChatModel) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief"}, *user("Hi")]
    assert model.prompt(messages) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_prompt_s_control_tokens_are_single_tokens(model: ChatModel) -> None:
    start, end = (model.metadata.tokens.index(t) for t in ("<|im_start|>", "<|im_end|>"))
    tokens = model.tokenize(model.prompt(user("Hi")))
    assert tokens.count(start) == 3  # the template has a system message of its own
    assert tokens.count(end) == 2


@pytest.mark.parametrize(
    "text", ["", "Hello there", "1234567", "Gr\u00fc\u00dfe \u4f60\u597d \U0001f600\n\n\tx", "\0"]
)
def test_tokens_and_pieces_are_inverse(model: ChatModel, text: str) -> None:
    pieces = [model._piece(token) for token in model.tokenize(text)]
    assert b"".join(pieces) == text.encode()


def test_text_that_is_none_is_refused(model: ChatModel) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        say(model, user("caf\udce9"))


def test_characters_of_several_tokens_come_whole(model: ChatModel) -> None:
    text = "\u4f60\u597d \U0001f600 \u05e9\u05dc\u05d5\u05dd"
    tokens = model.tokenize(text)
    assert len(tokens) > len(text), "the text must have characters of several tokens"
    pieces = list(_written(model, tokens))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def _written(model: ChatModel, tokens: list[int]) -> Iterator[str]:
    """What the model writes if these tokens are what sampling chooses."""
    end = model.metadata.tokens.index("<|im_end|>")
    chosen = iter([*tokens, end])
    library = model._library
    try:
        model._library = _Replaced(library, llama_sampler_sample=lambda *_: next(chosen))
        yield from model.stream(user("Hi"), Sampling(temperature=0))
    finally:
        model._library = library


class _Replaced:
    """A library in which some functions are others."""

    def __init__(self, library: object, **functions: object) -> None:
        self._library = library
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> object:
        return getattr(self._library, name)


# Answering.


def test_an_answer_and_its_numbers(model: ChatModel) -> None:
    messages: list[Message] = [
        {"role": "system", "content": "You are a helpful assistant."},
        *user("What is the capital of France?"),
    ]
    assert "Paris" in say(model, messages, replace(GREEDY, max_tokens=64))
    told = model.statistics
    assert told.stopped == "end"
    assert 0 < told.generated_tokens < 64
    assert told.context == 512
    assert told.context_used == told.prompt_tokens + told.generated_tokens
    assert told.prompt_tokens == len(model.tokenize(model.prompt(messages)))
    assert told.tokens_per_second == told.generated_tokens / told.generate_seconds


def test_the_answer_ends_at_the_length_asked_for(model: ChatModel) -> None:
    for limit in (1, 5):
        say(model, user("Tell me a story"), replace(GREEDY, max_tokens=limit))
        assert model.statistics.generated_tokens == limit
        assert model.statistics.stopped == "limit"


def test_what_is_known_already_is_not_read_again_and_changes_nothing(
    model: ChatModel, demo_gguf: Path, native: NativeBuild
) -> None:
    first = user("Name a colour")
    answer = say(model, first)
    second: list[Message] = [*first, {"role": "assistant", "content": answer}, *user("Another")]
    with_memory = say(model, second)
    assert model.statistics.cached_tokens > len(model.tokenize(model.prompt(first)))
    with ChatModel(demo_gguf, context=512, build=native) as fresh:
        assert say(fresh, second) == with_memory
        assert fresh.statistics.cached_tokens == 0
    # A conversation that begins otherwise must not see the one before.
    assert say(model, first) == answer


def test_the_seed_decides(model: ChatModel, demo_gguf: Path, native: NativeBuild) -> None:
    hot = Sampling(temperature=1.5, top_k=0, top_p=1, min_p=0, max_tokens=12)
    one = say(model, user("Tell me a story"), hot)
    assert say(model, user("Tell me a story"), hot) == one
    with ChatModel(demo_gguf, context=512, seed=2, build=native) as other:
        assert say(other, user("Tell me a story"), hot) != one


def test_sampling_options_reach_the_sampler(model: ChatModel) -> None:
    greedy = say(model, user("Tell me a story"))
    for narrow in (
        Sampling(temperature=5, top_k=1, max_tokens=16),
        Sampling(temperature=5, top_p=0, max_tokens=16),
        Sampling(temperature=5, min_p=1, max_tokens=16),
    ):
        assert say(model, user("Tell me a story"), narrow) == greedy


def test_a_repeat_penalty_changes_the_answer(model: ChatModel) -> None:
    question = user("List the days of the week.")
    long = replace(GREEDY, max_tokens=40)
    assert say(model, question, long) != say(model, question, replace(long, repeat_penalty=3))


def test_an_answer_that_is_broken_off_leaves_the_model_well(model: ChatModel) -> None:
    whole = say(model, user("Tell me a story"))
    stream = model.stream(user("Tell me a story"), GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert model.statistics.stopped == "interrupted"
    assert model.statistics.generated_tokens == 1
    assert say(model, user("Tell me a story")) == whole


# The context.


def test_a_conversation_that_does_not_fit_is_an_error(model: ChatModel) -> None:
    with pytest.raises(ContextError, match=r"has \d+ tokens, and the context 512") as caught:
        say(model, user("word " * 600))
    assert "/reset" in caught.value.hint
    assert "-c 1024" in caught.value.hint
    assert say(model, user("Hi"))


def test_an_answer_that_fills_the_context_is_an_error(demo_gguf: Path, native: NativeBuild) -> None:
    with ChatModel(demo_gguf, context=48, build=native) as small:
        pieces: list[str] = []
        with pytest.raises(ContextError, match="the answer filled the context of 48"):
            pieces.extend(small.stream(user("Tell me a story"), Sampling(temperature=0)))
        assert pieces
        assert small.statistics.context_used == small.context == 48
        assert small.statistics.stopped == "context"


def test_the_context_is_the_trained_one_within_reason(
    demo_gguf: Path, native: NativeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings = Warnings()
    with ChatModel(demo_gguf, build=native, progress=warnings) as loaded:
        assert loaded.context == 8192
    monkeypatch.setattr(runtime, "DEFAULT_CONTEXT", 256)
    with ChatModel(demo_gguf, build=native, progress=warnings) as loaded:
        assert loaded.context == 256
    assert warnings.told == []
    with ChatModel(demo_gguf, context=8200, build=native, progress=warnings) as loaded:
        assert loaded.context == 8200
    assert "8200 tokens is more than the 8192" in warnings.told[0]


def test_a_context_without_room_is_refused_before_it_is_tried(
    demo_gguf: Path, native: NativeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_token = 30 * 3 * (64 + 64) * 2 + 48  # layers, heads, keys and values, F16; a cell
    monkeypatch.setattr(host, "total_memory_nbytes", lambda: 4096 * per_token)
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 1024 * per_token)
    with pytest.raises(ToolError, match=r"a context of 4097 tokens takes 0\.1 GiB") as caught:
        ChatModel(demo_gguf, context=4097, build=native)
    assert caught.value.hint.endswith("-c 2048")
    warnings = Warnings()
    ChatModel(demo_gguf, context=1025, build=native, progress=warnings).close()
    assert "only 0.0 GiB are free" in warnings.told.pop()
    ChatModel(demo_gguf, context=1024, build=native, progress=warnings).close()
    assert warnings.told == []


# The template.


def test_without_a_template_nothing_is_guessed(mute: Path, native: NativeBuild) -> None:
    with pytest.raises(UsageError, match=r"mute\.gguf has no chat template") as caught:
        ChatModel(mute, build=native)
    assert "--chat-template" in caught.value.hint


def test_a_template_can_be_given_by_name_or_as_a_file(
    mute: Path, model: ChatModel, native: NativeBuild, tmp_path: Path
) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief"}, *user("Hi")]
    file = tmp_path / "template.jinja"
    file.write_text(model.template, encoding="utf-8")
    for given in ("chatml", str(file)):
        with ChatModel(mute, chat_template=given, context=512, build=native) as loaded:
            assert loaded.prompt(messages) == model.prompt(messages)
            assert say(loaded, messages) == say(model, messages)


def test_an_unknown_template_names_those_there_are(mute: Path, native: NativeBuild) -> None:
    with pytest.raises(UsageError, match="'chatmll' is neither") as caught:
        ChatModel(mute, chat_template="chatmll", build=native)
    assert " chatml, " in caught.value.hint


# Files that cannot be talked to.


def test_a_truncated_file(demo_gguf: Path, native: NativeBuild, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with demo_gguf.open("rb") as whole:
        cut.write_bytes(whole.read(10_000_000))
    with pytest.raises(IntegrityError, match="truncated"):
        ChatModel(cut, build=native)


def test_no_file(native: NativeBuild, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no"):
        ChatModel(tmp_path / "none.gguf", build=native)


def test_an_architecture_that_llama_cpp_does_not_know(
    demo_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    strange = patched(
        demo_gguf,
        tmp_path / "strange.gguf",
        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0lyama",
    )
    with pytest.raises(ToolError, match=r"cannot load .*unknown model architecture: 'lyama'"):
        ChatModel(strange, build=native)


def test_parts_of_a_model(native: NativeBuild, tmp_path: Path) -> None:
    for number in range(2):
        writer = GGUFWriter(tmp_path / f"model-0000{number + 1}-of-00003.gguf", "llama")
        writer.add_uint16("split.count", 3)
        writer.add_uint16("split.no", number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(UsageError, match="later part") as caught:
        ChatModel(tmp_path / "model-00002-of-00003.gguf", build=native)
    assert "model-00001-of-00003.gguf" in caught.value.hint
    with pytest.raises(UsageError, match=r"missing: model-00003-of-00003\.gguf"):
        ChatModel(tmp_path / "model-00001-of-00003.gguf", build=native)
