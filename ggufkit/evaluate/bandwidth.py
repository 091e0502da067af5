"""How fast memory can be read here, and what of it decoding needs.

To write one token, a model's weights have to be read once. Where they do not
fit into the caches, memory bandwidth divided by bytes per token is therefore a
ceiling for tokens per second, and the share of it that is reached says how much
a faster kernel could still win.
"""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ggufkit.llamacpp import host
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata, split_parts
from ggufkit.progress import Progress
from ggufkit.values import GGUFFile, Json, TensorInfo

if TYPE_CHECKING:
    import numpy as np

_SMALLEST = 1 << 30
"""Bytes, for machines that do not tell their caches."""
_CACHES = 4
"""Times the last-level cache, as STREAM (McCalpin) wants its arrays."""
_PASSES = 4


def measure_bandwidth(threads: int, progress: Progress) -> float | None:
    """Bytes per second that this machine's memory gives to so many reading threads.

    Each thread reads a slice of one large array, which it has written itself, so
    that the pages lie near it. Three reductions that need different instructions
    read the same bytes; the best pass of all counts, because anything else that the
    machine does can only slow a pass down, and so can a reduction for which
    reading is not all of the work. Only what is read is counted: this is no STREAM
    figure, whose kernels also write.

    Args:
        threads: how many read at the same time.
        progress: told if memory is too short.

    Returns:
        Bytes per second; None if the array would not fit into half of the free memory.
    """
    import numpy as np

    reductions = (
        (np.float32, np.maximum.reduce),
        (np.uint64, np.bitwise_or.reduce),
        (np.float64, np.add.reduce),
    )
    nbytes = max(_SMALLEST, _CACHES * host.last_level_cache_nbytes())
    free = host.available_memory_nbytes()
    if free is not None and nbytes > free // 2:
        progress.warn(
            f"memory bandwidth is not measured: that takes {nbytes / 2**30:.1f} GiB, four times "
            "the last-level cache, and there is not twice as much free"
        )
        return None
    count = nbytes // threads // 8 * 2
    fastest = float("inf")
    with (
        progress.task(f"memory bandwidth of {threads} threads", _PASSES, "passes") as task,
        ThreadPoolExecutor(threads) as pool,
    ):
        # numpy lets go of the interpreter's lock while it fills and reduces.
        slices = list(pool.map(_filled, [count] * threads))
        for done in range(_PASSES):
            for dtype, reduce in reductions:
                seconds = _seconds(pool, reduce, [piece.view(dtype) for piece in slices])
                fastest = min(fastest, seconds)
            task.update(done + 1)
    return threads * count * 4 / fastest


def _filled(count: int) -> "np.ndarray[Any, Any]":
    import numpy as np

    return np.full(count, 1.0, np.float32)  # finite and normal in every dtype that it is read as


def _seconds(pool: ThreadPoolExecutor, reduce: Any, slices: "list[np.ndarray[Any, Any]]") -> float:
    started = time.perf_counter()
    list(pool.map(reduce, slices))
    return time.perf_counter() - started


# What decoding reads.

_LOOKED_UP = re.compile(r"^(?:token_embd|per_layer_token_embd|position_embd|token_types)\.")
"""Tables of which a token needs one row."""
_EXPERTS = re.compile(r"_(?:ch)?exps\.")
"""Tensors that hold all experts of a block, side by side."""
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_OTHER_CACHES = (
    *("attention.sliding_window", "attention.kv_lora_rank", "attention.indexer.top_k"),
    *("ssm.state_size", "ssm.inner_size", "wkv.head_size", "shortconv.l_cache"),
)
"""Keys of architectures whose cache does not grow by the same bytes with each token."""


def weights_nbytes_per_token(header: GGUFFile) -> int:
    """Bytes of weights that are read to generate one token.

    That is all tensors, but of the embedding and other tables that are looked up
    only a row, which is left out; unless the embedding is the output matrix as
    well: then it is read whole. Of experts those in use count. Blocks that only
    predict tokens further ahead are not used.

    Args:
        header: of a model, or of the first part of a split one.
    """
    metadata = Metadata(header)
    others = [read_gguf(p, arrays=False) for p in split_parts(header) if p != header.path]
    tensors = [tensor for part in (header, *others) for tensor in part.tensors]
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    return round(sum(_read_share(t, metadata, tied) * t.nbytes for t in tensors))


def _read_share(tensor: TensorInfo, metadata: Metadata, tied: bool) -> float:
    if tensor.name == "token_embd.weight":
        return 1.0 if tied else 0.0
    if _LOOKED_UP.match(tensor.name):
        return 0.0
    block = _BLOCK.match(tensor.name)
    blocks = metadata.of_architecture("block_count")
    ahead = metadata.of_architecture("nextn_predict_layers")
    if block and isinstance(ahead, int) and int(block[1]) >= blocks - ahead:
        return 0.0
    if block and _EXPERTS.search(tensor.name):
        used = _of_block(metadata.of_architecture("expert_used_count"), int(block[1]))
        return used / tensor.shape[-1] if used else 1.0
    return 1.0


def cache_nbytes_per_token(header: GGUFFile) -> int:
    """Bytes of keys and values (F16) that one token of the context adds to what is read.

    Zero where the cache is of another kind (a sliding window, latent attention,
    recurrent state), because what is read of it then does not grow this way.

    Args:
        header: of a model, read with its arrays.
    """
    metadata = Metadata(header)
    if any(metadata.of_architecture(key) for key in _OTHER_CACHES):
        return 0
    blocks = metadata.of_architecture("block_count")
    width = metadata.of_architecture("embedding_length")
    heads = metadata.of_architecture("attention.head_count")
    kv_heads = metadata.of_architecture("attention.head_count_kv") or heads
    if not all(isinstance(value, int) and value > 0 for value in (blocks, width)) or not heads:
        return 0
    total = 0
    for block in range(blocks):
        queries = _of_block(heads, block)
        key = metadata.of_architecture("attention.key_length") or width // max(1, queries)
        value = metadata.of_architecture("attention.value_length") or width // max(1, queries)
        total += _of_block(kv_heads, block) * (key + value) * 2
    return int(total)


def _of_block(value: Json, block: int) -> int:
    """A number that may be given for each block."""
    found = value[block] if isinstance(value, list) and block < len(value) else value
    return found if isinstance(found, int) else 0
