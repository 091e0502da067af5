"""A larger model to measure speed with: random weights in Q4_0, another model's vocabulary.

Its shapes are those of Llama 3.2 1B. What it writes is noise, and speed does not
depend on what weights are.
"""

import os
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

WIDTH, LAYERS, INNER, HEADS, KV_HEADS = 2048, 16, 8192, 32, 8
_HEAD = WIDTH // HEADS
_BLOCK = 32
_NBYTES = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q8_0: 34}
# With it, rows of random nibbles keep the size of what they are multiplied with.
_SCALE = {GGMLQuantizationType.Q4_0: 0.0048, GGMLQuantizationType.Q8_0: 0.0003}


def large_model(vocabulary: Path, out: Path, seed: int = 0) -> Path:
    """Write the model, unless it is there.

    Args:
        vocabulary: the GGUF that tokens and template are taken from.
        out: where to write; appears whole or not at all.
        seed: of the weights.
    """
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    reader = GGUFReader(vocabulary)
    writer = GGUFWriter(partial, "llama")
    writer.add_name("random-1B")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(_HEAD)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(2)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    draw = np.random.default_rng(seed)
    words = len(reader.fields["tokenizer.ggml.tokens"].data)
    _add(writer, draw, "token_embd.weight", words, WIDTH, GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (KV_HEADS * _HEAD, WIDTH),
        "attn_v": (KV_HEADS * _HEAD, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
        for name, (rows, columns) in shapes.items():
            place = f"blk.{layer}.{name}.weight"
            _add(writer, draw, place, rows, columns, GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, out)
    return out


def _add(
    writer: GGUFWriter,
    draw: np.random.Generator,
    name: str,
    rows: int,
    columns: int,
    kind: GGMLQuantizationType,
) -> None:
    """Random blocks: a scale in half precision, and then the numbers."""
    blocks = draw.integers(0, 256, (rows, columns // _BLOCK, _NBYTES[kind]), np.uint8)
    scale = np.array([_SCALE[kind]], np.float16).view(np.uint8)
    blocks[..., :2] = scale
    writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=kind)
