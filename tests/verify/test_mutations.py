"""Verification passes for each family, and catches what faulty conversions get wrong.

Each mutation changes one thing in a sound GGUF or in the checkpoint beside it, and
must be caught by the name of what it breaks.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ggufkit.checkpoint.index import open_checkpoint
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.observing import UnusableGGUFError
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.values import GGUFFile
from ggufkit.verify.check import Verifier
from ggufkit.verify.values import Verification
from tests.architectures import vocabularies
from tests.factory import ARCHITECTURES, make_checkpoint
from tests.test_factory import BLOCKS, CONVERTED
from tests.verify.converting import convert_all
from tests.verify.rewriting import rewrite

WITH_BIAS = ("llama", "stablelm")
"""Families that take biases in attention on request, and whose biases llama.cpp adds."""


@dataclass(frozen=True)
class Case:
    """A family's checkpoint and its float GGUF."""

    arch: str
    checkpoint: Path
    gguf: Path
    header: GGUFFile
    scratch: Path

    @property
    def name(self) -> str:
        return str(self.header.metadata["general.architecture"])

    @property
    def tensors(self) -> set[str]:
        return {tensor.name for tensor in self.header.tensors}

    def key(self, name: str) -> Any:
        return self.header.metadata.get(f"{self.name}.{name}")

    def edited(self, **changes: Any) -> Path:
        """The checkpoint with another config."""
        copy = self.scratch / "edited"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.checkpoint, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | changes))
        return copy


def _byte_level(arch: str) -> str:
    """The kind of byte-level tokenizer of a family; empty for SentencePiece."""
    # transformers splits text for Qwen2 by a rule of its own, whatever the file says.
    return "qwen2" if arch == "qwen2" else "bpe" if ARCHITECTURES[arch].byte_level else ""


@pytest.fixture(scope="module")
def cases(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    place = tmp_path_factory.mktemp("cases")
    for kind in ("bpe", "qwen2"):
        vocabularies.write(kind, place / kind, 512)
    pairs = {}
    for arch in CONVERTED:
        checkpoint = make_checkpoint(
            place / arch / "checkpoint",
            arch,
            layers=BLOCKS.get(arch, 2),
            hidden=64,
            intermediate=128,
            tokenizer=place / kind if (kind := _byte_level(arch)) else None,
            bias=arch in WITH_BIAS,
        )
        pairs[checkpoint] = place / arch / f"{arch}.gguf"
    convert_all(native, pairs)
    return {
        gguf.stem: Case(gguf.stem, checkpoint, gguf, read_gguf(gguf), gguf.parent)
        for checkpoint, gguf in pairs.items()
    }


@pytest.fixture(scope="module", params=CONVERTED)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture(scope="module")
def verifier(case: Case) -> Iterator[Verifier]:
    index = open_checkpoint(case.checkpoint, trust_remote_code=True)
    trust = ARCHITECTURES[case.arch].code is not None
    with Verifier(index, trust_remote_code=trust, stored="F32") as verifier:
        yield verifier


KNOWN = {
    # It strips blanks after its control tokens, which no GGUF can say.
    "phi3": {"unusual-text"},
    # It composes characters (NFC), which llama.cpp does not.
    "qwen2": {"unusual-text"},
}
"""Warnings of sound conversions."""


def names(found: Verification) -> set[str]:
    return {m.name for m in found.mismatches if m.error}


def test_a_sound_conversion_passes(case: Case, verifier: Verifier) -> None:
    found = verifier.check(case.gguf)
    assert {m.name for m in found.mismatches} <= KNOWN.get(case.arch, set())
    assert not found.errors
    assert found.not_compared == ()
    assert found.figures["lines"] > 80
    assert found.figures["positions"] == 48
    assert found.figures["kl_mean"] < 1e-6


Values = npt.NDArray[Any]


def _mutated_gguf(case: Case, **changes: Any) -> Path:
    return rewrite(case.gguf, case.scratch / "mutated.gguf", **changes)


def _pre_tokenizer(case: Case) -> Path | None:
    keys = case.header.metadata
    if keys["tokenizer.ggml.model"] == "gpt2":
        other = "gpt-2" if keys["tokenizer.ggml.pre"] == "qwen2" else "llama-bpe"
        return _mutated_gguf(case, keys={"tokenizer.ggml.pre": other})
    prefix = bool(keys.get("tokenizer.ggml.add_space_prefix", True))
    return _mutated_gguf(case, keys={"tokenizer.ggml.add_space_prefix": not prefix})


def _lost_added_token(case: Case) -> Path:
    tokens = list(case.header.metadata["tokenizer.ggml.tokens"])
    kinds = list(case.header.metadata["tokenizer.ggml.token_type"])
    number = tokens.index("<|im_end|>")
    tokens[number], kinds[number] = f"[PAD{number}]", 5
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    return _mutated_gguf(case, keys=keys)


def _changed_template(case: Case) -> Path:
    template = case.header.metadata["tokenizer.chat_template"]
    return _mutated_gguf(
        case, keys={"tokenizer.chat_template": template.replace("assistant\n", "assistant ")}
    )


def _dropped_bias(case: Case) -> Path | None:
    name = next(
        (n for n in sorted(case.tensors) if n.endswith(("attn_q.bias", "attn_qkv.bias"))), None
    )
    return name and _mutated_gguf(case, tensors={name: np.zeros_like})


def _other_rope_base(case: Case) -> Path | None:
    bases = {
        f"{case.name}.{name}": 3 * base
        for name in ("rope.freq_base", "rope.freq_base_swa")
        if (base := case.key(name))
    }
    return _mutated_gguf(case, keys=bases) if bases else None


def _permuted_heads(case: Case) -> Path:
    name = next(
        n
        for n in ("blk.0.attn_q.weight", "blk.0.attn_qkv.weight", "blk.0.attn_q_b.weight")
        if n in case.tensors
    )
    heads = int(case.key("attention.head_count"))

    def swap(values: Values) -> Values:
        rows = values.shape[0] // (1 if "qkv" not in name else 3)
        size = rows // heads
        values[: 2 * size] = np.concatenate([values[size : 2 * size], values[:size]])
        return values

    return _mutated_gguf(case, tensors={name: swap})


def _other_output(case: Case) -> Path:
    """An output matrix that is not the embedding; another order of tokens where it is untied."""
    shuffle: Callable[[Values], Values] = lambda values: np.roll(values, 7, axis=0)  # noqa: E731
    if "output.weight" in case.tensors:
        return _mutated_gguf(case, tensors={"output.weight": shuffle})
    held: dict[str, Values] = {}

    def keep(values: Values) -> Values:
        held["output.weight"] = shuffle(values)
        return values

    first = rewrite(case.gguf, case.scratch / "first.gguf", tensors={"token_embd.weight": keep})
    return rewrite(first, case.scratch / "mutated.gguf", added=held)


def _rescaled_norm(case: Case) -> Path:
    name = next(n for n in sorted(case.tensors) if "norm" in n and n.endswith(".weight"))
    return _mutated_gguf(case, tensors={name: lambda values: values * np.float32(1.5)})


GGUF_MUTATIONS: dict[str, tuple[Callable[[Case], Path | None], str]] = {
    "another pre-tokenizer": (_pre_tokenizer, "tokens"),
    "a lost added token": (_lost_added_token, "vocabulary"),
    "another template": (_changed_template, "template"),
    "a dropped bias": (_dropped_bias, "function"),
    "another RoPE base": (_other_rope_base, "function"),
    "permuted heads": (_permuted_heads, "function"),
    "another output matrix": (_other_output, "function"),
    "a rescaled norm": (_rescaled_norm, "function"),
}


def test_mutated_ggufs_are_caught_by_name(case: Case, verifier: Verifier) -> None:
    wrong, tried = {}, 0
    for what, (mutate, name) in GGUF_MUTATIONS.items():
        mutated = mutate(case)
        if mutated is None:
            continue  # the family has no such thing
        tried += 1
        try:
            found = names(verifier.check(mutated))
        except UnusableGGUFError:
            # Such as an output matrix where llama.cpp always takes the embedding.
            continue
        if name not in found:
            wrong[what] = found
    assert not wrong
    assert tried >= 6


def test_mutated_checkpoints_are_caught_by_name(case: Case) -> None:
    before = json.loads((case.checkpoint / "config.json").read_text())
    keys = {"activation_function", "hidden_act", "hidden_activation"} & before.keys()
    mutations: dict[str, dict[str, Any]] = {
        "function": dict.fromkeys(keys, "relu"),
        "end-tokens": {"eos_token_id": [before["eos_token_id"], 7]},
    }
    trust = ARCHITECTURES[case.arch].code is not None
    if trust:
        del mutations["function"]  # their own code knows one activation alone
    for name, changes in mutations.items():
        index = open_checkpoint(case.edited(**changes), trust_remote_code=trust)
        with Verifier(index, trust_remote_code=trust, stored="F32") as verifier:
            assert name in names(verifier.check(case.gguf))


WINDOWED = ("mistral", "mixtral", "phi3", "gemma2", "gemma3", "cohere2")


@pytest.mark.parametrize("case", WINDOWED, indirect=True)
def test_another_window_is_another_function(case: Case) -> None:
    index = open_checkpoint(case.edited(sliding_window=8))
    with Verifier(index, stored="F32") as verifier:
        assert "function" in names(verifier.check(case.gguf))
