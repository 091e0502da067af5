"""Running programs, finding builds, and the wrappers on the real tools."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ggufkit.errors import GgufkitError, IntegrityError, SourceError, ToolError
from ggufkit.llamacpp import host, toolchain
from ggufkit.llamacpp.pin import native_dir, read_pin, recipe_digest
from ggufkit.llamacpp.toolchain import BUILD_FILE, NativeBuild, ToolRun
from ggufkit.values import to_json
from tests.factory import break_architecture, make_checkpoint

# Running programs.


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_merges_streams_and_keeps_a_log(tmp_path: Path) -> None:
    pieces: list[str] = []
    code = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"
    ran = toolchain.run(python(code), on_text=pieces.append, log=tmp_path / "logs" / "a.log")
    assert ran.returncode == 3
    assert "".join(pieces) == "out\nerr\n"
    assert ran.tail == ("out", "err")
    log = (tmp_path / "logs" / "a.log").read_text()
    assert log.startswith("$ ")
    assert log.endswith("out\nerr\n")
    assert ran.argv[1:] == ("-c", code)


def test_run_can_leave_stdout_out(tmp_path: Path) -> None:
    pieces: list[str] = []
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    toolchain.run(python(code), on_text=pieces.append, stderr_only=True, log=tmp_path / "a.log")
    assert "".join(pieces) == "err\n"
    assert "out\n" in (tmp_path / "a.log").read_text()


PATIENT = """
import pathlib, sys, time
print("[1]2.5,", end="", flush=True)
for _ in range(300):
    if pathlib.Path(sys.argv[1]).exists():
        print("heard")
        break
    time.sleep(0.1)
"""


def test_run_gives_text_before_its_line_ends(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    ran = toolchain.run([*python(PATIENT), answer], on_text=lambda text: answer.touch())
    assert ran.tail == ("[1]2.5,heard",)


def test_run_changes_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GGUFKIT_TEST_GONE", "1")
    code = "import os; print(os.environ.get('GGUFKIT_TEST_GONE'), os.environ['NEW'], os.getcwd())"
    env = {"GGUFKIT_TEST_GONE": None, "NEW": "x"}
    assert toolchain.run(python(code), env=env, cwd=tmp_path).tail == (f"None x {tmp_path}",)


def test_run_measures_the_program_and_not_this_process() -> None:
    ours = bytearray(400 << 20)
    ran = toolchain.run(python("x = bytearray(64 << 20)"))
    assert len(ours) > 300 << 20
    assert 64 << 20 < ran.peak_rss_nbytes < 200 << 20


def test_run_reports_signals() -> None:
    ran = toolchain.run(python("import os; os.abort()"))
    assert ran.returncode == -signal.SIGABRT
    error = toolchain.explain_failure(ran, "counting", Path("x.log"))
    assert "SIGABRT" in error.message
    assert "x.log" in error.hint


def test_run_needs_a_program() -> None:
    with pytest.raises(ToolError, match="no program 'no-such-program'"):
        toolchain.run(["no-such-program"])


FAMILY = r"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
os.write(1, f"{os.getpid()} {child.pid}\n".encode())
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Whether a process ends within seconds; one that nobody reaped counts as ended."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_an_exception_ends_the_whole_family() -> None:
    pids: list[int] = []

    def interrupt(text: str) -> None:
        pids.extend(map(int, text.split()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toolchain.run(python(FAMILY), on_text=interrupt)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_killing_the_asker_ends_the_whole_family() -> None:
    code = f"""
import sys
from ggufkit.llamacpp import toolchain
toolchain.run([sys.executable, "-c", {FAMILY!r}], on_text=lambda t: print(t, flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None
        pids = [int(pid) for pid in asker.stdout.readline().split()]
        asker.kill()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


# pip, on an index that is a directory.


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package index with the wheel ``tiny==1.0``; gives its hash."""
    place = tmp_path / "index"
    place.mkdir()
    path = place / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pip_download(index: str, tmp_path: Path) -> None:
    got = toolchain.pip_download("tiny==1.0", index, tmp_path / "got")
    assert got == tmp_path / "got" / "tiny-1.0-py3-none-any.whl"
    assert [p.name for p in got.parent.iterdir()] == [got.name]


def test_pip_download_of_another_file(index: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        toolchain.pip_download("tiny==1.0", "0" * 64, tmp_path / "got")
    assert index in caught.value.message
    assert "0" * 64 in caught.value.message
    assert not list((tmp_path / "got").glob("*.whl"))


def test_pip_download_of_nothing(index: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tiny==2\.0 cannot be fetched") as caught:
        toolchain.pip_download("tiny==2.0", index, tmp_path / "got")
    assert "pip.log" in caught.value.hint


def test_pip_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(ToolError, match="has no pip") as caught:
        toolchain.pip(["--version"])
    assert "ensurepip" in caught.value.hint


# Finding builds.


def put_build(root: Path, **changes: object) -> NativeBuild:
    build = NativeBuild(
        root=root,
        key="k",
        commit=read_pin().commit,
        backend="cpu",
        compiler="c++ 1",
        cpu=host.cpu_identity(),
        flags=(),
        tools=("llama-bench",),
        built="2026-01-01T00:00:00+00:00",
        source_kind="pin",
        source=read_pin().sha256,
        recipe=recipe_digest(),
    )
    build = dataclasses.replace(build, **changes)  # type: ignore[arg-type]
    described = to_json(build)
    del described["root"]
    root.mkdir(parents=True)
    (root / BUILD_FILE).write_text(json.dumps(described))
    return build


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; gives its directory of builds."""
    monkeypatch.setenv("GGUFKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GGUFKIT_NATIVE", raising=False)
    return toolchain.builds_dir()


def test_no_build(builds: Path) -> None:
    with pytest.raises(ToolError, match="not built yet") as caught:
        toolchain.find_build()
    assert caught.value.hint == "Run: ggufkit build"
    with pytest.raises(ToolError, match="for cuda") as caught:
        toolchain.find_build("cuda")
    assert caught.value.hint == "Run: ggufkit build --backend cuda"


def test_newest_build_wins(builds: Path) -> None:
    put_build(builds / "a")
    newest = put_build(builds / "b", built="2026-03-01T00:00:00+00:00", backend="cuda")
    put_build(builds / "c", built="2026-02-01T00:00:00+00:00")
    assert toolchain.find_build() == newest
    assert toolchain.find_build("cpu").root.name == "c"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cpu": "another"}, "another CPU"),
        ({"recipe": "0"}, "other build files"),
        ({"source": "0"}, "yet"),
        ({"source_kind": "checkout", "source": "/src"}, "yet"),
    ],
)
def test_builds_that_do_not_fit(builds: Path, changes: dict[str, str], reason: str) -> None:
    put_build(builds / "a", **changes)
    with pytest.raises(ToolError, match=reason):
        toolchain.find_build()


def test_unfinished_builds_are_not_found(builds: Path) -> None:
    put_build(builds / "a.partial")
    (builds / "b").mkdir()
    with pytest.raises(ToolError, match="yet"):
        toolchain.find_build()
    (builds / "c").mkdir()
    (builds / "c" / BUILD_FILE).write_text("{")
    with pytest.raises(ToolError, match="damaged"):
        toolchain.find_build()


def test_a_checkout_is_found_by_its_place(builds: Path, tmp_path: Path) -> None:
    wanted = put_build(builds / "a", source_kind="checkout", source=str(tmp_path.resolve()))
    assert toolchain.find_build(source=tmp_path) == wanted


def test_a_build_named_by_the_environment(builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = put_build(builds / "a", source_kind="checkout", commit="abc")
    monkeypatch.setenv("GGUFKIT_NATIVE", str(named.root))
    assert toolchain.find_build() == named
    monkeypatch.setenv("GGUFKIT_NATIVE", str(builds))
    with pytest.raises(IntegrityError, match="no finished build"):
        toolchain.find_build()
    other = put_build(builds / "b", cpu="another CPU: x")
    monkeypatch.setenv("GGUFKIT_NATIVE", str(other.root))
    with pytest.raises(ToolError, match="another CPU"):
        toolchain.find_build()


def test_a_tool_that_was_not_built(builds: Path) -> None:
    with pytest.raises(ToolError, match="no llama-quantize") as caught:
        put_build(builds / "a").tool("llama-quantize")
    assert caught.value.hint == "Run: ggufkit build --force"


def test_pin_is_complete() -> None:
    pin = read_pin()
    assert len(pin.sha256) == 64
    assert len(pin.llama_cpp_commit) == 40
    assert pin.llama_cpp_commit.startswith(pin.commit)
    assert pin.requirement == f"llama-cpp-python=={pin.version}"
    assert (native_dir() / "CMakeLists.txt").is_file()


# The real tools.


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="module")
def model(native: NativeBuild, scratch: Path) -> Path:
    """A tiny random Llama, converted by the real converter."""
    checkpoint = make_checkpoint(scratch / "checkpoint")
    out = scratch / "tiny-F32.gguf"
    log = scratch / "convert.log"
    ran = toolchain.convert_checkpoint(native, checkpoint, out, outtype="f32", name="Tiny", log=log)
    assert ran.peak_rss_nbytes > 0
    assert "convert_hf_to_gguf.py" in log.read_text()
    return out


def test_identity(native: NativeBuild) -> None:
    assert toolchain.identify(native) == native.commit == read_pin().commit
    assert toolchain.cpu_features(native)
    assert isinstance(toolchain.devices(native), tuple)
    assert len({native.digest_of(tool) for tool in native.tools}) == len(native.tools)


def test_convert_refuses_an_unknown_architecture(native: NativeBuild, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    break_architecture(checkpoint)
    out = tmp_path / "out.gguf"
    with pytest.raises(ToolError, match="does not know the architecture") as caught:
        toolchain.convert_checkpoint(
            native, checkpoint, out, outtype="f16", name="X", log=tmp_path / "convert.log"
        )
    assert "convert.log" in caught.value.hint
    assert not out.exists()


def quantize(native: NativeBuild, model: Path, out: Path, type: str, **options: object):  # type: ignore[no-untyped-def]
    return toolchain.quantize(
        native, model, out, type, threads=1, log=out.with_suffix(".log"), **options
    )


def test_quantize_and_its_dry_run_agree(native: NativeBuild, model: Path, tmp_path: Path) -> None:
    overrides = {"blk.0.attn_q.weight": "q8_0", "blk.1.ffn_down.weight": "q6_K"}
    out = tmp_path / "out.gguf"
    planned = quantize(native, model, out, "Q4_K_M", dry_run=True, tensor_types=overrides)
    assert not out.exists()
    done = quantize(native, model, out, "Q4_K_M", tensor_types=overrides)
    assert done.tensors == planned.tensors
    assert done.fallbacks == planned.fallbacks == {}
    types = {t.name: t.type for t in done.tensors}
    assert types["blk.0.attn_q.weight"] == "q8_0"
    assert types["blk.1.attn_q.weight"] == "q4_K"
    assert types["blk.1.ffn_down.weight"] == "q6_K"
    assert out.stat().st_size > sum(t.nbytes for t in done.tensors)
    assert done.peak_rss_nbytes > 0


def test_quantize_refuses_with_reasons(native: NativeBuild, model: Path, tmp_path: Path) -> None:
    small, out = tmp_path / "small.gguf", tmp_path / "out.gguf"
    quantize(native, model, small, "Q8_0")
    with pytest.raises(ToolError, match=r"quantized already \(to q8_0\)") as caught:
        quantize(native, small, out, "Q4_0")
    assert "--allow-requantize" in caught.value.hint
    with pytest.raises(ToolError, match="needs an importance matrix"):
        quantize(native, model, out, "IQ1_S")
    with pytest.raises(ToolError, match=r"output_norm\.weight was to become q8_0"):
        quantize(native, model, out, "Q4_0", tensor_types={"output_norm.weight": "q8_0"})
    (tmp_path / "broken.gguf").write_bytes(b"not a GGUF")
    with pytest.raises(ToolError, match="invalid magic characters"):
        quantize(native, tmp_path / "broken.gguf", out, "Q4_0")
    assert not out.exists()
    quantize(native, small, out, "Q4_0", allow_requantize=True)
    assert out.exists()
    with pytest.raises(ValueError, match="absolute"):
        quantize(native, model, Path("out.gguf"), "Q4_0")


def test_the_path_of_the_imatrix_stays_out(
    native: NativeBuild, model: Path, text: Path, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    place = tmp_path / "private place"
    place.mkdir()
    imatrix = place / "imatrix.gguf"
    argv = [native.tool("llama-imatrix"), "-m", model, "-f", text, "-o", imatrix, "-c", "64"]
    ran = toolchain.run([*argv, "--chunks", "2", "-t", "1"])
    assert ran.returncode == 0, ran.tail
    out = tmp_path / "out.gguf"
    told = quantize(native, model, out, "Q4_0", imatrix=imatrix)
    assert told.total_tensors == len(told.tensors)
    assert GGUFReader(out).fields["quantize.imatrix.file"].contents() == "imatrix.gguf"


@pytest.fixture(scope="module")
def text(scratch: Path) -> Path:
    path = scratch / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return path


def test_perplexity(native: NativeBuild, model: Path, text: Path, tmp_path: Path) -> None:
    estimates: list[tuple[int, int | None, float]] = []
    told = toolchain.perplexity(
        native,
        model,
        text,
        context=64,
        chunks=3,
        threads=1,
        log=tmp_path / "p.log",
        on_estimate=lambda *estimate: estimates.append(estimate),
    )
    assert [n for n, _, _ in estimates] == [1, 2, 3]
    assert {total for _, total, _ in estimates} == {3}
    assert told.chunk_estimates == tuple(value for _, _, value in estimates)
    assert told.perplexity == told.chunk_estimates[-1]
    assert (told.tokens, told.chunks, told.context) == (192, 3, 64)
    assert told.perplexity > 1
    assert told.error > 0


def test_a_result_that_the_logger_lost_is_asked_for_again(
    native: NativeBuild,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, ran = toolchain.run, 0

    def lossy(argv: Any, *, on_text: Any, **options: Any) -> ToolRun:
        nonlocal ran
        ran += 1
        printed: list[str] = []
        told = run(argv, on_text=printed.append, **options)
        on_text("".join(printed).partition("Final")[0] if ran == 1 else "".join(printed))
        return told

    monkeypatch.setattr(toolchain, "run", lossy)
    told = toolchain.perplexity(
        native, model, text, context=64, chunks=3, threads=1, log=tmp_path / "p.log"
    )
    assert ran >= 2
    assert told.perplexity > 1


def test_perplexity_of_a_short_text(native: NativeBuild, model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.", encoding="utf-8")
    with pytest.raises(GgufkitError, match=r"only \d+ tokens; a context of 64 needs at least 128"):
        toolchain.perplexity(native, model, short, context=64, threads=1, log=tmp_path / "p.log")


def test_perplexity_of_no_model(native: NativeBuild, text: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not a GGUF")
    with pytest.raises(ToolError, match=r"measuring broken\.gguf failed") as caught:
        toolchain.perplexity(
            native, tmp_path / "broken.gguf", text, threads=1, log=tmp_path / "p.log"
        )
    assert "p.log" in caught.value.hint
