from collections.abc import Callable
from pathlib import Path

import click
import pytest

from ggufkit import cli
from ggufkit.cli.session import LineProgress, Session, nbytes_text
from ggufkit.errors import GgufkitError, IntegrityError, UsageError

Run = Callable[..., tuple[int, str, str]]


def test_help_names_every_verb_with_its_own_help(run_cli: Run) -> None:
    code, out, err = run_cli("--help")
    assert (code, err) == (0, "")
    verbs = [line.split()[0] for line in out.partition("Commands:")[2].strip().splitlines()]
    assert {"build", "convert", "awq", "quantize", "ppl", "doctor"} <= set(verbs)
    for verb in verbs:
        code, out, _ = run_cli(verb, "--help")
        assert code == 0
        assert out.startswith(f"Usage: ggufkit {verb}")


def test_a_wrong_verb_suggests_the_nearest(run_cli: Run) -> None:
    code, out, err = run_cli("convrt", "model")
    assert (code, out) == (2, "")
    assert "error: there is no command 'convrt'. Did you mean 'convert'?" in err


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (GgufkitError("broken", "mend it"), 1, "error: broken\nhint: mend it\n"),
        (UsageError("wrong"), 2, "error: wrong\n"),
        (IntegrityError("truncated"), 3, "error: truncated\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_become_text_in_one_place(
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    shown: str,
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(cli.root, "main", fails)
    told, out, err = run_cli()
    assert (told, out) == (code, "")
    assert err.startswith(shown)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli.root, "main", fails)
    with pytest.raises(ZeroDivisionError):
        cli.execute([])


def test_the_models_directory_comes_from_the_option_or_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Path] = []

    @click.command("show")
    @click.pass_obj
    def show(session: Session) -> None:
        seen.append(session.models_dir)

    monkeypatch.setattr(type(cli.root), "get_command", lambda *_: show)
    monkeypatch.setattr(type(cli.root), "list_commands", lambda *_: ["show"])
    cli.execute(["show"])
    monkeypatch.setenv("GGUFKIT_MODELS", "from-environment")
    cli.execute(["show"])
    cli.execute(["--models-dir", "from-option", "show"])
    assert seen == [Path("models"), Path("from-environment"), Path("from-option")]


def test_progress_is_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress()
    progress.interval_seconds = 0.0
    progress.say("hello")
    progress.warn("careful")
    with progress.task("work", 10, "pieces") as task:
        task.update(5, "half-way")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:3] == ["hello", "warning: careful", "work ..."]
    assert err.splitlines()[3].startswith("work: 50 %, ")
    assert err.splitlines()[3].endswith("half-way")


def test_quiet_keeps_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress(quiet=True)
    progress.say("hello")
    with progress.task("work", 10) as task:
        task.update(5)
    progress.warn("careful")
    assert capsys.readouterr().err == "warning: careful\n"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.00 GiB")],
)
def test_sizes_are_in_binary_units(nbytes: int, text: str) -> None:
    assert nbytes_text(nbytes) == text
