from pathlib import Path

import pytest

from ggufkit.checkpoint import open_checkpoint
from ggufkit.errors import GgufkitError
from tests.factory import ARCHITECTURES, BREAKERS, make_checkpoint

# What only shows when weights and tokenizer are used.
DEEP = {"architecture", "nan", "wrong_tokenizer"}


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_the_seed_decides(tmp_path: Path, arch: str) -> None:
    first = contents(make_checkpoint(tmp_path / "a", arch, hidden=64))
    assert contents(make_checkpoint(tmp_path / "b", arch, hidden=64)) == first
    other = contents(make_checkpoint(tmp_path / "c", arch, hidden=64, seed=1))
    assert {n for n in first if other[n] != first[n]} == {"model.safetensors"}


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_options_reach_the_tensors(tmp_path: Path, arch: str) -> None:
    index = open_checkpoint(
        make_checkpoint(
            tmp_path, arch, layers=3, hidden=192, heads=3, kv_heads=1, tied=False,
            dtype="bfloat16", bias=True, shards=2,
        )
    )  # fmt: skip
    assert index.dtype == "BF16"
    assert len(index.shards) == 2
    assert index.tensors["lm_head.weight"].shape == (512, 192)
    assert index.tensors["model.layers.2.self_attn.k_proj.weight"].shape == (64, 192)
    assert index.tensors["model.layers.2.self_attn.k_proj.bias"].shape == (64,)


def test_both_spellings_of_the_tokenizer_agree(tmp_path: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer

    make_checkpoint(tmp_path, hidden=64)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("The quick brown fox", "assignment statements bind names", "12 äöü 世界"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 1
        assert ids[1:] == pieces.encode(text)
        assert tokenizer.decode(ids).strip() == text


@pytest.mark.parametrize("breaker", sorted(BREAKERS))
def test_broken_ones_are_refused(tmp_path: Path, breaker: str) -> None:
    path = make_checkpoint(tmp_path / "tiny", hidden=64)
    BREAKERS[breaker](path)
    if breaker in DEEP:
        open_checkpoint(path)
        return
    with pytest.raises(GgufkitError) as caught:
        open_checkpoint(path)
    assert caught.value.hint
