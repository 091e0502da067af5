"""How models are served. Needs none of the packages that serve them."""

from dataclasses import dataclass, field

from ggufkit.serve.hosting import HostOptions

_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What clients may ask of the server.

    Attributes:
        body_nbytes: size of a request.
        max_tokens: length of an answer, whatever a request says; None for the context's.
        timeout_seconds: from the request to the end of its answer.
        connections: clients that are connected at once.
        receive_seconds: for a request to arrive as a whole.
        send_seconds: for a client to read at least some of what was sent to it.
        shutdown_seconds: for answers to finish when the server is told to end.
    """

    body_nbytes: int = 8 * _MIB
    max_tokens: int | None = None
    timeout_seconds: float = 600.0
    connections: int = 512
    receive_seconds: float = 30.0
    send_seconds: float = 30.0
    shutdown_seconds: float = 30.0


@dataclass(frozen=True)
class ServeOptions:
    """How models are served.

    Attributes:
        host: address to listen on.
        port: 0 for any that is free.
        keys: API keys that let in; none lets everybody in.
        origins: web pages that may ask from a browser.
        memory_nbytes: that loaded models may take together; None for most of the
            machine's if there are several.
        limits: what clients may ask.
        hosting: how models are loaded.
        ui: whether there is a page to chat in the browser.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    memory_nbytes: int | None = None
    limits: Limits = field(default_factory=Limits)
    hosting: HostOptions = field(default_factory=HostOptions)
    ui: bool = False
