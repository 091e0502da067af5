"""Markdown that is drawn while it comes."""

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ggufkit.cli.markdown import THEME, StreamedMarkdown, split_finished
from ggufkit.cli.terminal import harmless

DOCUMENT = """# A guide

Some **bold text that
spans lines** and `code`.

<think>
Aside & more.
</think>

1. First
2. Second
   - nested

```python
{code}
```

| Name | Value |
|------|------:|
| a    |     1 |

Done: [here](https://example.org/path).
"""


def screen_of(text: str, *, pieces: list[str], height: int = 12, width: int = 60) -> list[str]:
    """Lines that a terminal shows in the end, scrolled away or not."""
    out = io.StringIO()
    console = Console(
        *(),
        file=out,
        force_terminal=True,
        width=width,
        height=height,
        theme=THEME,
        color_system=None,
    )
    assert "".join(pieces) == text
    with StreamedMarkdown(console, lambda: "STATUS") as view:
        view._due = -1.0
        for piece in pieces:
            view.feed(piece)
            view._due = -1.0  # draw each piece
    return shown(out.getvalue(), height)


def shown(output: str, height: int) -> list[str]:
    """What a terminal makes of the few control sequences that are used."""
    lines, row = [""], 0
    position = column = 0
    while position < len(output):
        if output.startswith("\x1b[", position):
            end = position + 2
            while not output[end].isalpha():
                end += 1
            code, letter = output[position + 2 : end], output[end]
            position = end + 1
            if letter == "A":
                row -= int(code or 1)
                assert row >= max(0, len(lines) - height), "drawn above the top of the screen"
            elif letter == "K":
                assert code == "2"
                lines[row] = ""
            elif letter == "m" or (letter in "hl" and code == "?25"):
                pass
            else:
                raise AssertionError(f"unexpected sequence {code}{letter}")
            continue
        character = output[position]
        position += 1
        if character == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif character == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def cut(text: str, seed: int) -> list[str]:
    chance, pieces = random.Random(seed), []
    while text:
        length = chance.randint(1, 9)
        pieces.append(text[:length])
        text = text[length:]
    return pieces


@pytest.mark.parametrize("length", [2, 40])
def test_all_is_shown_once_whatever_the_pieces(length: int) -> None:
    code = "\n".join(f"print({n})" for n in range(length))
    text = DOCUMENT.format(code=code)
    for seed in range(3):
        lines = screen_of(text, pieces=cut(text, seed))
        assert [line.strip() for line in lines if "print(" in line] == code.split("\n")
        for once in ("A guide", "<think>", "</think>", "First", "Second", "nested", "Name", "Done"):
            assert sum(once in line for line in lines) == 1, (once, lines)
        assert "spans lines and code." in lines  # a line break counts
        assert "Done: here (https://example.org/path)." in lines
        assert not any("STATUS" in line for line in lines)
        assert not any(
            a == b == c == "" for a, b, c in zip(lines, lines[1:], lines[2:], strict=False) if b
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "word ",
                "*",
                "**",
                "`",
                "```\n",
                "\n",
                "\n\n",
                "- ",
                "1. ",
                "# ",
                "> ",
                "|a|b|\n",
                "<b>",
            ]
        ),
        max_size=40,
    )
)
def test_no_text_breaks_it(pieces: list[str]) -> None:
    lines = screen_of("".join(pieces), pieces=pieces, height=6)
    assert sum(line.count("word") for line in lines) == pieces.count("word ")


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("", ""),
        ("one line", ""),
        ("para\n\nnext one", "para\n\n"),
        ("para\n\n- ", ""),  # too little to know what it will be
        ("- a\n- b\n", ""),
        ("- a\n\nafter it", "- a\n\n"),
        ("```\na\n\nb\n", ""),
        ("```\na\n```\nafter", "```\na\n```\n"),
        ("# Head\ntext below", "# Head\n"),
    ],
)
def test_what_is_finished(text: str, finished: str) -> None:
    assert split_finished(text) == (finished, text[len(finished) :])


def test_a_model_s_text_cannot_command_the_terminal() -> None:
    text = "a\x1b[2J\x07\x9b\x7fb\r\n\t\u3000\u00a0\U0001f469\u200d\U0001f680"
    assert harmless(text) == "a[2Jb\n\t\u3000\u00a0\U0001f469\u200d\U0001f680"
