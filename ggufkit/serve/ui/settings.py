"""The panel of parameters, and the question for an API key."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nicegui import ui

from ggufkit.serve.ui.conversation import Settings

_OWN = "the model's own"
_NUMBERS = (
    ("temperature", "Temperature", 0.1, _OWN, "0 takes the likeliest token, always"),
    ("top_p", "Top-p", 0.05, _OWN, "the likeliest tokens that have this much together"),
    ("top_k", "Top-k", 1, _OWN, "so many of the likeliest tokens"),
    ("min_p", "Min-p", 0.01, _OWN, "tokens at least this likely beside the likeliest"),
    ("max_tokens", "Max tokens", 1, "as many as there is room for", "length of an answer"),
    ("seed", "Seed", 1, "another one each time", "the same one gives the same answer again"),
)
_WHOLE = frozenset({"top_k", "max_tokens", "seed"})


class SettingsPanel:
    """The drawer with all parameters.

    Args:
        settings: what they are.
        on_change: called with what they become.
    """

    def __init__(self, settings: Settings, on_change: Callable[[Settings], None]) -> None:
        self._settings = settings
        self._on_change = on_change
        self._fields: dict[str, Any] = {}
        drawer = ui.right_drawer(value=False, fixed=True, bottom_corner=True).props(
            "width=320 breakpoint=1100"
        )
        with drawer.classes("settings") as self.drawer:
            with ui.element("div").classes("settings-title"):
                ui.label("Settings")
                ui.button(icon="close", on_click=self.drawer.hide, color=None).props(
                    'flat round dense size="sm" aria-label="Close settings"'
                )
            self._fields["system"] = (
                ui.textarea("System prompt", on_change=lambda e: self._set("system", e.value or ""))
                .props("outlined dense autogrow debounce=200")
                .classes("system")
            )
            for name, label, step, unset, hint in _NUMBERS:
                self._number(name, label, step, unset, hint)
            ui.button("Reset", icon="restart_alt", on_click=self.reset, color=None).props(
                "flat no-caps dense"
            )
        self.show(settings)

    def _number(self, name: str, label: str, step: float, unset: str, hint: str) -> None:
        def changed(value: float | None) -> None:
            whole = name in _WHOLE and value is not None
            self._set(name, int(value or 0) if whole else value)

        self._fields[name] = ui.number(
            label, step=step, placeholder=unset, on_change=lambda e: changed(e.value)
        ).props(f'outlined dense clearable stack-label hint="{hint}" debounce=200')

    def _set(self, name: str, value: Any) -> None:
        changed = replace(self._settings, **{name: value})
        if changed != self._settings:
            self._settings = changed
            self._on_change(changed)

    def show(self, settings: Settings) -> None:
        """Show other settings."""
        self._settings = settings
        for name, shown in self._fields.items():
            shown.value = getattr(settings, name)

    def reset(self) -> None:
        """Back to the model's own recommendations."""
        for name, shown in self._fields.items():
            shown.value = getattr(Settings(), name)


class KeyQuestion:
    """Asks for the API key of a server that wants one.

    Args:
        on_key: called with what was typed.
    """

    def __init__(self, on_key: Callable[[str], Any]) -> None:
        with ui.dialog().props("persistent") as self._dialog, ui.card().classes("key"):
            ui.label("API key").classes("key-title")
            ui.label("This server answers only those who have one of its keys.")
            # No password field: the browser would offer to keep it, by the address.
            self._input = (
                ui.input("Key")
                .props('outlined dense autofocus autocomplete="off" spellcheck="false"')
                .classes("secret")
            )
            self._wrong = ui.label("").classes("wrong").props('role="alert"')
            ui.button("Continue", on_click=self._told).props("unelevated no-caps").classes("go")
        self._input.on("keydown.enter", self._told)
        self._on_key = on_key

    async def _told(self) -> None:
        if key := (self._input.value or "").strip():
            await self._on_key(key)

    def ask(self, told: str = "") -> None:
        """Ask; ``told`` is what is wrong with the key that there was."""
        self._wrong.text = told
        self._wrong.set_visibility(bool(told))
        self._dialog.open()

    def done(self) -> None:
        """The key is right."""
        self._input.value = ""
        self._dialog.close()
