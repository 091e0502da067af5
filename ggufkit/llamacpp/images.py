"""Images as a model reads them: llama.cpp's libmtmd with the projector of a model.

A projector (``mmproj``) is a second GGUF: it holds the part of a model that sees,
and turns an image into vectors that stand in a prompt as tokens do.
"""

import ctypes
import hashlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

from ggufkit import settings
from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.runtime import drain_errors, load_mtmd

if TYPE_CHECKING:
    from ggufkit.llamacpp.batching import Model

_MAX_SEEN = 64
"""Images that are kept ready; what a conversation shows again is not read again."""
_IDENTITY_NBYTES = 6


@dataclass(frozen=True)
class Seen:
    """A part of an image, ready to be computed; large images are cut into several.

    Attributes:
        tokens: stand for it in a prompt, one for each of its positions: negative
            numbers, and the same again for the same image alone.
        chunk: what libmtmd computes.
    """

    tokens: tuple[int, ...]
    chunk: "_Chunk"


@dataclass(frozen=True)
class Prompt:
    """Text and images as tokens.

    Attributes:
        tokens: of the text, and between them those that stand for images.
        images: what begins at which place in ``tokens``.
    """

    tokens: tuple[int, ...]
    images: dict[int, Seen]


class _Chunk:
    """One of libmtmd's chunks, freed together with this."""

    def __init__(self, library: ModuleType, borrowed: Any) -> None:
        self._free = library.mtmd_input_chunk_free
        self.pointer = library.mtmd_input_chunk_copy(borrowed)

    def __del__(self) -> None:
        self._free(self.pointer)


class Projector:
    """What a model sees with. One thread prepares prompts, one other may compute.

    Args:
        model: the model; this must be closed first.
        path: GGUF of the projector.
        threads: None for the setting's.

    Attributes:
        marker: stands in a text where an image is.

    Raises:
        ToolError: if the build has no libmtmd, or it cannot use the projector.
        UsageError: if it is no projector, or none for images.
        IntegrityError: if the file is broken.
    """

    def __init__(self, model: "Model", path: Path, *, threads: int | None = None) -> None:
        if Metadata(read_gguf(path)).get("general.architecture") != "clip":
            raise UsageError(
                f"{path.name} is no projector for images",
                "It is a file of its own beside the model, most often called mmproj-...gguf",
            )
        self._library = lib = load_mtmd(model.build)
        # Nobody can guess it, and so nobody can write an image into a text.
        self.marker = f"<__image_{secrets.token_hex(8)}__>"
        self._words = model.vocabulary
        self._seen: dict[bytes, tuple[Seen | tuple[int, ...], ...]] = {}
        params = lib.mtmd_context_params_default()
        params.use_gpu = model.on_gpu
        params.print_timings = False
        params.n_threads = threads or settings.threads()
        params.media_marker = self.marker.encode()
        drain_errors()
        self.pointer = lib.mtmd_init_from_file(os.fsencode(path), model.pointer, params)
        if not self.pointer:
            raise ToolError(
                f"llama.cpp cannot use {path.name} with {model.path.name}: {drain_errors()}",
                "A projector fits only the model that it was made with",
            )
        if not lib.mtmd_support_vision(self.pointer):
            self.close()
            raise UsageError(f"{path.name} is not for images")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free its memory."""
        self._seen.clear()
        pointer, self.pointer = self.pointer, None
        if pointer:
            self._library.mtmd_free(pointer)

    def size(self, image: bytes) -> tuple[int, int]:
        """Width and height of an image in pixels.

        Raises:
            UsageError: if it cannot be read.
        """
        lib, bitmap = self._library, self._bitmap(image)
        try:
            return int(lib.mtmd_bitmap_get_nx(bitmap)), int(lib.mtmd_bitmap_get_ny(bitmap))
        finally:
            lib.mtmd_bitmap_free(bitmap)

    def _bitmap(self, image: bytes) -> Any:
        lib = self._library
        buffer = (ctypes.c_uint8 * len(image)).from_buffer_copy(image)
        bitmap = lib.mtmd_helper_bitmap_init_from_buf(self.pointer, buffer, len(image), False)
        drain_errors()
        if bitmap and not lib.mtmd_bitmap_is_audio(bitmap):
            return bitmap
        if bitmap:
            lib.mtmd_bitmap_free(bitmap)
        raise UsageError("this is no image that can be read", "JPEG, PNG, BMP and GIF can")

    def tokenize(self, text: str, images: Sequence[bytes]) -> Prompt:
        """Tokens of a text with images where its markers are.

        Args:
            text: has :attr:`marker` once for each image.
            images: files, in the order of the markers.

        Raises:
            UsageError: if an image cannot be read.
            ToolError: if the projector cannot take it.
        """
        first, *rest = text.split(self.marker)
        if len(rest) != len(images):
            raise ValueError(f"{len(images)} images for {len(rest)} markers")
        tokens, places = self._words.tokenize(first), dict[int, Seen]()
        for image, after in zip(images, rest, strict=True):
            for part in self._look(image):
                if isinstance(part, Seen):
                    places[len(tokens)] = part
                    tokens += part.tokens
                else:
                    tokens += part
            tokens += self._words.tokenize(after, begins=False)
        return Prompt(tuple(tokens), places)

    def _look(self, image: bytes) -> tuple[Seen | tuple[int, ...], ...]:
        """An image as parts of it, and the tokens that the model wants around them."""
        digest = hashlib.sha256(image).digest()
        if digest not in self._seen:
            if len(self._seen) >= _MAX_SEEN:
                del self._seen[next(iter(self._seen))]
            self._seen[digest] = self._prepared(image, digest)
        return self._seen[digest]

    def _prepared(self, image: bytes, digest: bytes) -> tuple[Seen | tuple[int, ...], ...]:
        lib = self._library
        bitmap, chunks = self._bitmap(image), lib.mtmd_input_chunks_init()
        try:
            marker = self.marker.encode()
            text = lib.mtmd_input_text(marker, len(marker), False, True)
            listed = (lib.mtmd_bitmap_p_ctypes * 1)(bitmap)
            status = lib.mtmd_tokenize(self.pointer, chunks, ctypes.byref(text), listed, 1)
            if status != 0:
                raise ToolError(f"llama.cpp cannot take the image: {drain_errors()}")
            count = lib.mtmd_input_chunks_size(chunks)
            each = [lib.mtmd_input_chunks_get(chunks, number) for number in range(count)]
            return tuple(self._part(chunk, digest, n) for n, chunk in enumerate(each))
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)

    def _part(self, chunk: Any, digest: bytes, number: int) -> Seen | tuple[int, ...]:
        lib = self._library
        if lib.mtmd_input_chunk_get_type(chunk) == lib.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t(0)
            place = lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            tokens = tuple(place[: count.value])
            if min(tokens, default=0) < 0:
                raise ToolError(
                    "the model has no tokens for what the projector wants around an image",
                    "A projector fits only the model that it was made with",
                )
            return tokens
        identity = hashlib.sha256(digest + bytes([number % 256])).digest()[:_IDENTITY_NBYTES]
        start = int.from_bytes(identity, "little") << 16
        positions = range(lib.mtmd_input_chunk_get_n_pos(chunk))
        return Seen(tuple(-1 - start - n for n in positions), _Chunk(lib, chunk))

    def compute(self, context: Any, seen: Seen, *, sequence: int, start: int, batch: int) -> int:
        """Let a context take in a part of an image.

        Args:
            context: llama.cpp's.
            seen: the part.
            sequence: whose next positions it takes.
            start: the first of them.
            batch: tokens that the context computes at once.

        Returns:
            llama.cpp's status: 0 if all is well, 1 if there is no room.
        """
        lib, after = self._library, ctypes.c_int32(start)
        return int(
            lib.mtmd_helper_eval_chunk_single(
                self.pointer,
                context,
                seen.chunk.pointer,
                start,
                sequence,
                batch,
                False,
                ctypes.byref(after),
            )
        )
