"""What tests of several verbs share."""

from pathlib import Path

import pytest


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file for verbs whose pipeline is replaced: it is named, and never read."""
    path = tmp_path / "any.gguf"
    path.write_bytes(b"never opened")
    return path
