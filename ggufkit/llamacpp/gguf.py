"""The header of a GGUF, read strictly and within bounds.

The packaged ``gguf`` reader (0.19) trusts the counts in a file, so that a
43-byte file can hang it, and it wraps every token of a vocabulary in an array
of its own, which takes seconds for 150,000 of them. Here no count is trusted
before the bytes it needs are known to be there. Format: ggml's docs/gguf.md.
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ggufkit.errors import IntegrityError, SourceError
from ggufkit.llamacpp.blocks import TYPE_NUMBERS, TYPE_SIZES
from ggufkit.values import GGUFFile, Json, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
"""``GGML_MAX_DIMS``."""
_LONG_ARRAY = 64
_COPIED_AT_ONCE = 1 << 24
_MAX_MESSAGE = 300
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Value type to :mod:`struct` code; strings and arrays apart."""

_TYPE_NAMES = {number: name for name, number in TYPE_NUMBERS.items()}

_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive (or a pickled checkpoint)",
    b"\x80\x02": "a pickle",
    b"<!DO": "an HTML page, as a failed download leaves it",
    b"<htm": "an HTML page, as a failed download leaves it",
    b"vers": "a Git LFS pointer: the file itself was not fetched",
    b"ggml": "a GGML file of 2023, which llama.cpp no longer reads",
    b"ggjt": "a GGJT file of 2023, which llama.cpp no longer reads",
    b"PAR1": "a parquet file",
}


def read_gguf(path: Path, *, arrays: bool = True) -> GGUFFile:
    """Read the header of a GGUF and check it against the size of the file.

    Args:
        path: the file.
        arrays: read long arrays (tokens, merges) too; else they are checked,
            passed over, and left out of the metadata.

    Raises:
        SourceError: if there is no such file.
        IntegrityError: if it is not a GGUF, is truncated, or makes no sense.
    """
    with _mapped(path) as data:
        _check_magic(path, data)
        return _Header(path, data, arrays).read()


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    if path.is_dir():
        raise SourceError(f"{path} is a directory, not a GGUF")
    if path.exists() and not path.is_file():
        # Opening a pipe waits for a writer that may never come.
        raise SourceError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise IntegrityError(f"{path} is empty", "Fetch or convert it again")
            with (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as data,
            ):
                yield data
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceError(f"there is no {path}", "See what is there: ggufkit models") from error
    except PermissionError as error:
        raise SourceError(f"{path} may not be read") from error


def _check_magic(path: Path, data: memoryview) -> None:
    start = bytes(data[:16])
    if start[:4] == MAGIC:
        return
    what = next((name for magic, name in _OTHER_FILES.items() if start.startswith(magic)), "")
    if not what and start[8:9] == b"{":
        what = "a safetensors file"
    raise IntegrityError(
        f"{path} is not a GGUF" + (f": it looks like {what}" if what else ""),
        "A checkpoint becomes one with: ggufkit convert",
    )


class _Header:
    """A cursor over the bytes of a header; every read is checked first."""

    def __init__(self, path: Path, data: memoryview, arrays: bool) -> None:
        self._path = path
        self._data = data
        self._arrays = arrays
        self._at = len(MAGIC)

    def read(self) -> GGUFFile:
        version = self._scalar("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in _VERSIONS:
                raise self._broken("is big-endian, which is not read here")
            raise self._broken(f"has GGUF version {version}; known are 2 and 3")
        tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
        # The smallest key takes 13 bytes, the smallest tensor 24.
        self._fits(key_count, 13, f"{key_count} metadata keys")
        self._fits(tensor_count, 24, f"{tensor_count} tensors")
        metadata: dict[str, Json] = {}
        for _ in range(key_count):
            key = self._string("a key")
            if key in metadata:
                raise self._broken(f"has the key '{key}' twice")
            metadata[key] = self._value(self._scalar("I"), key)
        self.metadata_end = self._at
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        self.header_end = self._at
        self.alignment = self._alignment(metadata)
        tensors = self._place(entries, self.alignment)
        shown = {key: value for key, value in metadata.items() if value is not _PASSED_OVER}
        return GGUFFile(self._path, version, len(self._data), shown, tensors)

    def _broken(self, what: str) -> IntegrityError:
        # Names come from the file: they may be long, or be commands to a terminal.
        shown = "".join(c if c.isprintable() else "?" for c in what[:_MAX_MESSAGE])
        return IntegrityError(
            f"{self._path} {shown}", "The file is damaged: fetch or make it again"
        )

    def _need(self, count: int, what: str) -> int:
        """Claim bytes for something; where they start."""
        if count > len(self._data) - self._at:
            raise self._broken(
                f"is truncated: {what} needs {count} bytes at {self._at}, "
                f"the file has {len(self._data)}"
            )
        start = self._at
        self._at += count
        return start

    def _fits(self, count: int, least: int, what: str) -> None:
        if count * least > len(self._data) - self._at:
            raise self._broken(f"claims {what}, more than its {len(self._data)} bytes can hold")

    def _scalar(self, code: str) -> int:
        start = self._need(struct.calcsize(code), "a number")
        value: int = struct.unpack_from(f"<{code}", self._data, start)[0]
        return value

    def _string(self, what: str) -> str:
        length = self._scalar("Q")
        self._fits(length, 1, f"{what} of {length} bytes")
        start = self._need(length, what)
        try:
            return str(self._data[start : start + length], "utf-8")
        except UnicodeDecodeError:
            # Tokens of byte-level vocabularies may be broken UTF-8; keys may not.
            if what == "a key" or what == "a tensor's name":
                raise self._broken(f"has {what} that is not UTF-8") from None
            return str(self._data[start : start + length], "utf-8", "replace")

    def _value(self, kind: int, key: str) -> Json:
        if kind == _STRING:
            return self._string(f"the value of {key}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._broken(f"has a value of unknown type {kind} at '{key}'")
        return self._scalar(_SCALARS[kind])

    def _array(self, key: str) -> Json:
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == _ARRAY:
            raise self._broken(f"has an array of arrays at '{key}', which llama.cpp refuses too")
        keep = self._arrays or count <= _LONG_ARRAY
        if kind == _STRING:
            self._fits(count, 8, f"{count} strings at '{key}'")
            if keep:
                return [self._string(f"a string of {key}") for _ in range(count)]
            for _ in range(count):
                self._need(self._scalar("Q"), f"a string of {key}")
            return _PASSED_OVER
        if kind not in _SCALARS:
            raise self._broken(f"has an array of unknown type {kind} at '{key}'")
        code = _SCALARS[kind]
        self._fits(count, struct.calcsize(code), f"{count} values at '{key}'")
        start = self._need(count * struct.calcsize(code), f"the array {key}")
        if not keep:
            return _PASSED_OVER
        return list(struct.unpack_from(f"<{count}{code}", self._data, start))

    def _alignment(self, metadata: dict[str, Json]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"has an alignment of {alignment}, which is no power of two")
        return alignment

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name")
        dimensions = self._scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._broken(f"has a tensor '{name}' of {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> tuple[TensorInfo, ...]:
        """Turn entries into tensors, each within the file.

        Like ``gguf_init`` of llama.cpp, this wants them one after the other,
        each padded to the alignment, so no two can share bytes.
        """
        base = -(-self._at // alignment) * alignment
        expected = 0
        seen: set[str] = set()
        tensors = []
        for name, shape, number, offset in entries:
            kind = _TYPE_NAMES.get(number)
            if kind not in TYPE_SIZES:
                raise self._broken(f"has a tensor '{name}' of unknown type {number}")
            if name in seen:
                raise self._broken(f"has the tensor '{name}' twice")
            seen.add(name)
            block, size = TYPE_SIZES[kind]
            if shape and shape[0] % block:
                raise self._broken(
                    f"has a tensor '{name}' with rows of {shape[0]}, "
                    f"which blocks of {block} ({kind}) cannot fill"
                )
            nbytes = prod(shape) // block * size
            end = base + offset + nbytes
            if offset != expected:
                raise self._broken(f"has the tensor '{name}' at offset {offset}, not {expected}")
            expected += -(-nbytes // alignment) * alignment
            if end > len(self._data):
                raise self._broken(
                    f"is truncated: tensor '{name}' ends at byte {end}, "
                    f"the file has {len(self._data)}"
                )
            tensors.append(TensorInfo(name, shape, kind, base + offset, nbytes))
        return tuple(tensors)


_PASSED_OVER = object()


def write_skeleton(
    vocab_only: Path, out: Path, tensors: Sequence[tuple[str, tuple[int, ...], str]]
) -> None:
    """Write a GGUF with another's metadata and tensors that have no data yet.

    The data is a hole in the file, so it takes no disk where the file system
    knows holes. It serves to ask ``llama-quantize --dry-run`` which type each
    tensor would get.

    Args:
        vocab_only: a GGUF without tensors, as the converter's ``--vocab-only`` writes.
        out: the file to write.
        tensors: name, shape (columns first) and type of each.
    """
    with _mapped(vocab_only) as data:
        _check_magic(vocab_only, data)
        header = _Header(vocab_only, data, arrays=False)
        read = header.read()
        alignment = header.alignment
        counts = struct.pack("<IQ", read.version, len(tensors))
        start = len(MAGIC) + len(counts)
        parts = [MAGIC, counts, bytes(data[start : header.metadata_end])]
    offset = 0
    for name, shape, kind in tensors:
        parts.append(_packed_string(name))
        parts.append(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", TYPE_NUMBERS[kind], offset))
        block, size = TYPE_SIZES[kind]
        offset += -(-prod(shape) // block * size // alignment) * alignment
    written = b"".join(parts)
    with out.open("wb") as file:
        file.write(written)
        file.truncate(-(-len(written) // alignment) * alignment + offset)


def write_replaced(
    source: Path,
    out: Path,
    data: "Iterable[tuple[str, npt.NDArray[np.uint8]]]",
    note: tuple[str, str],
) -> None:
    """Write a copy of a GGUF with other data in some tensors and one more key.

    Names, shapes, types and order of the tensors stay as they are, and so does
    all other metadata.

    Args:
        source: the GGUF.
        out: the file to write.
        data: names of tensors and their new bytes, any shape, taken one after the other.
        note: a key that the source does not have, and its value, a string.

    Raises:
        SourceError: if there is no such file, or no such tensor in it.
        IntegrityError: if the source is no sound GGUF.
        ValueError: if it has that key, or bytes are not as many as the tensor's.
    """
    with _mapped(source) as old, out.open("wb") as file:
        _check_magic(source, old)
        header = _Header(source, old, arrays=False)
        read = header.read()
        if note[0] in read.metadata:
            raise ValueError(f"{source} has the key '{note[0]}' already")
        counts = len(MAGIC) + struct.calcsize("<IQQ")
        _, tensor_count, key_count = struct.unpack_from("<IQQ", old, len(MAGIC))
        file.write(MAGIC + struct.pack("<IQQ", read.version, tensor_count, key_count + 1))
        file.write(old[counts : header.metadata_end])
        file.write(_packed_string(note[0]) + struct.pack("<I", _STRING) + _packed_string(note[1]))
        file.write(old[header.metadata_end : header.header_end])
        before, after = (
            -(-at // header.alignment) * header.alignment for at in (header.header_end, file.tell())
        )
        file.write(bytes(after - file.tell()))
        for start in range(before, len(old), _COPIED_AT_ONCE):
            file.write(old[start : start + _COPIED_AT_ONCE])
        places = {tensor.name: tensor for tensor in read.tensors}
        for name, content in data:
            tensor = places.get(name)
            if tensor is None:
                raise SourceError(
                    f"{source} has no tensor '{name}'", "Was it made of another model?"
                )
            view = content.tobytes()
            if len(view) != tensor.nbytes:
                raise ValueError(
                    f"{len(view)} bytes do not fill '{name}', which has {tensor.nbytes}"
                )
            file.seek(tensor.offset - before + after)
            file.write(view)


def _packed_string(value: str) -> bytes:
    spelled = value.encode()
    return struct.pack("<Q", len(spelled)) + spelled
