"""From the bytes of tokens to text that can be shown."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Text of one answer, let out as soon as it is sure.

    Bytes wait until they are whole characters, and text waits while it may be the
    beginning of a stop string.

    Args:
        stop: the stop strings, none of them empty.

    Attributes:
        stopped_by: the stop string that was met, if one was.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, piece: bytes) -> str:
        """Take the bytes of the next token; give what can be shown, maybe nothing."""
        text = self._decoder.decode(piece)
        return self._release(text) if self._stop else text

    def _release(self, text: str) -> str:
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            sure, self._held = self._held[:at], ""
            return sure
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - keep
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure

    def finish(self) -> str:
        """What was still held back; nothing after a stop string."""
        if self.stopped_by is not None:
            return ""
        rest = self._decoder.decode(b"", final=True)
        rest = self._release(rest) + self._held if self._stop else rest
        self._held = ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
