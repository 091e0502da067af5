"""Layers on other machines: llama.cpp's own servers, on this one."""

import re
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp import devices, rpc, toolchain
from ggufkit.llamacpp.batching import BatchContext, ContextOptions, Decoded, Model, ModelOptions
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.cli.test_chat import Terminal
from tests.factory import make_checkpoint

PROMPT = list(range(5, 45))
LAYERS = 3
OPTIONS = ContextOptions(context=128, sequences=2, batch=64, threads=1)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def gguf(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    checkpoint = make_checkpoint(
        place / "tiny", "llama", layers=LAYERS, hidden=64, intermediate=128, vocab=384
    )
    out = place / "tiny.gguf"
    toolchain.convert_checkpoint(
        native, checkpoint, out, outtype="f32", name="tiny", log=place / "log"
    )
    return out


class Server:
    """A server in a process of its own."""

    def __init__(self, build: NativeBuild) -> None:
        self.endpoint = f"127.0.0.1:{free_port()}"
        port = self.endpoint.partition(":")[2]
        self.process = subprocess.Popen(
            [build.tool(rpc.TOOL), "-p", port, "-t", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while True:
            try:
                self.offer = rpc.check_server(self.endpoint)
                return
            except ToolError:
                assert self.process.poll() is None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


@pytest.fixture(scope="module")
def servers(native: NativeBuild) -> Iterator[list[Server]]:
    started = [Server(native), Server(native)]
    yield started
    for server in started:
        server.end()


def answer(model: Model, count: int = 24) -> list[int]:
    """The likeliest tokens after the prompt."""
    context = BatchContext(model, OPTIONS)
    try:
        tokens, known = list(PROMPT), 0
        while len(tokens) < len(PROMPT) + count:
            context.clear()
            place = context.add(0, known, tokens[known:], output=True)
            assert context.decode() is Decoded.DONE
            known = len(tokens)
            tokens.append(int(context._logits.view(place).argmax()))
        return tokens[len(PROMPT) :]
    finally:
        context.close()


def answer_by(gguf: Path, build: NativeBuild, options: ModelOptions) -> list[int]:
    with Model(gguf, options, build=build) as model:
        return answer(model)


@pytest.fixture(scope="module")
def alone(gguf: Path, native: NativeBuild) -> list[int]:
    return answer_by(gguf, native, ModelOptions())


def test_a_server_says_what_it_offers(servers: list[Server]) -> None:
    offer = servers[0].offer
    assert offer.version.startswith("7.0.")
    assert len(offer.total_nbytes) == len(offer.free_nbytes) == 1
    assert 0 < offer.free_nbytes[0] <= offer.total_nbytes[0]


def test_layers_on_one_server_answer_as_at_home(
    gguf: Path, native: NativeBuild, servers: list[Server], alone: list[int]
) -> None:
    options = ModelOptions(rpc=(servers[0].endpoint,))
    with Model(gguf, options, build=native) as model:
        assert model.gpu_layers == -1
        assert answer(model) == alone


def test_two_servers_share_the_layers(
    gguf: Path, native: NativeBuild, servers: list[Server], alone: list[int]
) -> None:
    endpoints = tuple(server.endpoint for server in servers)
    assert answer_by(gguf, native, ModelOptions(rpc=endpoints)) == alone
    assert answer_by(gguf, native, ModelOptions(rpc=endpoints, gpu_layers=2)) == alone
    assert answer_by(gguf, native, ModelOptions(rpc=endpoints, split=(1, 3))) == alone


def test_servers_of_another_model_are_left_alone(
    gguf: Path, native: NativeBuild, servers: list[Server], alone: list[int]
) -> None:
    first, second = servers
    devices.add_rpc_servers(native, (first.endpoint, second.endpoint))
    places = devices.places_for_layers(native, (second.endpoint,))
    assert [(p.kind, p.description) for p in places] == [("rpc", second.endpoint)]
    with Model(gguf, ModelOptions(rpc=(second.endpoint,)), build=native) as model:
        assert answer(model) == alone
        # One that is in use does not answer, and this one does.
        assert rpc.check_server(first.endpoint)
        with pytest.raises(ToolError, match=r"does not answer within 0\.2 seconds") as caught:
            rpc.check_server(second.endpoint, seconds=0.2)
    assert "one client at a time" in caught.value.hint
    with Model(gguf, build=native) as model:
        assert rpc.check_server(second.endpoint)
        assert answer(model) == alone


def test_models_of_one_process_share_a_server(
    gguf: Path, native: NativeBuild, servers: list[Server], alone: list[int]
) -> None:
    options = ModelOptions(rpc=(servers[0].endpoint,))
    with Model(gguf, options, build=native) as first:
        with Model(gguf, options, build=native) as second:
            assert answer(second) == alone
        assert answer(first) == alone
    assert rpc.check_server(servers[0].endpoint)


# Servers that cannot be used.


def test_an_address_must_be_one(native: NativeBuild) -> None:
    for wrong in ("here", "host:", ":50052", "host:port", "host:0", "host:65536"):
        with pytest.raises(UsageError, match="is not HOST:PORT"):
            devices.add_rpc_servers(native, (wrong,))
    with pytest.raises(UsageError, match="knows IPv4 alone"):
        rpc.parse_endpoint("::1:50052")


def test_no_server(gguf: Path, native: NativeBuild) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(ToolError, match=f"there is no RPC server at {endpoint}") as caught:
        Model(gguf, ModelOptions(rpc=(endpoint,)), build=native)
    assert "ggufkit rpc" in caught.value.hint


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(ToolError, match=r"at nobody\.invalid:50052"):
        rpc.check_server("nobody.invalid:50052")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not an RPC server of this llama.cpp"),
        (b"", "is not an RPC server of this llama.cpp"),
        (b"\x04\0\0\0\0\0\0\0\7\0\0\0", "is not an RPC server of this llama.cpp"),
        (b"\x1c\0\0\0\0\0\0\0\6\1\2" + bytes(25), r"speaks version 6\.1\.2 .*, and this build 7"),
    ],
)
def test_something_else_listens(reply: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_once() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(64)
                connection.sendall(reply)

        thread = threading.Thread(target=answer_once)
        thread.start()
        with pytest.raises(ToolError, match=message):
            rpc.check_server(f"127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


_ANSWER_AND_KILL = """
import os, signal, sys
from pathlib import Path
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.batching import BatchContext, ContextOptions, Model, ModelOptions

gguf, endpoint, pid = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = Model(gguf, ModelOptions(rpc=(endpoint,)), build=toolchain.find_build())
context = BatchContext(model, ContextOptions(context=64, sequences=1))
for position in range(32):
    if position == 8:
        os.kill(pid or os.getpid(), signal.SIGKILL)
    context.clear()
    context.add(0, position, [5], output=True)
    context.decode()
print("went on")
"""


def answer_and_kill(gguf: Path, endpoint: str, pid: int) -> "subprocess.CompletedProcess[str]":
    """Write an answer, and kill a process in the midst of it; 0 is the writer itself."""
    command = [sys.executable, "-c", _ANSWER_AND_KILL, gguf, endpoint, str(pid)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_server_that_dies_in_mid_answer_ends_the_process_with_a_reason(
    gguf: Path, native: NativeBuild
) -> None:
    server = Server(native)
    try:
        ran = answer_and_kill(gguf, server.endpoint, server.process.pid)
    finally:
        server.end()
    assert ran.returncode == 1
    assert "error: an RPC server went away" in ran.stderr
    assert "hint: " in ran.stderr
    assert ran.stdout == ""


def test_a_chat_whose_server_is_gone_leaves_the_terminal_as_it_was(
    gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    server = Server(native)
    screen = Terminal(tmp_path, gguf, "--rpc", server.endpoint, "-c", "128", "--temp", "0")
    try:
        screen.expect_prompt()
        server.end()
        screen.enter("Hello")
        screen.expect("an RPC server went away")
        assert screen.process.wait(timeout=60) == 1
        assert termios.tcgetattr(screen._screen)[3] & termios.ECHO
    finally:
        screen.close()


# The command.


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_told_to_end(
    gguf: Path, native: NativeBuild, alone: list[int], ending: signal.Signals
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "ggufkit", "rpc", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        told = iter(process.stderr.readline, "")
        first = [next(told) for _ in range(4)]
        assert first[0].startswith(f"listening on 127.0.0.1:{port}, protocol 7.")
        assert re.match(r"offered: .* of .* of memory\n", first[1])
        assert f"--rpc 127.0.0.1:{port}" in first[2]
        assert answer_and_kill(gguf, f"127.0.0.1:{port}", 0).returncode == -signal.SIGKILL
        assert answer_by(gguf, native, ModelOptions(rpc=(f"127.0.0.1:{port}",))) == alone
        process.send_signal(ending)
        rest = list(told)
    assert process.returncode == 0
    assert rest[0] == "a client has come\n"
    assert rest[-1] == "ended\n"
    with pytest.raises(ToolError, match="there is no RPC server"):
        rpc.check_server(f"127.0.0.1:{port}")


def test_the_command_warns_when_others_can_reach_it(native: NativeBuild) -> None:
    command = [sys.executable, "-m", "ggufkit", "rpc", "--host", "0.0.0.0"]
    command += ["--port", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert "knows no passwords" in process.stderr.readline()
        assert process.stderr.readline().startswith("listening on 0.0.0.0:")
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    assert process.returncode == 0


def test_a_port_that_is_taken(run_cli: Run, servers: list[Server], native: NativeBuild) -> None:
    port = servers[0].endpoint.partition(":")[2]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        code, _, err = run_cli("rpc", "--port", port)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in err


def test_a_host_that_is_none() -> None:
    with pytest.raises(UsageError, match="no IPv4 address"):
        rpc.address("nobody.invalid")
    assert rpc.address("localhost") == "127.0.0.1"
    assert not rpc.is_loopback("0.0.0.0")
