"""The application: all endpoints, and what stands before them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from ggufkit import __version__
from ggufkit.errors import GgufkitError
from ggufkit.serve.api import chat, completions, embeddings, status, tokens
from ggufkit.serve.api.answering import Service
from ggufkit.serve.api.errors import ApiError, as_api_error
from ggufkit.serve.api.limits import BodyLimit, Keys, OwnNames, error_response
from ggufkit.serve.api.metrics import Counting, registry_of


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    own_names: bool = False,
    ui: bool = False,
) -> FastAPI:
    """The application.

    Args:
        service: models and limits.
        keys: API keys that let in; none lets everybody in.
        origins: web pages that may ask from a browser (CORS); none but our own.
        own_names: whether it may be asked under this machine's own names alone.
        ui: whether there is a page to chat in the browser; one application of a
            process can have it.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.models.close()

    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(
        title="ggufkit", version=__version__, lifespan=life, docs_url=None, redoc_url=None
    )
    app.state.service = service
    app.state.registry = registry = registry_of(lambda: service.models.loaded)
    for part in (chat, completions, embeddings, tokens, status):
        app.include_router(part.router)
    app.add_exception_handler(GgufkitError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_bug)
    # The first tells nothing but that the server is there.
    open_to_all: tuple[str, ...] = ("/health",)
    if ui:
        # The package that it needs may be missing, and takes time to load.
        from ggufkit.serve.ui.mounting import PATHS, mount

        mount(app)
        open_to_all += PATHS
    app.state.ui = ui
    app.add_middleware(BodyLimit, limits=service.limits)
    app.add_middleware(Keys, keys=keys, open_to_all=open_to_all)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    if own_names:
        app.add_middleware(OwnNames)
    paths = frozenset(app.openapi()["paths"])
    app.add_middleware(Counting, registry=registry, paths=lambda: paths)
    return app


def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GgufkitError)
    return error_response(as_api_error(error))


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path[:200]}"
    told = error_response(ApiError(error.status_code, message))
    told.headers.update(error.headers or {})
    return told


def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    return error_response(ApiError(400, message, param=place or None))


def _on_bug(_: Request, error: Exception) -> Response:
    # The traceback is logged; clients are told no secrets.
    told = error_response(ApiError(500, "the server has a bug", code="internal_error"))
    # uvicorn closes the connection, so nobody must ask on it again.
    told.headers["Connection"] = "close"
    return told
