"""Cells of its own for each sequence that is computed; sequences that rest lie aside.

In one pool of cells, llama.cpp steps over the cells of all sequences for each
token of one, so every user pays for all others and for all that is remembered.
In a context with pools apart it looks at a sequence's own only. Such a pool is a
*lane* here. There may be more sequences than lanes: what a sequence that rests
held is copied into plain memory, and back into any lane when it is wanted again.
Keys and values are copied bit by bit, so nothing that is computed changes.

llama.cpp computes lanes together only if their numbers are consecutive; a gap
reads the weights once more. So lanes are chosen beside those in use, and when
the same sequences have been computed with gaps for a while, one is moved.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from ggufkit.errors import ToolError
from ggufkit.llamacpp.sampling import holding

_PATIENCE = 3
"""Batches with the same sequences and a gap before one of them is moved."""


@dataclass(frozen=True)
class _Aside:
    """What a sequence held; several sequences may begin with the same.

    Attributes:
        data: as llama.cpp writes it.
        stored: tokens in there.
        count: how many of them count.
    """

    data: "ctypes.Array[ctypes.c_uint8]"
    stored: int
    count: int


class Lanes:
    """Where sequences lie.

    Args:
        library: the binding.
        context: the context's pointer; it has ``count`` sequences with pools apart.
        count: lanes.
        limit: tokens that may lie aside before :attr:`full` says so.
    """

    def __init__(self, library: ModuleType, context: Any, count: int, limit: int) -> None:
        self._library = library
        self._context = context
        self._memory = library.llama_get_memory(context)
        self._remove = holding(library, "llama_memory_seq_rm")
        self._last = holding(library, "llama_memory_seq_pos_max")
        self._limit = limit
        self._holder: list[int | None] = [None] * count
        self._lane: dict[int, int] = {}
        self._aside: dict[int, _Aside] = {}
        self._used = [0] * count
        self._batches = 1
        self._now: set[int] = set()
        self._before: frozenset[int] = frozenset()
        self._repeats = 0

    @property
    def full(self) -> bool:
        """Whether more lies aside than may; something must be forgotten."""
        different = {id(aside.data): aside.stored for aside in self._aside.values()}
        return sum(different.values()) > self._limit

    def begin(self) -> None:
        """A batch begins. If the last ones had a gap that a move closes, close it."""
        now = frozenset(self._now)
        self._repeats = self._repeats + 1 if now == self._before else 0
        self._before = now
        self._now.clear()
        self._batches += 1
        if self._repeats >= _PATIENCE:
            move = _closing_move([self._lane[s] for s in now if s in self._lane], len(self._holder))
            if move is not None:
                self._move(*move)

    def rank(self, sequence: int) -> int:
        """Its lane, which llama.cpp wants in rising order; what lies aside comes last."""
        return self._lane.get(sequence, len(self._holder))

    def place(self, sequence: int) -> int:
        """The lane of a sequence that takes part in the batch; what it holds is there."""
        lane = self._lane.get(sequence)
        if lane is None:
            lane = self._choose()
            self._vacate(lane)
            self._settle(sequence, lane)
            if (aside := self._aside.pop(sequence, None)) is not None:
                self._load(lane, aside)
        self._now.add(sequence)
        self._used[lane] = self._batches
        return lane

    def forget(self, sequence: int, start: int = 0) -> bool:
        """Take back a sequence's tokens from a position on; False if it cannot."""
        lane = self._lane.get(sequence)
        if lane is not None:
            if start == 0:
                self._leave(sequence, lane)
            return bool(self._remove(self._memory, lane, start, -1))
        aside = self._aside.pop(sequence, None)
        if aside is not None and start > 0:
            self._aside[sequence] = replace(aside, count=min(aside.count, start))
        return True

    def copy(self, source: int, target: int, count: int) -> None:
        """Let an empty sequence begin with another's first tokens."""
        lane = self._lane.get(source)
        aside = self._aside[source] if lane is None else self._save(lane)
        self.forget(target)
        self._aside[target] = replace(aside, count=min(count, aside.count))

    def forget_all(self) -> None:
        """Empty all sequences."""
        self._library.llama_memory_clear(self._memory, False)
        self._holder = [None] * len(self._holder)
        self._lane.clear()
        self._aside.clear()

    # Lanes.

    def _choose(self) -> int:
        """A lane for one more: none of this batch, beside others if possible, best an empty one."""
        busy = {self._lane[s] for s in self._now}
        lately = {n for n, used in enumerate(self._used) if used >= self._batches - 1}
        beside = busy | {n for n in lately if self._holder[n] is not None}

        def cost(lane: int) -> tuple[bool, int, bool, int]:
            held = self._holder[lane] is not None
            neighbours = len({lane - 1, lane + 1} & beside)
            return held and lane in lately, -neighbours, held, self._used[lane] if held else lane

        return min((n for n in range(len(self._holder)) if n not in busy), key=cost)

    def _settle(self, sequence: int, lane: int) -> None:
        self._holder[lane], self._lane[sequence] = sequence, lane

    def _leave(self, sequence: int, lane: int) -> None:
        self._holder[lane] = None
        del self._lane[sequence]

    def _vacate(self, lane: int) -> None:
        """Put aside what lies in a lane."""
        sequence = self._holder[lane]
        if sequence is None:
            return
        if self._last(self._memory, lane) >= 0:
            self._aside[sequence] = self._save(lane)
            self._remove(self._memory, lane, 0, -1)
        self._leave(sequence, lane)

    def _move(self, lane: int, target: int) -> None:
        sequence = self._holder[lane]
        assert sequence is not None
        self._vacate(target)
        aside = self._save(lane)
        self._remove(self._memory, lane, 0, -1)
        self._leave(sequence, lane)
        self._settle(sequence, target)
        self._used[target] = self._batches
        self._load(target, aside)

    # Copies.

    def _save(self, lane: int) -> _Aside:
        lib, count = self._library, int(self._last(self._memory, lane)) + 1
        size = lib.llama_state_seq_get_size(self._context, lane)
        data = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data(self._context, data, size, lane) != size:
            raise ToolError("llama.cpp cannot copy what a sequence holds")
        return _Aside(data, count, count)

    def _load(self, lane: int, aside: _Aside) -> None:
        lib, size = self._library, len(aside.data)
        if lib.llama_state_seq_set_data(self._context, aside.data, size, lane) != size:
            raise ToolError("llama.cpp cannot take back what a sequence held")
        if aside.count < aside.stored:
            self._remove(self._memory, lane, aside.count, -1)


def _closing_move(lanes: Iterable[int], count: int) -> tuple[int, int] | None:
    """From which lane to which one should move so that fewer runs remain, in the end one.

    Args:
        lanes: those in use.
        count: how many there are.
    """
    runs = list[list[int]]()
    for lane in sorted(lanes):
        if runs and runs[-1][-1] == lane - 1:
            runs[-1].append(lane)
        else:
            runs.append([lane])
    if len(runs) < 2:
        return None
    longest = max(runs, key=len)
    target = longest[-1] + 1 if longest[-1] + 1 < count else longest[0] - 1
    smallest = min((run for run in runs if run is not longest), key=len)
    # The far end: the near one will be met by the growing run.
    return max(smallest, key=lambda lane: abs(lane - target)), target
