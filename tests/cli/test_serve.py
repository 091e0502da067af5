"""``ggufkit serve`` on the real command line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ggufkit import pipeline
from ggufkit.llamacpp.batching import ContextOptions, ModelOptions
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.serve.api.options import Limits, ServeOptions
from ggufkit.serve.drafting import DraftOptions
from ggufkit.serve.hosting import HostOptions
from tests.chatting import without_template
from tests.serve.serving import eventually, hosted

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What :func:`pipeline.serve` is asked for, instead of serving."""
    found: dict[str, Any] = {}

    def serve(models: dict[str, Path], **options: Any) -> None:
        found.update(options, models=models)
        model = hosted(template=None, parallel=2)
        options["on_start"]("http://127.0.0.1:1", model)
        model.close()

    monkeypatch.setattr(pipeline, "serve", serve)
    return found


def test_every_option_arrives(run_cli: Run, asked: dict[str, Any], gguf: Path) -> None:
    words = "--host 0.0.0.0 --port 0 --api-key a --api-key b --cors http://page -np 3 --cells 900"
    more = "--memory 1.5 --max-queue 7 --max-tokens 9 --max-body 0.5 --max-clients 11 --timeout 12"
    rest = "--grace 13 --chat-template chatml -ngl 4 --lora l.gguf:0.5 -c 256 -t 2 -fa on -ctk q8_0"
    rest += f" --draft {gguf} --draft-max 3"
    words, more, rest = words.split(), more.split(), rest.split()
    code, out, err = run_cli("serve", f"x={gguf}", "--ui", *words, *more, *rest)
    assert (code, out) == (0, "")
    assert asked["models"] == {"x": gguf}
    assert asked["options"] == ServeOptions(
        host="0.0.0.0",
        port=0,
        keys=("a", "b"),
        origins=("http://page",),
        ui=True,
        memory_nbytes=3 << 29,
        limits=Limits(
            body_nbytes=1 << 19,
            max_tokens=9,
            timeout_seconds=12,
            connections=11,
            shutdown_seconds=13,
        ),
        hosting=HostOptions(
            model=ModelOptions(gpu_layers=4, adapters={"l.gguf": Path("l.gguf")}),
            context=ContextOptions(
                context=256, cells=900, threads=2, flash_attention="on", key_type="q8_0"
            ),
            scales={"l.gguf": 0.5},
            draft=DraftOptions(gguf, count=3),
            chat_template="chatml",
            parallel=3,
            queue=7,
        ),
    )
    assert "http://127.0.0.1:1/v1" in err
    assert "page: http://127.0.0.1:1\n" in err
    assert "models: x" in err
    assert "2 users at once" in err
    assert "stop: Ctrl-C" in err


def test_without_options_it_is_for_this_machine_alone(
    run_cli: Run, asked: dict[str, Any], gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GGUFKIT_API_KEY", raising=False)
    assert run_cli("serve", gguf)[0] == 0
    assert asked["models"] == {"any": gguf}
    assert asked["options"] == ServeOptions()
    assert asked["options"].host == "127.0.0.1"


def test_keys_come_from_the_environment(
    run_cli: Run, asked: dict[str, Any], gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGUFKIT_API_KEY", "one two")
    assert run_cli("serve", gguf)[0] == 0
    assert asked["options"].keys == ("one", "two")


def test_names_of_models(run_cli: Run, asked: dict[str, Any], gguf: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a=b.gguf"
    odd.write_bytes(b"")
    assert run_cli("serve", gguf, odd, f"c={gguf}")[0] == 0
    assert asked["models"] == {"any": gguf, "a=b": odd, "c": gguf}
    assert run_cli("serve", gguf, "--alias", "n")[0] == 0
    assert asked["models"] == {"n": gguf}
    for wrong in ((gguf, gguf), (gguf, odd, "--alias", "n"), ()):
        code, _, err = run_cli("serve", *wrong)
        assert code == 2, err


def test_a_page_that_lacks_its_package_is_told(
    run_cli: Run, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    monkeypatch.delitem(sys.modules, "ggufkit.serve.ui.mounting", raising=False)
    code, _, err = run_cli("serve", gguf, "--ui", "--port", 0)
    assert (code, "'nicegui' is needed" in err) == (2, True)
    assert "pip install 'ggufkit[ui]'" in err


# The real thing.


def test_what_cannot_be_served_is_told(run_cli: Run, demo_gguf: Path, tmp_path: Path) -> None:
    code, _, err = run_cli("serve", tmp_path / "none.gguf")
    assert (code, "there is no" in err) == (1, True)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 40)
    assert run_cli("serve", broken, "--port", 0)[0] == 3
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run_cli("serve", demo_gguf, "--port", port)
    assert (code, "cannot listen" in err) == (2, True)
    code, _, err = run_cli("serve", demo_gguf, "--port", 0, "--memory", 0.01)
    assert (code, "--memory" in err) == (2, True)
    code, _, err = run_cli("serve", demo_gguf, "--port", 0, "--api-key", "")
    assert (code, "empty" in err) == (2, True)
    code, _, err = run_cli("serve", f"a={demo_gguf}", f"b={demo_gguf}", "--port", 0, "--lora", "l")
    assert (code, "LoRA" in err) == (2, True)


@contextmanager
def started(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server in a process of its own, its address, and what it says first."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ggufkit", "serve", *map(str, arguments), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    try:
        with process.stderr:
            for line in process.stderr:
                said.append(line)
                if line.startswith("stop:"):
                    break
            found = re.search(r"serving at (http://\S+)/v1", "".join(said))
            assert found, said
            yield process, found[1], said
            said += process.stderr.readlines()
    finally:
        process.kill()
        process.wait()


def test_sigterm_under_load(demo_gguf: Path, native: NativeBuild, tmp_path: Path) -> None:
    """What runs or waits is finished, nothing new is taken, and the exit is a clean one."""
    mute = without_template(demo_gguf, tmp_path / "mute.gguf")
    served = (f"m={mute}", "-c", 256, "-t", 1, "-np", 2, "--grace", 300)
    with started(*served) as (process, url, said), ThreadPoolExecutor(5) as pool:
        assert "context: 256 tokens for each user" in "".join(said)
        assert "no chat template" in "".join(said)
        streams = [pool.submit(streamed, url, f"Number {n}") for n in range(5)]
        eventually(lambda: taken(url) == 5)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: refused(url))
        for stream in streams:
            *_, end, done = stream.result()
            assert done == "data: [DONE]"
            assert json.loads(end.removeprefix("data: "))["choices"][0]["finish_reason"]
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(said)


def streamed(url: str, prompt: str) -> list[str]:
    body = {"prompt": prompt, "max_tokens": 30, "stream": True, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    return [line for line in answer.text.splitlines() if line]


def taken(url: str) -> float:
    """Requests that the server has begun with."""
    counts = httpx.get(f"{url}/metrics").text
    return sum(
        float(line.rpartition(" ")[2])
        for line in counts.splitlines()
        if line.startswith(("ggufkit_running{", "ggufkit_waiting{", "ggufkit_finished_total{"))
    )


def refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.TransportError:
        return True
    return False


def test_ctrl_c_ends_it(demo_gguf: Path, native: NativeBuild) -> None:
    with started(demo_gguf, "-c", 256, "-t", 1, "--grace", 0) as (process, url, said):
        body = {"prompt": "One two", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(said)
    assert not left_behind(process.pid)


def left_behind(parent: int) -> list[str]:
    """Processes that the server started and that still run."""
    time.sleep(0.1)
    found = []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8")
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            found.append(stat)
    return found
