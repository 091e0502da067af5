"""Errors as OpenAI's clients know them."""

from typing import Any

from ggufkit.errors import GgufkitError, UsageError
from ggufkit.llamacpp.rendering import TemplateStoppedError
from ggufkit.llamacpp.runtime import ContextError
from ggufkit.llamacpp.sampling import GrammarError
from ggufkit.llamacpp.template import TemplateError
from ggufkit.serve.requests import BusyError, ClosedError, FinishReason


class ApiError(GgufkitError):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: what is wrong.
        code: a short name of it, for programs.
        param: the field of the request that is wrong.
        retry_seconds: when to try again, if that may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_seconds = retry_seconds

    @property
    def body(self) -> dict[str, Any]:
        """The object that OpenAI's clients look for."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else _INVALID)
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {}
        if self.retry_seconds is not None:
            headers["Retry-After"] = str(self.retry_seconds)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


_INVALID = "invalid_request_error"
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_OF_ERRORS: tuple[tuple[type[GgufkitError], int, str | None], ...] = (
    (BusyError, 503, "overloaded"),
    (ClosedError, 503, "shutting_down"),
    (ContextError, 400, "context_length_exceeded"),
    (TemplateStoppedError, 500, "template_stopped"),
    (TemplateError, 400, "template_error"),
    (GrammarError, 400, "grammar_error"),
    (UsageError, 400, None),
)
_OF_ENDS: dict[FinishReason, tuple[int, str, str]] = {
    "timeout": (504, "timeout", "the answer took longer than it may"),
    "slow": (408, "slow_reader", "the answer was not read"),
    "cancelled": (503, "shutting_down", "the server is shutting down"),
    "error": (500, "server_error", "the answer could not be written"),
}


def as_api_error(error: GgufkitError) -> ApiError:
    """What to tell a client of an error."""
    if isinstance(error, ApiError):
        return error
    status, code = next(
        ((status, code) for kind, status, code in _OF_ERRORS if isinstance(error, kind)),
        (500, "server_error"),
    )
    again = 1 if status == 503 else None
    return ApiError(status, error.message, code=code, retry_seconds=again)


def of_end(reason: FinishReason) -> ApiError | None:
    """The error that the end of an answer is; None for a proper end."""
    if reason not in _OF_ENDS:
        return None
    status, code, message = _OF_ENDS[reason]
    return ApiError(status, message, code=code)
