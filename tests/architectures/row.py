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
    DIFFERS = "differs"
    REFUSED = "refused"
    NOT_LOADED = "cannot be loaded"
    CRASHED = "crashed"
    NOT_MADE = "not made"


@dataclass(frozen=True)
class Verdict:
    """How a conversion ended, or is expected to end.

    Attributes:
        kind: which of the ends.
        detail: names of what differs, or words of the reason; of an expected
            verdict, what must occur in the reason.
    """

    kind: Kind
    detail: str = ""

    def covers(self, found: "Verdict") -> bool:
        """Whether this, as an expectation, is met by what was found."""
        if self.kind is Kind.DIFFERS:  # names come with verify
            return found.kind is self.kind
        return self.kind is found.kind and self.detail in found.detail

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.detail}" if self.detail else self.kind.value


OK = Verdict(Kind.OK)
NOT_LOADED = Verdict(Kind.NOT_LOADED)
CRASHED = Verdict(Kind.CRASHED)


def differs(why: str) -> Verdict:
    """The GGUF computes something else; ``why`` is for people."""
    return Verdict(Kind.DIFFERS, why)


def refused(why: str) -> Verdict:
    """Nothing is published; ``why`` occurs in the reason."""
    return Verdict(Kind.REFUSED, why)


@dataclass(frozen=True)
class Row:
    """One tiny checkpoint.

    Attributes:
        name: class of transformers that computes it, without what it ends in
            (``ForCausalLM``, or ``ForConditionalGeneration`` where there are ``parts``).
        config: what its config has beyond, or instead of, the common one; with
            ``parts``, the config of the part that writes. ``model_type`` chooses
            another class for it.
        tokenizer: ``bpe`` (byte-level) or ``spm`` (SentencePiece).
        steps: done to the files, in this order.
        parts: configs of the parts that do not write; None for a model of one part.
        top: further keys of a config with parts.
        factory: the row of ``tests.factory`` that makes it instead; ``config`` then
            holds options of ``make_checkpoint``.
        of: the row that this one is a variant of; config and steps are added to its own.
        expected: the verdict.
    """

    name: str = ""
    config: Config = field(default_factory=dict)
    tokenizer: str = "bpe"
    steps: tuple[Step, ...] = ()
    parts: dict[str, Config] | None = None
    top: Config = field(default_factory=dict)
    factory: str = ""
    of: str = ""
    expected: Verdict = OK

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
