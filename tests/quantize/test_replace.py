"""Rounded maps put into a GGUF, whatever the converter did to their rows."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from ggufkit.errors import CheckpointError
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.quantize.replace import (
    NOT_TRIED,
    LeftAlone,
    Replaced,
    RoundedRows,
    replace_rounded,
)

NOTE = ("ggufkit.rounding", "gptq")
ORDER = np.random.default_rng(1).permutation(12)


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=1)


def weight(dtype: str) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((12, 64)).astype(np.float32)
    if dtype == "F16":
        return rows.astype(np.float16).astype(np.float32)
    bits = rows.view(np.uint32)
    return (bits & 0xFFFF0000).view(np.float32) if dtype == "BF16" else rows


def write(path: Path, tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]]) -> Path:
    writer = GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, GGMLQuantizationType]:
    if dtype == "F16":
        return rows.astype(np.float16), GGMLQuantizationType.F16
    if dtype == "BF16":
        halves = (rows.view(np.uint32) >> 16).astype(np.uint16)
        return halves.view(np.uint8), GGMLQuantizationType.BF16
    return rows, GGMLQuantizationType.F32


def pair(directory: Path, ggml: Ggml, dtype: str) -> tuple[Path, Path]:
    """A quantized GGUF and its float one: rows of a map mixed, another taken apart."""
    rows = weight(dtype)
    parts = {"mixed.weight": rows[ORDER], "a.weight": rows[:4], "b.weight": rows[4:]}
    floats = {name: stored(part, dtype) for name, part in parts.items()}
    blocks = {
        name: (ggml.quantize(ggml.type("q4_0"), part), GGMLQuantizationType.Q4_0)
        for name, part in parts.items()
    }
    return write(directory / "q.gguf", blocks), write(directory / "f.gguf", floats)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_puts_each_row_where_the_converter_did(dtype: str, ggml: Ggml, tmp_path: Path) -> None:
    quantized, floats = pair(tmp_path, ggml, dtype)
    packed = np.random.default_rng(2).integers(0, 256, (12, 36), dtype=np.uint8)
    rows = weight(dtype)
    told = replace_rounded(
        quantized,
        floats,
        tmp_path / "out.gguf",
        [
            RoundedRows(("mixed.weight",), "Q4_0", rows, packed),
            RoundedRows(("a.weight", "b.weight"), "Q4_0", rows, packed),
        ],
        NOTE,
    )
    assert told == Replaced(("mixed.weight", "a.weight", "b.weight"), 24 * 64, ())
    found = {t.name: np.asarray(t.data) for t in GGUFReader(tmp_path / "out.gguf").tensors}
    np.testing.assert_array_equal(found["mixed.weight"], packed[ORDER])
    np.testing.assert_array_equal(found["a.weight"], packed[:4])
    np.testing.assert_array_equal(found["b.weight"], packed[4:])
    assert read_gguf(tmp_path / "out.gguf").metadata[NOTE[0]] == NOTE[1]


def test_says_what_is_left_alone(ggml: Ggml, tmp_path: Path) -> None:
    quantized, floats = pair(tmp_path, ggml, "F32")
    rows = weight("F32")
    packed = np.random.default_rng(2).integers(0, 256, (12, 36), dtype=np.uint8)
    out = tmp_path / "out.gguf"
    told = replace_rounded(
        quantized,
        floats,
        out,
        [
            RoundedRows(("mixed.weight",), "Q8_0", rows, np.zeros((12, 68), np.uint8)),
            RoundedRows(("a.weight", "elsewhere.weight"), "q4_0", rows, packed),
        ],
        NOTE,
    )
    assert told.names == ("a.weight",)
    assert told.parameters == 4 * 64
    assert told.left_alone == (
        LeftAlone("mixed.weight", "Q4_0", 12 * 64, "was rounded to Q8_0"),
        LeftAlone("b.weight", "Q4_0", 8 * 64, NOT_TRIED),
    )
    before, after = (
        {t.name: bytes(np.asarray(t.data)) for t in GGUFReader(path).tensors}
        for path in (quantized, out)
    )
    assert [name for name in before if before[name] != after[name]] == ["a.weight"]


def test_rows_that_the_converter_changes_are_left_alone(ggml: Ggml, tmp_path: Path) -> None:
    quantized, floats = pair(tmp_path, ggml, "F32")
    rows = weight("F32")
    packed = np.zeros((12, 36), np.uint8)
    maps = [
        RoundedRows(("mixed.weight",), "Q4_0", rows, packed),
        RoundedRows(("a.weight",), "Q4_0", 2 * rows, packed),
    ]
    told = replace_rounded(quantized, floats, tmp_path / "out.gguf", maps, NOTE)
    assert told.names == ("mixed.weight",)
    assert told.left_alone[0].reason == "the converter changes its rows"


def test_finer_rows_are_known_by_what_the_file_keeps_of_them(ggml: Ggml, tmp_path: Path) -> None:
    """A BF16 tensor in an F16 file, say: its smallest weights lose bits there."""
    for dtype in ("F16", "BF16"):
        place = tmp_path / dtype
        place.mkdir()
        quantized, floats = pair(place, ggml, dtype)
        finer = weight(dtype) * np.float32(1 + 2**-14)
        map = RoundedRows(("mixed.weight",), "Q4_0", finer, np.zeros((12, 36), np.uint8))
        told = replace_rounded(quantized, floats, place / "out.gguf", [map], NOTE)
        assert told.names == ("mixed.weight",)


def test_refuses_a_gguf_of_another_checkpoint(ggml: Ggml, tmp_path: Path) -> None:
    quantized, floats = pair(tmp_path, ggml, "F32")
    packed = np.zeros((12, 36), np.uint8)
    rows = weight("F32")
    out = tmp_path / "out.gguf"
    for names, weights, why in (
        (("mixed.weight",), rows + 1, "mixed.weight: the converter changes its rows"),
        (("gone.weight",), rows, "nothing of the maps that were rounded"),
    ):
        map = RoundedRows(names, "Q4_0", weights, packed)
        with pytest.raises(CheckpointError, match=why):
            replace_rounded(quantized, floats, out, [map], NOTE)
        assert not out.exists()
    map = RoundedRows(("mixed.weight",), "Q4_0", rows, packed)
    with pytest.raises(CheckpointError, match="is Q4_0, not floats"):
        replace_rounded(quantized, quantized, out, [map], NOTE)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "f.gguf", {"x.weight": stored(rows, "F32")})
    with pytest.raises(CheckpointError, match=r"has no tensor 'mixed\.weight'"):
        replace_rounded(quantized, other, out, [map], NOTE)
