"""Images as tokens, by a tiny model that sees."""

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggufkit.errors import ToolError, UsageError
from ggufkit.llamacpp import runtime
from ggufkit.llamacpp.batching import BatchContext, ContextOptions, Decoded, Model
from ggufkit.llamacpp.images import Projector
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.factory import IMAGE_CONTROL
from tests.pictures import picture

OPTIONS = ContextOptions(context=256, sequences=2, batch=64, threads=1)


@pytest.fixture(scope="module")
def model(seeing: tuple[Path, Path], native: NativeBuild) -> Iterator[Model]:
    with Model(seeing[0], build=native) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def projector(model: Model, seeing: tuple[Path, Path]) -> Iterator[Projector]:
    with Projector(model, seeing[1], threads=1) as loaded:
        yield loaded


def test_an_image_has_a_size(projector: Projector) -> None:
    assert projector.size(picture(1, 40, 24)) == (40, 24)


@pytest.mark.parametrize("image", [b"", b"no image", picture(1)[:60], b"RIFF\0\0\0\0WAVEfmt "])
def test_what_is_no_image_is_refused(projector: Projector, image: bytes) -> None:
    with pytest.raises(UsageError, match="no image that can be read"):
        projector.tokenize(projector.marker, [image])


def test_text_stays_text_and_an_image_stands_where_its_marker_was(projector: Projector) -> None:
    words = projector._words
    before, after = words.tokenize("Look: "), words.tokenize(" Well?", begins=False)
    found = projector.tokenize(f"Look: {projector.marker} Well?", [picture(1)])
    assert found.tokens[: len(before)] == tuple(before)
    assert found.tokens[-len(after) :] == tuple(after)
    assert found.images
    for place, seen in found.images.items():
        assert found.tokens[place : place + len(seen.tokens)] == seen.tokens
        # 32 x 32 pixels are 4 x 4 patches, of which 2 x 2 become one.
        assert len(seen.tokens) == 4
    assert {t for t in found.tokens if t < 0} == {
        t for seen in found.images.values() for t in seen.tokens
    }
    control = {words.tokenize(text, begins=False)[-1] for text in IMAGE_CONTROL}
    assert control <= set(found.tokens)


def test_the_same_image_has_the_same_tokens_and_no_other(projector: Projector) -> None:
    def negative(seed: int) -> list[int]:
        found = projector.tokenize(projector.marker, [picture(seed)])
        return [t for t in found.tokens if t < 0]

    first, second = negative(1), negative(2)
    assert first == negative(1)
    assert len(set(first)) == len(first)
    assert not set(first) & set(second)


def logits(context: BatchContext, tokens: tuple[int, ...], images: Any) -> Any:
    """After the last token of a prompt."""
    context.forget_all()
    known = 0
    while known < len(tokens):
        if known in images:
            assert context.see(0, known, images[known]) is Decoded.DONE
            known += len(images[known].tokens)
            continue
        end = min((place for place in images if place > known), default=len(tokens))
        context.clear()
        place = context.add(0, known, tokens[known:end], output=end == len(tokens))
        assert context.decode() is Decoded.DONE
        known = end
    return context._logits.view(place).copy()


def by_llama_cpp(projector: Projector, context: BatchContext, text: str, image: bytes) -> Any:
    """The same by libmtmd alone: it reads the text, and computes all of it."""
    lib = projector._library
    chunks, bitmap = lib.mtmd_input_chunks_init(), projector._bitmap(image)
    spelled = text.encode()
    given = lib.mtmd_input_text(spelled, len(spelled), True, True)
    listed = (lib.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert lib.mtmd_tokenize(projector.pointer, chunks, ctypes.byref(given), listed, 1) == 0
    context.forget_all()
    after = ctypes.c_int32(0)
    status = lib.mtmd_helper_eval_chunks(
        projector.pointer, context._pointer, chunks, 0, 0, 64, True, ctypes.byref(after)
    )
    assert status == 0
    lib.mtmd_input_chunks_free(chunks)
    lib.mtmd_bitmap_free(bitmap)
    return context._logits.view(-1).copy()


def test_a_prompt_with_an_image_is_computed_as_llama_cpp_does(
    model: Model, projector: Projector
) -> None:
    context = BatchContext(model, OPTIONS, projector)
    try:
        text = f"Look: {projector.marker} Well?"
        found = projector.tokenize(text, [picture(1)])
        ours = logits(context, found.tokens, found.images)
        assert (ours == by_llama_cpp(projector, context, text, picture(1))).all()
        other = projector.tokenize(text, [picture(2)])
        assert (logits(context, other.tokens, other.images) != ours).any()
    finally:
        context.close()


def test_no_room_for_an_image_leaves_the_sequence_as_it_was(
    model: Model, projector: Projector
) -> None:
    context = BatchContext(model, replace(OPTIONS, context=8, batch=8), projector)
    try:
        found = projector.tokenize(projector.marker, [picture(1)])
        (image, *_) = found.images.values()
        size = len(image.tokens)
        position = 0
        while context.see(0, position, image) is Decoded.DONE:
            position += size
        assert position >= context.cells - size
        context.clear()
        assert context.forget(0, position - size)
        context.add(0, position - size, [5], output=True)
        assert context.decode() is Decoded.DONE
    finally:
        context.close()


# What cannot be used.


def test_a_model_is_no_projector(model: Model, seeing: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="is no projector for images"):
        Projector(model, seeing[0])


def test_a_projector_of_another_model(
    seeing: tuple[Path, Path], tiny_gguf: Path, native: NativeBuild
) -> None:
    with (
        Model(tiny_gguf, build=native) as other,
        pytest.raises(ToolError, match=r"cannot use mmproj-seeing\.gguf with .*mismatch"),
    ):
        Projector(other, seeing[1])


def test_a_build_without_the_library(native: NativeBuild, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no library for images") as caught:
        runtime.require_mtmd(replace(native, root=tmp_path))
    assert "ggufkit build" in caught.value.hint


def test_without_a_projector_nothing_is_seen(model: Model, projector: Projector) -> None:
    context = BatchContext(model, OPTIONS)
    try:
        (image, *_) = projector.tokenize(projector.marker, [picture(1)]).images.values()
        with pytest.raises(ToolError, match="no projector"):
            context.see(0, 0, image)
    finally:
        context.close()
