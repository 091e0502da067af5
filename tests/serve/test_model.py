"""One model for one conversation, on the demo model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFWriter

from ggufkit.errors import IntegrityError, SourceError, ToolError, UsageError
from ggufkit.llamacpp import devices
from ggufkit.llamacpp.batching import ContextOptions, ModelOptions
from ggufkit.llamacpp.conversing import NoTemplateError
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.runtime import ContextError
from ggufkit.llamacpp.template import Message
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Silent
from ggufkit.serve.model import ChatModel, Sampling, cache_nbytes
from tests.chatting import patched, without_template

GREEDY = Sampling(temperature=0, max_tokens=16)


class Warnings(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, message: str) -> None:
        self.told.append(message)


def room(context: int) -> ContextOptions:
    return ContextOptions(context=context)


@pytest.fixture(scope="module")
def model(demo_gguf: Path, native: NativeBuild) -> Iterator[ChatModel]:
    with ChatModel(demo_gguf, context=room(512), build=native) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def mute(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_template(demo_gguf, tmp_path_factory.mktemp("mute") / "mute.gguf")


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


FRANCE: list[Message] = [
    {"role": "system", "content": "You are a helpful assistant."},
    *user("What is the capital of France?"),
]


def say(model: ChatModel, messages: list[Message], sampling: Sampling = GREEDY) -> str:
    return "".join(model.stream(messages, sampling))


def test_layers_for_a_gpu_that_is_not_there_are_said(
    demo_gguf: Path, native: NativeBuild, model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "places_for_layers", lambda build, endpoints: ())
    for backend, message in (("cpu", "CPU-only build"), ("cuda", "is for cuda, but sees no")):
        warnings = Warnings()
        build = replace(native, backend=backend)
        options = ModelOptions(gpu_layers="all")
        with ChatModel(
            demo_gguf, options=options, context=room(64), build=build, progress=warnings
        ) as loaded:
            assert say(loaded, user("Hi"))
        assert len(warnings.told) == 1
        assert message in warnings.told[0]
        assert "-ngl changes nothing" in warnings.told[0]


def test_llama_cpp_is_silent(
    demo_gguf: Path, native: NativeBuild, capfd: pytest.CaptureFixture[str]
) -> None:
    with ChatModel(demo_gguf, context=room(64), build=native) as loaded:
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


def test_text_that_is_none_is_refused(model: ChatModel) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        say(model, user("caf\udce9"))


# Answering.


def test_an_answer_and_its_numbers(model: ChatModel) -> None:
    assert "Paris" in say(model, FRANCE, replace(GREEDY, max_tokens=64))
    told = model.statistics
    assert told.stopped == "end"
    assert 0 < told.generated_tokens < 64
    assert told.context == 512
    assert told.context_used == told.prompt_tokens + told.generated_tokens
    assert told.prompt_tokens == len(model.tokenize(model.prompt(FRANCE)))
    assert told.tokens_per_second == (told.generated_tokens - 1) / told.generate_seconds
    assert told.prompt_seconds > 0


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
    with ChatModel(demo_gguf, context=room(512), build=native) as fresh:
        assert say(fresh, second) == with_memory
        assert fresh.statistics.cached_tokens == 0
    # A conversation that begins otherwise must not see the one before.
    assert say(model, first) == answer


def test_the_seed_decides(model: ChatModel) -> None:
    hot = Sampling(temperature=1.5, top_k=0, top_p=1, min_p=0, max_tokens=12, seed=1)
    one = say(model, user("Tell me a story"), hot)
    assert say(model, user("Tell me a story"), hot) == one
    assert say(model, user("Tell me a story"), replace(hot, seed=2)) != one


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
    with ChatModel(demo_gguf, context=room(48), build=native) as small:
        pieces: list[str] = []
        with pytest.raises(ContextError, match="the answer filled the context of 48"):
            pieces.extend(small.stream(user("Tell me a story"), Sampling(temperature=0)))
        assert pieces
        assert small.statistics.context_used == small.context == 48
        assert small.statistics.stopped == "context"


# The template.


def test_without_a_template_nothing_is_guessed(mute: Path, native: NativeBuild) -> None:
    with pytest.raises(NoTemplateError, match=r"mute\.gguf has no chat template") as caught:
        ChatModel(mute, build=native)
    assert "--chat-template" in caught.value.hint


def test_a_template_can_be_given_by_name_or_as_a_file(
    mute: Path, model: ChatModel, native: NativeBuild, tmp_path: Path
) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief"}, *user("Hi")]
    file = tmp_path / "template.jinja"
    file.write_text(model.metadata.chat_template, encoding="utf-8")
    for given in ("chatml", str(file)):
        with ChatModel(mute, chat_template=given, context=room(512), build=native) as loaded:
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


# What llama.cpp can be asked for.


def test_a_text_is_gone_on_with(mute: Path, native: NativeBuild) -> None:
    with ChatModel(mute, context=room(64), template_needed=False, build=native) as loaded:
        assert not loaded.has_template
        text = "".join(loaded.complete("1, 2, 3, 4, 5,", replace(GREEDY, max_tokens=3)))
        assert text.startswith(" 6")
        assert "".join(loaded.complete("", replace(GREEDY, max_tokens=2)))
        with pytest.raises(UsageError, match="no chat template"):
            say(loaded, user("Hi"))
        assert loaded.statistics.stopped == ""


def test_a_stop_string_ends_the_answer(model: ChatModel) -> None:
    whole = say(model, FRANCE)
    assert "Paris" in whole
    stopped = say(model, FRANCE, replace(GREEDY, stop=("Paris",)))
    assert stopped == whole[: whole.index("Paris")]
    assert model.statistics.stopped == "end"


def test_an_answer_that_is_stopped_ends_by_itself(model: ChatModel) -> None:
    pieces: list[str] = []
    for piece in model.stream(user("Count from 1 to 1000."), Sampling(temperature=0)):
        pieces.append(piece)
        if len(pieces) == 3:
            model.stop()
    assert model.statistics.stopped == "interrupted"
    assert 3 <= model.statistics.generated_tokens < 500
    model.stop()  # nothing is being written: nothing happens
    assert say(model, user("Hi"))


def test_a_grammar_is_followed(model: ChatModel) -> None:
    asked = replace(GREEDY, grammar='root ::= "red" | "blue"')
    assert say(model, user("Name a colour"), asked) in ("red", "blue")
    with pytest.raises(UsageError, match="cannot read the grammar"):
        say(model, user("Name a colour"), replace(GREEDY, grammar="root ::= nothing"))
    assert say(model, user("Hi"))


def test_the_model_s_recommendation_counts_where_nothing_is_said(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Metadata, "sampling", property(lambda self: {"temperature": 0.3, "top_k": 7.0})
    )
    chosen = Sampling(top_k=9, presence_penalty=0.5).resolve(model.metadata)
    assert (chosen.temperature, chosen.top_k, chosen.presence_penalty) == (0.3, 9, 0.5)
    assert Sampling().resolve(model.metadata).top_k == 7
    assert isinstance(Sampling().resolve(model.metadata).top_k, int)
    assert Sampling().resolve().temperature == 0.8
    with pytest.raises(UsageError, match="top_p is nan"):
        Sampling(top_p=float("nan")).resolve()


def test_keys_and_values_can_be_smaller(
    model: ChatModel, demo_gguf: Path, native: NativeBuild
) -> None:
    small = ContextOptions(context=512, flash_attention="on", key_type="q8_0", value_type="q8_0")
    full = cache_nbytes(model.metadata, ContextOptions())
    assert full == 30 * 3 * (64 + 64) * 2
    assert cache_nbytes(model.metadata, small) == full * 34 / 32 / 2
    with ChatModel(demo_gguf, context=small, build=native) as loaded:
        assert "Paris" in say(loaded, FRANCE)


def test_a_lora_adapter_that_is_not_there(demo_gguf: Path, native: NativeBuild) -> None:
    options = ModelOptions(adapters={"none": Path("none.gguf")})
    with pytest.raises(UsageError, match=r"no LoRA adapter at none\.gguf"):
        ChatModel(demo_gguf, options=options, context=room(64), build=native)
