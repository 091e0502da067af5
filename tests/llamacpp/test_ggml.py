"""ggml's quantizers against gguf-py's own, and against what they refuse."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp.blocks import TYPE_NUMBERS
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.toolchain import NativeBuild

ROUND_TRIP_TYPES = [
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq4_nl", "iq4_xs", "iq3_s", "tq1_0", "tq2_0", "f16", "bf16"),
]


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=2)


def rows(count: int = 130, columns: int = 512, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((count, columns)).astype(np.float32)


@pytest.mark.parametrize("name", ROUND_TRIP_TYPES)
def test_dequantizes_as_gguf_does(ggml: Ggml, name: str) -> None:
    kind = ggml.type(name)
    packed = ggml.quantize(kind, rows())
    assert packed.shape == (130, 512 // kind.block * kind.block_nbytes)
    ours = ggml.dequantize(kind, packed, 512)
    theirs = quants.dequantize(packed, GGMLQuantizationType(kind.id))
    np.testing.assert_array_equal(ours, theirs)
    # The coarsest type here is ternary; the mean of |x| itself is 0.8.
    assert np.abs(ours - rows()).mean() < 0.7


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16"])
def test_quantizes_as_gguf_does(ggml: Ggml, name: str) -> None:
    kind = ggml.type(name)
    theirs = quants.quantize(rows(), GGMLQuantizationType(kind.id))
    np.testing.assert_array_equal(ggml.quantize(kind, rows()), theirs.view(np.uint8))


def test_threads_do_not_change_the_bytes(ggml: Ggml, native: NativeBuild) -> None:
    kind = ggml.type("q4_k")
    alone = Ggml(native.bin, threads=1).quantize(kind, rows())
    np.testing.assert_array_equal(ggml.quantize(kind, rows()), alone)


def test_weights_change_what_is_kept(ggml: Ggml) -> None:
    kind = ggml.type("q4_0")
    weights = np.ones(512, np.float32)
    weights[::32] = 1e4
    plain = ggml.round_trip(kind, rows())
    weighted = ggml.round_trip(kind, rows(), weights)
    important = slice(None, None, 32)
    assert (
        np.abs(weighted - rows())[:, important].mean() < np.abs(plain - rows())[:, important].mean()
    )


def test_the_table_of_types_is_that_of_the_library(ggml: Ggml) -> None:
    assert {kind.name.upper(): kind.id for kind in ggml.types.values()} == TYPE_NUMBERS
    assert {k.name: k.value for k in GGMLQuantizationType}.items() <= TYPE_NUMBERS.items()


def test_knows_its_types(ggml: Ggml) -> None:
    assert ggml.type("Q4_0").bits_per_weight == 4.5
    assert ggml.type("q6_K").block == 256
    assert not ggml.type("f16").is_quantized
    assert ggml.requires_imatrix(ggml.type("iq2_xxs"))
    assert not ggml.requires_imatrix(ggml.type("q4_0"))
    with pytest.raises(UsageError, match="no type 'q9_9'"):
        ggml.type("q9_9")


def test_refuses_rows_that_do_not_divide(ggml: Ggml) -> None:
    with pytest.raises(UsageError, match="rows of 576 do not divide into q4_K blocks"):
        ggml.quantize(ggml.type("q4_k"), rows(columns=576))
    with pytest.raises(ValueError, match="C-contiguous float32"):
        ggml.quantize(ggml.type("q4_0"), rows().astype(np.float64))
    with pytest.raises(ValueError, match="C-contiguous float32"):
        ggml.quantize(ggml.type("q4_0"), rows().T)
    with pytest.raises(ValueError, match=r"weights have shape \(3,\)"):
        ggml.quantize(ggml.type("q4_0"), rows(), np.ones(3, np.float32))
    with pytest.raises(ValueError, match="are not a q4_0 row of 32"):
        ggml.dequantize(ggml.type("q4_0"), np.zeros((1, 17), np.uint8), 32)


def test_a_missing_library_is_told(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no libggml-base") as told:
        Ggml(tmp_path, threads=1)
    assert "ggufkit build" in told.value.hint
    (tmp_path / "libggml-base.so").write_bytes(b"not a library")
    with pytest.raises(ToolError, match="cannot be loaded"):
        Ggml(tmp_path, threads=1)
