from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufkit.errors import ToolOutputError
from ggufkit.llamacpp import output
from ggufkit.llamacpp.blocks import TYPE_SIZES
from ggufkit.llamacpp.output import QuantizeOutput
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.values import GGUFFile, TensorInfo

DATA = Path(__file__).parent / "data"
QUANTIZE = (DATA / "quantize-q4_k_m.txt").read_text()
DRY_RUN = (DATA / "quantize-dry-run.txt").read_text()
PERPLEXITY = (DATA / "perplexity.txt").read_text()
SHORT = (DATA / "perplexity-short.txt").read_text()


def quantized(text: str) -> QuantizeOutput:
    return output.parse_quantize(text, seconds=1.5, peak_rss_nbytes=7)


def test_quantize() -> None:
    told = quantized(QUANTIZE)
    assert {t.name: (t.from_type, t.type) for t in told.tensors} == {
        "output_norm.weight": ("f32", "f32"),
        "token_embd.weight": ("f32", "q8_0"),
        "blk.0.attn_k.weight": ("f32", "q5_0"),
        "blk.0.attn_norm.weight": ("f32", "f32"),
        "blk.0.ffn_down.weight": ("f32", "q6_K"),
    }
    assert told.fallbacks == {"q8_0": 1, "q5_0": 1}
    assert told.fallback_tensors == {"token_embd.weight": "q8_0", "blk.0.attn_k.weight": "q5_0"}
    assert told.types_wanted == {"token_embd.weight": "q6_K", "blk.0.attn_k.weight": "q4_K"}
    assert (told.total_tensors, told.bits_per_weight) == (5, 8.43)
    assert (told.seconds, told.peak_rss_nbytes) == (1.5, 7)
    assert told.tensors[1].shape == (576, 49152)
    assert told.tensors[1].nbytes == 576 * 49152 // 32 * 34
    assert told.tensors[0].shape == (576,)


def test_dry_run() -> None:
    told = quantized(DRY_RUN)
    assert [t.type for t in told.tensors] == ["f32", "q5_0", "q6_K"]
    assert told.fallbacks == {"q5_0": 1}
    assert sum(t.nbytes for t in told.tensors) / 2**20 == pytest.approx(0.91, abs=0.01)


def test_bits_per_weight_asked_counts_the_type_wanted() -> None:
    told = quantized(DRY_RUN)
    tensors = tuple(TensorInfo(t.name, t.shape, t.type, 0, t.nbytes) for t in told.tensors)
    written = GGUFFile(Path("x.gguf"), 3, 0, {}, tensors)
    asked = (576 * 32 + 576 * 576 * 4.5 + 1536 * 576 * 6.5625) / (576 + 576 * 576 + 1536 * 576)
    assert told.bits_per_weight_asked(written) == pytest.approx(asked)
    assert told.bits_per_weight_asked(written) < written.bits_per_weight


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("quant size", "size", "no 'quant size"),
        ("converting to q5_0", "turning into q5_0", r"cannot be read: \[   3/   5\]"),
        ("WARNING: 2 of 5", "WARNING: 3 of 5", "counts 3 tensors that fell back, but named 2"),
        ("-> falling back to    q5_0", "-> falling back to?", "cannot be read: warning: blk.0"),
        ("q6_K .. size", "q99 .. size", "'q99'"),
        ("[   4/   5] blk.0.attn_norm", "(   4/   5) blk.0.attn_norm", "listed 4 of 5"),
    ],
)
def test_quantize_output_that_is_not_understood(old: str, new: str, message: str) -> None:
    assert old in QUANTIZE
    with pytest.raises(ToolOutputError, match=message):
        quantized(QUANTIZE.replace(old, new))


def test_no_output_at_all() -> None:
    with pytest.raises(ToolOutputError):
        quantized("")
    with pytest.raises(ToolOutputError):
        output.parse_perplexity("", seconds=1, peak_rss_nbytes=1)


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({c % (len(text) + 1) for c in cuts})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.lists(st.integers(min_value=0), max_size=20))
def test_text_may_come_in_any_pieces(cuts: list[int]) -> None:
    estimates: list[tuple[int, int | None, float]] = []
    watch = output.Estimates(lambda *estimate: estimates.append(estimate))
    for piece in pieces(PERPLEXITY, cuts):
        watch.feed(piece)
    assert estimates == [
        (1, 6, 44.1913),
        (2, 6, 42.3745),
        (3, 6, 37.0387),
        (4, 6, 33.9725),
        (5, 6, 33.9646),
        (6, 6, 34.5810),
    ]

    totals: list[float] = []
    done: list[float] = []
    count = output.TensorCount(totals.append, done.append)
    for piece in pieces(DRY_RUN, cuts):
        count.feed(piece)
    assert (totals, done) == ([3], [1, 2, 3])

    steps: list[tuple[int, int, str]] = []
    ninja = output.BuildSteps(lambda *step: steps.append(step))
    for piece in pieces("[1/2] Building CXX object a/b.cpp.o\n[2/2] Linking c\n", cuts):
        ninja.feed(piece)
    assert steps == [(1, 2, "b.cpp.o"), (2, 2, "Linking c")]

    percents: list[int] = []
    bar = output.Percentages(percents.append)
    for piece in pieces(
        "\rWriting:   0%|  | 0\rWriting:  42%|## | 1\rWriting: 100%|###| 2\n", cuts
    ):
        bar.feed(piece)
    assert percents == [0, 42, 100]


def test_steps_of_make() -> None:
    steps: list[tuple[int, int, str]] = []
    output.BuildSteps(lambda *step: steps.append(step)).feed(
        "[  7%] Building C object x/y.c.o\nz\n"
    )
    assert steps == [(7, 100, "y.c.o")]


def test_perplexity() -> None:
    told = output.parse_perplexity(PERPLEXITY, seconds=6.3, peak_rss_nbytes=9)
    assert (told.perplexity, told.error) == (34.5810, 3.61516)
    assert (told.chunks, told.context, told.tokens) == (6, 256, 1536)
    assert told.chunk_estimates == (44.1913, 42.3745, 37.0387, 33.9725, 33.9646, 34.5810)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Final estimate", "final", "no 'Final estimate"),
        ("PPL = 34.5810 +/- 3.61516", "PPL = nan +/- nan", "no number"),
        ("[3]37.0387,", "", "5 of 6 estimates"),
        ("over 6 chunks", "over some chunks", "how many chunks"),
    ],
)
def test_perplexity_output_that_is_not_understood(old: str, new: str, message: str) -> None:
    assert old in PERPLEXITY
    with pytest.raises(ToolOutputError, match=message):
        output.parse_perplexity(PERPLEXITY.replace(old, new), seconds=1, peak_rss_nbytes=1)


def test_short_text() -> None:
    assert output.parse_short_text(SHORT) == (1210, 4096)
    assert output.parse_short_text(PERPLEXITY) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ERROR:hf-to-gguf:Model FooForCausalLM is not supported", "FooForCausalLM"),
        ("NotImplementedError: BPE pre-tokenizer was not recognized - update", "tokenizer"),
        ("NotImplementedError: Quant method is not yet supported: 'awq'", "'awq'"),
        (
            "ValueError: Can not map tensor 'model.layers.0.mlp.ffn_sub_norm.weight'",
            "what the tensor model.layers.0.mlp.ffn_sub_norm.weight is for",
        ),
        ("KeyError: 'swa_head_dim'", "config.json lacks swa_head_dim"),
        (
            "KeyError: \"could not find any of: ['n_shared_experts']\"",
            "lacks all of ['n_shared_experts']",
        ),
    ],
)
def test_plain_explanations_of_the_converter(text: str, message: str) -> None:
    problem = output.conversion_problem(["INFO: loading", text])
    assert problem is not None
    assert message in problem.message


def test_other_failures_have_no_plain_explanation() -> None:
    assert output.conversion_problem(["KeyError: '[gMASK]'"]) is None
    assert output.conversion_problem(["KeyError: 'hidden_size'", "RuntimeError: other"]) is None
    assert output.conversion_problem([]) is None
    assert output.quantize_problem(["llama_quantize: failed"]) is None


def test_version() -> None:
    text = "version: 0.5.0-dev (build 0, commit 0c1e57098)\nbuilt with GNU 12.2.0"
    assert output.parse_version(text) == "0c1e57098"
    assert output.parse_version("version: 4321 (abcdef1)\n") == "abcdef1"
    with pytest.raises(ToolOutputError, match="commit"):
        output.parse_version("usage: llama-perplexity")


def test_devices() -> None:
    assert output.parse_devices("noise\nAvailable devices:\n  (none)\n") == ()
    listed = "Available devices:\n  CUDA0: NVIDIA H200 (142000 MiB, 141000 MiB free)\n"
    assert output.parse_devices(listed) == ("CUDA0: NVIDIA H200 (142000 MiB, 141000 MiB free)",)
    with pytest.raises(ToolOutputError):
        output.parse_devices("error")


def test_system_info() -> None:
    assert output.parse_system_info(PERPLEXITY) == ("SSE3", "AVX2", "FMA", "REPACK")
    with pytest.raises(ToolOutputError):
        output.parse_system_info("nothing")


def test_type_sizes_are_those_of_the_library(native: NativeBuild) -> None:
    from ggufkit.llamacpp.ggml import Ggml

    theirs = {t.name.upper(): (t.block, t.block_nbytes) for t in Ggml(native.bin, 1).types.values()}
    assert theirs.items() <= TYPE_SIZES.items()
    assert len(theirs) > 20
