from pathlib import Path

import pytest

from ggufkit.checkpoint import check_tokenizer, open_checkpoint
from ggufkit.errors import CheckpointError
from tests import factory
from tests.factory import make_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny", hidden=64)


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_tokenizer(open_checkpoint(path))
    assert caught.value.hint
    return caught.value.message


def test_the_right_one_passes(checkpoint: Path) -> None:
    check_tokenizer(open_checkpoint(checkpoint))


@pytest.mark.parametrize("kept", ["tokenizer.json", "tokenizer.model"])
def test_tokens_without_embeddings(checkpoint: Path, kept: str) -> None:
    factory.break_wrong_tokenizer(checkpoint)
    for name in {"tokenizer.json", "tokenizer.model"} - {kept}:
        (checkpoint / name).unlink()
    found = message(checkpoint)
    assert f"{kept} has 576 tokens" in found
    assert "embeddings for 512 only" in found


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("tokenizer.json", b"{}", "cannot be read"),
        ("tokenizer.json", b"[", "is not valid JSON"),
        ("tokenizer.json", b"[]", "cannot be read"),
        ("tokenizer.model", b"\nrubbish", "cannot be read"),
    ],
)
def test_a_damaged_tokenizer(checkpoint: Path, name: str, data: bytes, reason: str) -> None:
    (checkpoint / name).write_bytes(data)
    assert f"{name} {reason}" in message(checkpoint)


def test_added_tokens_count(checkpoint: Path) -> None:
    import json

    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 600, "content": "<new>"})
    path.write_text(json.dumps(content))
    assert "has 601 tokens" in message(checkpoint)


def test_a_tiktoken_table_called_tokenizer_model(checkpoint: Path) -> None:
    lines = "".join(f"YQ== {i}\n" for i in range(513))
    (checkpoint / "tokenizer.model").write_text(lines)
    assert "has 513 tokens" in message(checkpoint)
