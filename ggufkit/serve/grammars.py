"""How much a grammar makes llama.cpp do before the first character.

llama.cpp follows all ways through a grammar at once, up to the next character
each. Repetitions of what may be empty multiply when they are nested: a line of
GBNF, such as ``((("x"?){100}){100}){100}``, fills any memory. So the ways are
counted before it sees them, by the rules of ``llama_grammar_advance_stack``.
"""

import re
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from ggufkit.errors import UsageError

MOST_WAYS = 4096
_MOST_STEPS = 500_000
"""Of counting; only a grammar that was made for it takes so many."""
_TOKEN = re.compile(
    r"""\s+ | \#[^\n]*
    | (?P<rule> [\w-]+ \s* ::=) | (?P<name> [\w-]+)
    | (?P<literal> "(?:\\.|[^"\\])*" | \[(?:\\.|[^\]\\])*\] | \. | !?<[^>\n]*>)
    | (?P<repeat> [*+?] | \{ \s* \d* \s* (?:,\s*\d*)? \s* \})
    | (?P<mark> [|()])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass
class _Item:
    """One element of a sequence.

    Attributes:
        rule: that it refers to; None for characters.
        empty: whether it is a literal without characters.
        least: how often it stands there at least.
        most: at most, as far as that multiplies ways.
    """

    rule: str | None = None
    empty: bool = False
    least: int = 1
    most: int = 1


_Rules = dict[str, list[list[_Item]]]
"""Alternatives of each rule, each a sequence. A group in parentheses is a rule too."""


def check_grammar(text: str) -> None:
    """See that a grammar (GBNF) can be followed.

    What this cannot read is left to llama.cpp to refuse.

    Raises:
        UsageError: if there are too many ways through it.
    """
    rules = _read(text)
    nullable = set[str]()
    ways: dict[str, int] = defaultdict(int)

    def find_nullable(name: str) -> bool:
        if name in nullable or not any(
            all(_may_be_empty(item, nullable) for item in sequence) for sequence in rules[name]
        ):
            return False
        nullable.add(name)
        return True

    def count_ways(name: str) -> bool:
        before = ways[name]
        counts = [_ways(sequence, ways, nullable) for sequence in rules[name]]
        ways[name] = sum(c[-1] for c in counts if c)
        if max(ways[name], *(max(c, default=0) for c in counts)) > MOST_WAYS:
            raise _too_many()
        return ways[name] > before

    _settle(rules, find_nullable)
    _settle(rules, count_ways)


def _too_many() -> UsageError:
    return UsageError(
        f"the grammar has more than {MOST_WAYS} ways to go on at one place",
        "Nest no repetitions of what may be empty",
    )


def _read(text: str) -> _Rules:
    rules: _Rules = {}
    groups: list[list[list[_Item]]] = [[[]]]
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            break
        at = found.end()
        sequence = groups[-1][-1]
        if found["rule"]:
            groups = [[[]]]
            rules[found["rule"][:-3].strip()] = groups[0]
        elif found["name"]:
            sequence.append(_Item(rule=found["name"]))
        elif found["literal"]:
            sequence.append(_Item(empty=found["literal"] == '""'))
        elif found["repeat"] and sequence:
            _repeat(sequence[-1], found["repeat"])
        elif found["mark"] == "(":
            name = f"({len(rules)}"
            rules[name] = [[]]
            sequence.append(_Item(rule=name))
            groups.append(rules[name])
        elif found["mark"] == "|":
            groups[-1].append([])
        elif found["mark"] == ")" and len(groups) > 1:
            groups.pop()
    return rules


def _repeat(item: _Item, sign: str) -> None:
    if sign in ("*", "?"):
        item.least = 0
    elif sign != "+":
        least, _, most = sign.strip("{} \t\r\n").partition(",")
        item.least = int(least or 0)
        item.most = max(item.least, int(most) if most.strip() else 1)


def _may_be_empty(item: _Item, nullable: set[str]) -> bool:
    return item.least == 0 or item.empty or item.rule in nullable


def _ways(sequence: list[_Item], ways: dict[str, int], nullable: set[str]) -> list[int]:
    """From each place of a sequence to the next characters, the last place first."""
    found, after = list[int](), 0
    for item in reversed(sequence):
        own = 1 + (ways[item.rule] if item.rule is not None else 1)
        # If one pass may be empty, the next one begins at the same place.
        if item.empty or item.rule in nullable:
            own *= max(1, item.most)
        after = own + (after if _may_be_empty(item, nullable) else 0)
        found.append(after)
    return found


def _settle(rules: _Rules, change: Callable[[str], bool]) -> None:
    """Apply a change to rules until none follows from another any more."""
    users: dict[str, set[str]] = defaultdict(set)
    for name, alternatives in rules.items():
        for sequence in alternatives:
            for item in sequence:
                if item.rule is not None:
                    users[item.rule].add(name)
    todo = deque(reversed(rules))
    waiting = set(todo)
    for _ in range(_MOST_STEPS):
        if not todo:
            return
        name = todo.popleft()
        waiting.discard(name)
        if change(name):
            more = users[name] - waiting
            todo.extend(more)
            waiting |= more
    raise _too_many()
