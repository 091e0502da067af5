"""A reference's predictions in a compact file, to be used again without the reference.

For each scored token the file holds what
:class:`~ggufkit.evaluate.divergence.CompactReference` does: the log probabilities
of the likeliest tokens in float32, and the sum of the others. As many tokens are
kept as make the file a ninth of what ``llama-perplexity --kl-divergence-base``
writes (16 bits for each token of the vocabulary). Divergences from it are lower
bounds; how much too low was measured when the file was written.

Layout: a header of 4096 bytes (a line that names the format, JSON, spaces), then
one record for each chunk, little-endian, each with its CRC-32 behind it.
"""

import json
import os
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ggufkit.errors import IntegrityError, UsageError
from ggufkit.evaluate.divergence import CompactReference
from ggufkit.store import require_space
from ggufkit.values import Json, to_json

_MAGIC = b"ggufkit reference cache 1\n"
_HEADER = 4096
_SHARE = 9
"""The file is this part of llama.cpp's."""
_SHORT_VOCABULARY = 1 << 16


@dataclass(frozen=True)
class Identity:
    """What a cache is of. One of anything else must not be used.

    Attributes:
        reference: SHA-256 of the reference's GGUF.
        text: SHA-256 of the text.
        context: tokens per chunk.
        vocabulary: tokens that the reference knows.
        gpu_layers: layers that were on a GPU.
        llamacpp: commit of llama.cpp.
        backend: of the native build.
    """

    reference: str
    text: str
    context: int
    vocabulary: int
    gpu_layers: int
    llamacpp: str
    backend: str

    @property
    def scored(self) -> int:
        """Scored tokens of a chunk."""
        return self.context - 1 - self.context // 2

    @property
    def token_nbytes(self) -> int:
        """Bytes of a token's id."""
        return 2 if self.vocabulary <= _SHORT_VOCABULARY else 4

    @property
    def kept(self) -> int:
        """Tokens whose log probabilities are kept."""
        return max(1, 2 * self.vocabulary // (_SHARE * (self.token_nbytes + 4)))

    @property
    def record_nbytes(self) -> int:
        """Bytes of one chunk."""
        return self.scored * (8 + self.kept * (self.token_nbytes + 4)) + 4


class ReferenceCache:
    """A finished cache, open for reading.

    Attributes:
        chunks: how many it holds.
        shortfall: by how large a share the mean divergence from this cache was
            too low when it was written: name of a model to share.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        """Open and check a cache.

        Raises:
            IntegrityError: if it is none, or truncated.
            UsageError: if it is of another model, text or setting.
        """
        self.path = path
        self._identity = identity
        self._file = path.open("rb")
        try:
            header = _read_header(self._file, path)
            _check_identity(header, identity, path)
            self.chunks = int(header["chunks"])
            self.shortfall: dict[str, float] = header["shortfall"]
            expected = _HEADER + self.chunks * identity.record_nbytes
            if (nbytes := path.stat().st_size) != expected:
                raise IntegrityError(
                    f"the reference cache {path} has {nbytes:,} bytes instead of {expected:,}",
                    f"Remove it, and it is made again: rm '{path}'",
                )
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def chunk(self, number: int) -> CompactReference:
        """What the reference said in one chunk, counted from 0.

        Raises:
            IntegrityError: if its bytes have changed.
        """
        size = self._identity.record_nbytes
        self._file.seek(_HEADER + number * size)
        raw = self._file.read(size)
        if len(raw) != size or zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
            raise IntegrityError(
                f"the reference cache {self.path} is damaged in chunk {number + 1}",
                f"Remove it, and it is made again: rm '{self.path}'",
            )
        return _unpack(raw, self._identity)


class CacheWriter:
    """Writes a cache, or goes on with one that is not finished or too short.

    Attributes:
        chunks: chunks that are there.
    """

    def __init__(self, path: Path, identity: Identity, chunks: int) -> None:
        """Begin.

        Args:
            path: the cache to be.
            identity: what it is of.
            chunks: how many it shall hold.

        Raises:
            DiskSpaceError: if it would not fit.
        """
        self.path = path
        self._identity = identity
        self._partial = path.with_name(f".{path.name}.partial")
        self._exact: dict[str, float] = {}
        self._bound: dict[str, float] = {}
        self._shortfall: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cache = ReferenceCache(path, identity)
            self._shortfall = cache.shortfall
            cache.close()
            os.replace(path, self._partial)
        self.chunks = self._whole_chunks()
        missing = (chunks - self.chunks) * identity.record_nbytes
        require_space(path.parent, missing, f"the reference cache {path.name}")
        self._file = self._partial.open("r+b" if self.chunks else "w+b")
        self._file.truncate(_HEADER + self.chunks * identity.record_nbytes)
        self._write_header()
        self._file.seek(0, os.SEEK_END)

    def _whole_chunks(self) -> int:
        """Chunks that a killed run left, if they are of the same model and text."""
        try:
            with self._partial.open("rb") as file:
                header = _read_header(file, self._partial)
            _check_identity(header, self._identity, self._partial)
        except (OSError, IntegrityError, UsageError):
            return 0
        return (self._partial.stat().st_size - _HEADER) // self._identity.record_nbytes

    def _write_header(self) -> None:
        told = {"chunks": self.chunks, "shortfall": self._shortfall, **to_json(self._identity)}
        header = _MAGIC + json.dumps(told).encode()
        if len(header) >= _HEADER:  # names of very many models
            header = _MAGIC + json.dumps(told | {"shortfall": {}}).encode()
        self._file.seek(0)
        self._file.write(header.ljust(_HEADER - 1) + b"\n")

    @property
    def kept(self) -> int:
        """Tokens of each row whose log probabilities are kept."""
        return self._identity.kept

    def append(self, chunk: CompactReference) -> None:
        """Add the next chunk."""
        raw = _pack(chunk, self._identity)
        self._file.write(raw + zlib.crc32(raw).to_bytes(4, "little"))
        self._file.flush()
        self.chunks += 1

    def note(self, model: str, exact: float, bound: float) -> None:
        """Note what a model's divergences sum up to, without and with the cache."""
        self._exact[model] = self._exact.get(model, 0.0) + exact
        self._bound[model] = self._bound.get(model, 0.0) + bound

    def finish(self) -> dict[str, float]:
        """Publish the cache; gives by how large a share its divergences are too low."""
        found = {
            model: 1 - self._bound[model] / exact
            for model, exact in self._exact.items()
            if exact > 0
        }
        self._shortfall = {**self._shortfall, **found}
        self._write_header()
        self.close()
        os.replace(self._partial, self.path)
        return found

    def close(self) -> None:
        """Close the file; what is there stays for the next run."""
        self._file.close()


def _read_header(file: BinaryIO, path: Path) -> dict[str, Json]:
    raw = file.read(_HEADER)
    try:
        if len(raw) != _HEADER or not raw.startswith(_MAGIC):
            raise ValueError("it does not begin like one")
        header = json.loads(raw[len(_MAGIC) :])
        if not isinstance(header["chunks"], int) or not isinstance(header["shortfall"], dict):
            raise ValueError("its header is incomplete")
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(
            f"{path} is no reference cache: {error}", f"Remove it: rm '{path}'"
        ) from error
    return dict(header)


_WORDS = {
    "reference": "another reference",
    "text": "another text",
    "context": "another context",
    "vocabulary": "another vocabulary",
    "gpu_layers": "another number of GPU layers",
    "llamacpp": "another llama.cpp",
    "backend": "another backend of llama.cpp",
}


def _check_identity(header: dict[str, Json], identity: Identity, path: Path) -> None:
    for f in fields(identity):
        found, wanted = header.get(f.name), getattr(identity, f.name)
        if found != wanted:
            raise UsageError(
                f"the reference cache {path} is of {_WORDS[f.name]}: {found}, not {wanted}",
                f"Name another directory with --reference-cache, or remove it: rm '{path}'",
            )


def _pack(chunk: CompactReference, identity: Identity) -> bytes:
    kinds = ("<f4", "<f4", f"<u{identity.token_nbytes}", "<f4")
    arrays = (getattr(chunk, f.name) for f in fields(chunk))
    return b"".join(a.astype(k).tobytes() for a, k in zip(arrays, kinds, strict=True))


def _unpack(raw: bytes, identity: Identity) -> CompactReference:
    rows, kept, width = identity.scored, identity.kept, identity.token_nbytes
    at = 8 * rows
    both = np.frombuffer(raw, "<f4", 2 * rows).reshape(2, rows)
    tokens = np.frombuffer(raw, f"<u{width}", rows * kept, at).reshape(rows, kept)
    log_p = np.frombuffer(raw, "<f4", rows * kept, at + width * rows * kept).reshape(rows, kept)
    return CompactReference(both[0], both[1], tokens, log_p)
