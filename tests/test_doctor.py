import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit import doctor
from ggufkit.doctor import Finding
from ggufkit.errors import ToolError
from ggufkit.llamacpp import building, toolchain
from ggufkit.llamacpp.pin import read_pin
from ggufkit.llamacpp.toolchain import NativeBuild


def by_subject(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {f.subject: f for f in findings}


def test_a_machine_where_all_is_well(native: NativeBuild, tmp_path: Path) -> None:
    findings = by_subject(doctor.examine(tmp_path))
    wrong = [f for f in findings.values() if f.state == "problem"]
    assert not wrong
    assert native.commit in findings["native build"].detail
    assert findings["CPU features"].detail
    assert findings["llama-cpp-python"].detail.startswith(read_pin().version)
    assert findings["package torch"].detail == importlib.metadata.version("torch")
    assert {"python", "cmake", "C++ compiler", "GPU", "memory", "disk, cache"} <= findings.keys()
    assert all(f.remedy for f in findings.values() if f.state != "ok")


def test_without_a_native_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GGUFKIT_NATIVE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = by_subject(doctor.examine(tmp_path))
    assert findings["native build"].state == "problem"
    assert findings["native build"].remedy == "Run: ggufkit build"
    assert findings["cmake"].state == "problem"
    assert "apt install" in findings["cmake"].remedy
    assert "CPU features" not in findings


def test_a_native_build_that_does_not_run(
    native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(build: NativeBuild) -> str:
        raise ToolError("starting the tools failed: libfoo.so is missing")

    monkeypatch.setattr(toolchain, "identify", broken)
    finding = by_subject(doctor.examine(tmp_path))["native build"]
    assert finding.state == "problem"
    assert "libfoo.so" in finding.detail
    assert finding.remedy == "Run: ggufkit build --force"


@pytest.mark.parametrize(("version", "detail"), [("", "not installed"), ("0.1.0", "pinned")])
def test_the_binding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, detail: str
) -> None:
    monkeypatch.setattr(building, "binding_version", lambda: version)
    finding = by_subject(doctor.examine(tmp_path))["llama-cpp-python"]
    assert finding.state == "problem"
    assert detail in finding.detail
    assert finding.remedy == "Run: ggufkit build"


def test_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=999.1", "no-such-package>=1", "rich", "click>=8.1"]
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    findings = by_subject(doctor.examine(tmp_path))
    assert "older than 999.1" in findings["package numpy"].detail
    assert findings["package no-such-package"].detail == "not installed"
    assert "no-such-package>=1" in findings["package no-such-package"].remedy
    assert findings["package rich"].state == findings["package click"].state == "ok"


def test_a_gpu_that_the_build_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "devices", lambda build: ())
    monkeypatch.setattr(toolchain, "nvidia_gpus", lambda: ("NVIDIA H200, 143771 MiB, 570.1",))
    finding = by_subject(doctor.examine(tmp_path))["GPU"]
    assert finding.state == "warning"
    assert finding.remedy == "Run: ggufkit build --backend cuda"


def test_exit_code_and_json(
    run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Finding("cmake", "problem", "not here [bold]", "Install it")
    monkeypatch.setattr(doctor, "examine", lambda models_dir: (bad,))
    code, out, _ = run_cli("doctor")
    assert code == 1
    assert "not here [bold]" in out
    assert "→ Install it" in out
    code, out, _ = run_cli("doctor", "--json")
    assert code == 1
    assert json.loads(out)[0] == {
        "subject": "cmake", "state": "problem", "detail": "not here [bold]", "remedy": "Install it",
    }  # fmt: skip
    monkeypatch.setattr(doctor, "examine", lambda models_dir: (Finding("cmake", "ok", "3.25"),))
    assert run_cli("doctor")[0] == 0
