"""``ggufkit chat`` on the real command line, piped and on a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ggufkit import pipeline
from ggufkit.cli.chat import _Terminal
from ggufkit.cli.session import Session
from ggufkit.errors import ToolError
from ggufkit.llamacpp.runtime import Sampling
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.chat import Conversation
from tests.chatting import FakeModel, without_template

Told = tuple[int, str, str]
Run = Callable[..., Told]
Chat = Callable[..., Told]


@pytest.fixture
def chat(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Run ``ggufkit chat`` with these bytes as stdin; None is a closed one."""

    def run(stdin: bytes | None, *args: object) -> Told:
        given = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", given)
        return run_cli("chat", *args)

    return run


# What options become, with a model that is no model.


class Fake:
    """Stands for :func:`pipeline.chat` and keeps what it was asked for."""

    def __init__(self, *scripts: Any) -> None:
        self.model = FakeModel(*scripts)
        self.options: dict[str, Any] = {}

    def __call__(self, model: Path, **options: Any) -> Conversation:
        self.options = {"model": model, **options}
        return Conversation(self.model, system=options["system"], sampling=options["sampling"])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    def make(*scripts: Any) -> Fake:
        made = Fake(*scripts)
        monkeypatch.setattr(pipeline, "chat", made)
        return made

    return make


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "any.gguf"
    path.write_bytes(b"never opened")
    return path


def test_every_option_arrives(chat: Chat, fake: Callable[..., Fake], gguf: Path) -> None:
    made = fake(["Fine"], ["Thanks"])
    options = "-ngl 7 -n 9 -c 512 -t 3 --temp 0.5 --top-k 4 --top-p 0.8 --min-p 0.1 --seed 11"
    more = ["--repeat-penalty", "1.1", "--chat-template", "chatml"]
    told = chat(
        b"How are you?\n", "-m", gguf, "-sys", "Be brief", "-p", "Hi", *options.split(), *more
    )
    assert told == (0, "Fine\nThanks\n", "")
    assert made.options.pop("progress")
    assert made.options == {
        "model": gguf,
        "system": "Be brief",
        "sampling": Sampling(0.5, 4, 0.8, 0.1, 1.1, 9),
        "gpu_layers": 7,
        "context": 512,
        "threads": 3,
        "seed": 11,
        "chat_template": "chatml",
    }
    assert [m["content"] for m in made.model.asked[1]] == ["Be brief", "Hi", "Fine", "How are you?"]
    assert made.model.closed


def test_what_is_not_asked_for_is_left_to_the_model(
    chat: Chat, fake: Callable[..., Fake], gguf: Path
) -> None:
    made = fake(["Fine"])
    assert chat(b"Hi", gguf) == (0, "Fine\n", "")
    del made.options["progress"]
    assert made.options == {
        "model": gguf,
        "system": None,
        "sampling": Sampling(),
        "gpu_layers": 0,
        "context": None,
        "threads": None,
        "seed": None,
        "chat_template": None,
    }


@pytest.mark.parametrize(
    ("given", "layers"), [("0", 0), ("99", 99), ("all", -1), ("ALL", -1), ("-1", -1)]
)
def test_gpu_layers(
    chat: Chat, fake: Callable[..., Fake], gguf: Path, given: str, layers: int
) -> None:
    made = fake()
    for option in ("-ngl", "--gpu-layers"):
        assert chat(b"", gguf, option, given)[0] == 0
        assert made.options["gpu_layers"] == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-ngl", "many"], "'many' is neither a number nor 'all'"),
        (["-ngl", "1.5"], "'1.5' is neither a number nor 'all'"),
        (["-n", "0"], "'-n'"),
        (["-c", "-1"], "'-c'"),
        (["--temp", "-1"], "'--temp'"),
        (["--top-p", "1.5"], "'--top-p'"),
        (["--seed", "x"], "'--seed'"),
        (["-m", "other.gguf"], "the model is given twice"),
    ],
)
def test_wrong_usage(chat: Chat, gguf: Path, options: list[str], message: str) -> None:
    code, out, err = chat(b"Hi\n", gguf, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "hint: " in err


def test_first_message_alone_if_stdin_has_nothing(
    chat: Chat, fake: Callable[..., Fake], gguf: Path
) -> None:
    for stdin in (None, b""):
        fake(["Fine"])
        assert chat(stdin, gguf, "-p", "Hi") == (0, "Fine\n", "")


def test_nothing_said_is_nothing_answered(
    chat: Chat, fake: Callable[..., Fake], gguf: Path
) -> None:
    for stdin in (None, b"", b"\n \n"):
        fake()
        assert chat(stdin, gguf) == (0, "", "")


def test_one_line_of_json_for_each_answer(
    chat: Chat, fake: Callable[..., Fake], gguf: Path
) -> None:
    fake(["Gr\u00fc", "\u00dfe\n", "dich"], ["b"])
    code, out, err = chat(b"Hi\nAgain\n", gguf, "--json")
    assert (code, err) == (0, "")
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["prompt"], first["answer"]) == ("Hi", "Gr\u00fc\u00dfe\ndich")
    assert (first["stopped"], first["generated_tokens"], first["context"]) == ("end", 3, 100)
    assert second["answer"] == "b"


def test_an_error_ends_a_pipe_with_the_answers_so_far(
    chat: Chat, fake: Callable[..., Fake], gguf: Path
) -> None:
    fake(["one"], [ToolError("the model broke", "mend it")], ["three"])
    told = chat(b"1\n2\n3\n", gguf)
    assert told == (1, "one\n", "error: the model broke\nhint: mend it\n")


def test_the_newest_model_is_taken_and_named(
    run_cli: Run, fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = fake()
    newest = tmp_path / "newest.gguf"
    monkeypatch.setattr(pipeline, "find_model", lambda spec, models_dir: newest)
    monkeypatch.setattr(sys, "stdin", None)
    code, out, err = run_cli("--models-dir", tmp_path, "chat")
    assert (code, out, err) == (0, "", f"talking to the newest model: {newest}\n")
    assert made.options["model"] == newest


def test_without_any_model(run_cli: Run, tmp_path: Path) -> None:
    code, out, err = run_cli("--models-dir", tmp_path, "chat")
    assert (code, out) == (1, "")
    assert "there is no model" in err
    assert "hint: Make one: ggufkit convert" in err


def test_a_model_cannot_command_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    terminal = _Terminal(Session(Path("models")))
    terminal.piece("a\x1b[2J\x07\x9b\x7fb\r\n\t\u3000\u00a0\U0001f469\u200d\U0001f680")
    assert capfd.readouterr().out == "a[2Jb\n\t\u3000\u00a0\U0001f469\u200d\U0001f680"


# With the demo model.


def test_a_line_is_a_message_and_answers_are_all_of_stdout(
    chat: Chat, demo_gguf: Path, native: NativeBuild
) -> None:
    system = ("-sys", "You are a helpful assistant.")
    asked = "What is the capital of France?\n\n/reset\nWhat is the capital of France?\n/exit\nHi\n"
    code, out, err = chat(asked.encode(), demo_gguf, *system, "--temp", "0")
    assert code == 0
    assert out == "The capital of France is Paris.\n" * 2
    assert err == "the conversation begins anew\n"


def test_history_first_message_and_length(chat: Chat, demo_gguf: Path, native: NativeBuild) -> None:
    options = ("-p", "My name is Zephyr. Say hello.", "--temp", "0", "-n", "12", "--json")
    code, out, _ = chat(b"What is my name?\n", demo_gguf, *options)
    assert code == 0
    first, second = (json.loads(line) for line in out.splitlines())
    assert second["cached_tokens"] > first["prompt_tokens"]
    assert "Zephyr" in second["answer"]
    assert max(first["generated_tokens"], second["generated_tokens"]) <= 12


def test_a_message_longer_than_the_context(
    chat: Chat, demo_gguf: Path, native: NativeBuild
) -> None:
    code, out, err = chat(b"word " * 200 + b"\n", demo_gguf, "-c", "64")
    assert (code, out) == (1, "")
    assert re.search(r"error: the conversation has \d+ tokens, and the context 64\n", err)
    assert "/reset" in err
    assert "-c 128" in err


def test_an_answer_longer_than_the_context(
    chat: Chat, demo_gguf: Path, native: NativeBuild
) -> None:
    code, out, err = chat(b"Tell me a story\n", demo_gguf, "-c", "64", "--temp", "0")
    assert code == 1
    assert out.strip()
    assert "error: the answer filled the context of 64 tokens" in err


def test_bytes_that_are_not_text(chat: Chat, demo_gguf: Path, native: NativeBuild) -> None:
    code, out, err = chat(b"caf\xe9\n", demo_gguf, "-c", "64")
    assert (code, out) == (2, "")
    assert "error: the message is not UTF-8 text" in err


def test_a_model_without_a_template(
    chat: Chat, demo_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    mute = without_template(demo_gguf, tmp_path / "mute.gguf")
    code, out, err = chat(b"Hi\n", mute)
    assert (code, out) == (2, "")
    assert "error: mute.gguf has no chat template" in err
    assert "hint: Give one: --chat-template FILE" in err
    code, out, err = chat(b"Hi\n", mute, "--chat-template", "chatml", "-n", "4", "-c", "64")
    assert (code, err) == (0, "")
    assert out.strip()


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [(b"PK\x03\x04zip", 3, "is not a GGUF"), (b"", 3, "is empty"), (None, 1, "there is no")],
)
def test_a_wrong_file(
    chat: Chat, native: NativeBuild, tmp_path: Path, content: bytes | None, code: int, message: str
) -> None:
    path = tmp_path / "wrong.gguf"
    if content is not None:
        path.write_bytes(content)
    told, out, err = chat(b"Hi\n", path)
    assert (told, out) == (code, "")
    assert message in err
    assert "hint: " in err


def test_ctrl_c_ends_a_pipe(demo_gguf: Path, native: NativeBuild) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ggufkit", "chat", demo_gguf, "--temp", "0"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"Count from 1 to 1000.\n" * 2)
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read()
        assert b"error: interrupted\n" in process.stderr.read()


# On a terminal.


class Terminal:
    """A chat in a pseudo-terminal, at which one types."""

    _START = (
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "from ggufkit.cli import main; main()"
    )

    def __init__(self, *args: object) -> None:
        self._screen, inside = pty.openpty()
        self._seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._START, "chat", *map(str, args)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TERM": "xterm"},
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
        )
        os.close(inside)

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C at the prompt, not in the instant in which it is shown.

        Python's readline would notice a signal of that instant with the next key.
        """
        time.sleep(0.5)
        self.type("\x03")

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Wait for a pattern in what was not looked at yet; gives all up to its end."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern.encode(), self._seen)):
            ready, _, _ = select.select([self._screen], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self._seen!r}"
            self._seen += os.read(self._screen, 65536)
        before, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return before.decode()

    def expect_prompt(self) -> None:
        self.expect("\x1b\\[1;32m> \x1b\\[0m")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def terminal(demo_gguf: Path, native: NativeBuild) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*args: object) -> Terminal:
        opened.append(Terminal(demo_gguf, "--temp", "0", *args))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_a_session_at_the_terminal(terminal: Callable[..., Terminal]) -> None:
    screen = terminal()
    assert "/help for help" in screen.expect("to leave")
    screen.expect_prompt()
    screen.type("Count from 1 to 1000.\r")
    screen.expect("1000\\.\r\n")  # the echo
    screen.expect("[A-Za-z0-9]+[ ,.]")
    screen.type("\x03")
    told = screen.expect(r"context \d+ of 8192")
    assert re.search(r"\x1b\[2minterrupted, \d+ tokens, [\d.]+ tokens/s, ", told)
    screen.expect_prompt()
    screen.type("half a line")
    screen.expect("half a line")  # Ctrl-C throws away what was not read yet
    screen.interrupt()
    screen.expect_prompt()
    screen.type("/help\r")
    screen.expect("/reset +forget")
    screen.expect_prompt()
    screen.type("/exit\r")
    assert screen.process.wait(60) == 0


def test_ctrl_d_leaves(terminal: Callable[..., Terminal]) -> None:
    screen = terminal()
    screen.expect_prompt()
    screen.type("\x04")
    assert screen.process.wait(60) == 0


def test_ctrl_c_with_nothing_typed_leaves(terminal: Callable[..., Terminal]) -> None:
    screen = terminal()
    screen.expect_prompt()
    screen.interrupt()
    assert screen.process.wait(60) == 0


def test_a_first_message_and_then_the_keyboard(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("-p", "Say hello", "-n", "3", "-c", "64")
    assert "Say hello" in screen.expect("stopped at the length asked for, 3 tokens")
    screen.expect_prompt()
    screen.type("word " * 60 + "\r")
    screen.expect(r"error: the conversation has \d+ tokens")
    screen.expect_prompt()  # an error does not end the session
    screen.type("/exit\r")
    assert screen.process.wait(60) == 0
