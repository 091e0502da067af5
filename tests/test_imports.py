"""The import rule of docs/architecture.md, held by reading the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ggufkit"

FLOORS = (
    {"cli", "__main__"},
    {"pipeline", "conversion"},
    {
        "sources",
        "scaling",
        "quantize",
        "evaluate",
        "serve",
        "verify",
        "ollama",
        "library",
        "doctor",
    },
    {"texts"},
    {"llamacpp", "checkpoint", "store"},
    {"values", "errors", "foreign", "progress", "settings", "__init__"},
)
"""From the roof down. A room may import rooms of lower floors only."""

FREE_AMONG_THEMSELVES = ({"pipeline", "conversion"}, *FLOORS[4:], FLOORS[0])
"""Floors whose rooms are foundations (or one roof) and may know each other."""

ONLY_IN = {
    "click": {"cli"},
    "rich": {"cli"},
    "prompt_toolkit": {"cli"},
    "subprocess": {"llamacpp/toolchain.py"},
    "llama_cpp": {"llamacpp/runtime.py"},
    "nicegui": {"serve/ui"},
    "pyarrow": {"texts/arrow.py"},
}
ONLY_INSIDE_FUNCTIONS = {
    "torch": {"scaling", "checkpoint", "verify"},
    "transformers": {"scaling", "checkpoint", "verify"},
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(n for n, rooms in enumerate(FLOORS) if room in rooms)


def imports(tree: ast.Module) -> list[tuple[str, bool]]:
    """Names imported, and whether at the top of the module (and for real)."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute here"
                found.append((str(child.module), top))
                if child.module == "ggufkit":
                    found.extend((f"ggufkit.{alias.name}", top) for alias in child.names)
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            walk(child, top and not inner)

    walk(tree, True)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    for name, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] != "ggufkit" or len(parts) == 1 or parts[1] in (room, "__version__"):
            continue
        other = parts[1]
        below = floor_of(other) > floor_of(room)
        together = any({room, other} <= rooms for rooms in FREE_AMONG_THEMSELVES)
        assert below or together, f"{path.name} ({room}) imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_packages_stay_in_their_rooms(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    for name, top in imports(ast.parse(path.read_text(encoding="utf-8"))):
        package = name.split(".")[0]
        places = {relative, relative.rpartition("/")[0], room_of(path)}
        if package in ONLY_IN:
            assert ONLY_IN[package] & places, f"{relative} imports {package}"
        if package in ONLY_INSIDE_FUNCTIONS:
            assert ONLY_INSIDE_FUNCTIONS[package] & places, f"{relative} imports {package}"
            assert not top, f"{relative} imports {package} outside of a function"


def test_the_command_line_starts_light() -> None:
    code = (
        "import sys; from ggufkit import cli; cli.execute(['--help']);"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'numpy', 'rich', 'prompt_toolkit'};"
        "heavy &= set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Commands:" in ran.stdout
