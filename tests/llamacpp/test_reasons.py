"""Reasons, out of what the programs really printed: see data/failures."""

from pathlib import Path

import pytest

from ggufkit.llamacpp import output, reasons

DATA = Path(__file__).parent / "data"
FAILURES = DATA / "failures"

CUT = "tensor 'blk.0.attn_v.weight' data is not within the file bounds, "
REASONS = {
    "bench-cut": "failed to load model 'cut.gguf'",
    "convert-architecture": "Model NobodyForCausalLM is not supported",
    "convert-config-json": "json.decoder.JSONDecodeError: Expecting property name enclosed in "
    "double quotes: line 1 column 2 (char 1)",
    "convert-extra-tensor": "ValueError: Can not map tensor 'model.layers.0.strange.weight'",
    "convert-missing_shard": "FileNotFoundError: [Errno 2] No such file or directory: "
    "'b-missing_shard/model-00002-of-00002.safetensors'",
    "convert-no_tokenizer": "ValueError: Couldn't instantiate the backend tokenizer from one of: "
    "(1) a `tokenizers` library serialization file,",
    "convert-quantized": "NotImplementedError: Quant method is not yet supported: 'awq'",
    "convert-shape": "RuntimeError: shape '[4, 2, 0, 256]' is invalid for input of size 1792",
    "convert-tokenizer-model": "RuntimeError: INTERNAL: could not parse ModelProto from "
    "tokmodel/tokenizer.model",
    "convert-truncated": "ValueError: mmap length is greater than file size",
    "convert-type-of-field": "TypeError: unsupported operand type(s) for //: 'str' and 'int'",
    "perplexity-arch": "unknown model architecture: 'llamx'",
    "perplexity-ctxbig": "insufficient memory (attempted to allocate 36621.09 MB)",
    "perplexity-cut": f"{CUT}model is corrupted or incomplete",
    "perplexity-key": "key not found in model: llama.context_length",
    "perplexity-nofile": "failed to open file 'nowhere.txt'",
    "perplexity-nogguf": "invalid magic characters: 'hell', expected 'GGUF'",
    "perplexity-option": "invalid argument: --no-such-option",
    "perplexity-ren": "check_tensor_dims: tensor 'blk.0.attn_q.weight' not found",
    "pip-build": "RuntimeError: error in the build: no compiler",
    "pip-net": "Could not find a version that satisfies the requirement tiny==1.0 "
    "(from versions: none)",
    "pip-none": "Could not find a version that satisfies the requirement "
    "no-such-package-ggufkit==1.0 (from versions: none)",
    "quantize-arch": "unknown model architecture: 'llamx'",
    "quantize-cut": f"{CUT}model is corrupted or incomplete",
    "quantize-empty": "failed to read magic",
    "quantize-imatrix-bad": "invalid magic characters: '????', expected 'GGUF'",
    "quantize-imatrix-nan": "imatrix contains non-finite value nan",
    "quantize-imatrix-none-iq2": "Missing importance matrix for tensor blk.0.attn_k.weight in a "
    "very low-bit quantization",
    "quantize-imatrix-size": "imatrix size 128 is different from tensor size 256 for "
    "blk.0.attn_k.weight",
    "quantize-iq2_xs": "this quantization requires an imatrix!",
    "quantize-key": "key not found in model: llama.context_length",
    "quantize-nodir": "basic_ios::clear: iostream error",
    "quantize-nogguf": "invalid magic characters: 'hell', expected 'GGUF'",
    "quantize-q1_0": "no tensor type fallback is defined for type q1_0",
    "quantize-requant": "requantizing from type q8_0 is disabled",
}
"""File of what a program printed, its last 40 lines, and the reason in it."""


def lines_of(name: str) -> list[str]:
    return (FAILURES / f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_what_the_program_says_is_an_error(name: str) -> None:
    assert reasons.essential_line(lines_of(name)) == REASONS[name]


def test_every_failure_is_in_the_table() -> None:
    kept = {path.stem for path in FAILURES.glob("*.txt")}
    assert kept - set(REASONS) == {"cmake-compile", "cmake-version"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cmake-compile", "b/x.c:1:20: error: \u2018y\u2019 undeclared"),
        (
            "cmake-version",
            "CMake Error at CMakeLists.txt:1 (cmake_minimum_required): "
            'cmake_minimum_required could not parse VERSION "99".',
        ),
    ],
)
def test_the_reason_of_a_build(name: str, reason: str) -> None:
    assert reasons.build_error((FAILURES / f"{name}.txt").read_text()).startswith(reason)


def test_build_errors() -> None:
    ninja = "[1/2] Building x\nFAILED: x\na.cpp:3:1: error: expected ';'\nninja: build stopped\n"
    assert reasons.build_error(ninja) == "a.cpp:3:1: error: expected ';'"
    cmake = "-- ok\nCMake Error at CMakeLists.txt:11 (message):\n\n  Could not find CUDA\n"
    assert reasons.build_error(cmake).endswith("Could not find CUDA")
    two = f"CMake Warning:\n  error: no ccache\n\n{cmake}  (missing: nvcc)\n\n-- end\n"
    assert reasons.build_error(two).endswith("(message): Could not find CUDA (missing: nvcc)")
    link = "ld: a.o: in function `main':\na.c:(.text+0x9): undefined reference to `y'\n"
    assert reasons.build_error(f"{link}collect2: error: ld returned 1").endswith("reference to `y'")


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        ([], "it did not say why"),
        (["llama_model_loader: - kv 25: tokenizer.ggml.unknown_token_id u32 = 0", ""], None),
        (["0.00.001 I error rate: 0", "0.00.002 W unknown thing"], "it did not say why"),
        (["fatal: not a git repository", "x"], "not a git repository"),
        (
            [
                "Traceback (most recent call last):",
                '  File "x", line 1',
                "KeyError: 'a'",
                "100%|#|",
            ],
            "KeyError: 'a'",
        ),
        # The head of a traceback may lie before the tail.
        (['  File "x", line 1, in f', "    f()", "    ^^^", "OSError: no room", "bye"], "no room"),
        # An error that was survived, and the one that was not.
        (["ERROR: first", "on we go", "ERROR: second", "ERROR: so it ends"], "second"),
        (
            ["0.1 E a_b: survived", "0.2 I on", "0.3 E c_d: this one", "0.4 E e: unable to"],
            "this one",
        ),
        (["/s/ggml.c:12: GGML_ASSERT(x == y) failed", "[New LWP 7]"], "GGML_ASSERT(x == y) failed"),
        (
            ["terminate called after throwing an instance of 'E'", "  what():  bad file"],
            "bad file",
        ),
    ],
)
def test_reasons_of_other_shapes(tail: list[str], reason: str | None) -> None:
    found = reasons.essential_line(tail)
    assert found.endswith(reason if reason is not None else tail[0])


def test_what_pip_says_of_the_network() -> None:
    told = "Failed to establish a new connection: [Errno 111] Connection refused"
    assert reasons.connection_problem(lines_of("pip-net")) == told
    assert reasons.connection_problem(lines_of("pip-none")) == ""


def test_plain_explanations_of_llama_quantize() -> None:
    problem = output.quantize_problem(lines_of("quantize-q1_0"))
    assert problem is not None
    assert problem.message == (
        "tensor blk.0.attn_k.weight has rows of 192, which blocks of 128 cannot fill, "
        "and no tensor type fallback is defined for type q1_0"
    )
    problem = output.quantize_problem(lines_of("quantize-nodir"))
    assert problem is not None
    assert problem.message == "the result could not be written"
    assert output.quantize_problem(lines_of("quantize-arch")) is None


def test_whether_the_logger_said_why() -> None:
    short = (DATA / "perplexity-short.txt").read_text().splitlines()
    assert reasons.says_error(short)
    assert not reasons.says_error(short[:-1]), "how many there are is missing"
    assert not reasons.says_error((DATA / "perplexity.txt").read_text().splitlines())
