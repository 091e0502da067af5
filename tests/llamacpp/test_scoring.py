"""The model that reads, held against llama-perplexity."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from ggufkit.errors import IntegrityError, SourceError, ToolError, UsageError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.scoring import Scorer, layout_for
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.chatting import splitting_by_regex
from tests.factory import break_gguf

THREADS = 2
CONTEXT = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics))[:30_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def scorer(tiny_gguf: Path, native: NativeBuild) -> Iterator[Scorer]:
    with Scorer(tiny_gguf, context=CONTEXT, threads=THREADS, build=native) as loaded:
        yield loaded


def chunks_of(scorer: Scorer, text: Path, count: int) -> list[np.ndarray]:
    tokens = scorer.tokenize(text.read_bytes())
    size = scorer.layout.context
    return [tokens[n * size : (n + 1) * size] for n in range(count)]


def read_all(scorer: Scorer, chunks: list[np.ndarray], step: int) -> list[np.ndarray]:
    """Logits of all scored positions, chunk by chunk."""
    found: list[np.ndarray] = []
    for start in range(0, len(chunks), step):
        some = chunks[start : start + step]
        parts: list[list[np.ndarray]] = [[] for _ in some]
        for blocks in scorer.read(some):
            for own, block in zip(parts, blocks, strict=True):
                own.append(block.logits.copy())
        found += [np.concatenate(own) for own in parts]
    return found


def log_likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    sums = np.log(np.exp(shifted).sum(axis=1))
    return shifted[np.arange(len(targets)), targets] - sums


@pytest.mark.parametrize(("context", "chunks"), [(64, 9), (512, 3), (1280, 2)])
def test_perplexity_is_llama_perplexitys_own(
    tiny_gguf: Path, text: Path, native: NativeBuild, tmp_path: Path, context: int, chunks: int
) -> None:
    told = toolchain.perplexity(
        native,
        tiny_gguf,
        text,
        context=context,
        chunks=chunks,
        batch=context,
        threads=THREADS,
        log=tmp_path / "log",
    )
    with Scorer(tiny_gguf, context=context, threads=THREADS, build=native) as scorer:
        read = chunks_of(scorer, text, chunks)
        logits = read_all(scorer, read, scorer.layout.sequences)
    assert [len(rows) for rows in logits] == [context - 1 - context // 2] * chunks
    found = [
        log_likelihoods(rows, chunk[context // 2 + 1 :])
        for rows, chunk in zip(logits, read, strict=True)
    ]
    assert f"{np.exp(-np.mean(found)):.4f}" == f"{told.perplexity:.4f}"


def test_tokens_are_those_that_llama_perplexity_writes_down(
    tiny_gguf: Path, scorer: Scorer, text: Path, native: NativeBuild, tmp_path: Path
) -> None:
    logits = tmp_path / "logits.bin"
    ran = toolchain.run(
        [
            *(native.tool("llama-perplexity"), "-m", tiny_gguf, "-f", text, "-c", str(CONTEXT)),
            *("-b", str(CONTEXT), "--chunks", "5", "--save-all-logits", logits),
        ]
    )
    assert ran.returncode == 0
    raw = logits.read_bytes()
    context, vocabulary, chunks = struct.unpack_from("<iii", raw, 8)
    assert (context, vocabulary, chunks) == (CONTEXT, scorer.vocabulary, 5)
    theirs = np.frombuffer(raw, np.int32, chunks * context, 20)
    assert np.array_equal(theirs, np.concatenate(chunks_of(scorer, text, 5)))


def test_a_word_without_end_is_read_too(
    demo_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    falcon = splitting_by_regex(demo_gguf, tmp_path / "falcon.gguf")
    text = b"so " + b"!" * 200_000
    with Scorer(falcon, context=CONTEXT, threads=THREADS, build=native) as scorer:
        tokens = scorer.tokenize(text)
        assert b"".join(map(scorer.piece, tokens.tolist())) == text


def test_special_tokens_in_a_text_are_characters(scorer: Scorer) -> None:
    tokens = scorer.tokenize(b"</s> and <|im_end|>\n")
    assert scorer.bos == tokens[0] == 1
    assert not {2, *range(3, 5)} & set(tokens[1:].tolist())
    spelled = b"".join(scorer.piece(int(token)) for token in tokens[1:])
    assert spelled == b" </s> and <|im_end|>"


def test_logits_are_a_view_that_nobody_can_write_to(scorer: Scorer, text: Path) -> None:
    chunks = chunks_of(scorer, text, 2)
    ((first,),) = scorer.read(chunks[:1])
    kept, before = first.logits, first.logits.copy()
    assert not kept.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        kept[0, 0] = 0
    ((second,),) = scorer.read(chunks[1:])
    assert second.logits.ctypes.data == kept.ctypes.data
    assert not np.array_equal(kept, before)


def test_a_chunk_reads_the_same_alone_and_among_others(scorer: Scorer, text: Path) -> None:
    chunks = chunks_of(scorer, text, scorer.layout.sequences + 2)
    assert scorer.layout.sequences > 1
    together = read_all(scorer, chunks, scorer.layout.sequences)
    alone = read_all(scorer, chunks, 1)
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one, other)


def test_any_position_of_a_chunk_can_be_scored(
    scorer: Scorer, tiny_gguf: Path, text: Path, native: NativeBuild
) -> None:
    chunk = chunks_of(scorer, text, 1)
    (half,) = read_all(scorer, chunk, 1)
    with Scorer(
        tiny_gguf, context=CONTEXT, threads=THREADS, whole_chunks=True, build=native
    ) as whole:
        ((block,),) = whole.read(chunk, 0)
        assert block.first == 0
        assert len(block.logits) == CONTEXT - 1
        assert np.allclose(block.logits[CONTEXT // 2 :], half, atol=1e-4)


@given(context=st.integers(8, 9000), vocabulary=st.integers(100, 300_000))
def test_every_layout_covers_what_is_scored_and_stays_small(context: int, vocabulary: int) -> None:
    layout = layout_for(context, vocabulary)
    first = context // 2
    calls = list(layout.calls(context, first))
    assert [n for c in calls for n in range(c.start, c.end)] == list(range(context))
    scored = [n for c in calls for n in range(c.begin, c.scored)]
    assert scored == list(range(first, context - 1))
    assert max(c.end - c.begin for c in calls) * layout.sequences <= layout.rows
    assert layout.sequences * layout.batch <= max(512, layout.batch)
    assert 4 * vocabulary * layout.rows <= 256 << 20 or layout.batch <= 32


def test_a_large_vocabulary_gets_a_small_batch() -> None:
    rows = layout_for(512, 150_000).rows
    assert 2 * 2 * 4 * 150_000 * rows < 700 << 20  # two models, each holding logits twice


def test_the_broken_block_is_named(
    tiny_types: dict[str, Path], text: Path, native: NativeBuild, tmp_path: Path
) -> None:
    broken = break_gguf(tiny_types["F32"], tmp_path / "broken.gguf", "blk.1.ffn_down.weight")
    with Scorer(broken, context=CONTEXT, threads=THREADS, build=native) as scorer:
        (chunk,) = chunks_of(scorer, text, 1)
        assert not np.isfinite(read_all(scorer, [chunk], 1)[0]).any()
        assert scorer.first_broken_tensor(chunk) == "ffn_out-1"


def test_a_sound_model_has_no_broken_tensor(scorer: Scorer, text: Path) -> None:
    assert scorer.first_broken_tensor(chunks_of(scorer, text, 1)[0]) is None


def test_what_cannot_be_loaded_is_told(
    native: NativeBuild, tiny_gguf: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError):
        Scorer(tmp_path / "none.gguf", context=CONTEXT, build=native)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-100])
    with pytest.raises(IntegrityError):
        Scorer(cut, context=CONTEXT, build=native)
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(tiny_gguf.read_bytes().replace(b"llama", b"lama!"))
    with pytest.raises(ToolError, match=r"cannot load .*unknown\.gguf.*lama!"):
        Scorer(unknown, context=CONTEXT, build=native)


def test_learned_positions_end_somewhere(native: NativeBuild, tmp_path: Path) -> None:
    """Behind them llama.cpp aborts the process, so it must not even begin."""
    writer = GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    writer.add_tensor("position_embd.weight", np.zeros((100, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match="has learned 100 positions") as caught:
        Scorer(tmp_path / "gpt2.gguf", context=101, build=native)
    assert caught.value.hint == "Ask for a shorter one: --context 100"
    with pytest.raises(ToolError, match="cannot load"):  # it is no whole model, but may be tried
        Scorer(tmp_path / "gpt2.gguf", context=100, build=native)
