"""llama.cpp's RPC servers: starting one, and asking whether one is there.

llama.cpp's own client ends the process when a server is missing, speaks another
version or goes away. So each is asked here first, in a few bytes.
"""

import ipaddress
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggufkit import settings
from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild

DEFAULT_PORT = 50052
TOOL = "ggml-rpc-server"
_PROTOCOL = (7, 0)
"""``RPC_PROTO_MAJOR_VERSION`` and ``..._MINOR_VERSION`` of ggml-rpc.h."""
_HELLO, _DEVICE_COUNT, _DEVICE_MEMORY = 14, 15, 11
"""``rpc_cmd`` of ggml-rpc.cpp."""
_CAPABILITIES_NBYTES = 24
_MAX_REPLY_NBYTES = 64
_ABORT = struct.pack("ii", 1, 0)
"""``struct linger``: close at once, without ceremony."""
_SECONDS = 5.0
_START_SECONDS = 60.0
_PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Offer:
    """What an RPC server offers.

    Attributes:
        endpoint: ``HOST:PORT``.
        version: of the protocol.
        free_nbytes: free memory of each of its devices.
        total_nbytes: memory of each.
    """

    endpoint: str
    version: str
    free_nbytes: tuple[int, ...]
    total_nbytes: tuple[int, ...]


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``.

    Raises:
        UsageError: if it is something else.
    """
    host, colon, port = endpoint.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise UsageError(
            f"'{endpoint}' is not HOST:PORT", f"Such as --rpc 192.168.1.7:{DEFAULT_PORT}"
        )
    if ":" in host:
        raise UsageError(f"'{endpoint}' is an IPv6 address; llama.cpp's RPC knows IPv4 alone")
    return host, int(port)


def check_server(endpoint: str, *, seconds: float = _SECONDS) -> Offer:
    """See that a server of llama.cpp's RPC is there, free, and of our version.

    Args:
        endpoint: ``HOST:PORT``.
        seconds: to wait for each of its answers.

    Raises:
        UsageError: if it is not ``HOST:PORT``.
        ToolError: if it cannot be used.
    """
    host, port = parse_endpoint(endpoint)
    start_hint = f"Start one there: ggufkit rpc --host {host} --port {port}"
    try:
        with _connect(host, port, seconds) as connection:
            try:
                return _ask(connection, endpoint)
            except TimeoutError:
                # It will find the question later, and an answer that nobody takes
                # would end it; a connection that was aborted does not.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                raise
    except TimeoutError as error:
        raise ToolError(
            f"the RPC server at {endpoint} does not answer within {seconds:g} seconds",
            "It serves one client at a time: end the other, or start a second server",
        ) from error
    except ConnectionRefusedError as error:
        raise ToolError(f"there is no RPC server at {endpoint}", start_hint) from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ToolError(f"the RPC server at {endpoint}: {reason}", start_hint) from error


def _connect(host: str, port: int, seconds: float) -> socket.socket:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.settimeout(seconds)
    try:
        connection.connect((host, port))
    except BaseException:
        connection.close()
        raise
    return connection


def _ask(connection: socket.socket, endpoint: str) -> Offer:
    hello = _call(connection, endpoint, _HELLO, bytes(_CAPABILITIES_NBYTES))
    if len(hello) != 4 + _CAPABILITIES_NBYTES:
        raise _no_server(endpoint)
    major, minor, patch = hello[:3]
    version = f"{major}.{minor}.{patch}"
    if major != _PROTOCOL[0] or minor > _PROTOCOL[1]:
        raise ToolError(
            f"the RPC server at {endpoint} speaks version {version} of the protocol, "
            f"and this build {_PROTOCOL[0]}.{_PROTOCOL[1]}",
            "Build llama.cpp from the same pin on both machines: ggufkit build",
        )
    (count,) = _unpacked(connection, endpoint, "<I", _DEVICE_COUNT)
    memory = [
        _unpacked(connection, endpoint, "<QQ", _DEVICE_MEMORY, struct.pack("<I", n))
        for n in range(count)
    ]
    free, total = tuple(m[0] for m in memory), tuple(m[1] for m in memory)
    return Offer(endpoint, version, free, total)


def _unpacked(
    connection: socket.socket, endpoint: str, form: str, command: int, given: bytes = b""
) -> tuple[int, ...]:
    reply = _call(connection, endpoint, command, given)
    if len(reply) != struct.calcsize(form):
        raise _no_server(endpoint)
    return struct.unpack(form, reply)


def _call(connection: socket.socket, endpoint: str, command: int, given: bytes) -> bytes:
    connection.sendall(struct.pack("<BQ", command, len(given)) + given)
    (size,) = struct.unpack("<Q", _receive(connection, endpoint, 8))
    if size > _MAX_REPLY_NBYTES:
        raise _no_server(endpoint)
    return _receive(connection, endpoint, size)


def _receive(connection: socket.socket, endpoint: str, count: int) -> bytes:
    got = b""
    while len(got) < count:
        piece = connection.recv(count - len(got))
        if not piece:
            raise _no_server(endpoint)
        got += piece
    return got


def _no_server(endpoint: str) -> ToolError:
    return ToolError(
        f"what listens at {endpoint} is not an RPC server of this llama.cpp",
        "Start one there: ggufkit rpc",
    )


# Starting one.


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at an address."""
    return ipaddress.ip_address(host).is_loopback


def address(host: str) -> str:
    """The IPv4 address of a host, which is what llama.cpp's server can listen on.

    Raises:
        UsageError: if there is none.
    """
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise UsageError(f"'{host}' is no IPv4 address, nor the name of one") from error


def serve(
    build: NativeBuild,
    *,
    host: str,
    port: int,
    threads: int,
    cache: bool,
    on_start: Callable[[Offer], None],
    on_client: Callable[[bool], None],
) -> None:
    """Run llama.cpp's RPC server until this is interrupted; the server ends with it.

    Args:
        build: whose server to run.
        host: IPv4 address to listen on.
        port: to listen on.
        threads: of the CPU, where it computes.
        cache: keep large tensors on disk, so that they need not be sent again.
        on_start: called from another thread when it answers.
        on_client: called when a client comes (True), and when it goes.

    Raises:
        ToolError: if it ends by itself, or never answers.
    """
    tool = build.tool(TOOL)
    _require_free(host, port)
    argv: list[str | Path] = [tool, "-H", host, "-p", str(port), "-t", str(threads)]
    argv += ["-c"] if cache else []
    watch = _Watch(host, port, on_start, on_client)
    with watch:
        ran = toolchain.run(
            argv,
            env={"LLAMA_CACHE": str(settings.cache_dir())},
            on_text=watch.read,
            serves=True,
        )
    raise toolchain.explain_failure(ran, "serving layers", None)


def _require_free(host: str, port: int) -> None:
    """The server ends without a reason, and with success, where it cannot listen."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror}", "Take another: --port"
            ) from error


class _Watch:
    """Waits until the server answers, and reads who comes and goes after that."""

    def __init__(
        self,
        host: str,
        port: int,
        on_start: Callable[[Offer], None],
        on_client: Callable[[bool], None],
    ) -> None:
        reachable = "127.0.0.1" if ipaddress.ip_address(host).is_unspecified else host
        self._endpoint = f"{reachable}:{port}"
        self._on_start = on_start
        self._on_client = on_client
        self._ended = threading.Event()
        self._started = False
        self._thread = threading.Thread(target=self._wait, name="ggufkit-rpc", daemon=True)
        self._rest = ""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _wait(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while not self._ended.wait(_PAUSE_SECONDS) and time.monotonic() < until:
            try:
                offer = check_server(self._endpoint)
            except ToolError:
                continue
            self._on_start(offer)
            return

    def read(self, text: str) -> None:
        """Take what the server prints."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.startswith("Accepted client"):
                # The first is who looks whether it answers.
                if self._started:
                    self._on_client(True)
            elif line.startswith("Client connection closed"):
                if self._started:
                    self._on_client(False)
                self._started = True
