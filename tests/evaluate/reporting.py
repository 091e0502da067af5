"""Models and results to make reports of, without measuring anything."""

import dataclasses
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from ggufkit.llamacpp.blocks import TYPE_SIZES
from ggufkit.store import Store
from ggufkit.values import (
    Comparison,
    Difference,
    EvalResult,
    SpeedResult,
    TaskResult,
    to_json,
)

CONTEXT = 512
COLUMNS = 256
ROLES = ("attn_q", "attn_v", "ffn_down")


def make_gguf(
    path: Path, types: Sequence[str], *, blocks: int = 3, name: str = "Tiny", rows: int = 8
) -> Path:
    """A GGUF whose matrices take these types in turn; its weights are all zero."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_block_count(blocks)
    _add(writer, "token_embd.weight", types[0], rows)
    writer.add_tensor("output_norm.weight", np.zeros(COLUMNS, np.float32))
    turn = 0
    for block in range(blocks):
        writer.add_tensor(f"blk.{block}.attn_norm.weight", np.zeros(COLUMNS, np.float32))
        for role in ROLES:
            _add(writer, f"blk.{block}.{role}.weight", types[turn % len(types)], rows)
            turn += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, type: str, rows: int) -> None:
    if type == "F32":
        writer.add_tensor(name, np.zeros((rows, COLUMNS), np.float32))
        return
    elements, nbytes = TYPE_SIZES[type]
    data = np.zeros((rows, COLUMNS // elements * nbytes), np.uint8)
    writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[type])


def comparison(
    model: Path,
    reference: Path,
    *,
    divergence: float,
    delta: float | None = None,
    reach: float = 0.001,
    verdict: str = "worse",
    chunks: int = 40,
    text: str = "prose.txt",
) -> Comparison:
    """A comparison with an interval of ``delta`` ± ``reach``."""
    delta = divergence if delta is None else delta
    told = Difference(
        measure="log_perplexity",
        model=model,
        other=reference,
        difference=delta,
        low=delta - reach,
        high=delta + reach,
        confidence=0.95,
        chunks=chunks,
        seed=0,
        verdict=verdict,
        chunks_to_decide=900 if verdict == "indistinguishable" else None,
    )
    spread = {"50": 0.4, "90": 2, "95": 3, "99": 8, "99.9": 20, "100": 50}
    return Comparison(
        model=model,
        reference=reference,
        text=text,
        context=CONTEXT,
        chunks=chunks,
        tokens=chunks * CONTEXT // 2,
        log_perplexity=3.0 + delta,
        log_perplexity_error=0.05,
        reference_log_perplexity=3.0,
        delta_log_perplexity=delta,
        delta_log_perplexity_error=reach / 1.96,
        divergence=divergence,
        divergence_error=divergence / 50,
        divergence_percentiles={name: of * divergence for name, of in spread.items()},
        agreement=1 - 0.4 * sqrt(min(divergence, 1)),
        agreement_error=0.002,
        delta_p_mean=0.0,
        delta_p_rms=0.01,
        delta_p_percentiles={},
        bits_per_byte=1.0,
        reference_bits_per_byte=1.0,
        file_nbytes=model.stat().st_size,
        reference_file_nbytes=reference.stat().st_size,
        verdicts=(told,),
    )


def perplexity(
    model: Path, value: float, *, chunks: int = 40, text: str = "prose.txt"
) -> EvalResult:
    """A perplexity on some chunks."""
    return EvalResult(
        model=model,
        text=text,
        perplexity=value,
        error=0.5,
        tokens=chunks * CONTEXT,
        chunks=chunks,
        context=CONTEXT,
        tokens_per_second=100,
        peak_rss_nbytes=10_000_000,
        file_nbytes=model.stat().st_size,
        seconds=chunks * CONTEXT / 100,
    )


def speed(model: Path, value: float, *, work: str = "generation", threads: int = 2) -> SpeedResult:
    """A speed in tokens per second."""
    return SpeedResult(
        model=model,
        work=work,
        tokens=64,
        depth=0,
        threads=threads,
        batch=2048,
        ubatch=512,
        flash_attention=True,
        gpu_layers=0,
        tokens_per_second=value,
        tokens_per_second_deviation=value / 40,
        peak_rss_nbytes=20_000_000,
        file_nbytes=model.stat().st_size,
        bandwidth=1e10,
        bandwidth_share=0.5,
        machine="A machine",
    )


def task(model: Path, score: float, *, questions: int = 200) -> TaskResult:
    """A share of questions answered rightly."""
    return TaskResult(
        model=model,
        task="hellaswag",
        data="questions.txt",
        questions=questions,
        score=score,
        low=score - 0.05,
        high=score + 0.05,
        chance=0.25,
        file_nbytes=model.stat().st_size,
        seconds=1,
    )


_STAGES = {
    EvalResult: "evaluate",
    Comparison: "compare",
    SpeedResult: "bench",
    TaskResult: "task",
}


def keep(store: Store, value: Any) -> None:
    """Store a result as the verbs do: digests as inputs, the fields as facts."""
    inputs = {"model": store.digest(value.model).sha256}
    if isinstance(value, Comparison):
        inputs["reference"] = store.digest(value.reference).sha256
    if isinstance(value, Comparison | EvalResult):
        inputs["text"] = f"digest of {value.text}"
    if isinstance(value, TaskResult):
        inputs["data"] = f"digest of {value.data}"
    facts = to_json(value)
    numbers = {k: v for k, v in facts.items() if isinstance(v, int | float | str | bool)}
    store.run(
        _STAGES[type(value)],
        version=1,
        model="tiny",
        inputs=inputs,
        options={k: numbers[k] for k in sorted(numbers) if k not in ("model", "reference")},
        tool={"llama.cpp": "abc123"},
        work=lambda _: facts,
    )


@dataclasses.dataclass(frozen=True)
class Bench:
    """Files of growing size and quality in a models directory, and their reference."""

    store: Store
    reference: Path
    files: dict[str, Path]


TYPES = {
    "Q2_K": ("Q2_K", "Q3_K"),
    "Q4_0": ("Q4_0",),
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q6_K": ("Q6_K",),
    "Q8_0": ("Q8_0",),
}
DIVERGENCES = {"Q2_K": 0.6, "Q4_0": 0.9, "Q4_K_M": 0.03, "Q6_K": 0.006, "Q8_0": 0.0009}
SPEEDS = {"Q2_K": 90.0, "Q4_0": 95.0, "Q4_K_M": 80.0, "Q6_K": 60.0, "Q8_0": 50.0}


def make_files(root: Path, *, stem: str = "Tiny") -> Bench:
    """The files of ``TYPES`` and an F32, without results."""
    place = root / "tiny"
    files = {label: make_gguf(place / f"{stem}-{label}.gguf", t) for label, t in TYPES.items()}
    return Bench(Store(root), make_gguf(place / f"{stem}-F32.gguf", ["F32"]), files)


def make_measured(root: Path, *, stem: str = "Tiny", text: str = "prose.txt") -> Bench:
    """The files with results of every kind."""
    bench = make_files(root, stem=stem)
    for label, file in bench.files.items():
        divergence = DIVERGENCES[label]
        keep(bench.store, comparison(file, bench.reference, divergence=divergence, text=text))
        other = comparison(
            file, bench.reference, divergence=1.5 * divergence, text="code.py", chunks=30
        )
        keep(bench.store, other)
        keep(bench.store, perplexity(file, 20 * (1 + divergence), text=text))
        keep(bench.store, task(file, 0.4 - divergence / 10))
    for label, value in (*SPEEDS.items(), ("F32", 20.0)):
        file = bench.files.get(label, bench.reference)
        keep(bench.store, speed(file, value))
        keep(bench.store, speed(file, 5 * value, work="prompt"))
    return bench
