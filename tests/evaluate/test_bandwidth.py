from math import prod
from pathlib import Path

import pytest

from ggufkit.evaluate import bandwidth
from ggufkit.evaluate.bandwidth import (
    cache_nbytes_per_token,
    measure_bandwidth,
    weights_nbytes_per_token,
)
from ggufkit.llamacpp import host, toolchain
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT, Silent
from ggufkit.values import GGUFFile, Json, TensorInfo


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def header(tensors: dict[str, tuple[int, ...]], **keys: Json) -> GGUFFile:
    """A model whose tensors have a byte for each element."""
    infos = tuple(TensorInfo(name, shape, "Q8", 0, prod(shape)) for name, shape in tensors.items())
    named = {f"llama.{key.replace('__', '.')}": value for key, value in keys.items()}
    return GGUFFile(Path("/m/x.gguf"), 3, 0, {"general.architecture": "llama"} | named, infos)


def test_reading_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SMALLEST", 32 << 20)
    monkeypatch.setattr(host, "last_level_cache_nbytes", lambda: 1 << 20)
    for threads in (1, 3):
        found = measure_bandwidth(threads, SILENT)
        assert found is not None
        assert 1e8 < found < 1e13  # bytes per second of anything that runs this


def test_memory_too_short_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_memory_nbytes", lambda: 1 << 30)
    monkeypatch.setattr(host, "last_level_cache_nbytes", lambda: 480 << 20)
    listener = Listener()
    assert measure_bandwidth(2, listener) is None
    assert "1.9 GiB" in listener.warnings[0]


BLOCK = {"token_embd.weight": (64, 1000), "blk.0.attn_q.weight": (64, 64)}
PLAIN: dict[str, Json] = {
    "block_count": 3,
    "embedding_length": 64,
    "attention__head_count": 4,
    "attention__head_count_kv": 2,
}


def test_an_embedding_is_read_whole_only_if_it_is_the_output() -> None:
    assert weights_nbytes_per_token(header(BLOCK)) == 64 * 1000 + 64 * 64
    untied = {**BLOCK, "output.weight": (64, 1000), "position_embd.weight": (64, 500)}
    assert weights_nbytes_per_token(header(untied)) == 64 * 1000 + 64 * 64


@pytest.mark.parametrize("used", [2, [2]])
def test_experts_count_as_far_as_they_are_used(used: Json) -> None:
    experts = {**BLOCK, "blk.0.ffn_up_exps.weight": (64, 10, 8), "blk.0.ffn_up_shexp.weight": (64,)}
    expected = 64 * 1000 + 64 * 64 + 64 * 10 * 2 + 64
    assert weights_nbytes_per_token(header(experts, expert_used_count=used)) == expected


def test_blocks_that_look_further_ahead_are_not_used() -> None:
    more = {**BLOCK, "blk.1.attn_q.weight": (64, 64)}
    ahead = header(more, block_count=2, nextn_predict_layers=1)
    assert weights_nbytes_per_token(ahead) == weights_nbytes_per_token(header(BLOCK))


def test_a_real_model(tiny_gguf: Path) -> None:
    found = read_gguf(tiny_gguf)
    every = {t.name: t.nbytes for t in found.tensors}
    tied = "output.weight" not in every
    expected = sum(every.values()) - (0 if tied else every["token_embd.weight"])
    assert weights_nbytes_per_token(found) == expected
    # Two blocks, two key/value heads of 64, keys and values, two bytes each.
    assert cache_nbytes_per_token(found) == 2 * 2 * 64 * 2 * 2


def test_parts_of_a_split_model_add_up(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    split = [native.tool("llama-gguf-split"), "--split", "--split-max-tensors", "8"]
    ran = toolchain.run([*split, tiny_gguf, tmp_path / "tiny"])
    assert ran.returncode == 0
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 1
    whole = weights_nbytes_per_token(read_gguf(tiny_gguf))
    assert weights_nbytes_per_token(read_gguf(parts[0])) == whole


def test_keys_and_values_of_a_token() -> None:
    assert cache_nbytes_per_token(header({}, **PLAIN)) == 3 * 2 * (16 + 16) * 2
    wide = PLAIN | {"attention__key_length": 32, "attention__value_length": 8}
    assert cache_nbytes_per_token(header({}, **wide)) == 3 * 2 * (32 + 8) * 2
    by_block = PLAIN | {"attention__head_count_kv": [4, 0, 2]}
    assert cache_nbytes_per_token(header({}, **by_block)) == 6 * (16 + 16) * 2
    no_groups = {key: value for key, value in PLAIN.items() if not key.endswith("_kv")}
    assert cache_nbytes_per_token(header({}, **no_groups)) == 3 * 4 * (16 + 16) * 2


@pytest.mark.parametrize("key", ["attention__sliding_window", "ssm__state_size"])
def test_other_caches_do_not_count(key: str) -> None:
    assert cache_nbytes_per_token(header({}, **PLAIN | {key: 128})) == 0
    assert cache_nbytes_per_token(header({})) == 0
