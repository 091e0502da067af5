"""llama.cpp's logits beside transformers'."""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np

from ggufkit.errors import ToolError
from ggufkit.llamacpp.runtime import drain_errors, load_llama_cpp
from ggufkit.llamacpp.toolchain import NativeBuild
from tests.architectures.recipes import RECIPES
from tests.architectures.recipes.shared import VOCAB
from tests.architectures.row import OK, Kind, Verdict

LENGTH = 96
"""Tokens: three windows."""


def load(gguf: Path, build: NativeBuild) -> None:
    """Open a GGUF with llama.cpp."""
    library = load_llama_cpp(build)
    library.llama_model_free(_opened(library, gguf))


def _opened(library: Any, gguf: Path) -> Any:
    params = library.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    model = library.llama_model_load_from_file(str(gguf).encode(), params)
    if not model:
        raise ToolError(f"llama.cpp cannot load it: {drain_errors()}")
    return model


def compare(name: str, checkpoint: Path, gguf: Path, build: NativeBuild) -> dict[str, float]:
    """Mean KL, and the largest difference of a logit."""
    tokens = np.random.default_rng(0).integers(17, VOCAB, LENGTH)
    tokens[0] = 1
    ours = _llama_cpp(gguf, tokens, build).astype(np.float64)
    theirs = _transformers(name, checkpoint, tokens).astype(np.float64)
    p, q = _log_softmax(theirs), _log_softmax(ours)
    divergence = (np.exp(p) * (p - q)).sum(-1)
    return {
        "kl": float(divergence.mean()),
        "difference": float(np.abs(ours - theirs).max()),
        "gelu": float(_has_gelu(checkpoint)),
        "memory": 0.0
        if RECIPES[name].factory
        else float(np.abs(theirs - _memory(name, tokens)).max()),
    }


def _memory(name: str, tokens: np.ndarray) -> np.ndarray:
    from tests.architectures import making

    return _forward(making.model_of(RECIPES[name]), tokens)


def _has_gelu(checkpoint: Path) -> bool:
    config = json.loads((checkpoint / "config.json").read_text())
    config = config.get("text_config", config)
    return "gelu" in json.dumps(config) or config["model_type"] in ("bloom", "mpt")


def judge(figures: dict[str, float]) -> Verdict:
    """Whether they agree; ggml's GELU is a table in half precision."""
    bound = 1e-4 if figures["gelu"] else 1e-8
    return OK if figures["kl"] < bound else Verdict(Kind.DIFFERS)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _transformers(name: str, checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    kind = "CausalLM" if RECIPES[name].parts is None else "ImageTextToText"
    cls = getattr(transformers, f"AutoModelFor{kind}")
    model = cls.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=(checkpoint / "config.json").read_text().count("auto_map") > 0,
    )
    return _forward(model.eval(), tokens)


def _forward(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)[None]).logits[0].float().numpy()


def _llama_cpp(gguf: Path, tokens: np.ndarray, build: NativeBuild) -> np.ndarray:
    library = load_llama_cpp(build)
    model = _opened(library, gguf)
    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0
    params.flash_attn_type = 0
    context = library.llama_init_from_model(model, params)
    if not context:
        raise ToolError(f"llama.cpp makes no context: {drain_errors()}")
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = int(token)
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    if status := library.llama_decode(context, batch):
        raise ToolError(f"llama_decode gives {status}: {drain_errors()}")
    logits = ctypes.cast(library.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(logits, (len(tokens), size)).copy()
