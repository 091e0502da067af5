"""Three kinds of vocabulary, and what llama.cpp makes of each; docs/verify.md has the table."""

import io
import json
from pathlib import Path
from typing import Any

from ggufkit.checkpoint.index import open_checkpoint
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.verify.check import Verifier
from ggufkit.verify.values import Verification
from tests.factory import CONTROL, _tokenizer_json, make_checkpoint, write_demo_tokenizer

VOCAB = 512


def sentencepiece_model(kind: str) -> bytes:
    from pydoc_data.topics import topics

    import sentencepiece

    lines = "\n".join(topics[name] for name in sorted(topics))[:60_000].splitlines()
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type=kind,
        vocab_size=VOCAB,
        byte_fallback=True,
        control_symbols=list(CONTROL),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def unigram_json(model: bytes) -> str:
    """The tokenizer of a unigram model as transformers reads it."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    scores = [(pieces.id_to_piece(n), pieces.get_score(n)) for n in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    # As SentencePiece does it: a blank in front, and blanks as U+2581.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<s>", "</s>", *CONTROL)]
    )
    return tokenizer.to_str()


def verified(native: NativeBuild, checkpoint: Path) -> Verification:
    out = checkpoint.parent / "out.gguf"
    toolchain.convert_checkpoint(
        native, checkpoint, out, outtype="f32", name="x", log=checkpoint.parent / "log"
    )
    with Verifier(open_checkpoint(checkpoint), stored="F32") as verifier:
        return verifier.check(out)


def with_vocabulary(tmp_path: Path, model: bytes, **config: Any) -> Path:
    path = make_checkpoint(tmp_path / "model", hidden=64, intermediate=128, vocab=VOCAB)
    (path / "tokenizer.model").write_bytes(model)
    named = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(named | config))
    return path


def test_byte_level_bpe_is_the_same_everywhere(
    native: NativeBuild, demo_gguf: Path, tmp_path: Path
) -> None:
    tokenizer = write_demo_tokenizer(demo_gguf, tmp_path / "tokenizer")
    path = make_checkpoint(tmp_path / "model", hidden=64, intermediate=128, tokenizer=tokenizer)
    found = verified(native, path)
    assert found.mismatches == ()
    assert found.figures["lines"] > 150


def test_sentencepiece_bpe_differs_around_blanks_and_control_tokens_alone(
    native: NativeBuild, tmp_path: Path
) -> None:
    """llama.cpp puts a blank after each control token and before a text that begins with one."""
    model = sentencepiece_model("bpe")
    own = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    path = with_vocabulary(tmp_path, model, **own)
    (path / "tokenizer.json").write_text(_tokenizer_json(model, True, CONTROL))
    found = verified(native, path)
    (warning,) = found.mismatches
    assert (warning.name, warning.error) == ("unusual-text", False)
    for kind in ("begin with a blank", "control tokens", "conversations"):
        assert kind in warning.message


def test_a_unigram_vocabulary_becomes_other_tokens(native: NativeBuild, tmp_path: Path) -> None:
    """The converter writes it as a SentencePiece BPE, which merges greedily instead of
    looking for the most likely split."""
    model = sentencepiece_model("unigram")
    path = with_vocabulary(tmp_path, model)
    (path / "tokenizer.json").write_text(unigram_json(model))
    (tokens,) = (m for m in verified(native, path).errors if m.name == "tokens")
    assert int(tokens.message.split()[0]) >= 8
