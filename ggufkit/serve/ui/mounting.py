"""Puts the page into the application that serves the endpoints."""

import logging
from pathlib import Path

from fastapi import FastAPI
from nicegui import app as pages
from nicegui import ui
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ggufkit.serve.ui.conversation import Memory
from ggufkit.serve.ui.endpoint import Endpoint
from ggufkit.serve.ui.markdown import colour_css
from ggufkit.serve.ui.page import ChatPage

PATH = "/ui"
"""Where the page is. All that it needs lies below."""
PATHS = ("/", PATH, f"{PATH}/")
"""What the page needs before there is a key: it tells nothing of the models."""

_HERE = Path(__file__).parent
_TABS_SECONDS = 3600.0
"""For how long NiceGUI keeps what it knows of a browser tab, which is next to nothing."""
_RECONNECT_SECONDS = 3.0
"""For how long an answer goes on when its page cannot be reached."""
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Browsers load nothing for the page from anywhere else, whatever stands in it. Vue
compiles templates, for which it needs to evaluate them."""


def mount(app: FastAPI) -> None:
    """Add the page to an application, once in a process: NiceGUI has one state for all.

    Args:
        app: the application; its root leads to the page from now on.
    """
    logging.getLogger("nicegui").setLevel(logging.ERROR)
    pages.colors(primary="#4f46e5")
    pages.storage.max_tab_storage_age = _TABS_SECONDS
    memory = Memory()
    head = (
        f"<style>{colour_css()}\n{_read('page.css')}</style>\n<script>{_read('page.js')}</script>"
    )

    @ui.page("/", title="ggufkit")
    async def page(request: Request) -> None:
        ui.add_head_html(head)
        await ChatPage(Endpoint(own_address(request.scope)), memory).run()

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    pages.add_middleware(Fence)
    ui.run_with(
        app,
        mount_path=PATH,
        title="ggufkit",
        favicon=_HERE / "icon.svg",
        dark=None,
        language="en-US",
        tailwind=False,
        show_welcome_message=False,
        # Nothing is bound that would have to be watched: an idle server does nothing.
        binding_refresh_interval=None,
        reconnect_timeout=_RECONNECT_SECONDS,
        gzip_middleware_factory=None,
    )


def own_address(scope: Scope) -> str:
    """Where the server was reached by a request, by which it reaches itself."""
    host, port = scope["server"]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Fence:
    """Tells browsers to load nothing from elsewhere.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def fenced(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, fenced)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
