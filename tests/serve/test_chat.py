import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufkit.errors import GgufkitError, IntegrityError, SourceError, UsageError
from ggufkit.serve.chat import Conversation, Style, read_conversation
from ggufkit.serve.model import Sampling
from tests.chatting import FakeModel


def roles(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in conversation.messages]


def test_history_grows_and_the_system_message_stays_first() -> None:
    model = FakeModel(["Hel", "lo"], ["Fine"])
    sampling = Sampling(temperature=0, max_tokens=5)
    conversation = Conversation(model, system="Be brief", sampling=sampling)
    assert list(conversation.ask("Hi")) == ["Hel", "lo"]
    assert list(conversation.ask("How are you?")) == ["Fine"]
    assert [m["content"] for m in model.asked[1]] == ["Be brief", "Hi", "Hello", "How are you?"]
    assert roles(conversation) == [
        ("system", "Be brief"),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "How are you?"),
        ("assistant", "Fine"),
    ]
    assert model.sampling == [sampling, sampling]


def test_an_empty_system_message_is_said_and_none_is_not() -> None:
    model = FakeModel(["a"], ["b"])
    list(Conversation(model, system="").ask("Hi"))
    list(Conversation(model).ask("Hi"))
    assert [[m["role"] for m in asked] for asked in model.asked] == [["system", "user"], ["user"]]


def test_reset_keeps_the_system_message_alone() -> None:
    conversation = Conversation(FakeModel(["Hello"]), system="Be brief")
    list(conversation.ask("Hi"))
    conversation.reset()
    assert roles(conversation) == [("system", "Be brief")]


def test_prefix_and_suffix_surround_each_message() -> None:
    model = FakeModel(["a"], ["b"])
    conversation = Conversation(model, style=Style(prefix="Q: ", suffix=" /short"))
    list(conversation.ask("Hi"))
    list(conversation.ask("Ho"))
    assert [m["content"] for m in model.asked[1]] == ["Q: Hi /short", "a", "Q: Ho /short"]


def test_a_completion_goes_on_with_all_the_text() -> None:
    model = FakeModel([" there", " was"], [" it"], ["!"])
    style = Style(completion=True, suffix="|")
    conversation = Conversation(model, system="Tale. ", style=style)
    assert "".join(conversation.ask("Once")) == " there was"
    list(conversation.ask(" upon"))
    list(conversation.ask(""))
    assert model.completed == [
        "Tale. Once|",
        "Tale. Once| there was upon|",
        "Tale. Once| there was upon| it|",
    ]
    assert model.asked == []


# Once more.


def test_an_answer_is_replaced_by_another() -> None:
    model = FakeModel(["one"], ["two"], ["three"])
    conversation = Conversation(model, sampling=Sampling(seed=5))
    list(conversation.ask("Hi"))
    assert list(conversation.again()) == ["two"]
    assert list(conversation.again()) == ["three"]
    assert roles(conversation) == [("user", "Hi"), ("assistant", "three")]
    assert [[m["content"] for m in asked] for asked in model.asked] == [["Hi"]] * 3
    assert [s.seed for s in model.sampling] == [5, 6, 7]


def test_another_message_begins_with_the_seed_again() -> None:
    model = FakeModel(["one"], ["two"], ["three"])
    conversation = Conversation(model, sampling=Sampling(seed=0xFFFFFFFE))
    list(conversation.ask("Hi"))
    list(conversation.again())
    list(conversation.ask("Ho"))
    assert [s.seed for s in model.sampling] == [0xFFFFFFFE, 0, 0xFFFFFFFE]


def test_the_old_answer_stays_if_no_new_one_comes() -> None:
    conversation = Conversation(FakeModel(["one"], [GgufkitError("broken")]))
    list(conversation.ask("Hi"))
    with pytest.raises(GgufkitError, match="broken"):
        list(conversation.again())
    assert roles(conversation) == [("user", "Hi"), ("assistant", "one")]


def test_nothing_can_be_answered_again_before_something_was_asked() -> None:
    with pytest.raises(UsageError, match="nothing was said"):
        Conversation(FakeModel()).again()


# Files.


def held(*, system: str | None = "Be brief", **given: Any) -> Conversation:
    model = FakeModel(["Gr\u00fc\u00df dich\n"])
    conversation = Conversation(model, system=system, **given)
    list(conversation.ask("Sag hallo \U0001f600"))
    return conversation


def test_a_conversation_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "talk.json"
    sampling = Sampling(temperature=0.2, top_k=3, seed=1, stop=("x", "y"), max_tokens=9)
    before = held(sampling=sampling, style=Style(prefix="> "))
    before.save(path)
    after = Conversation(FakeModel(["next"]))
    assert after.load(path) == "fake.gguf"
    assert after.messages == before.messages
    assert (after.sampling, after.style) == (sampling, before.style)
    list(after.ask("More"))
    assert roles(after)[-2:] == [("user", "> More"), ("assistant", "next")]
    assert [p.name for p in path.parent.iterdir()] == ["talk.json"]


@given(
    st.lists(st.tuples(st.text(), st.text()), max_size=3),
    st.none() | st.text(),
    st.floats(0, 5) | st.none(),
)
def test_every_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    turns: list[tuple[str, str]],
    system: str | None,
    temperature: float | None,
) -> None:
    path = tmp_path_factory.mktemp("talk") / "talk.json"
    sampling = Sampling(temperature=temperature)
    conversation = Conversation(FakeModel(), system=system, sampling=sampling)
    for question, answer in turns:
        conversation.history += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    conversation.save(path)
    saved = read_conversation(path)
    assert (saved.system, saved.history) == (system, conversation.history)
    assert saved.sampling == sampling


def test_saving_replaces_a_conversation_and_nothing_else(tmp_path: Path) -> None:
    path, other = tmp_path / "talk.json", tmp_path / "model.gguf"
    held().save(path)
    held(system="New").save(path)
    assert read_conversation(path).system == "New"
    other.write_bytes(b"GGUF weights")
    with pytest.raises(UsageError, match="exists and is not a conversation"):
        held().save(other)
    assert other.read_bytes() == b"GGUF weights"
    with pytest.raises(UsageError, match="exists and is not a conversation"):
        held().save(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        held().save(path / "below.json")


def _change(raw: dict[str, Any], *place: str | int, to: object) -> None:
    *way, last = place
    for step in way:
        raw = raw[step]  # type: ignore[index]
    raw[last] = to  # type: ignore[index]


@pytest.mark.parametrize(
    ("place", "to"),
    [
        (("format",), "something else"),
        (("version",), 2),
        (("messages",), {}),
        (("messages", 0, "role"), "assistant"),
        (("messages", 1, "content"), None),
        (("messages", 0), "Hi"),
        (("system",), 3),
        (("system",), "\ud83d"),
        (("sampling", "temperature"), -1),
        (("sampling", "temperature"), "hot"),
        (("sampling", "stop"), 7),
        (("sampling", "unknown"), 7),
        (("sampling",), None),
        (("style", "completion"), 1),
        (("style", "prefix"), None),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(
    tmp_path: Path, place: tuple[str | int, ...], to: object
) -> None:
    path = tmp_path / "talk.json"
    held().save(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    _change(raw, *place, to=to)
    path.write_text(json.dumps(raw), encoding="utf-8")
    conversation = held(system=None)
    before = (conversation.messages, conversation.sampling, conversation.style)
    with pytest.raises(IntegrityError, match="is not a conversation"):
        conversation.load(path)
    assert (conversation.messages, conversation.sampling, conversation.style) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"3"])
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        held().load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        held().load(tmp_path / "none.json")


def test_a_completion_is_not_gone_on_with_as_a_chat(tmp_path: Path) -> None:
    held(style=Style(completion=True)).save(tmp_path / "text.json")
    with pytest.raises(UsageError, match="is a completion, and this is a chat"):
        held().load(tmp_path / "text.json")


def test_leaving_frees_the_model_also_after_an_error() -> None:
    model = FakeModel([])
    with pytest.raises(ZeroDivisionError), Conversation(model):
        raise ZeroDivisionError
    assert model.closed
