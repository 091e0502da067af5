"""One message of the conversation as it is seen."""

import asyncio
import json
from collections.abc import Callable

from nicegui import ui

from ggufkit.serve.ui.conversation import Figures
from ggufkit.serve.ui.markdown import to_html


def show_question(text: str) -> None:
    """What the user said, as typed."""
    with ui.element("div").classes("question"):
        ui.label(text)


class AnswerView:
    """What the model says.

    Args:
        on_again: called when another answer is wanted.
    """

    def __init__(self, on_again: Callable[[], object]) -> None:
        self._text = ""
        self._on_again = on_again
        with ui.element("article").classes("answer") as self.whole:
            self._waiting = ui.element("div").classes("waiting").props('aria-label="waiting"')
            with self._waiting:
                for _ in range(3):
                    ui.element("i")
            self._body = ui.html("").classes("text")
            self._notice = ui.element("div").classes("notice").props('role="alert"')
            self._below = ui.element("div").classes("below")
        self._notice.set_visibility(False)
        self._below.set_visibility(False)

    async def show(self, text: str, *, colours: bool = False) -> None:
        """Show the answer as far as it has come.

        Args:
            text: Markdown.
            colours: whether code gets colours.
        """
        # Beside the event loop, which others' answers go through.
        html = await asyncio.to_thread(to_html, text, colours=colours)
        self._text = text
        self._waiting.set_visibility(not text)
        self._body.set_content(html)

    def end(self, figures: Figures | None) -> None:
        """Show what there is to say of the whole answer."""
        self._waiting.set_visibility(False)
        self._below.set_visibility(True)
        with self._below:
            if self._text:
                copy = f"copyText({json.dumps(self._text)})"
                self._button("content_copy", "Copy", lambda: ui.run_javascript(copy))
            self._button("refresh", "Regenerate", self._on_again).classes("again")
            if figures:
                ui.label(figures.told()).classes("figures")

    def fail(self, message: str, hint: str = "") -> None:
        """Show what went wrong instead."""
        self._notice.set_visibility(True)
        with self._notice:
            ui.icon("error_outline")
            with ui.element("div"):
                ui.label(message[:1].upper() + message[1:]).classes("message")
                if hint:
                    ui.label(hint).classes("hint")

    def _button(self, icon: str, told: str, on_click: Callable[[], object]) -> ui.button:
        button = ui.button(icon=icon, on_click=on_click, color=None).props(
            f'flat round dense size="sm" aria-label="{told}"'
        )
        with button:
            ui.tooltip(told)
        return button
