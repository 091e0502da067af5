"""Building, with a stand-in for CMake where the real one would take minutes.

The stand-in does what the builder relies on: it takes the commit when it
configures, and makes tools that print it.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ggufkit.errors import DiskSpaceError, GgufkitError, IntegrityError, ToolError, UsageError
from ggufkit.llamacpp import building, toolchain
from ggufkit.llamacpp.pin import Pin, read_pin
from ggufkit.progress import Silent

CMAKE = """#!/bin/sh
set -e
case "$1" in
--version) echo "cmake version ${FAKE_CMAKE_VERSION:-3.25.1}";;
--preset)
    test -f CMakePresets.json
    mkdir -p "$4"
    for word; do
        case "$word" in -DLLAMA_BUILD_COMMIT=*) echo "${word#*=}" > "$4/commit";; esac
    done;;
--build)
    echo "[1/2] Building CXX object a.cpp.o"
    if [ -n "$FAKE_CMAKE_ERROR" ]; then
        echo "a.cpp:1:2: error: $FAKE_CMAKE_ERROR"; echo "ninja: build stopped"; exit 1
    fi
    mkdir -p "$2/bin"
    commit=${FAKE_COMMIT:-$(cat "$2/commit")}
    for tool in llama-perplexity llama-quantize; do
        echo "#!/bin/sh" > "$2/bin/$tool"
        echo "echo 'version: 1 (build 0, commit $commit)'" >> "$2/bin/$tool"
        chmod +x "$2/bin/$tool"
    done
    echo "[2/2] Linking";;
esac
"""


class Listener(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the stand-in for CMake on the path."""
    monkeypatch.setenv("GGUFKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GGUFKIT_NATIVE", raising=False)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "cmake").write_text(CMAKE)
    (programs / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return tmp_path / "cache"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A llama.cpp source tree, as far as the builder looks at it; not in git."""
    tree = tmp_path / "llama.cpp"
    for name in ("CMakeLists.txt", "ggml/CMakeLists.txt", "convert_hf_to_gguf.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"# {name}\n")
    (tree / "gguf-py/gguf").mkdir(parents=True)
    (tree / "gguf-py/gguf/__init__.py").write_text("")
    return tree


def finished(cache: Path) -> list[Path]:
    return sorted(p.parent for p in cache.glob(f"native/*/{toolchain.BUILD_FILE}"))


def test_build_reuse_and_force(cache: Path, checkout: Path) -> None:
    first = building.build(source=checkout)
    assert not first.reused
    assert first.build == toolchain.find_build(source=checkout)
    assert first.build.tools == ("llama-quantize", "llama-perplexity")
    assert first.build.source_kind == "checkout"
    assert toolchain.identify(first.build) == first.build.commit
    assert (first.build.scripts / "convert_hf_to_gguf.py").is_file()
    assert (first.build.scripts / "gguf-py/gguf/__init__.py").is_file()
    assert not list(cache.glob("native/*.work"))
    assert building.build(source=checkout).reused
    forced = building.build(source=checkout, force=True)
    assert not forced.reused
    assert finished(cache) == [first.build.root] == [forced.build.root]


def test_the_key_covers_what_changes_a_build(
    cache: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [building.build(source=checkout).build.key]
    keys.append(building.build(source=checkout, cmake_args=["-DGGML_NATIVE=OFF"]).build.key)
    keys.append(building.build("metal", source=checkout).build.key)
    monkeypatch.setenv("CXXFLAGS", "-O1")
    keys.append(building.build(source=checkout).build.key)
    monkeypatch.delenv("CXXFLAGS")
    (checkout / "ggml" / "x.cpp").write_text("int x;")
    keys.append(building.build(source=checkout).build.key)
    assert len(set(keys)) == 5
    base = ("digest", "cpu", [], "c++ 1", "cpu 1")
    assert building.build_key(*base) != building.build_key(*base[:3], "c++ 2", "cpu 1")
    assert building.build_key(*base) != building.build_key(*base[:4], "cpu 2")


def test_a_failed_build_says_why_and_can_go_on(
    cache: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CMAKE_ERROR", "no such type")
    with pytest.raises(ToolError, match=r"a\.cpp:1:2: error: no such type") as caught:
        building.build(source=checkout)
    log = Path(caught.value.hint.rpartition(": ")[2])
    assert "ninja: build stopped" in log.read_text()
    assert not finished(cache)
    monkeypatch.delenv("FAKE_CMAKE_ERROR")
    assert not building.build(source=checkout).reused
    assert len(finished(cache)) == 1


@pytest.mark.parametrize(
    "step", ["_configure", "_compile", "_collect", "require_commit", "_publish"]
)
def test_an_interrupted_build_leaves_nothing_that_looks_finished(
    cache: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            building.build(source=checkout)
    with pytest.raises(ToolError, match="not built yet"):
        toolchain.find_build(source=checkout)
    assert not building.build(source=checkout).reused
    assert toolchain.find_build(source=checkout)


def test_tools_of_another_commit_are_refused(
    cache: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_COMMIT", "abcdef123")
    with pytest.raises(ToolError, match="of commit abcdef123, not tree"):
        building.build(source=checkout)
    assert not finished(cache)


def test_the_binding_is_not_installed_for_another_commit(cache: Path, checkout: Path) -> None:
    listener = Listener()
    report = building.build(source=checkout, progress=listener)
    assert report.binding == ""
    assert len(listener.warned) == 1
    assert read_pin().version in listener.warned[0]
    assert report.build.commit in listener.warned[0]


def test_what_is_missing_is_said_first(
    cache: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no backend 'gpu'") as usage:
        building.build("gpu")
    assert "cuda" in usage.value.hint
    with pytest.raises(UsageError, match="not a llama"):
        building.build(source=tmp_path)
    monkeypatch.setenv("FAKE_CMAKE_VERSION", "3.18.4")
    with pytest.raises(ToolError, match=r"CMake 3\.18 is too old; 3\.21"):
        building.build(source=checkout)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ToolError, match="CXX=no-such-compiler") as caught:
        building.build(source=checkout)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"needs a C\+\+ compiler") as caught:
        building.build(source=checkout)
    assert "apt install g++" in caught.value.hint
    with pytest.raises(ToolError, match=r"needs CMake 3\.21") as caught:
        building.require_cmake()
    assert "brew install cmake" in caught.value.hint


def test_a_full_disk_is_said_first(
    cache: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(building._DISK_NBYTES, "cpu", 1 << 60)
    with pytest.raises(DiskSpaceError, match=r"only .* GiB are free") as caught:
        building.build(source=checkout)
    assert "GGUFKIT_CACHE" in caught.value.hint


# The archive.

PIN = Pin("llama-cpp-python", "9.9", "llama_cpp_python-9.9.tar.gz", "", "0" * 40)


def archive_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def file(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f"llama_cpp_python-9.9/{name}")
    member.size = 3
    return member


def link(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f"llama_cpp_python-9.9/{name}")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


def test_unpack_takes_only_what_a_build_needs(tmp_path: Path) -> None:
    wanted = ("CMakeLists.txt", "src/llama.cpp", "models/templates/a.jinja")
    others = ("vendor/llama.cpp/docs/a.md", "vendor/llama.cpp/models/v.gguf", "llama_cpp/x.py")
    members = [file(f"vendor/llama.cpp/{name}") for name in wanted] + [file(n) for n in others]
    target = tmp_path / "tree"
    building.unpack(archive_of(tmp_path / "a.tar.gz", *members), target)
    found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert found == set(wanted)


@pytest.mark.parametrize(
    "member", [link("vendor/llama.cpp/a"), file("vendor/llama.cpp/../../../../a")]
)
def test_unpack_refuses_unsafe_members(tmp_path: Path, member: tarfile.TarInfo) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", file("vendor/llama.cpp/CMakeLists.txt"), member)
    with pytest.raises(IntegrityError, match="unsafe member"):
        building.unpack(archive, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_unpack_refuses_what_is_no_source_archive(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="holds no llama"):
        building.unpack(archive_of(tmp_path / "a.tar.gz", file("README.md")), tmp_path / "tree")
    (tmp_path / "b.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(IntegrityError, match="cannot be unpacked"):
        building.unpack(tmp_path / "b.tar.gz", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


@pytest.fixture
def fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], list[str]]:
    """Sets what the package index gives; returns the list of what was asked of it."""

    def set_content(content: bytes) -> list[str]:
        asked: list[str] = []

        def pip_download(
            requirement: str, sha256: str, directory: Path, progress: object, *, source: bool
        ) -> Path:
            assert source
            asked.append(requirement)
            directory.mkdir(parents=True)
            (directory / PIN.sdist).write_bytes(content)
            toolchain.check_sha256(directory / PIN.sdist, sha256)
            return directory / PIN.sdist

        monkeypatch.setattr(toolchain, "pip_download", pip_download)
        return asked

    return set_content


def test_the_archive_is_fetched_once(fetched: Callable[[bytes], list[str]], cache: Path) -> None:
    import dataclasses
    import hashlib

    pin = dataclasses.replace(PIN, sha256=hashlib.sha256(b"good").hexdigest())
    fetched(b"evil")
    with pytest.raises(IntegrityError) as caught:
        building.fetch_archive(pin)
    assert pin.sha256 in caught.value.message
    assert hashlib.sha256(b"evil").hexdigest() in caught.value.message
    assert caught.value.exit_code == 3
    assert not (cache / "archives" / PIN.sdist).exists()

    asked = fetched(b"good")
    archive = building.fetch_archive(pin)
    assert building.fetch_archive(pin) == archive
    assert asked == ["llama-cpp-python==9.9"]

    archive.write_bytes(b"goo")
    listener = Listener()
    assert building.fetch_archive(pin, listener).read_bytes() == b"good"
    assert len(asked) == 2
    assert "damaged" in listener.warned[0]


def test_errors_of_installing_the_binding() -> None:
    tail = ("error: externally-managed-environment", "x")
    ran = toolchain.ToolRun(("pip",), 1, 0.1, 0, tail)
    error: GgufkitError = building._install_error(ran, Path("x.log"))
    assert "belongs to the operating system" in error.message
    assert "venv" in error.hint
