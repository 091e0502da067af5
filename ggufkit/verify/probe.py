"""What a checkpoint and its GGUF are both given, so that their answers can be compared."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ggufkit.values import Json

PLAIN = (
    "A grey heron waited by the pond until the frogs had gone to sleep.",
    "Hedgehogs sleep under leaves in winter; they don't like it, and we'll see they're fine.",
    "I'm sure it's what you'd've said: \"Isn't that SHE'S?\" 'Tis so.",
    "trailing space ",
    "two  spaces,   three,    four",
    "tabs\tand\t\ttwo of them",
    "lines\nand lines\n\nand a blank one\n\n\nand two",
    "Windows\r\nlines\r\n",
    "Numbers: 7 42 128 2026 31415926535 1,234,567.89 -5 +3 1e-9 0x1F 3/4 50%",
    "2026-11-28T21:58:43Z 192.168.0.1 +49 (0)30 901820",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # r^2\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] << 2; }\n\treturn sum;",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '{"key": [1, 2.5, null, true], "text": "a\\nb"}',
    "<html><body class='x'>&amp; &lt;</body></html>",
    "$E = mc^2$, \\frac{a}{b} \\in \\mathbb{R}",
    "https://example.org/path?query=1&other=a%20b#part user@example.org",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
    "Größere Igel schlafen früher ein, heißt es über Gärten in Köln.",
    "Où est l'élève ? Ça dépend, naïveté, cœur.",
    "El niño comió piñas mañana ¿verdad? ¡Sí!",
    "Jeże śpią pod liśćmi; ćma źle leży. Ježci spí pod listím, říká děd.",
    "İzmir'de hava güneşli, ağaçlar yeşil. Hôm nay trời đẹp quá.",
    "Ёжик спит под листьями, а зимой его будить нельзя.",
    "Ο σκαντζόχοιρος κοιμάται κάτω από τα φύλλα.",
    "刺猬冬天睡在树叶下面，我们今天学习中文。繁體字也要試。",
    "はりねずみは冬に眠る。カタカナと漢字も。",
    "고슴도치는 겨울에 낙엽 밑에서 잔다.",
    "ينام القنفذ تحت أوراق الشجر في الشتاء",
    "הקיפוד ישן מתחת לעלים בחורף",
    "सर्दियों में साही पत्तों के नीचे सोता है।",
    "เม่นนอนหลับใต้ใบไม้ในฤดูหนาว",
    "ქართული ენა. Հայերեն լեզու.",
    "mixed 中文 and English, русский и 日本語 2026年",
    "—dashes– “quotes” ‘single’ … € £ ¥ © ® ™ ° ± × ÷",
    "∀x ∈ ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → γ ≤ ∞",
    "aaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "!!! ??? ... --- === *** ((([[[{{{ }}}]]])))",
    "a",
    "A",
    "\n",
)
"""Text as people write it. Other tokens here change every answer."""

BLANK = (" leading space, trailing space ", " a", " ", "  two", " \n")
"""Text that begins with a blank: tokenizers that put one in front disagree on a second."""

RARE = (
    "e\u0301 o\u0308 decomposed",
    "a\u200db zero width joiner",
    "\u00a0no-break\u00a0space",
    "\u3000ideographic space\u2028separator",
    "\U0001f469\U0001f3fd\u200d\U0001f680 \U0001f1e9\U0001f1ea \U0001f600",
    "\U0001d400\U0001d401 \ufb01ne \u2460 \uff21\uff22 full width",
    "\u13a0\u13a1 \U00010330\U00010331 \ua000",
    "soft\u00adhyphen \ufeffmark",
    "\u0001control\u007f",
    "trailing newlines\n\n\n\n",
    "x" * 300,
    "forty                                        spaces",
)
"""Characters that most texts never have, and lengths that few words have."""

CONTROL, ADDED = "control", "added"
_NEIGHBOURS = ("{}", "a{}b", "a {} b", " {}", "{} ", "{0}{0}", "{}\n", "Hi.{}\n{}user")
_MANY_ADDED = 120
"""Added tokens that are tried at most; models reserve thousands that are alike."""


@dataclass(frozen=True)
class Conversation:
    """A conversation to be rendered by a chat template.

    Attributes:
        name: what is special about it.
        messages: its turns.
        tools: functions that the model may call.
        other: the same turns in another form, which templates may want instead.
    """

    name: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    other: Sequence[dict[str, Any]] | None = None

    @property
    def forms(self) -> list[list[dict[str, Any]]]:
        """The turns in every form; a template may make sense of one alone."""
        forms = [list(self.messages), *([list(self.other)] if self.other else [])]
        # Templates of models that see want all content as parts.
        return forms + [[_in_parts(m) for m in form] for form in forms]


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return message | {"content": _parts(content)} if isinstance(content, str) else message


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def plain_conversations() -> list[Json]:
    """The conversations as a client sends them, as values of JSON."""
    return [{"messages": list(c.messages), "tools": c.tools} for c in CONVERSATIONS]


_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["town"],
        },
    },
}
_CALL: dict[str, Any] = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"town": "Köln", "days": 2}},
}
_CALL_AS_TEXT = {
    **_CALL,
    "function": {"name": "weather", "arguments": json.dumps(_CALL["function"]["arguments"])},
}


def _called(call: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "The weather in Köln?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": "rain"},
    ]


_USER = {"role": "user", "content": "Where do hedgehogs sleep?"}
_ASSISTANT = {"role": "assistant", "content": "Under leaves."}
_SYSTEM = {"role": "system", "content": "You are terse."}

CONVERSATIONS = (
    Conversation("one turn", [_USER]),
    Conversation("system", [_SYSTEM, _USER]),
    Conversation("turns", [_USER, _ASSISTANT, {"role": "user", "content": " And in\nsummer? "}]),
    Conversation(
        "system and turns",
        [_SYSTEM, _USER, _ASSISTANT, {"role": "user", "content": "Why?"}],
    ),
    Conversation(
        "parts",
        [{"role": "user", "content": _parts("Hello")}],
        other=[{"role": "user", "content": "Hello"}],
    ),
    Conversation("tools", [_USER], [_TOOL]),
    Conversation(
        "a call and its result",
        _called(_CALL),
        [_TOOL],
        other=_called(_CALL_AS_TEXT),
    ),
    Conversation(
        "reasoning",
        [_USER, {**_ASSISTANT, "reasoning_content": "Leaves are warm."}, _USER],
    ),
)


def added_lines(added: Iterable[Json]) -> list[tuple[str, str]]:
    """Lines that hold each added token with neighbours: what kind of token, and the line.

    Of many that are alike, such as reserved ones, only some are tried.

    Args:
        added: ``content`` and ``special`` of each.
    """
    tokens = list(added)
    step = max(1, len(tokens) // _MANY_ADDED)
    chosen = [*tokens[:16], *tokens[16::step]]
    return [
        (CONTROL if token["special"] else ADDED, form.format(*[token["content"]] * 2))
        for number, token in enumerate(chosen)
        for form in (_NEIGHBOURS if number < 16 else _NEIGHBOURS[1:2])
    ]


def normalized_lines(normalizer: Json) -> list[str]:
    """Lines that hold what a tokenizer replaces in a text, which the GGUF has to do, too."""
    found: list[str] = []
    todo = [normalizer]
    while todo:
        part = todo.pop()
        if not isinstance(part, dict):
            continue
        todo += part.get("normalizers") or []
        pattern = (part.get("pattern") or {}).get("String")
        if part.get("type") == "Replace" and isinstance(pattern, str) and pattern.strip():
            found.append(f"before {pattern} and {pattern}behind")
    return found


def passage() -> str:
    """A text of some 3,000 characters for predictions: prose, code, numbers, scripts."""
    return " ".join(line.strip() for line in (*PLAIN[:36], *reversed(PLAIN[:36])))


_LENGTH, _SHORTEST = 64, 24
_PARAMETERS_READ = 4e10
"""Parameters times tokens that a probe without a window comes to at most, so that it stays
a small share of a conversion."""
_POSITIONS = 48
_AFTER_WINDOW = 24
_OPERATIONS = 3e11
"""Parameters times tokens that are affordable for a look beyond a sliding window: some
seconds of two cores."""


def probe_length(config: Json, parameters: int, longest: int) -> int:
    """Tokens of the passage that predictions are compared on.

    More than the sliding window where the model has one and it is affordable.

    Args:
        config: the checkpoint's ``config.json``.
        parameters: of the model.
        longest: positions that the model knows.
    """
    window = sliding_window(config)
    wanted = max(_SHORTEST, min(_LENGTH, int(_PARAMETERS_READ / max(1, parameters))))
    if window and window + _AFTER_WINDOW > wanted:
        beyond = window + _AFTER_WINDOW
        wanted = beyond if beyond * parameters <= _OPERATIONS else wanted
    return min(wanted, longest)


def sliding_window(config: Json) -> int | None:
    """Tokens that the attention of some layers reaches back; None if all of them."""
    text = {**config, **(config.get("text_config") or {})}
    window = text.get("sliding_window")
    if not isinstance(window, int) or text.get("use_sliding_window") is False:
        return None
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and not any("sliding" in str(kind) for kind in kinds):
        return None
    return window


def probe_positions(length: int) -> list[int]:
    """Positions of a passage of so many tokens whose predictions are compared."""
    if length <= _LENGTH:
        return list(range(length - min(_POSITIONS, 3 * length // 4), length))
    half = _POSITIONS // 2
    early = range(_LENGTH // 2 - half // 2, _LENGTH // 2 + half // 2)
    return [*early, *range(length - half, length)]
