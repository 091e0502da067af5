"""What a page holds: the conversation, the settings, and how fast answers came."""

import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ggufkit.serve.ui.endpoint import Piece

Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class Figures:
    """How an answer came about.

    Attributes:
        first_seconds: from the question to the first text; None if there was none.
        rest_seconds: from there to the end.
        tokens: length of the answer; roughly, if it did not come to its end.
        finish: why it ended: ``stop``, ``length`` or ``stopped`` (by the user).
    """

    first_seconds: float | None
    rest_seconds: float = 0.0
    tokens: int = 0
    finish: str = "stop"

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None if there is nothing to tell it from."""
        if self.tokens < 2 or self.rest_seconds <= 0:
            return None
        return (self.tokens - 1) / self.rest_seconds

    def told(self) -> str:
        """In words, for below the answer."""
        parts = []
        about = "about " if self.finish == "stopped" else ""
        if about:
            parts.append("stopped")
        if self.finish == "length":
            parts.append("cut off at the limit of tokens")
        if speed := self.tokens_per_second:
            parts.append(f"{about}{speed:.1f} tokens/s")
        if self.first_seconds is not None:
            parts.append(f"first token after {self.first_seconds:.2f} s")
        if self.tokens:
            parts.append(f"{about}{self.tokens} token{'' if self.tokens == 1 else 's'}")
        return " · ".join(parts)


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: who said it.
        text: what.
        figures: of an answer.
    """

    role: Role
    text: str
    figures: Figures | None = None


@dataclass(frozen=True)
class Settings:
    """What is asked of the model; None is the model's own recommendation.

    Attributes:
        model: its name; None as long as the models are not known.
        system: the system prompt; empty for none.
        temperature: how freely tokens are chosen.
        top_p: of the likeliest tokens, those that have this much together.
        top_k: so many of the likeliest tokens.
        min_p: tokens that are at least this likely beside the likeliest.
        max_tokens: length of an answer at most.
        seed: for the same answer again.
    """

    model: str | None = None
    system: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """As the endpoint takes them."""
        names = ("model", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class State:
    """All that a page holds.

    Attributes:
        turns: the conversation; question and answer take turns.
        settings: what is asked of the model.
        key: the API key; empty for none.
    """

    turns: tuple[Turn, ...] = ()
    settings: Settings = field(default_factory=Settings)
    key: str = ""

    def asked(self) -> dict[str, Any]:
        """The question to the endpoint."""
        messages = [{"role": turn.role, "content": turn.text} for turn in self.turns]
        if self.settings.system:
            messages.insert(0, {"role": "system", "content": self.settings.system})
        return {**self.settings.fields(), "messages": messages}

    def with_turn(self, turn: Turn) -> "State":
        """The same with another turn."""
        return replace(self, turns=(*self.turns, turn))

    @property
    def unanswered(self) -> bool:
        """Whether the last that was said is a question."""
        return bool(self.turns) and self.turns[-1].role == "user"

    def without_answer(self) -> "State":
        """The same without its last answer, if there is one."""
        return self if self.unanswered else replace(self, turns=self.turns[:-1])

    def without_question(self) -> "State":
        """The same without its last question, if that has no answer."""
        return replace(self, turns=self.turns[:-1]) if self.unanswered else self


class Memory:
    """What pages hold, by the browser tab, so that reloading one does not lose it.

    Args:
        most: tabs that are remembered; those longest unused make room.
    """

    def __init__(self, most: int = 100) -> None:
        self._most = most
        self._states: dict[str, State] = {}

    def get(self, tab: str) -> State:
        """What a tab holds; nothing yet, if it is not known."""
        return self._states.get(tab, State())

    def put(self, tab: str, state: State) -> None:
        """Remember it."""
        self._states.pop(tab, None)
        self._states[tab] = state
        while len(self._states) > self._most:
            del self._states[next(iter(self._states))]


class Writing:
    """An answer that is being written, and the clock beside it; it starts at once.

    Attributes:
        text: what there is of it.
        finish: why it has ended; empty while it goes on.
    """

    def __init__(self) -> None:
        self.text = ""
        self.finish = ""
        self._began = time.monotonic()
        self._first: float | None = None
        self._last = self._began
        self._pieces = 0
        self._tokens: int | None = None

    def take(self, piece: Piece) -> None:
        """Add what comes next."""
        self.finish = piece.finish or self.finish
        if piece.tokens is not None:
            self._tokens = piece.tokens
        elif piece.text:
            self.text += piece.text
            self._pieces += 1
            self._last = time.monotonic()
            self._first = self._first or self._last

    def figures(self) -> Figures:
        """How it came about."""
        return Figures(
            first_seconds=None if self._first is None else self._first - self._began,
            rest_seconds=self._last - (self._first or self._last),
            tokens=self._pieces if self._tokens is None else self._tokens,
            finish=self.finish or "stop",
        )
