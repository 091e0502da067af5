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
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ggufkit import pipeline
from ggufkit.errors import ToolError
from ggufkit.llamacpp.batching import ContextOptions, ModelOptions
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.chat import Conversation, Style, read_conversation
from ggufkit.serve.drafting import DraftOptions
from ggufkit.serve.model import Sampling
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
        return Conversation(
            self.model,
            system=options["system"],
            sampling=options["sampling"],
            style=options["style"],
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    def make(*scripts: Any) -> Fake:
        made = Fake(*scripts)
        monkeypatch.setattr(pipeline, "chat", made)
        return made

    return make


def test_every_option_arrives(
    chat: Chat, fake: Callable[..., Fake], gguf: Path, tmp_path: Path
) -> None:
    made = fake(["Fine"], ["Thanks"])
    made.model.sees = True
    options = "-ngl 7 -n 9 -c 512 -t 3 -tb 4 --temp 0.5 --top-k 4 --top-p 0.8 --min-p 0.1 --seed 11"
    more = "--repeat-penalty 1.1 --presence-penalty 0.1 --frequency-penalty 0.2 -r stop -r halt"
    loading = "-fa on -ctk q8_0 -ctv q5_1 --lora a.gguf --lora b.gguf:0.5 --rpc one:1,two:2"
    loading += f" -ts 3,1 -md {gguf} --draft-max 2 --mmproj {gguf} --image {gguf}"
    told = chat(
        b"How are you?\n",
        *("-m", gguf, "-sys", "Be brief", "-p", "Hi", "--chat-template", "chatml"),
        *("--in-prefix", "<", "--in-suffix", ">", "--grammar", "root ::= any"),
        *options.split(),
        *more.split(),
        *loading.split(),
    )
    assert told == (0, "Fine\nThanks\n", "")
    assert made.options.pop("progress")
    assert made.options == {
        "model": gguf,
        "system": "Be brief",
        "sampling": Sampling(
            *(0.5, 4, 0.8, 0.1, 1.1, 9, 0.1, 0.2, 11, "root ::= any", ("stop", "halt"))
        ),
        "style": Style(prefix="<", suffix=">"),
        "options": ModelOptions(
            gpu_layers=7,
            adapters={"a.gguf": Path("a.gguf"), "b.gguf": Path("b.gguf")},
            split=(3.0, 1.0),
            rpc=("one:1", "two:2"),
        ),
        "scales": {"a.gguf": 1.0, "b.gguf": 0.5},
        "context": ContextOptions(
            context=512,
            threads=3,
            batch_threads=4,
            flash_attention="on",
            key_type="q8_0",
            value_type="q5_1",
        ),
        "chat_template": "chatml",
        "mmproj": gguf,
        "draft": DraftOptions(gguf, count=2),
    }
    assert made.model.asked[0][1]["images"] == [str(gguf)]
    contents = [m["content"] for m in made.model.asked[1]]
    assert contents == ["Be brief", "<Hi>", "Fine", "<How are you?>"]
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
        "style": Style(),
        "options": ModelOptions(),
        "scales": {},
        "context": ContextOptions(),
        "chat_template": None,
        "draft": None,
        "mmproj": None,
    }


@pytest.mark.parametrize(
    ("given", "layers"),
    [("0", 0), ("99", 99), ("all", "all"), ("ALL", "all"), ("-1", "all"), ("auto", "auto")],
)
def test_gpu_layers(
    chat: Chat, fake: Callable[..., Fake], gguf: Path, given: str, layers: int | str
) -> None:
    made = fake()
    for option in ("-ngl", "--gpu-layers"):
        assert chat(b"", gguf, option, given)[0] == 0
        assert made.options["options"].gpu_layers == layers


def test_grammars_come_from_options_and_files(
    chat: Chat, fake: Callable[..., Fake], gguf: Path, tmp_path: Path, native: NativeBuild
) -> None:
    grammar, schema = tmp_path / "answer.gbnf", tmp_path / "answer.json"
    grammar.write_text('root ::= "yes"', encoding="utf-8")
    schema.write_text('{"const": "yes"}', encoding="utf-8")
    found = []
    for options in (
        ["--grammar-file", grammar],
        ["--json-schema", '{"const": "yes"}'],
        ["--json-schema-file", schema],
    ):
        made = fake()
        assert chat(b"", gguf, *options)[0] == 0
        found.append(made.options["sampling"].grammar)
    assert found[0] == 'root ::= "yes"'
    assert "yes" in found[1]
    assert found[1] == found[2]


def test_a_completion_reads_all_of_stdin(chat: Chat, fake: Callable[..., Fake], gguf: Path) -> None:
    made = fake([" more"])
    told = chat(b"Once\n upon\n", gguf, "--completion", "-sys", "Tale: ")
    assert told == (0, " more\n", "")
    assert made.model.completed == ["Tale: Once\n upon"]
    made = fake()
    assert chat(b"", gguf, "--completion") == (0, "", "")


def test_a_single_turn(chat: Chat, fake: Callable[..., Fake], gguf: Path) -> None:
    fake(["Fine"])
    assert chat(b"Hi\nHo\n", gguf, "-st") == (0, "Fine\n", "")
    fake(["Fine"])
    assert chat(b"Hi\nHo\n", gguf, "-st", "-p", "He") == (0, "Fine\n", "")
    fake()
    assert chat(b"", gguf, "-st") == (0, "", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-ngl", "many"], "'many' is neither a number nor 'all'"),
        (["-ngl", "1.5"], "'1.5' is neither a number nor 'all'"),
        (["--lora", "a.gguf:big"], "'big' is not the scale of an adapter"),
        (["--grammar", "root ::= x", "--json-schema", "{}"], "more than one grammar"),
        (["--json-schema", "{"], "the JSON schema is not JSON"),
        (["-ctk", "q9"], "'q9' is not one of"),
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
    assert "hint: Let it go on with your text: --completion" in err
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
        assert process.wait(300) == 130
        assert process.stdout.read()
        assert b"error: interrupted\n" in process.stderr.read()


# On a terminal.


class Terminal:
    """A chat in a pseudo-terminal, at which one types."""

    _START = (
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "from ggufkit.cli import main; main()"
    )

    def __init__(self, state: Path, *args: object) -> None:
        self._screen, inside = pty.openpty()
        termios.tcsetwinsize(inside, (24, 80))
        self._seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._START, "chat", *map(str, args)],
            cwd=Path(__file__).parents[2],
            env={
                **os.environ,
                "TERM": "xterm",
                "XDG_STATE_HOME": str(state),
            },
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
        )
        os.close(inside)

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def enter(self, text: str) -> None:
        self.type(text + "\r")

    def expect(self, pattern: str, seconds: float = 300) -> str:
        """Wait for a pattern in what was not looked at yet; gives all up to its end."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern.encode(), self._seen)):
            ready, _, _ = select.select([self._screen], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self._seen!r}"
            told = os.read(self._screen, 65536)
            for _ in range(told.count(b"\x1b[6n")):  # where is the cursor?
                self.type("\x1b[1;1R")
            self._seen += told
        before, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return before.decode(errors="replace")

    def expect_prompt(self) -> str:
        return self.expect(r"context \d+ of \d+ \(\d+ %\)")

    def leave(self) -> None:
        self.enter("/exit")
        assert self.process.wait(300) == 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


Opened = Callable[..., Terminal]


@pytest.fixture
def terminal(demo_gguf: Path, native: NativeBuild, tmp_path: Path) -> Iterator[Opened]:
    opened: list[Terminal] = []

    def start(*args: object, model: Path = demo_gguf) -> Terminal:
        opened.append(Terminal(tmp_path / "state", model, "--temp", "0", "-c", "256", *args))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_a_session_at_the_terminal(terminal: Opened, tmp_path: Path) -> None:
    screen, path = terminal("-n", "24"), tmp_path / "talk.json"
    assert "/help for help" in screen.expect("to leave")
    screen.expect_prompt()
    screen.enter("What is the capital of France?")
    shown = screen.expect_prompt()
    assert "stopped at the length asked for, 24 tokens" in shown
    screen.enter(f"/save {path}")
    screen.expect("saved in")
    screen.expect_prompt()
    first = read_conversation(path).history
    assert first[0]["content"] == "What is the capital of France?"
    assert first[1]["content"].split()[0] in shown
    screen.enter("/params n 3")
    screen.expect(r"mn +3\x1b")
    screen.expect_prompt()
    screen.enter("/regen")
    screen.expect("the answer will be the same")
    screen.expect("stopped at the length asked for, 3 tokens")
    screen.expect_prompt()
    screen.enter(f"/load {path}")
    screen.expect("loaded 2 messages")
    screen.expect_prompt()
    screen.enter("/system Be brief.")
    screen.expect("system message: Be brief")
    screen.expect_prompt()
    screen.enter(f"/save {path}")
    screen.expect("saved in")
    screen.expect_prompt()
    saved = read_conversation(path)
    assert (saved.history, saved.system) == (first, "Be brief.")
    assert saved.sampling.max_tokens == 24
    screen.leave()


def test_ctrl_c_ends_the_answer_and_not_the_program(terminal: Opened) -> None:
    screen = terminal("--no-markdown", "-c", "4096")
    screen.expect_prompt()
    screen.enter("Count from 1 to 1000, one number in each line.")
    screen.expect("2\r?\n")
    screen.type("\x03")
    told = screen.expect(r"context \d+ of 4096")
    assert re.search(r"interrupted, \d+ tokens, [\d.]+ tokens/s, ", told)
    screen.expect_prompt()
    screen.type("half a line")
    screen.expect("half a line")
    screen.type("\x03")  # throws away what was typed
    screen.enter("/help")
    screen.expect("/reset +forget")
    screen.expect_prompt()
    screen.type("\x03")
    screen.expect("Ctrl-C again, or Ctrl-D, to leave")
    screen.expect_prompt()
    screen.type("\x03")
    assert screen.process.wait(300) == 0


def test_markdown_is_drawn(terminal: Opened) -> None:
    grammar = r'root ::= "# Head\n\nSome **bold** text.\n\n- one\n- two\n"'
    screen = terminal("--grammar", grammar, "-p", "Go")
    shown = screen.expect_prompt()
    assert re.search("\x1b\\[1;4mHead\x1b", shown)
    assert re.search("Some \x1b\\[1mbold\x1b\\[0m text.", shown)
    assert " • " in shown
    screen.leave()


def test_what_was_typed_is_there_the_next_time(terminal: Opened, tmp_path: Path) -> None:
    screen = terminal("-n", "2")
    screen.expect_prompt()
    screen.enter("One line\\\rand another")
    screen.expect_prompt()
    screen.leave()
    kept = tmp_path / "state" / "ggufkit" / "chat-history"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    again = terminal("-n", "2")
    again.expect_prompt()
    again.type("\x1b[A\x1b[A")  # /exit, and what came before it
    again.expect("and another")
    again.type("\x1b\r!")  # Alt-Enter: a third line
    again.type("\r")
    again.expect_prompt()
    again.enter(f"/save {tmp_path / 'talk.json'}")
    again.expect("saved in")
    again.expect_prompt()
    again.leave()
    (question, _) = read_conversation(tmp_path / "talk.json").history
    assert question["content"] == "One line\nand another\n!"


def test_history_can_be_left_out(terminal: Opened, tmp_path: Path) -> None:
    screen = terminal("--no-history")
    screen.expect_prompt()
    screen.leave()
    assert not (tmp_path / "state").exists()


def test_ctrl_d_leaves(terminal: Opened) -> None:
    screen = terminal()
    screen.expect_prompt()
    screen.type("\x04")
    assert screen.process.wait(300) == 0


def test_commands_are_completed(terminal: Opened) -> None:
    screen = terminal()
    screen.expect_prompt()
    screen.type("/he\t\r")
    screen.expect("/reset +forget")
    screen.expect_prompt()
    screen.leave()


def test_a_first_message_and_then_the_keyboard(terminal: Opened) -> None:
    screen = terminal("-p", "Say hello", "-n", "3")
    assert "Say hello" in screen.expect("stopped at the length asked for, 3 tokens")
    screen.expect_prompt()
    screen.enter("word " * 300)
    screen.expect(r"the conversation has \d+ tokens")
    screen.expect_prompt()  # an error does not end the session
    screen.leave()


def test_a_single_turn_at_the_terminal(terminal: Opened) -> None:
    screen = terminal("-p", "Say hello", "-n", "3", "-st")
    screen.expect("stopped at the length asked for, 3 tokens")
    assert screen.process.wait(300) == 0


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2)])
def test_without_a_template_it_asks(
    terminal: Opened, demo_gguf: Path, tmp_path: Path, answer: str, code: int
) -> None:
    screen = terminal("-n", "3", model=without_template(demo_gguf, tmp_path / "mute.gguf"))
    screen.expect(r"mute\.gguf has no chat template")
    screen.expect(r"\[y/N\]: ")
    screen.enter(answer)
    if code == 0:
        screen.expect("it goes on with what you type")
        screen.expect_prompt()
        screen.enter("1, 2, 3,")
        screen.expect(" 4, 5|stopped at the length asked for, 3 tokens")
        screen.expect_prompt()
        screen.leave()
    else:
        screen.expect(r"mute\.gguf has no chat template")
        assert screen.process.wait(300) == code
