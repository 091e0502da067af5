"""The application: all endpoints, and what stands before them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from ggufkit import __version__
from ggufkit.errors import GgufkitError
from ggufkit.serve.api import chat, completions, embeddings, status, tokens
from ggufkit.serve.api.answering import Service
from ggufkit.serve.api.errors import ApiError, as_api_error
from ggufkit.serve.api.limits import BodyLimit, Keys, error_response
from ggufkit.serve.api.metrics import Counting, registry_of


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    page: Path | None = None,
) -> FastAPI:
    """The application.

    Args:
        service: models and limits.
        keys: API keys that let in; none lets everybody in.
        origins: web pages that may ask from a browser (CORS); none but our own.
        page: directory of a web page to show at ``/``.
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
    if page is not None:
        app.mount("/", StaticFiles(directory=page, html=True), name="page")
    app.add_middleware(BodyLimit, limits=service.limits)
    app.add_middleware(Keys, keys=keys)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
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
    return error_response(ApiError(500, "the server has a bug", code="internal_error"))
