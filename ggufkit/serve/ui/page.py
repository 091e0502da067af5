"""The page: a conversation with one of the models."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import ClassVar

from nicegui import background_tasks, ui

from ggufkit.serve.ui.conversation import Memory, Settings, State, Turn, Writing
from ggufkit.serve.ui.endpoint import Endpoint, EndpointError
from ggufkit.serve.ui.messages import AnswerView, show_question
from ggufkit.serve.ui.settings import KeyQuestion, SettingsPanel

_PAINT_SECONDS = 0.08
"""Between two looks of a growing answer."""
_PAINT_SHARE = 0.1
"""Of one core, that showing all answers that grow may take at most."""
_HINTS = {
    "context_length_exceeded": "Start a new chat, or have the server started with more context: -c",
    "no_chat_template": "It is a base model, or lost its template: serve it with --chat-template",
    "overloaded": "Try again in a moment.",
    "model_not_found": "Choose another model above.",
}
_ENTER = """(event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    emit(event.target.value);
}"""


class ChatPage:
    """One page in one browser.

    Args:
        endpoint: who answers.
        memory: where the conversation is kept.
    """

    _growing: ClassVar[int] = 0
    """Answers that are being shown, on all pages."""

    def __init__(self, endpoint: Endpoint, memory: Memory) -> None:
        self._endpoint = endpoint
        self._memory = memory
        self._tab = ""
        self._state = State()
        self._answering: asyncio.Task[None] | None = None
        self._following = False
        self._client = ui.context.client
        self._client.on_delete(self._leave)
        self._build()

    async def run(self) -> None:
        """Bring the page to life when the browser has it."""
        await self._client.connected()
        ui.run_javascript("begin()")
        self._tab = self._client.tab_id or ""
        self._state = self._memory.get(self._tab)
        self._settings.show(self._state.settings)
        await self._show_all()
        await self._find_models()

    # What is seen.

    def _build(self) -> None:
        self._settings = SettingsPanel(self._state.settings, self._set)
        self._key = KeyQuestion(self._use_key)
        with ui.header(elevated=False).classes("top"):
            ui.label("ggufkit").classes("brand")
            self._choice = (
                ui.select([], on_change=lambda e: self._choose(e.value))
                .props('dense borderless options-dense aria-label="Model"')
                .classes("model")
            )
            ui.element("div").classes("gap")
            self._tool("add_comment", "New chat", self._start_over)
            self._tool("tune", "Settings", self._settings.drawer.toggle)
            self._tool("contrast", "Light or dark").on("click", js_handler="toggleColours")
        self._conversation = ui.element("div").classes("conversation").props('aria-live="polite"')
        with ui.footer().classes("bottom"), ui.element("div").classes("composer"):
            self._input = (
                ui.textarea(placeholder="Ask something")
                .props('autogrow borderless dense autofocus aria-label="Message"')
                .on("keydown", lambda e: self._send(str(e.args)), js_handler=_ENTER)
            )
            self._go = self._round("arrow_upward", "Send", lambda: self._send(self._input.value))
            self._halt = self._round("stop", "Stop", self.stop).classes("stop")
        self._halt.set_visibility(False)

    def _tool(
        self, icon: str, told: str, on_click: Callable[[], object] | None = None
    ) -> ui.button:
        button = ui.button(icon=icon, on_click=on_click, color=None).props(
            f'flat round aria-label="{told}"'
        )
        with button.classes("tool"):
            ui.tooltip(told)
        return button

    def _round(self, icon: str, told: str, on_click: Callable[[], object]) -> ui.button:
        return (
            ui.button(icon=icon, on_click=on_click)
            .props(f'round unelevated aria-label="{told}"')
            .classes("round")
        )

    async def _show_all(self) -> None:
        """The whole conversation anew."""
        self._conversation.clear()
        with self._conversation:
            if not self._state.turns:
                self._show_welcome()
            for turn in self._state.turns:
                if turn.role == "user":
                    show_question(turn.text)
                else:
                    view = AnswerView(self.regenerate)
                    await view.show(turn.text, colours=True)
                    view.end(turn.figures)
            if self._state.unanswered:
                AnswerView(self.regenerate).end(None)

    def _show_welcome(self) -> None:
        with ui.element("div").classes("welcome"):
            ui.label("What would you like to know?").classes("welcome-title")
            told = "Enter sends, Shift+Enter begins a new line, Escape stops an answer."
            ui.label(told).classes("welcome-keys")

    def _show_busy(self, busy: bool) -> None:
        self._go.set_visibility(not busy)
        self._halt.set_visibility(busy)

    # What it holds.

    def _keep(self, state: State) -> None:
        """Remember it, also if the page is loaded again."""
        self._state = state
        if self._tab:
            self._memory.put(self._tab, state)

    def _set(self, settings: Settings) -> None:
        self._keep(replace(self._state, settings=replace(settings, model=self._model)))

    @property
    def _model(self) -> str | None:
        return self._state.settings.model

    def _choose(self, name: str | None) -> None:
        self._keep(replace(self._state, settings=replace(self._state.settings, model=name)))

    async def _find_models(self) -> None:
        try:
            names = await self._endpoint.models(self._state.key)
        except EndpointError as error:
            if error.status == 401:
                self._key.ask("This key is wrong." if self._state.key else "")
            else:
                ui.notify(error.message, type="negative", position="top")
            return
        self._key.done()
        chosen = self._model if self._model in names else names[0]
        self._choice.set_options(names, value=chosen)
        self._choose(chosen)

    async def _use_key(self, key: str) -> None:
        self._keep(replace(self._state, key=key))
        await self._find_models()

    # What happens.

    async def _start_over(self) -> None:
        await self._end()
        self._keep(replace(self._state, turns=()))
        await self._show_all()
        self._input.run_method("focus")

    def _send(self, text: str | None) -> None:
        text = (text or "").strip()
        if not text or self._answering:
            return
        self._input.value = ""
        if not self._state.turns:
            self._conversation.clear()
        elif self._state.unanswered:
            # A question that has no answer is no part of the conversation.
            self._take_away(2)
        self._keep(self._state.without_question().with_turn(Turn("user", text)))
        with self._conversation:
            show_question(text)
        self._answer()

    def _take_away(self, count: int) -> None:
        for message in list(self._conversation)[-count:]:
            message.delete()

    def regenerate(self) -> None:
        """Ask for the last answer again."""
        if self._answering:
            return
        self._keep(self._state.without_answer())
        self._take_away(1)
        self._answer()

    def _answer(self) -> None:
        with self._conversation:
            view = AnswerView(self.regenerate)
        self._show_busy(True)
        self._client.run_javascript("followAgain()")
        self._following = True
        self._answering = background_tasks.create(self._write(view), name="answer")

    async def _write(self, view: AnswerView) -> None:
        writing = Writing()
        failure: EndpointError | None = None
        try:
            await self._follow(writing, view)
        except asyncio.CancelledError:
            writing.finish = "stopped"
        except EndpointError as error:
            failure = error
        self._following = False
        try:
            if not self._client.is_deleted:
                with self._client:
                    await self._finish(writing, view, failure)
        finally:
            self._answering = None

    async def _follow(self, writing: Writing, view: AnswerView) -> None:
        """Show the answer as it grows."""
        due = 0.0
        answer = self._endpoint.answer(self._state.asked(), self._state.key)
        ChatPage._growing += 1
        try:
            async with aclosing(answer) as pieces:
                async for piece in pieces:
                    writing.take(piece)
                    began = time.monotonic()
                    if piece.text and began >= due:
                        await view.show(writing.text)
                        now = time.monotonic()
                        pause = (now - began) * ChatPage._growing / _PAINT_SHARE
                        due = now + max(_PAINT_SECONDS, pause)
        finally:
            ChatPage._growing -= 1

    async def _finish(
        self, writing: Writing, view: AnswerView, failure: EndpointError | None
    ) -> None:
        figures = writing.figures()
        if writing.text:
            await view.show(writing.text, colours=True)
            self._keep(self._state.with_turn(Turn("assistant", writing.text, figures)))
        view.end(None if failure else figures)
        self._show_busy(False)
        if failure:
            view.fail(failure.message, _HINTS.get(failure.code or "", ""))
            if failure.status == 401:
                self._key.ask("This key is wrong." if self._state.key else "")

    def stop(self) -> None:
        """End the answer that is being written; the server hears of it, too."""
        if self._answering and self._following:
            self._following = False
            self._answering.cancel()

    async def _end(self) -> None:
        """Stop, and wait until all is told of it."""
        self.stop()
        if self._answering:
            await asyncio.wait([self._answering])

    async def _leave(self) -> None:
        await self._end()
        await self._endpoint.close()
