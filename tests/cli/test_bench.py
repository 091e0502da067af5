import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ggufkit.cli import bench as verb
from ggufkit.evaluate import bandwidth
from ggufkit.llamacpp import host
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.values import SpeedResult

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(
    run_cli: Run,
    native: NativeBuild,
    tiny_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    monkeypatch.setattr(bandwidth, "_SMALLEST", 16 << 20)
    monkeypatch.setattr(host, "last_level_cache_nbytes", lambda: 8 << 20)
    quick = ("-p", "16", "-n", "8", "-r", "1")

    def run(*args: object) -> tuple[int, str, str]:
        return run_cli("--models-dir", tmp_path / "models", "bench", tiny_gguf, *quick, *args)

    return run


def test_a_table_and_json(bench: Run, tiny_gguf: Path) -> None:
    code, out, err = bench("-t", "1,2", "-fa", "on,off")
    assert code == 0, err
    lines = out.splitlines()
    assert str(tiny_gguf) in lines[0]
    assert lines[2].split() == [
        "test",
        "threads",
        "flash",
        "tokens/s",
        "memory",
        "bandwidth",
        "share",
    ]
    assert [line.split()[0] for line in lines[3:11]] == ["pp16"] * 4 + ["tg8"] * 4
    assert [line.split()[1:3] for line in lines[3:7]] == [
        *(["1", "on"], ["1", "off"], ["2", "on"], ["2", "off"])
    ]
    assert "GB/s" in lines[10]
    assert lines[10].endswith("%")
    assert "fits into the last-level cache (8 MiB)" in err
    code, out, err = bench("-t", "1,2", "-fa", "on,off", "--json")
    rows = json.loads(out)
    assert len(rows) == 8
    assert all(row["reused"] for row in rows)
    code, out, err = bench("-t", "1,2", "-fa", "on,off")
    assert "8 of 8 measured before" in out


def test_batches_show_when_they_differ(bench: Run) -> None:
    code, out, err = bench("-ub", "8,16", "-n", "0")
    assert code == 0, err
    assert [line.split()[2] for line in out.splitlines()[2:5]] == ["batch", "2048/8", "2048/16"]


def test_noise_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    row = SpeedResult(
        *(Path("a.gguf"), "prompt", 8, 0, 1, 8, 8, True, 0, 100.0, 9.0, 1000, 1000, None, None),
        machine="a machine",
    )
    verb._print(Console(width=200), [row])
    quiet = capsys.readouterr().out
    verb._print(Console(width=200), [row, replace(row, tokens_per_second_deviation=11.0)])
    noisy = capsys.readouterr().out
    assert "--again" not in quiet
    assert "--again" in noisy


def test_without_a_model_the_newest_is_measured(bench: Run, run_cli: Run, tiny_gguf: Path) -> None:
    models = tiny_gguf.parent.parent
    code, out, err = run_cli("--models-dir", models, "bench", "-p", "8", "-n", "0", "-r", "1")
    assert code == 0, err
    assert "measuring the newest model" in err
    assert "pp8" in out


@pytest.mark.parametrize(
    ("args", "code", "message", "hint"),
    [
        (["-t", "two"], 2, "'two' is not a list of numbers such as 1,2,4", "bench --help"),
        (["-fa", "maybe"], 2, "'maybe' is none of auto, on, off", "bench --help"),
        (["-t", "0"], 2, "at least 1", ""),
        (["-p", "0", "-n", "0"], 2, "nothing to measure", "-p or -n"),
        (["-ngl", "5"], 2, "CPU-only build", "--backend cuda"),
        (["-d", "2040"], 2, "trained with 2048 tokens of context", "at most 2048"),
    ],
)
def test_bad_input(bench: Run, args: list[str], code: int, message: str, hint: str) -> None:
    told = bench(*args)
    assert told[:2] == (code, "")
    assert message in told[2]
    assert hint in told[2]


def test_no_such_model_and_no_model(run_cli: Run, native: NativeBuild, tmp_path: Path) -> None:
    code, out, err = run_cli("bench", tmp_path / "none.gguf")
    assert (code, out) == (1, "")
    assert "there is no" in err
    other = tmp_path / "other.gguf"
    other.write_text("not a GGUF at all")
    code, out, err = run_cli("--models-dir", tmp_path / "models", "bench", other)
    assert (code, out) == (3, "")
    assert "is not a GGUF" in err
