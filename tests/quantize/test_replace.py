"""Rounded maps put into a GGUF, whatever the converter did to their rows."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from ggufkit.errors import CheckpointError
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.quantize.replace import RoundedRows, replace_rounded

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
    names = replace_rounded(
        quantized,
        floats,
        tmp_path / "out.gguf",
        [
            RoundedRows(("mixed.weight",), "Q4_0", rows, packed),
            RoundedRows(("a.weight", "b.weight"), "Q4_0", rows, packed),
        ],
        NOTE,
    )
    assert names == ["mixed.weight", "a.weight", "b.weight"]
    found = {t.name: np.asarray(t.data) for t in GGUFReader(tmp_path / "out.gguf").tensors}
    np.testing.assert_array_equal(found["mixed.weight"], packed[ORDER])
    np.testing.assert_array_equal(found["a.weight"], packed[:4])
    np.testing.assert_array_equal(found["b.weight"], packed[4:])
    assert read_gguf(tmp_path / "out.gguf").metadata[NOTE[0]] == NOTE[1]


def test_leaves_other_types_alone(ggml: Ggml, tmp_path: Path) -> None:
    quantized, floats = pair(tmp_path, ggml, "F32")
    other = RoundedRows(("mixed.weight",), "Q8_0", weight("F32"), np.zeros((12, 68), np.uint8))
    out = tmp_path / "out.gguf"
    assert replace_rounded(quantized, floats, out, [other], NOTE) == []
    before, after = (
        {t.name: bytes(np.asarray(t.data)) for t in GGUFReader(path).tensors}
        for path in (quantized, out)
    )
    assert before == after


def test_refuses_a_gguf_of_another_checkpoint(ggml: Ggml, tmp_path: Path) -> None:
    quantized, floats = pair(tmp_path, ggml, "F32")
    packed = np.zeros((12, 36), np.uint8)
    rows = weight("F32")
    for names, weights, told in (
        (("mixed.weight",), rows + 1, "the rows of 'mixed.weight' are not those"),
        (("gone.weight",), rows, "no tensor 'gone.weight'"),
    ):
        map = RoundedRows(names, "Q4_0", weights, packed)
        with pytest.raises(CheckpointError, match=told):
            replace_rounded(quantized, floats, tmp_path / "out.gguf", [map], NOTE)
    map = RoundedRows(("mixed.weight",), "Q4_0", rows, packed)
    with pytest.raises(CheckpointError, match="is Q4_0, not floats"):
        replace_rounded(quantized, quantized, tmp_path / "out.gguf", [map], NOTE)
