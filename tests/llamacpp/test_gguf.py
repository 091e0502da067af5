import contextlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggufkit.errors import IntegrityError, SourceError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.gguf import read_gguf, write_replaced, write_skeleton
from ggufkit.llamacpp.toolchain import NativeBuild

VALUES: dict[str, tuple[GGUFValueType, object]] = {
    "t.uint8": (GGUFValueType.UINT8, 255),
    "t.int8": (GGUFValueType.INT8, -128),
    "t.uint16": (GGUFValueType.UINT16, 65535),
    "t.int16": (GGUFValueType.INT16, -32768),
    "t.uint32": (GGUFValueType.UINT32, 2**32 - 1),
    "t.int32": (GGUFValueType.INT32, -(2**31)),
    "t.uint64": (GGUFValueType.UINT64, 2**64 - 1),
    "t.int64": (GGUFValueType.INT64, -(2**63)),
    "t.float32": (GGUFValueType.FLOAT32, 0.5),
    "t.float64": (GGUFValueType.FLOAT64, 0.1),
    "t.bool": (GGUFValueType.BOOL, True),
    "t.string": (GGUFValueType.STRING, "Zoë 猫"),
}
ARRAYS: dict[str, list[object]] = {
    "a.strings": ["a", "", "ß"],
    "a.numbers": [1, -2, 3],
    "a.floats": [0.25, -1.5],
    "a.flags": [True, False],
}


def write(path: Path, tensors: bool = True) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        writer.add_key_value(key, value, kind)
    for key, array in ARRAYS.items():
        writer.add_array(key, array)
    if tensors:
        writer.add_tensor("a.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
        blocks = np.zeros((2, 34), dtype=np.uint8)
        writer.add_tensor("b.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if tensors:
        writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


def test_all_value_types_read_as_written(tmp_path: Path) -> None:
    read = read_gguf(write(tmp_path / "x.gguf"))
    wanted = {"general.architecture": "llama"} | {k: v for k, (_, v) in VALUES.items()} | ARRAYS
    assert read.metadata == wanted
    assert [(t.name, t.shape, t.type, t.nbytes) for t in read.tensors] == [
        ("a.weight", (4, 3), "F32", 48),
        ("b.weight", (32, 2), "Q8_0", 68),
    ]
    data = read.path.read_bytes()
    offset = read.tensors[0].offset
    assert struct.unpack("<12f", data[offset : offset + 48]) == tuple(range(12))


def test_agrees_with_the_packaged_reader_on_a_real_model(demo_gguf: Path) -> None:
    read, reader = read_gguf(demo_gguf), GGUFReader(demo_gguf)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert read.metadata == theirs
    assert [(t.name, t.shape, t.type, t.offset, t.nbytes, t.parameters) for t in read.tensors] == [
        (
            t.name,
            tuple(int(n) for n in t.shape),
            t.tensor_type.name,
            int(t.data_offset),
            int(t.n_bytes),
            int(t.n_elements),
        )
        for t in reader.tensors
    ]


def test_long_arrays_can_be_passed_over(demo_gguf: Path) -> None:
    whole, short = read_gguf(demo_gguf), read_gguf(demo_gguf, arrays=False)
    assert short.tensors == whole.tensors
    assert set(whole.metadata) - set(short.metadata) == {
        f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")
    }


def header(
    *, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b""
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


HUGE = 2**63
PADDING = bytes(4096)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUF", "is truncated"),
        (b"PK\x03\x04" + bytes(40), "looks like a zip archive"),
        (b"<!DOCTYPE html>" + bytes(40), "looks like an HTML page"),
        (b"version https://git-lfs", "looks like a Git LFS pointer"),
        (struct.pack("<Q", 10) + b'{"a":1}   ', "looks like a safetensors file"),
        (b"random bytes and more", "is not a GGUF"),
        (header(version=1), "has GGUF version 1; known are 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
        (header(tensors=HUGE), f"claims {HUGE} tensors"),
        (header(keys=HUGE), f"claims {HUGE} metadata keys"),
        (header(keys=1, rest=struct.pack("<Q", HUGE) + PADDING), "claims a key of"),
        (header(keys=1, rest=key("k", 99, b"") + PADDING), "unknown type 99 at 'k'"),
        (
            header(keys=1, rest=key("k", 9, struct.pack("<IQ", 8, HUGE)) + PADDING),
            f"claims {HUGE} strings at 'k'",
        ),
        (
            header(keys=1, rest=key("k", 9, struct.pack("<IQ", 4, HUGE)) + PADDING),
            f"claims {HUGE} values at 'k'",
        ),
        (
            header(keys=1, rest=key("k", 9, struct.pack("<IQ", 9, 1)) + PADDING),
            "an array of arrays at 'k'",
        ),
        (header(keys=2, rest=2 * key("k", 0, b"\1") + PADDING), "has the key 'k' twice"),
        (
            header(keys=1, rest=key("general.alignment", 4, struct.pack("<I", 3)) + PADDING),
            "an alignment of 3",
        ),
        (header(tensors=1, rest=tensor("t", (1,) * 5) + PADDING), "'t' of 5 dimensions"),
        (header(tensors=1, rest=tensor("t", (32,), kind=99) + PADDING), "'t' of unknown type 99"),
        (header(tensors=1, rest=tensor("t", (33,), kind=8) + PADDING), "'t' with rows of 33"),
        (header(tensors=2, rest=2 * tensor("t", (8,)) + PADDING), "has the tensor 't' twice"),
        (header(tensors=1, rest=tensor("t", (8,), offset=7) + PADDING), "'t' at offset 7, not 0"),
        (
            header(tensors=2, rest=tensor("t", (8,)) + tensor("u", (8,)) + PADDING),
            "has the tensor 'u' at offset 0, not 32",
        ),
        (header(tensors=1, rest=tensor("t", (HUGE, HUGE)) + PADDING), "is truncated: tensor 't'"),
        (header(tensors=1, rest=tensor("\x1b[2J", (1,) * 5) + PADDING), "'?[2J' of 5 dimensions"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        read_gguf(path)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(small[:-64])
    with pytest.raises(IntegrityError, match=rf"ends at byte \d+, the file has {len(small) - 64}"):
        read_gguf(path)


def test_the_file_that_hangs_the_packaged_reader(tmp_path: Path) -> None:
    path = tmp_path / "hang.gguf"
    path.write_bytes(header(keys=1, rest=key("k", 9, struct.pack("<IQ", 8, 2**62))))
    with pytest.raises(IntegrityError, match="claims"):
        read_gguf(path)


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(SourceError, match="is a directory"):
        read_gguf(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="there is no"):
        read_gguf(tmp_path / "file" / "x.gguf")


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(SourceError, match="is not a regular file"):
        read_gguf(tmp_path / "x.gguf")


def test_tensors_without_dimensions_or_elements_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    entries = tensor("scalar", ()) + tensor("empty", (32, 0), kind=8, offset=32)
    path.write_bytes(header(tensors=2, rest=entries + PADDING))
    assert [(t.parameters, t.nbytes) for t in read_gguf(path).tensors] == [(1, 4), (0, 0)]


def test_a_long_name_does_not_flood_the_message(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header(keys=1, rest=key(100_000 * "k", 99, b"") + PADDING))
    with pytest.raises(IntegrityError) as caught:
        read_gguf(path)
    assert len(caught.value.message) < len(str(path)) + 400


def reads_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for arrays in (True, False):
        with contextlib.suppress(IntegrityError):
            read_gguf(path, arrays=arrays)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.gguf"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_read_or_refused(data: st.DataObject, scratch: Path, small: bytes) -> None:
    damaged = bytearray(small)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(damaged)))
    reads_or_refuses(scratch, bytes(damaged[:end]))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rest=st.binary(max_size=200), keys=st.integers(0, 3), tensors=st.integers(0, 3))
def test_any_bytes_are_read_or_refused(rest: bytes, keys: int, tensors: int, scratch: Path) -> None:
    reads_or_refuses(scratch, header(keys=keys, tensors=tensors, rest=rest))


def without_tensors(source: Path, target: Path) -> Path:
    """What the converter's --vocab-only writes: the metadata alone."""
    read = GGUFReader(source)
    writer = GGUFWriter(target, read.fields["general.architecture"].contents())
    for name, field in read.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        if kind is GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return target


def test_a_skeleton_can_be_asked_for_its_types(
    tmp_path: Path, demo_gguf: Path, native: NativeBuild
) -> None:
    model = read_gguf(demo_gguf)
    shapes = [(t.name, t.shape, "F32" if len(t.shape) == 1 else "F16") for t in model.tensors]
    skeleton = tmp_path / "skeleton.gguf"
    write_skeleton(without_tensors(demo_gguf, tmp_path / "vocab.gguf"), skeleton, shapes)
    read = read_gguf(skeleton)
    assert read.metadata == model.metadata
    assert [(t.name, t.shape, t.type) for t in read.tensors] == shapes
    assert skeleton.stat().st_blocks * 512 < read.nbytes / 10, "the data should be a hole"
    told = toolchain.quantize(
        native,
        skeleton,
        skeleton,
        "Q4_1",
        dry_run=True,
        threads=1,
        log=tmp_path / "log",
    )
    assert {t.name: t.type.upper() for t in told.tensors if t.name.startswith("blk.0.attn")} == {
        f"blk.0.attn_{part}.weight": "Q4_1" for part in ("q", "k", "v", "output")
    } | {"blk.0.attn_norm.weight": "F32"}


def test_replaces_data_and_adds_a_key(tmp_path: Path) -> None:
    source, out = write(tmp_path / "x.gguf"), tmp_path / "y.gguf"
    blocks = np.arange(68, dtype=np.uint8).reshape(2, 34)
    write_replaced(source, out, [("b.weight", blocks)], ("made.by", "Zoë"))
    before, after = read_gguf(source), read_gguf(out)
    assert after.metadata == {**before.metadata, "made.by": "Zoë"}
    assert [(t.name, t.shape, t.type) for t in after.tensors] == [
        (t.name, t.shape, t.type) for t in before.tensors
    ]
    (_, a), (_, b) = ((t.name, t) for t in after.tensors)
    data = out.read_bytes()
    assert data[b.offset : b.offset + b.nbytes] == blocks.tobytes()
    assert struct.unpack_from("<12f", data, a.offset) == tuple(range(12))
    theirs = {tensor.name: tensor.data for tensor in GGUFReader(out).tensors}
    np.testing.assert_array_equal(theirs["b.weight"], blocks)
    again = tmp_path / "z.gguf"
    write_replaced(source, again, [("b.weight", blocks)], ("made.by", "Zoë"))
    assert again.read_bytes() == data


def test_refuses_to_replace_what_is_not_there(tmp_path: Path) -> None:
    source, out = write(tmp_path / "x.gguf"), tmp_path / "y.gguf"
    with pytest.raises(SourceError, match=r"no tensor 'c\.weight'"):
        write_replaced(source, out, [("c.weight", np.zeros(68, np.uint8))], ("made.by", ""))
    with pytest.raises(ValueError, match=r"67 bytes do not fill 'b\.weight'"):
        write_replaced(source, out, [("b.weight", np.zeros(67, np.uint8))], ("made.by", ""))
    with pytest.raises(ValueError, match=r"the key 't.string' already"):
        write_replaced(source, out, [], ("t.string", ""))
