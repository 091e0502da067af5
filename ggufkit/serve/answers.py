"""Answers in a file: JSON Lines that one run at a time adds to."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from ggufkit import settings
from ggufkit.errors import DiskSpaceError, IntegrityError, UsageError
from ggufkit.store import canonical_json

_KEY_LENGTH = 16


def digest(value: Any) -> str:
    """A short name of a JSON value, which no other one has."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:_KEY_LENGTH]


class AnswerFile:
    """A file of answers.

    On entering, what an earlier run left is read: a last line without its end was
    torn by whatever killed that run, and answers that failed are asked for again.

    Args:
        path: the file; made if there is none.

    Attributes:
        known: ids and keys of the answers that are there.

    Raises:
        UsageError: if another run is writing it, or it cannot be written.
        IntegrityError: if it holds anything but answers; it is not touched then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str | int, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._stack.enter_context(_only_one(self.path))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._recover()
            self._file = self._stack.enter_context(self.path.open("ab", buffering=0))
        except OSError as error:
            self._stack.close()
            raise UsageError(f"{self.path} cannot be written: {error.strerror}") from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._stack.close()

    def append(self, answer: Mapping[str, Any]) -> None:
        """Add an answer. It is there even if the program is killed right after.

        Raises:
            DiskSpaceError: if it does not fit on the disk; nothing of it is left.
        """
        line = as_line(answer)
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
        except OSError:
            written = 0
        if written != len(line):
            self._file.truncate(before)
            raise DiskSpaceError(
                f"there is no room to write to {self.path}", "Make room, and run it again to go on"
            )

    def _recover(self) -> None:
        held = self.path.read_bytes() if self.path.exists() else b""
        whole = held[: held.rfind(b"\n") + 1]
        kept = []
        for number, line in enumerate(whole.splitlines(keepends=True), 1):
            row_id, key, failed = self._read(line, number)
            if not failed and row_id not in self.known:
                kept.append(line)
                self.known[row_id] = key
        if (wanted := b"".join(kept)) != held:
            self._replace(wanted)

    def _read(self, line: bytes, number: int) -> tuple[str | int, str, bool]:
        try:
            answer = json.loads(line)
            return answer["id"], answer["key"], answer["finish_reason"] == "error"
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{self.path}, line {number}: this is not an answer of ggufkit run",
                "Name another file with -o",
            ) from error

    def _replace(self, content: bytes) -> None:
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            scratch.write_bytes(content)
            os.replace(scratch, self.path)
        finally:
            scratch.unlink(missing_ok=True)


def as_line(answer: Mapping[str, Any]) -> bytes:
    """An answer as it stands in a file."""
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:_KEY_LENGTH]
    place = settings.cache_dir() / "locks"
    place.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(place / f"{name}.lock").acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"another run is writing {path}", "Wait for it, or name another file with -o"
        ) from error
    with lock:
        yield
