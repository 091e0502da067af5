from collections.abc import Callable

import pytest

from ggufkit.errors import GgufkitError
from ggufkit.llamacpp.runtime import Sampling, Statistics
from ggufkit.serve.chat import HELP, Conversation, answer, converse
from tests.chatting import FakeModel


class Recorder:
    """A writer that keeps what it was told."""

    def __init__(self, interrupt_after: str | None = None) -> None:
        self.told: list[tuple[str, object]] = []
        self._interrupt_after = interrupt_after

    def piece(self, text: str) -> None:
        self.told.append(("piece", text))
        if text == self._interrupt_after:
            raise KeyboardInterrupt

    def answered(self, prompt: str, answer: str, statistics: Statistics) -> None:
        self.told.append(("answered", (prompt, answer, statistics.stopped)))

    def say(self, text: str) -> None:
        self.told.append(("say", text))

    def failed(self, error: GgufkitError) -> None:
        self.told.append(("failed", error.message))


def reader(*lines: str) -> Callable[[], str | None]:
    left = iter(lines)
    return lambda: next(left, None)


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


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    conversation = Conversation(FakeModel(["one ", "two ", KeyboardInterrupt()], ["more"]))
    writer = Recorder()
    answer(conversation, "Count", writer)
    assert writer.told[-1] == ("answered", ("Count", "one two ", "interrupted"))
    assert roles(conversation) == [("user", "Count"), ("assistant", "one two ")]
    answer(conversation, "Go on", writer)
    assert roles(conversation)[2:] == [("user", "Go on"), ("assistant", "more")]


def test_an_interrupt_while_writing_ends_the_model_too() -> None:
    model = FakeModel(["one ", "two ", "three"])
    conversation = Conversation(model)
    writer = Recorder(interrupt_after="two ")
    answer(conversation, "Count", writer)
    assert model.statistics.stopped == "interrupted"
    assert roles(conversation)[1] == ("assistant", "one two ")
    assert writer.told[-1] == ("answered", ("Count", "one two ", "interrupted"))


def test_an_interrupt_before_the_first_piece_forgets_the_question() -> None:
    conversation = Conversation(FakeModel([KeyboardInterrupt()]))
    answer(conversation, "Count", Recorder())
    assert roles(conversation) == []


def test_a_failure_is_told_and_does_not_look_like_an_answer() -> None:
    conversation = Conversation(FakeModel([GgufkitError("too long")], ["fine"]))
    writer = Recorder()
    converse(conversation, reader("long", "short"), writer)
    assert writer.told == [
        ("failed", "too long"),
        ("piece", "fine"),
        ("answered", ("short", "fine", "end")),
    ]
    assert roles(conversation) == [("user", "short"), ("assistant", "fine")]


def test_a_failure_in_the_middle_shows_the_answer_so_far() -> None:
    writer = Recorder()
    answer(Conversation(FakeModel(["half", GgufkitError("full")])), "Hi", writer)
    assert writer.told == [
        ("piece", "half"),
        ("answered", ("Hi", "half", "")),
        ("failed", "full"),
    ]


def test_an_empty_answer_is_an_answer() -> None:
    writer = Recorder()
    answer(Conversation(FakeModel([])), "Hi", writer)
    assert writer.told == [("answered", ("Hi", "", "end"))]


@pytest.mark.parametrize("line", ["/exit", "  /exit\n", "/exit\r\n"])
def test_exit_ends_before_what_follows(line: str) -> None:
    model = FakeModel(["never"])
    converse(Conversation(model), reader(line, "Hi"), Recorder())
    assert model.asked == []


def test_reset_and_help_are_not_said_to_the_model() -> None:
    model = FakeModel(["Hello"], ["Hello again"])
    writer = Recorder()
    converse(Conversation(model), reader("Hi", "/reset", "/help", "Hi"), writer)
    assert [[m["content"] for m in asked] for asked in model.asked] == [["Hi"], ["Hi"]]
    assert ("say", HELP) in writer.told


def test_another_slash_word_is_a_message_and_an_empty_line_is_none() -> None:
    model = FakeModel(["a"], ["b"])
    converse(Conversation(model), reader("", " \n", "/usr/bin\n", "/EXIT"), Recorder())
    assert [asked[-1]["content"] for asked in model.asked] == ["/usr/bin", "/EXIT"]


def test_leaving_frees_the_model_also_after_an_error() -> None:
    model = FakeModel([])
    with pytest.raises(ZeroDivisionError), Conversation(model):
        raise ZeroDivisionError
    assert model.closed
