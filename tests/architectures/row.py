"""What a recipe is made of, and the verdicts there can be."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Config = dict[str, Any]
Step = Callable[[Path], None]
"""Something done to a checkpoint after transformers has written it."""


class Kind(enum.Enum):
    """How a conversion can end."""

    OK = "ok"
    NEARLY = "nearly"
    """The same by verify's bounds, and yet further away than rounding takes it."""
    DIFFERS = "differs"
    REFUSED = "refused"
    UNUSABLE = "unusable"
    """llama.cpp cannot open or run what the converter wrote; nothing was published."""
    NOT_MADE = "not made"
    FAULT = "fault"
    """An exception that is none of ours, or a file that is published all the same."""


@dataclass(frozen=True)
class Verdict:
    """How a conversion ended.

    Attributes:
        kind: which of the ends.
        detail: what verify says, or the reason.
    """

    kind: Kind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.detail}" if self.detail else self.kind.value


@dataclass(frozen=True)
class Expected:
    """How a conversion is to end.

    Attributes:
        kind: which of the ends.
        says: words that the verdict's detail must have.
        because: what is known to differ: a key of the config, mostly.
    """

    kind: Kind
    says: tuple[str, ...] = ()
    because: str = ""

    def met_by(self, found: Verdict) -> bool:
        """Whether this is what was found."""
        return self.kind is found.kind and all(words in found.detail for words in self.says)

    def __str__(self) -> str:
        told = ", ".join(filter(None, (self.because, *self.says)))
        return f"{self.kind.value}: {told}" if told else self.kind.value


OK = Expected(Kind.OK)


def differs(because: str, *says: str) -> Expected:
    """The GGUF computes something else, and verify refuses it."""
    return Expected(Kind.DIFFERS, ("function", *says), because)


def nearly(because: str) -> Expected:
    """The GGUF computes something else, by less than verify minds."""
    return Expected(Kind.NEARLY, because=because)


def refused(why: str) -> Expected:
    """The converter, or what is done before it, gives up; ``why`` occurs in the reason."""
    return Expected(Kind.REFUSED, (why,))


@dataclass(frozen=True)
class Row:
    """One tiny checkpoint.

    Attributes:
        name: class of transformers that computes it, without what it ends in
            (``ForCausalLM``, or ``ForConditionalGeneration`` where there are ``parts``).
        config: what its config has beyond, or instead of, the common one; with
            ``parts``, the config of the part that writes. ``model_type`` chooses
            another class for it.
        tokenizer: one of ``vocabularies.KINDS``.
        steps: done to the files, in this order.
        parts: configs of the parts that do not write; None for a model of one part.
        top: further keys of a config with parts.
        factory: the row of ``tests.factory`` that makes it instead; ``config`` then
            holds options of ``make_checkpoint``.
        of: the row that this one is a variant of; config and steps are added to its own.
        expected: how its conversion is to end.
    """

    name: str = ""
    config: Config = field(default_factory=dict)
    tokenizer: str = "bpe"
    steps: tuple[Step, ...] = ()
    parts: dict[str, Config] | None = None
    top: Config = field(default_factory=dict)
    factory: str = ""
    of: str = ""
    expected: Expected = OK

    @property
    def class_name(self) -> str:
        """The class in full."""
        if self.name.endswith("Model"):
            return self.name
        return self.name + ("ForCausalLM" if self.parts is None else "ForConditionalGeneration")


def resolved(rows: dict[str, Row]) -> dict[str, Row]:
    """Variants as rows of their own."""

    def whole(row: Row) -> Row:
        if not row.of:
            return row
        base = whole(rows[row.of])
        return replace(
            base,
            config=base.config | row.config,
            steps=(*base.steps, *row.steps),
            expected=row.expected,
        )

    return {name: whole(row) for name, row in rows.items()}
