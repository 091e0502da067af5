import json
import os
from pathlib import Path
from typing import Any

import pytest

from ggufkit.errors import DiskSpaceError, IntegrityError, UsageError
from ggufkit.serve.answers import AnswerFile, digest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFKIT_CACHE", str(tmp_path / "cache"))


def answer(row_id: str | int, reason: str = "stop") -> dict[str, Any]:
    return {"id": row_id, "answer": "Gr\u00fc\u00dfe", "finish_reason": reason, "key": f"k{row_id}"}


def ids(path: Path) -> list[str | int]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_added_and_known_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    with AnswerFile(path) as file:
        assert file.known == {}
        file.append(answer("a"))
        assert ids(path) == ["a"]  # at once, not at the end
        file.append(answer(2))
    with AnswerFile(path) as file:
        assert file.known == {"a": "ka", 2: "k2"}
        file.append(answer("c"))
    assert ids(path) == ["a", 2, "c"]


def test_a_torn_line_is_taken_out_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as file:
        file.append(answer("a"))
        whole = path.stat().st_size
        file.append(answer("b"))
    held = path.read_bytes()
    for end in range(whole, len(held)):
        path.write_bytes(held[:end])
        with AnswerFile(path) as file:
            assert file.known == {"a": "ka"}
            file.append(answer("b"))
        assert path.read_bytes() == held


def test_what_failed_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as file:
        for row_id, reason in (("a", "stop"), ("b", "error"), ("c", "length")):
            file.append(answer(row_id, reason))
    with AnswerFile(path) as file:
        assert list(file.known) == ["a", "c"]
        file.append(answer("b"))
    assert ids(path) == ["a", "c", "b"]


@pytest.mark.parametrize("line", [b"notes", b"[]", b'{"id": 1}', b"\xff", b""])
def test_another_file_is_not_touched(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "out.jsonl"
    content = json.dumps(answer("a")).encode() + b"\n" + line + b"\nmore"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="line 2: this is not an answer"), AnswerFile(path):
        pass
    assert path.read_bytes() == content


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path):
        with pytest.raises(UsageError, match="another run is writing"), AnswerFile(path):
            pass
        with AnswerFile(tmp_path / "other.jsonl"):
            pass
    with AnswerFile(path):
        pass


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "out.jsonl", tmp_path):
        with pytest.raises(UsageError, match="cannot be written"), AnswerFile(path):
            pass


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as file:
        file.append(answer("a"))
        real = file._file

        class Full:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def write(self, line: bytes) -> int:
                return real.write(line[:7])

        file._file = Full()
        with pytest.raises(DiskSpaceError, match="no room to write"):
            file.append(answer("b"))
        assert ids(path) == ["a"]
        file._file = real
        file.append(answer("b"))
    assert ids(path) == ["a", "b"]


def test_digests_are_of_the_content(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert os.sep not in digest("x")
