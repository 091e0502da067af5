from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ggufkit.errors import GgufkitError
from ggufkit.serve.chat import Conversation, Style
from ggufkit.serve.dialogue import HELP, answer, converse
from ggufkit.serve.model import Sampling, Statistics
from tests.chatting import FakeModel


class Recorder:
    """A writer that keeps what it was told."""

    def __init__(self, interrupt_after: str | None = None) -> None:
        self.told: list[tuple[str, object]] = []
        self._interrupt_after = interrupt_after

    @contextmanager
    def writing(self, stop: Callable[[], None]) -> Iterator[None]:
        self.stop = stop
        yield

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


@pytest.mark.parametrize("line", ["/exit", "/exit  \n", "/exit\r\n"])
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


def test_a_path_is_a_message_and_so_is_what_begins_with_a_space() -> None:
    model = FakeModel(["a"], ["b"], ["c"])
    lines = ("", " \n", "/usr/bin\n", " /reset\n", "/1 is one")
    converse(Conversation(model), reader(*lines), Recorder())
    assert [asked[-1]["content"] for asked in model.asked] == ["/usr/bin", "/reset", "/1 is one"]


def test_an_unknown_command_is_told() -> None:
    model, writer = FakeModel(), Recorder()
    converse(Conversation(model), reader("/regn", "/EXIT now"), writer)
    assert writer.told == [
        ("failed", "there is no command /regn"),
        ("failed", "there is no command /EXIT"),
    ]


def test_an_answer_is_stopped_from_outside() -> None:
    model, writer = FakeModel(["one ", "two ", "three"]), Recorder()
    conversation = Conversation(model)

    class Stopping(Recorder):
        def piece(self, text: str) -> None:
            super().piece(text)
            if text == "two ":
                self.stop()

    writer = Stopping()
    answer(conversation, "Count", writer)
    assert writer.told[-1] == ("answered", ("Count", "one two ", "interrupted"))
    assert roles(conversation)[1] == ("assistant", "one two ")


def test_regen_shows_another_answer() -> None:
    model, writer = FakeModel(["one"], ["two"]), Recorder()
    conversation = Conversation(model, sampling=Sampling(temperature=0))
    converse(conversation, reader("Hi", "/regen"), writer)
    assert writer.told[-1] == ("answered", ("Hi", "two", "end"))
    assert any("will be the same" in str(told) for kind, told in writer.told if kind == "say")
    assert roles(conversation) == [("user", "Hi"), ("assistant", "two")]


def test_regen_with_nothing_said() -> None:
    writer = Recorder()
    converse(Conversation(FakeModel()), reader("/regen"), writer)
    assert writer.told == [("failed", "nothing was said yet")]


def test_the_system_message_is_shown_and_changed() -> None:
    writer, conversation = Recorder(), Conversation(FakeModel(["a"]), system="Be brief")
    converse(conversation, reader("/system", "/system Be long", "Hi"), writer)
    assert writer.told[:2] == [
        ("say", "system message: Be brief"),
        ("say", "system message: Be long"),
    ]
    assert roles(conversation)[0] == ("system", "Be long")
    converse(conversation, reader('/system ""'), writer)
    assert writer.told[-1] == ("say", "there is no system message")
    assert conversation.system is None


def test_parameters_are_shown_and_changed() -> None:
    writer, conversation = Recorder(), Conversation(FakeModel())
    converse(
        conversation, reader("/params temp 0.2 --top-k 20 n 7", "/params temp default"), writer
    )
    assert conversation.sampling == Sampling(top_k=20, max_tokens=7)
    first, second = (
        dict(line.split() for line in str(told).split("\n")) for _, told in writer.told
    )
    assert (first["temp"], first["top-k"], first["n"]) == ("0.2", "20", "7")
    assert (second["temp"], second["top-k"], second["top-p"]) == ("default", "20", "default")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/params temp", "takes names and values"),
        ("/params heat 3", "no parameter 'heat'"),
        ("/params grammar x", "no parameter 'grammar'"),
        ("/params temp hot", "'hot' is not a number"),
        ("/params temp nan", "'nan' is not a number"),
        ("/params top-k 1.5", "'1.5' is not a whole number"),
        ("/params top-p 2", "top_p is 2.0"),
        ("/params n 0", "n must be at least 1"),
        ("/params temp '", "cannot read"),
    ],
)
def test_parameters_that_make_no_sense_change_nothing(line: str, message: str) -> None:
    writer, sampling = Recorder(), Sampling(temperature=0.5)
    conversation = Conversation(FakeModel(), sampling=sampling)
    converse(conversation, reader(line), writer)
    ((kind, told),) = writer.told
    assert kind == "failed"
    assert message in str(told)
    assert conversation.sampling == sampling


def test_conversations_are_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    writer = Recorder()
    converse(Conversation(FakeModel(["Hello"])), reader("Hi", f"/save {path}"), writer)
    assert writer.told[-1] == ("say", f"saved in {path}")
    conversation = Conversation(FakeModel(["Fine"]))
    conversation.model.path = Path("other.gguf")
    converse(conversation, reader(f"/load {path}", "How are you?"), writer)
    assert ("say", "loaded 2 messages, held with fake.gguf; this is other.gguf") in writer.told
    assert [content for _, content in roles(conversation)] == [
        "Hi",
        "Hello",
        "How are you?",
        "Fine",
    ]


@pytest.mark.parametrize("line", ["/save", "/load", "/load nowhere.json", "/image cat.png"])
def test_commands_that_cannot_be_obeyed(line: str) -> None:
    writer = Recorder()
    converse(Conversation(FakeModel()), reader(line), writer)
    assert [kind for kind, _ in writer.told] == ["failed"]


def test_spaces_and_empty_lines_count_in_a_completion() -> None:
    model = FakeModel(["a"], ["b"])
    converse(
        Conversation(model, style=Style(completion=True)), reader(" Once \n", "\n"), Recorder()
    )
    assert model.completed == [" Once ", " Once a"]
