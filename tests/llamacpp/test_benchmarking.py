"""llama-bench's answer: as recorded, broken in every way, and from the tool itself."""

import dataclasses
import json
from pathlib import Path

import pytest

from ggufkit.errors import ToolError, ToolOutputError, UsageError
from ggufkit.llamacpp import benchmarking
from ggufkit.llamacpp.benchmarking import BenchSetting, arguments, bench, parse_bench
from ggufkit.llamacpp.toolchain import NativeBuild

RECORDED = (Path(__file__).parent / "data" / "bench-generation.txt").read_text(encoding="utf-8")
"""``-n 4 -d 8 -t 2 -fa auto -r 3`` on a model of two layers, without the dump of its graph."""
SETTING = BenchSetting("generation", 4, 8, 2, 2048, 512, "auto", 0)
RESULT = next(line for line in RECORDED.splitlines() if line.startswith("{"))


def parse(text: str, setting: BenchSetting = SETTING, repetitions: int = 3) -> float:
    told = parse_bench(text, setting, repetitions, seconds=1.5, peak_rss_nbytes=1000)
    return told.tokens_per_second


def changed(**values: object) -> str:
    return RECORDED.replace(RESULT, json.dumps(json.loads(RESULT) | values))


def test_the_recorded_result() -> None:
    told = parse_bench(RECORDED, SETTING, 3, seconds=1.5, peak_rss_nbytes=1000)
    result = json.loads(RESULT)
    assert told.tokens_per_second == result["avg_ts"] > 0
    assert told.tokens_per_second_deviation == result["stddev_ts"] > 0
    assert told.flash_attention
    assert (told.seconds, told.peak_rss_nbytes) == (1.5, 1000)


def test_flash_attention_is_what_the_context_says() -> None:
    refused = "resolve_fused_ops: Flash Attention not supported, set to disabled"
    off = RECORDED.replace("resolve_fused_ops: Flash Attention enabled", refused)
    assert not parse_bench(off, SETTING, 3, seconds=1, peak_rss_nbytes=1).flash_attention
    for word, on in (("enabled", True), ("disabled", False)):
        told = RECORDED.replace("flash_attn            = auto", f"flash_attn            = {word}")
        found = parse_bench(told, SETTING, 3, seconds=1, peak_rss_nbytes=1)
        assert found.flash_attention is on


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 results instead of one"),
        ("llama_bench: error: no memory\n", "no memory"),
        (RECORDED + RESULT + "\n", "2 results"),
        (RECORDED.replace(RESULT, RESULT[:400]), "no JSON"),
        (RECORDED.replace(RESULT, RESULT.replace('"stddev_ts": ', '"stddev_ts": -n')), "no JSON"),
        (changed(avg_ts="fast"), "no number as avg_ts"),
        (changed(avg_ts=True), "no number as avg_ts"),
        (changed(avg_ts=0), "was to measure"),
        (changed(stddev_ts=None), "no number as stddev_ts"),
        (changed(samples_ts=[1.0, 2.0]), "was to measure 3 times"),
        (changed(n_threads=1), "n_threads 2, but measured 1"),
        (changed(n_prompt=512), "n_prompt 0, but measured 512"),
        (changed(n_gpu_layers=-1), "n_gpu_layers 0, but measured -1"),
        (RECORDED.replace("Flash Attention enabled", "Flash Attention maybe"), "flash attention"),
        (RECORDED.replace("llama_context: flash_attn", "llama_context: fa"), "nothing"),
    ],
)
def test_what_cannot_be_understood_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ToolOutputError, match=message):
        parse(text)


def test_arguments_say_everything() -> None:
    prompt = dataclasses.replace(SETTING, work="prompt", tokens=512, flash_attention="off")
    spelled = " ".join(arguments(Path("/models/a.gguf"), prompt, 5))
    assert spelled == (
        "-m a.gguf -p 512 -n 0 -d 8 -t 2 -b 2048 -ub 512 -fa off -ngl 0 -r 5 -o jsonl --progress -v"
    )


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_passes_are_counted_as_they_begin(size: int) -> None:
    seen: list[int] = []
    watch = benchmarking.Passes(seen.append)
    for at in range(0, len(RECORDED), size):
        watch.feed(RECORDED[at : at + size])
    assert seen == [1, 2, 3]


def test_the_tool_itself(tiny_gguf: Path, native: NativeBuild, tmp_path: Path) -> None:
    place = tmp_path / "with, comma"
    place.mkdir()
    model = place / "größe.gguf"
    model.symlink_to(tiny_gguf)
    for work in (benchmarking.PROMPT, benchmarking.GENERATION):
        for attention in ("auto", "on", "off"):
            setting = BenchSetting(work, 8, 4, 1, 64, 32, attention, 0)
            seen: list[int] = []
            log = tmp_path / "bench.log"
            told = bench(native, model, setting, repetitions=2, log=log, on_pass=seen.append)
            assert told.tokens_per_second > 0
            assert told.flash_attention is (attention != "off")
            assert told.peak_rss_nbytes > model.stat().st_size
            assert seen == [1, 2]


def test_a_file_that_is_no_model(native: NativeBuild, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ToolError, match=r"measuring broken\.gguf failed: .*load"):
        bench(native, broken, SETTING, repetitions=1, log=tmp_path / "log")


def test_a_comma_in_the_name(native: NativeBuild, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comma"):
        bench(native, tmp_path / "a,b.gguf", SETTING, repetitions=1, log=tmp_path / "log")
