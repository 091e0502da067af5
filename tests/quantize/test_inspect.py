import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from ggufkit.errors import IntegrityError
from ggufkit.quantize.inspect import TypeShare, inspect

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A GGUF that says as little as one can."""
    path = tmp_path / "bare.gguf"
    writer = GGUFWriter(path, "odd")
    writer.add_tensor("a.weight", np.zeros((2, 32), dtype=np.float16))
    blocks = np.zeros((4, 34), dtype=np.uint8)
    writer.add_tensor("b.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_real_model(demo_gguf: Path) -> None:
    seen = inspect(demo_gguf)
    assert seen.architecture == "llama"
    assert seen.parameters == 134_515_008
    assert seen.bits_per_weight == pytest.approx(5.7437, abs=1e-4)
    assert [(s.type, s.tensors) for s in seen.types] == [("Q4_1", 210), ("Q8_0", 1), ("F32", 61)]
    assert sum(s.parameters for s in seen.types) == seen.parameters
    assert (seen.context_length, seen.embedding_length, seen.blocks) == (8192, 576, 30)
    assert (seen.heads, seen.kv_heads, seen.vocabulary) == (9, 3, 49152)
    assert seen.tokenizer == "gpt2, smollm"
    assert seen.special_tokens == {
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "unknown": "<|endoftext|>",
        "padding": "<|im_end|>",
    }
    assert seen.chat_template.startswith("{% for message in messages %}")
    assert seen.license == "apache-2.0"
    assert seen.nbytes == demo_gguf.stat().st_size
    assert len(seen.tensors) == 272


def test_a_model_that_says_little(bare: Path) -> None:
    seen = inspect(bare)
    assert seen.types == (TypeShare("Q8_0", 1, 128, 136), TypeShare("F16", 1, 64, 128))
    assert (seen.name, seen.context_length, seen.chat_template, seen.license) == ("", None, "", "")
    assert seen.special_tokens == {}
    assert seen.split == 1
    assert seen.manifest is None


def test_the_command_line_shows_it(run_cli: Run, demo_gguf: Path) -> None:
    code, out, err = run_cli("inspect", demo_gguf)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert any(line.split() == ["architecture", "llama"] for line in lines)
    assert any(line.split()[:2] == ["Q4_1", "210"] for line in lines)
    assert any("padding <|im_end|>" in line for line in lines), "a pipe's lines are not broken"
    assert "made by" in out
    assert "blk.0" not in out


def on_a_terminal(columns: int, *args: object) -> list[str]:
    """Run the command line on a pseudo-terminal: its lines, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    outside = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [sys.executable, "-m", "ggufkit", *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=outside | {"TERM": "xterm"},
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while block := os.read(ours, 65536):
                shown += block
        os.close(ours)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()


def test_a_terminal_of_80_columns_shows_everything(demo_gguf: Path) -> None:
    lines = on_a_terminal(80, "inspect", demo_gguf, "--tensors")
    path, facts = lines[0], lines[1:]
    assert path == str(demo_gguf), "a path must be whole to be copied"
    assert max(map(len, facts)) <= 80
    assert "…" not in "".join(facts)
    rows = [line.split() for line in facts]
    assert ["architecture", "llama"] in rows
    assert ["blk.29.attn_output.weight", "576", "x", "576", "Q4_1", "202.5", "KiB"] in rows


def test_the_command_line_lists_tensors(run_cli: Run, demo_gguf: Path) -> None:
    code, out, _ = run_cli("inspect", demo_gguf, "--tensors")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["blk.0.attn_k.weight", "576", "x", "192", "Q4_1", "67.5", "KiB"] in rows


def test_the_command_line_shows_a_model_that_says_little(run_cli: Run, bare: Path) -> None:
    code, out, err = run_cli("inspect", bare)
    assert (code, err) == (0, "")
    assert "none: chat needs --chat-template" in out
    assert "None" not in out


def test_the_command_line_shows_odd_metadata(run_cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "odd")
    writer.add_name("Red\x1b[31m [bold]name")
    writer.add_array("odd.attention.head_count", [8, 4, 8])
    writer.add_array("odd.attention.head_count_kv", [2, 2])
    writer.add_uint32("odd.block_count", 3)
    writer.add_float32("odd.rope.freq_base", 5e6)
    writer.add_string("split.count", "many")
    writer.add_string("quantize.imatrix.dataset", "cal.txt")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    code, out, err = run_cli("inspect", path)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["name", "Red", "[31m", "[bold]name"] in rows
    assert ["shape", "3", "blocks,", "heads", "4", "to", "8", "(2", "key/value)"] in rows
    assert ["rope", "base", "5000000"] in rows
    assert ["quantize.imatrix.dataset", "cal.txt"] in rows


def test_a_part_of_a_split_model_says_so(run_cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "big-00001-of-00003.gguf"
    writer = GGUFWriter(path, "odd")
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert inspect(path).split == 3
    assert "one of 3 files" in run_cli("inspect", path)[1]


def test_the_command_line_gives_json(run_cli: Run, bare: Path) -> None:
    code, out, _ = run_cli("inspect", bare, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["types"][0] == {"type": "Q8_0", "tensors": 1, "parameters": 128, "nbytes": 136}
    assert [t["name"] for t in told["tensors"]] == ["a.weight", "b.weight"]


def test_a_broken_file_is_refused(run_cli: Run, bare: Path) -> None:
    bare.write_bytes(bare.read_bytes()[:-50])
    with pytest.raises(IntegrityError):
        inspect(bare)
    code, out, err = run_cli("inspect", bare)
    assert (code, out) == (3, "")
    assert "is truncated" in err
    assert "hint: " in err
