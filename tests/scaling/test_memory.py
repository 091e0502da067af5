from pathlib import Path

import pytest

from ggufkit.checkpoint.index import CheckpointIndex, TensorEntry
from ggufkit.errors import GgufkitError
from ggufkit.llamacpp import host
from ggufkit.scaling.families import family_of
from ggufkit.scaling.memory import forecast, require_memory

GIB = 1 << 30


def llama(hidden: int, intermediate: int, blocks: int, vocab: int) -> CheckpointIndex:
    """The index of a Llama of some size, without its weights."""
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(blocks):
        at = f"model.layers.{n}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (intermediate, hidden) for x in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    tensors = {
        name: TensorEntry(name, "model.safetensors", "F16", shape, 0, 0)
        for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_attention_heads": 32,
        "num_hidden_layers": blocks,
    }
    return CheckpointIndex(Path("model"), config, (), tensors, {}, ())


def test_7b_fits_into_12_gib_whatever_the_number_of_blocks() -> None:
    small, large = (llama(4096, 11008, blocks, 32000) for blocks in (2, 32))
    family = family_of(small.config)
    needed = forecast(large, family, sequences=128, length=512)
    assert 3 * GIB < needed < 12 * GIB
    assert forecast(small, family, sequences=128, length=512) == needed


def test_too_little_memory_is_told_before_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 2 * GIB)
    require_memory(1 * GIB, "this")
    with pytest.raises(GgufkitError, match=r"this needs about 3.0 GiB .* only 2.0 GiB") as told:
        require_memory(3 * GIB, "this")
    assert "--calibration-samples" in told.value.hint
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: None)
    require_memory(3 * GIB, "this")
