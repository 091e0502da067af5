import os
from pathlib import Path

import pytest

from ggufkit.llamacpp import host


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two threads each, in pairs that share a last-level cache."""
    monkeypatch.setattr(host.sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for n in range(8):
        core, pair = n % 4, n % 4 // 2
        here = tmp_path / f"cpu{n}"
        put(here / "topology" / "thread_siblings_list", f"{core},{core + 4}")
        put(here / "cache" / "index0" / "level", "1")
        put(here / "cache" / "index0" / "shared_cpu_list", str(core))
        put(here / "cache" / "index0" / "size", "48K")
        put(here / "cache" / "index3" / "level", "3")
        put(here / "cache" / "index3" / "shared_cpu_list", f"pair {pair}")
        put(here / "cache" / "index3" / "size", "32768K")
    return tmp_path


def test_hyperthreads_are_no_cores(cpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.physical_cores(cpus) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 1})
    assert host.physical_cores(cpus) == 2


def test_last_level_caches_add_up(cpus: Path) -> None:
    assert host.last_level_cache_nbytes(cpus) == 2 * 32768 * 1024


def test_what_the_kernel_does_not_say(tmp_path: Path) -> None:
    assert host.physical_cores(tmp_path) is None
    assert host.last_level_cache_nbytes(tmp_path) == 0


def test_this_machine() -> None:
    assert 1 <= (host.physical_cores() or 1) <= (os.cpu_count() or 1)
    assert host.last_level_cache_nbytes() >= 0
