from collections.abc import Iterator, Sequence

import pytest

from ggufkit.errors import GgufkitError
from ggufkit.llamacpp.runtime import ContextError, Sampling, Statistics
from ggufkit.llamacpp.template import Message
from ggufkit.serve.chat import HELP, Conversation, converse


class Parrot:
    """Says a message back word by word; fails or is interrupted when told so."""

    def __init__(self) -> None:
        self.statistics = Statistics(context=8)
        self.seen: list[list[Message]] = []
        self.closed = False

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        self.seen.append([*messages])
        self.statistics = Statistics(context=8, stopped="end")
        for word in messages[-1]["content"].split():
            if word == "INTERRUPT":
                raise KeyboardInterrupt
            if word == "FAIL":
                raise ContextError("full", "/reset")
            yield f"{word} "

    def close(self) -> None:
        self.closed = True


class Record:
    def __init__(self, interrupt_at: str = "") -> None:
        self.events: list[tuple[str, ...]] = []
        self._interrupt_at = interrupt_at

    def piece(self, text: str) -> None:
        self.events.append(("piece", text))
        if text.strip() == self._interrupt_at:
            raise KeyboardInterrupt

    def answered(self, prompt: str, answer: str, statistics: Statistics) -> None:
        self.events.append(("answered", prompt, answer))

    def say(self, text: str) -> None:
        self.events.append(("say", text))

    def failed(self, error: GgufkitError) -> None:
        self.events.append(("failed", error.message))


def run(
    lines: list[str], writer: Record | None = None, system: str | None = None
) -> tuple[Parrot, Conversation, Record]:
    model, writer = Parrot(), writer or Record()
    conversation = Conversation(model, system=system)
    reader = iter(lines)
    converse(conversation, lambda: next(reader, None), writer)
    return model, conversation, writer


def test_history_grows_and_keeps_the_system_message() -> None:
    model, conversation, writer = run(["one two\n", "\n", "three"], system="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    assert model.seen[1] == [
        system,
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "one two "},
        {"role": "user", "content": "three"},
    ]
    assert len(conversation.messages) == 5
    assert writer.events == [
        ("piece", "one "),
        ("piece", "two "),
        ("answered", "one two", "one two "),
        ("piece", "three "),
        ("answered", "three", "three "),
    ]


def test_exit_ends_and_leaves_the_rest_unread() -> None:
    model, _, _ = run(["one", " /exit ", "two"])
    assert [messages[-1]["content"] for messages in model.seen] == ["one"]


def test_reset_forgets_all_but_the_system_message() -> None:
    model, _, writer = run(["one", "/reset", "two"], system="S")
    assert [m["content"] for m in model.seen[-1]] == ["S", "two"]
    assert ("say", "the conversation begins anew") in writer.events


def test_help_is_said_and_other_slash_words_are_messages() -> None:
    model, _, writer = run(["/help", "/etc/passwd"])
    assert writer.events[0] == ("say", HELP)
    assert [m["content"] for m in model.seen[0]] == ["/etc/passwd"]


@pytest.mark.parametrize(
    ("line", "interrupt_at"), [("one INTERRUPT two", ""), ("one two three", "one")]
)
def test_an_interrupted_answer_stays_as_far_as_it_came(line: str, interrupt_at: str) -> None:
    model, _, writer = run([line, "next"], Record(interrupt_at))
    assert ("answered", line, "one ") in writer.events
    assert [m["content"] for m in model.seen[1]] == [line, "one ", "next"]


def test_a_question_interrupted_before_any_answer_is_forgotten() -> None:
    model, _, _ = run(["INTERRUPT", "next"])
    assert [m["content"] for m in model.seen[1]] == ["next"]


def test_a_failure_is_told_and_what_came_before_it_is_kept() -> None:
    model, _, writer = run(["one FAIL", "FAIL", "next"])
    assert writer.events[:3] == [
        ("piece", "one "),
        ("answered", "one FAIL", "one "),
        ("failed", "full"),
    ]
    assert writer.events[3] == ("failed", "full")
    assert [m["content"] for m in model.seen[2]] == ["one FAIL", "one ", "next"]


def test_closing_frees_the_model() -> None:
    model = Parrot()
    with Conversation(model):
        assert not model.closed
    assert model.closed
