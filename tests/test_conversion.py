"""The whole way for every family that the converter knows, on tiny models."""

from pathlib import Path

import pytest

from ggufkit.conversion import Conversion
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT
from ggufkit.store import Store
from ggufkit.values import Calibration, Checkpoint, FetchOptions, VerifyOptions
from tests.factory import ARCHITECTURES, make_checkpoint, write_demo_tokenizer
from tests.test_factory import BLOCKS, CONVERTED

TYPE = "Q4_K_M"
SPLIT = {
    # The converter takes these apart, or turns their halves into tensors of their own.
    "internlm2": ("attn_v",),
    "deepseek_v2": ("attn_kv_b", "attn_k_b", "attn_v_b"),
    "deepseek_v2_lite": ("attn_kv_b", "attn_k_b", "attn_v_b"),
    "deepseek_v3": ("attn_kv_b", "attn_k_b", "attn_v_b"),
}
"""Tensors whose type the plan cannot know, by what their names hold."""


def quantized(type: str) -> str:
    """The type, but one name for all floats."""
    return "float" if type.lower() in ("f32", "f16", "bf16") else type.lower()


@pytest.fixture(scope="module")
def tokenizer(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_tokenizer(demo_gguf, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("arch", CONVERTED)
def test_awq_and_imatrix_the_whole_way(
    arch: str, tokenizer: Path, tmp_path: Path, native: NativeBuild
) -> None:
    row = ARCHITECTURES[arch]
    path = make_checkpoint(
        tmp_path / arch,
        arch,
        layers=BLOCKS.get(arch, 2),
        tokenizer=tokenizer if row.byte_level else None,
    )
    job = Conversion(
        Store(tmp_path / "models"),
        native,
        Checkpoint(path, arch, str(path), "0" * 64),
        FetchOptions(trust_remote_code=True),
        Calibration("pydoc-calibration", samples=4, length=64),
        [TYPE],
        SILENT,
        imatrix="auto",
        verify=VerifyOptions(enabled=False),
    )
    scales = job.scales_for([TYPE])[TYPE]
    facts = scales.manifest.facts
    assert facts["objective"] < facts["objective_plain"]
    assert facts["divergence"] < 1e-9
    made = read_gguf(job.quantize(TYPE, scales).file(".gguf"))

    # What was planned is what was written, name by name and type by type.
    written = {t.name: quantized(t.type) for t in made.tensors}
    planned = {
        name: quantized(told.type)
        for told in job.plans_for([TYPE])[TYPE].values()
        for name in told.gguf_names
        if told.type and not any(part in name for part in SPLIT.get(arch, ()))
    }
    assert {name: written.get(name) for name in planned} == planned

    # Each map that a block scales was quantized with its importance.
    maps = [
        t.name
        for t in made.tensors
        if t.name.startswith("blk.")
        and len(t.shape) > 1
        and "gate_inp" not in t.name
        and not any(part in t.name for part in SPLIT.get(arch, ()) if part != "attn_v")
    ]
    assert made.metadata["quantize.imatrix.entries_count"] >= len(maps)
