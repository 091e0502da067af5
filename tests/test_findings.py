"""The scripts in findings/ are run by people; here only their form is checked."""

import re
import subprocess
from pathlib import Path

import pytest

FINDINGS = Path(__file__).parent.parent / "findings"
SCRIPTS = sorted(p for p in FINDINGS.glob("*.sh") if p.name != "environment.sh")


@pytest.mark.parametrize("path", [*SCRIPTS, FINDINGS / "environment.sh"], ids=lambda p: p.name)
def test_the_shell_can_read_it(path: Path) -> None:
    ran = subprocess.run(["sh", "-n", path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_it_says_what_it_shows_and_compares_with_that(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    assert head.startswith("#!/bin/sh\n")
    assert "# One would guess: " in head
    assert "# What happens: " in head
    assert re.search(r"^#> ", head, re.MULTILINE)
    assert '. "$(dirname "$0")/environment.sh"' in text
    assert re.search(r"\bcompare\b", text)
    assert "ggufkit" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_all_that_it_installs_has_a_version(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    installed = re.findall(r"^(?:need|beside \w+) (.+)$", text, re.MULTILINE)
    assert installed
    for word in " ".join(installed).split():
        assert re.fullmatch(r"'?[\w-]+==[\w.]+'?", word), word


def test_the_table_has_each_of_them() -> None:
    table = (FINDINGS / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[([\w.-]+)\]\(([\w.-]+)\)", table, re.MULTILINE)
    assert all(one == other for one, other in named)
    assert sorted(name for name, _ in named) == [p.name for p in SCRIPTS]
