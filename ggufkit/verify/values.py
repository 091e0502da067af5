"""What a verification finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ggufkit.errors import GgufkitError
from ggufkit.values import Json, to_json

NAMES = (
    "tokens",
    "unusual-text",
    "vocabulary",
    "token-kinds",
    "begin-end",
    "end-tokens",
    "template",
    "tensors",
    "function",
    "window",
)
"""What can differ; ``--allow-difference`` takes these names."""


class DifferenceError(GgufkitError):
    """A GGUF that is not the checkpoint that it was made from."""


@dataclass(frozen=True)
class Mismatch:
    """One difference between a GGUF and its checkpoint.

    Attributes:
        name: one of :data:`NAMES`.
        error: whether it changes answers to ordinary text; else it is a warning.
        message: what differs, with an example.
    """

    name: str
    error: bool
    message: str


@dataclass(frozen=True)
class Verification:
    """A GGUF compared with its checkpoint.

    Attributes:
        gguf: the file.
        against: the checkpoint; empty if there was none and the file was only opened.
        mismatches: what differs, errors first.
        allowed: names of errors that were allowed.
        figures: what was compared, in numbers: lines, conversations, positions,
            ``kl_mean`` and ``kl_max`` in nats with their bounds.
        not_compared: what could not be compared, and why.
        exact: whether the GGUF holds floats, so that its predictions must be the checkpoint's.
        seconds: wall time.
    """

    gguf: Path
    against: str
    mismatches: tuple[Mismatch, ...] = ()
    allowed: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    not_compared: tuple[str, ...] = ()
    exact: bool = True
    seconds: float = 0.0

    @property
    def errors(self) -> tuple[Mismatch, ...]:
        """Differences that change ordinary answers and were not allowed."""
        return tuple(m for m in self.mismatches if m.error and m.name not in self.allowed)

    @property
    def warnings(self) -> tuple[Mismatch, ...]:
        """All other differences."""
        return tuple(m for m in self.mismatches if m not in self.errors)

    @property
    def facts(self) -> dict[str, Json]:
        """What a manifest keeps of it."""
        return {
            "against": self.against,
            "mismatches": to_json(self.mismatches),
            "allowed": list(self.allowed),
            "figures": dict(self.figures),
            "not_compared": list(self.not_compared),
            "seconds": round(self.seconds, 2),
        }

    def require_same(self) -> None:
        """Refuse a GGUF that is another model.

        Raises:
            DifferenceError: if there are errors; names all of them.
        """
        if not self.errors:
            return
        names = sorted({m.name for m in self.errors})
        options = " ".join(f"--allow-difference {name}" for name in names)
        raise DifferenceError(
            f"{self.gguf.name} differs from the checkpoint {self.against}:\n"
            + "\n".join(f"  {m.name}: {m.message}" for m in self.errors),
            f"Nothing was published. If you can live with it: {options}",
        )


def notes_of(facts: Mapping[str, Json]) -> tuple[str, ...]:
    """The lines that a user reads of a verification in a manifest's facts."""
    found = facts.get("verification")
    if found is None:
        return ()
    if found == "skipped":
        return ("not compared with the checkpoint: --no-verify",)
    notes = [
        f"warning: {m['name']}: {m['message']}"
        + (" (allowed)" if m["name"] in found["allowed"] else "")
        for m in found["mismatches"]
    ]
    notes += [f"not compared: {reason}" for reason in found["not_compared"]]
    figures = found["figures"]
    compared = [
        f"{figures[key]:.0f} {words}"
        for key, words in (
            ("lines", "lines of text"),
            ("conversations", "conversations"),
            ("positions", "predictions"),
        )
        if figures.get(key)
    ]
    if "kl_mean" in figures:
        compared[-1] += f" (KL {figures['kl_mean']:.1e}, at most {figures['kl_max']:.1e})"
    if compared:
        notes.append(f"compared with the checkpoint: {', '.join(compared)}")
    return tuple(notes)
