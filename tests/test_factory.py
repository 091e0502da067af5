"""The factory's checkpoints are what they say: real ones, only small."""

import contextlib
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ggufkit.checkpoint import open_checkpoint
from ggufkit.checkpoint.index import CheckpointIndex
from ggufkit.errors import GgufkitError, ToolError, ToolOutputError
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.factory import ARCHITECTURES, BREAKERS, make_checkpoint, write_demo_tokenizer

# What only shows when weights and tokenizer are used.
DEEP = {"architecture", "nan", "wrong_tokenizer"}

NOT_CONVERTED = {
    # The method that gathers the norms of a block is a generator, and returns
    # the gathered one instead of yielding it.
    "stablelm_qk_norm": "Unprocessed norms",
    # llama.cpp's Qwen2-MoE has experts in every block.
    "qwen2_moe_dense_layer": "does not know what the tensor model.layers.1.mlp",
}
"""What this converter cannot do, and the words in which it says so."""

CONVERTED = sorted(ARCHITECTURES.keys() - NOT_CONVERTED)

BLOCKS = {"deepseek_v2_lite": 26}
"""llama.cpp goes by their number to tell whether queries come without a low rank."""

_LAYER = "model.layers.1."
TENSORS = {
    "llama": (f"{_LAYER}self_attn.k_proj.weight", (64, 192)),
    "mistral": (f"{_LAYER}mlp.up_proj.weight", (320, 192)),
    "qwen2": (f"{_LAYER}self_attn.v_proj.bias", (64,)),
    "qwen3": (f"{_LAYER}self_attn.q_norm.weight", (128,)),
    "gemma": (f"{_LAYER}self_attn.v_proj.weight", (64, 192)),
    "gemma2": (f"{_LAYER}self_attn.o_proj.weight", (192, 384)),
    "gemma3": (f"{_LAYER}self_attn.k_norm.weight", (128,)),
    "phi3": (f"{_LAYER}mlp.gate_up_proj.weight", (640, 192)),
    "smollm3": (f"{_LAYER}post_attention_layernorm.weight", (192,)),
    "granite": (f"{_LAYER}mlp.down_proj.weight", (192, 320)),
    "minicpm": (f"{_LAYER}mlp.gate_proj.weight", (320, 192)),
    "internlm2": (f"{_LAYER}attention.wqkv.weight", (320, 192)),
    "mixtral": (f"{_LAYER}block_sparse_moe.experts.3.w1.weight", (320, 192)),
    "olmo2": (f"{_LAYER}self_attn.q_norm.weight", (192,)),
    "gpt2": ("transformer.h.1.attn.c_attn.weight", (192, 576)),
    "stablelm": (f"{_LAYER}post_attention_layernorm.bias", (192,)),
    "stablelm_parallel": (f"{_LAYER}post_attention_layernorm.bias", None),
    "stablelm_qk_norm": (f"{_LAYER}self_attn.q_layernorm.norms.2.weight", (64,)),
    "cohere": (f"{_LAYER}input_layernorm.weight", (192,)),
    "cohere2": (f"{_LAYER}post_attention_layernorm.weight", None),
    "qwen2_moe": (f"{_LAYER}mlp.shared_expert.down_proj.weight", (192, 320)),
    "qwen2_moe_dense_layer": (f"{_LAYER}mlp.gate_proj.weight", (320, 192)),
    "qwen3_moe": (f"{_LAYER}mlp.experts.3.gate_proj.weight", (160, 192)),
    "deepseek_v2": (f"{_LAYER}self_attn.q_b_proj.weight", (288, 96)),
    "deepseek_v2_lite": (f"{_LAYER}self_attn.q_proj.weight", (288, 192)),
    "deepseek_v3": (f"{_LAYER}mlp.gate.e_score_correction_bias", (4,)),
}
"""A tensor that published checkpoints of the architecture have (or that tells by its
absence), and its shape with the options below."""

OUTPUTS = ("lm_head.weight", "output.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight")


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def opened(path: Path, arch: str) -> CheckpointIndex:
    return open_checkpoint(path, trust_remote_code=ARCHITECTURES[arch].code is not None)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_the_seed_decides(tmp_path: Path, arch: str) -> None:
    first = contents(make_checkpoint(tmp_path / "a", arch, hidden=64))
    assert contents(make_checkpoint(tmp_path / "b", arch, hidden=64)) == first
    other = contents(make_checkpoint(tmp_path / "c", arch, hidden=64, seed=1))
    assert {n for n in first if other[n] != first[n]} == {"model.safetensors"}


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_transformers_finds_all_it_looks_for(tmp_path: Path, arch: str) -> None:
    path = make_checkpoint(tmp_path, arch, hidden=64, intermediate=128)
    model, info = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__name__ == ARCHITECTURES[arch].class_name
    assert not any(info.values()), info
    tokens = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(tokens).logits
    assert bool(logits.isfinite().all())
    assert float(logits.std(1).min()) > 0.1


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_options_reach_the_tensors(tmp_path: Path, arch: str) -> None:
    index = opened(
        make_checkpoint(
            tmp_path, arch, layers=3, hidden=192, intermediate=320, heads=3, kv_heads=1,
            tied=False, dtype="bfloat16", shards=2,
        ),
        arch,
    )  # fmt: skip
    assert index.dtype == "BF16"
    assert len(index.shards) == 2
    shapes = {name: entry.shape for name, entry in index.tensors.items()}
    assert [s for n, s in shapes.items() if n.endswith(EMBEDDINGS)] == [(512, 192)]
    assert [s for n, s in shapes.items() if n in OUTPUTS] == [(512, 192)]
    assert {n.split(".")[2] for n in shapes if n.split(".")[1] in {"layers", "h"}} == set("012")
    name, shape = TENSORS[arch]
    assert shapes.get(name) == shape


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_biases_are_given_where_they_can_be(tmp_path: Path, arch: str) -> None:
    if ARCHITECTURES[arch].bias is None:
        with pytest.raises(ValueError, match=arch):
            make_checkpoint(tmp_path, arch, bias=True)
        return
    plain = opened(make_checkpoint(tmp_path / "a", arch, hidden=64), arch)
    biased = opened(make_checkpoint(tmp_path / "b", arch, hidden=64, bias=True), arch)
    more = biased.tensors.keys() - plain.tensors.keys()
    assert more
    assert all(".bias" in name for name in more)
    assert plain.tensors.keys() < biased.tensors.keys()


class Conversions:
    """Checkpoints converted to F32, two at a time, the one asked for first."""

    def __init__(self, directory: Path, build: NativeBuild, tokenizer: Path) -> None:
        self.directory = directory
        self._build = build
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(2)
        self._started: dict[str, Future[Path]] = {}

    def __getitem__(self, arch: str) -> Path:
        for name in (arch, *CONVERTED):
            if name not in self._started:
                self._make(name)
                self._started[name] = self._pool.submit(self._convert, name)
        return self._started[arch].result()

    def checkpoint(self, arch: str) -> Path:
        return self.directory / arch

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _make(self, arch: str) -> None:
        make_checkpoint(
            self.checkpoint(arch),
            arch,
            layers=BLOCKS.get(arch, 2),
            hidden=64,
            intermediate=128,
            tokenizer=self._tokenizer if ARCHITECTURES[arch].byte_level else None,
        )

    def _convert(self, arch: str) -> Path:
        out = self.directory / f"{arch}.gguf"
        log = out.with_suffix(".log")
        toolchain.convert_checkpoint(
            self._build, self.checkpoint(arch), out, outtype="f32", name=arch, log=log
        )
        return out


@pytest.fixture(scope="module")
def conversions(
    tmp_path_factory: pytest.TempPathFactory, native: NativeBuild, demo_gguf: Path
) -> Iterator[Conversions]:
    directory = tmp_path_factory.mktemp("conversions")
    tokenizer = write_demo_tokenizer(demo_gguf, directory / "tokenizer")
    conversions = Conversions(directory, native, tokenizer)
    yield conversions
    conversions.stop()
    shutil.rmtree(directory)  # half a gigabyte, for the vocabulary is a real one


CONTEXT, CHUNKS = 128, 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "assignment.txt"
    path.write_text(topics["assignment"][:4000], encoding="utf-8")
    return path


def measure(native: NativeBuild, gguf: Path, text: Path, log: Path) -> float:
    """By llama-perplexity, whose last lines are lost at times if it is done at once."""
    for _ in range(9):
        with contextlib.suppress(ToolOutputError):
            return toolchain.perplexity(
                native, gguf, text, context=CONTEXT, chunks=CHUNKS, threads=2, log=log
            ).perplexity
    pytest.fail(log.read_text(encoding="utf-8"))


def perplexity(checkpoint: Path, text: Path) -> float:
    """As llama-perplexity has it: of the second half of each context."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")).ids)
    begins = bool(tokens[0] == 1)
    tokens = tokens[: CHUNKS * CONTEXT].reshape(CHUNKS, CONTEXT)
    if begins:
        tokens[:, 0] = 1
    with torch.inference_mode():
        told = model(tokens).logits[:, CONTEXT // 2 : -1].log_softmax(-1)
    scored = told.gather(2, tokens[:, CONTEXT // 2 + 1 :, None])
    return math.exp(-float(scored.mean()))


@pytest.mark.parametrize("arch", CONVERTED)
def test_llama_cpp_reads_the_same_model(
    conversions: Conversions, native: NativeBuild, text: Path, tmp_path: Path, arch: str
) -> None:
    gguf = conversions[arch]
    read = read_gguf(gguf)
    name = read.metadata["general.architecture"]
    blocks = BLOCKS.get(arch, 2)
    assert read.metadata[f"{name}.block_count"] == blocks
    assert {t.type for t in read.tensors} == {"F32"}
    expected = perplexity(conversions.checkpoint(arch), text)
    measured = measure(native, gguf, text, tmp_path / "log")
    # The tool keeps keys and values in half precision, in every block.
    assert measured == pytest.approx(expected, rel=1e-3 * blocks)


@pytest.mark.parametrize("arch", sorted(NOT_CONVERTED))
def test_some_cannot_be_converted(conversions: Conversions, arch: str) -> None:
    with pytest.raises(ToolError) as caught:
        conversions[arch]
    assert NOT_CONVERTED[arch] in caught.value.message


@pytest.mark.parametrize("arch", ["llama", "gemma", "phi3"])
def test_both_spellings_of_the_tokenizer_agree(tmp_path: Path, arch: str) -> None:
    import sentencepiece

    make_checkpoint(tmp_path, arch, hidden=64)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("The quick brown fox", "assignment statements bind names", "12 äöü 世界"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 1
        assert ids[1:] == pieces.encode(text)
        assert tokenizer.decode(ids).strip() == text


def test_a_tokenizer_can_be_taken_from_elsewhere(tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "phi3", hidden=64, vocab=640)
    taken = make_checkpoint(tmp_path / "taken", "gpt2", hidden=64, tokenizer=other)
    index = open_checkpoint(taken)
    assert index.tensors["transformer.wte.weight"].shape == (640, 64)
    assert (index.config["bos_token_id"], index.config["eos_token_id"]) == (1, 2)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (taken / name).read_bytes() == (other / name).read_bytes()


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
