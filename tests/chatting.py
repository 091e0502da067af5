"""What tests of chat share: a model that is no model, and files that cannot chat."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ggufkit.errors import UsageError
from ggufkit.llamacpp.template import Message
from ggufkit.serve.model import Sampling, Statistics


class FakeModel:
    """Answers with the next of its scripts, piece by piece; an exception is raised."""

    def __init__(self, *scripts: Sequence[str | BaseException]) -> None:
        self._scripts = list(scripts)
        self.path = Path("fake.gguf")
        self.asked: list[list[Message]] = []
        self.completed: list[str] = []
        self.sampling: list[Sampling] = []
        self.sees = False
        self.stopped = False
        self.closed = False
        self.statistics = Statistics(context=100)

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        self.asked.append(list(messages))
        return self._answer(sampling)

    def complete(self, text: str, sampling: Sampling) -> Iterator[str]:
        self.completed.append(text)
        return self._answer(sampling)

    def _answer(self, sampling: Sampling) -> Iterator[str]:
        self.sampling.append(sampling)
        self.statistics = Statistics(context=100)
        self.stopped = False
        try:
            for piece in self._scripts.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                self.statistics.generated_tokens += 1
                yield piece
                if self.stopped:
                    self.statistics.stopped = "interrupted"
                    return
            self.statistics.stopped = "end"
        except (KeyboardInterrupt, GeneratorExit):
            self.statistics.stopped = "interrupted"
            raise

    def look(self, path: Path) -> tuple[int, int]:
        if not self.sees:
            raise UsageError("it cannot see")
        return (4, 3)

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed = True


def patched(gguf: Path, out: Path, old: bytes, new: bytes) -> Path:
    """A copy of a GGUF in which one string of its header became another, as long."""
    assert len(old) == len(new)
    shutil.copyfile(gguf, out)
    with out.open("r+b") as file:
        header = file.read(8 << 20)
        assert header.count(old) == 1
        file.seek(header.index(old))
        file.write(new)
    return out


def splitting_by_regex(gguf: Path, out: Path) -> Path:
    """A copy of the demo model that splits text as Falcon does, by ``std::regex``."""
    # The byte after it is the length of the next key; the name stands elsewhere too.
    return patched(gguf, out, b"smollm\x15", b"falcon\x15")


def without_template(gguf: Path, out: Path) -> Path:
    """A copy of a GGUF that has no chat template."""
    return patched(gguf, out, b"tokenizer.chat_template", b"tokenizer.none_template")
