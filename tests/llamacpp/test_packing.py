"""Blocks taken apart and put together, held against ggml itself."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufkit.errors import IntegrityError, UsageError
from ggufkit.llamacpp.ggml import Ggml
from ggufkit.llamacpp.packing import FORMATS, Format, format_of, require_packable
from ggufkit.llamacpp.toolchain import NativeBuild

SUPPORTED = [
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
]
COLUMNS = 512
LARGEST_HALF = np.float16(65504)

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)


@pytest.fixture(scope="module")
def ggml(native: NativeBuild) -> Ggml:
    return Ggml(native.bin, threads=2)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to the bit, the sign of zero included."""
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def check(format: Format, ggml: Ggml, packed: np.ndarray) -> None:
    fields = format.unpack(packed)
    np.testing.assert_array_equal(format.pack(fields), packed)
    columns = packed.shape[1] // format.block_nbytes * format.block
    theirs = ggml.dequantize(ggml.type(format.name), packed, columns)
    assert_same_bits(format.dequantize(fields), theirs)


def written(format: Format, ggml: Ggml, rows: np.ndarray) -> np.ndarray:
    return ggml.quantize(ggml.type(format.name), np.ascontiguousarray(rows, np.float32))


def test_knows_the_types_it_should() -> None:
    assert sorted(FORMATS) == sorted(SUPPORTED)
    assert format_of("q4_k") is FORMATS["Q4_K"]
    with pytest.raises(UsageError, match="type 'iq3_s' cannot be packed") as told:
        format_of("iq3_s")
    assert all(name in told.value.hint for name in SUPPORTED)


@each_format
@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-30, 4), tails=st.booleans())
def test_agrees_with_ggml_on_random_rows(
    format: Format, ggml: Ggml, seed: int, size: float, tails: bool
) -> None:
    random = np.random.default_rng(seed)
    rows = random.standard_t(2, (3, COLUMNS)) if tails else random.normal(size=(3, COLUMNS))
    # Half floats end at 65504: what a scale cannot hold is another test's.
    rows = np.clip(rows * 10.0**size, -6e4, 6e4)
    check(format, ggml, written(format, ggml, rows))


@each_format
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(np.zeros(COLUMNS), id="zeros"),
        pytest.param(-np.zeros(COLUMNS), id="negative zeros"),
        pytest.param(np.full(COLUMNS, 0.37), id="constant"),
        pytest.param(np.full(COLUMNS, -0.37), id="negative constant"),
        pytest.param(np.eye(1, COLUMNS, 5)[0], id="one outlier"),
        pytest.param(-1e4 * np.eye(1, COLUMNS, 300)[0], id="one negative outlier"),
        pytest.param(np.linspace(-1, 1, COLUMNS) * 1e-40, id="denormal floats"),
        pytest.param(np.linspace(-1, 1, COLUMNS) * 1e-6, id="denormal half scales"),
        pytest.param(np.linspace(-1, 1, COLUMNS) * 6e4, id="large"),
        pytest.param(np.where(np.arange(COLUMNS) % 64 < 32, 0, 1.5), id="empty sub-blocks"),
    ],
)
def test_agrees_with_ggml_on_extreme_rows(format: Format, ggml: Ggml, row: np.ndarray) -> None:
    check(format, ggml, written(format, ggml, np.stack([row, row[::-1]])))


def any_blocks(format: Format, seed: int, scale: np.float16) -> np.ndarray:
    """Any bits at all, but with a scale that is given."""
    packed = np.random.default_rng(seed).integers(
        0, 256, (4, 2 * format.block_nbytes), dtype=np.uint8
    )
    at = np.arange(4 * 2).reshape(4, 2)
    halves = packed.reshape(4, 2, -1)
    for start in half_offsets(format):
        halves[..., start : start + 2] = (
            np.where(at[..., None] % 2, scale, -scale).astype("<f2").view(np.uint8)
        )
    return packed


def half_offsets(format: Format) -> list[int]:
    """Where the halves of a block are, in ggml-common.h."""
    end = format.block_nbytes
    return {
        "Q4_1": [0, 2],
        "Q5_1": [0, 2],
        "Q4_K": [0, 2],
        "Q5_K": [0, 2],
        "Q2_K": [end - 4, end - 2],
        "Q3_K": [end - 2],
        "Q6_K": [end - 2],
    }.get(format.name, [0])


@each_format
@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0, 65504, width=16),
)
def test_agrees_with_ggml_on_any_bits(format: Format, ggml: Ggml, seed: int, scale: float) -> None:
    check(format, ggml, any_blocks(format, seed, np.float16(scale)))


@each_format
def test_agrees_with_ggml_on_the_largest_and_smallest_scales(format: Format, ggml: Ggml) -> None:
    for scale in (LARGEST_HALF, np.float16(6e-8), np.float16(0)):
        check(format, ggml, any_blocks(format, 1, scale))


@each_format
@pytest.mark.parametrize("scale", [np.float16("nan"), np.float16("inf")])
def test_refuses_scales_that_are_no_numbers(format: Format, scale: np.float16) -> None:
    with pytest.raises(IntegrityError, match=f"a {format.name} block has a 'd"):
        format.unpack(any_blocks(format, 2, scale))
    fields = format.unpack(any_blocks(format, 2, np.float16(1)))
    with pytest.raises(IntegrityError, match="NaN or infinite"):
        format.pack(replace(fields, d=np.full_like(fields.d, scale)))


@each_format
def test_refuses_what_does_not_fit(format: Format) -> None:
    fields = format.unpack(any_blocks(format, 3, np.float16(1)))
    for codes in (fields.codes - len(format.levels), fields.codes + len(format.levels)):
        with pytest.raises(ValueError, match=f"codes of {format.name} lie outside 0 to"):
            format.pack(replace(fields, codes=codes))
    if fields.scales is not None:
        with pytest.raises(ValueError, match=f"scales of {format.name} lie outside"):
            format.pack(replace(fields, scales=fields.scales + 512))
    if fields.mins is not None:
        with pytest.raises(ValueError, match=f"mins of {format.name} lie outside"):
            format.pack(replace(fields, mins=fields.mins - 512))
    with pytest.raises(ValueError, match=f"no rows of {format.name} blocks"):
        format.unpack(np.zeros((1, format.block_nbytes + 1), np.uint8))


@each_format
def test_levels_and_limits_are_those_that_the_bits_can_hold(format: Format) -> None:
    fields = format.unpack(any_blocks(format, 4, np.float16(1)))
    assert fields.codes.min() == 0
    assert fields.codes.max() == len(format.levels) - 1
    assert (np.diff(format.levels) > 0).all()
    assert (np.diff(format.levels) == 1).all() == format.is_even
    assert (fields.scales is None) == (format.scale_limits is None)
    assert (fields.dmin is None) != format.has_min


def test_quantization_types_are_told_by_the_blocks_of_their_name() -> None:
    for type in (*SUPPORTED, "Q4_K_M", "q3_k_l", "Q2_K_S"):
        require_packable(type)
    for type in ("IQ3_S", "IQ3_M", "IQ2_XXS", "IQ1_S", "TQ1_0", "MXFP4_MOE", "Q1_0"):
        with pytest.raises(UsageError, match=f"blocks of type '{type}' cannot be packed") as told:
            require_packable(type)
        assert all(name in (told.value.hint or "") for name in SUPPORTED)
