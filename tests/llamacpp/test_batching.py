"""Batches, samplers and sequences, on tiny models through the real library."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from gguf import GGUFWriter

from ggufkit.errors import IntegrityError, ToolError, UsageError
from ggufkit.llamacpp import devices, toolchain
from ggufkit.llamacpp.batching import (
    CACHE_TYPES,
    BatchContext,
    ContextOptions,
    Decoded,
    Model,
    ModelOptions,
)
from ggufkit.llamacpp.runtime import load_llama_cpp
from ggufkit.llamacpp.sampling import MAX_GRAMMAR_DEPTH, Sampler, SamplingParams
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Silent
from tests.factory import make_checkpoint

HIDDEN, VOCAB = 64, 384
GREEDY = SamplingParams(temperature=0)
OPTIONS = ContextOptions(context=256, cells=1024, sequences=8, batch=64, threads=1)
PROMPT = list(range(5, 45))
Make = Callable[..., BatchContext]


def tiny(build: NativeBuild, directory: Path, arch: str) -> Path:
    checkpoint = make_checkpoint(
        directory / arch, arch, hidden=HIDDEN, intermediate=128, vocab=VOCAB
    )
    out = directory / f"{arch}.gguf"
    toolchain.convert_checkpoint(
        build, checkpoint, out, outtype="f32", name=arch, log=directory / f"{arch}.log"
    )
    return out


@pytest.fixture(scope="module")
def gguf(native: NativeBuild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(native, tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that turns the first block's queries around."""
    path = tmp_path_factory.mktemp("lora") / "style.gguf"
    draw = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, shape in (("lora_a", (4, HIDDEN)), ("lora_b", (HIDDEN, 4))):
        numbers = draw.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"blk.0.attn_q.weight.{name}", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(gguf: Path, lora: Path, native: NativeBuild) -> Iterator[Model]:
    with Model(gguf, ModelOptions(adapters={"style": lora}), build=native) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def shared(model: Model) -> Iterator[BatchContext]:
    made = BatchContext(model, OPTIONS)
    yield made
    made.close()


@pytest.fixture
def context(shared: BatchContext) -> BatchContext:
    shared.forget_all()
    shared.clear()
    shared.use_adapters(())
    return shared


def read(context: BatchContext, prompt: list[int], sequence: int = 0, start: int = 0) -> int:
    """Compute a prompt; the place to sample at."""
    place = -1
    for at in range(start, len(prompt), context.batch):
        context.clear()
        part = prompt[at : at + context.batch]
        place = context.add(sequence, at, part, output=True)
        assert context.decode() is Decoded.DONE
    return place


def write(context: BatchContext, sampler: Sampler, place: int, known: int, count: int) -> list[int]:
    """So many tokens after a prompt of ``known`` tokens."""
    tokens: list[int] = []
    while True:
        tokens.append(sampler.sample(place))
        if len(tokens) == count:
            sampler.close()
            return tokens
        context.clear()
        place = context.add(0, known + len(tokens) - 1, tokens[-1:], output=True)
        assert context.decode() is Decoded.DONE


def answer(context: BatchContext, params: SamplingParams = GREEDY, count: int = 12) -> list[int]:
    context.forget_all()
    sampler = context.sampler(params)
    sampler.prime(PROMPT)
    return write(context, sampler, read(context, PROMPT), len(PROMPT), count)


# Batches.


def test_sequences_in_one_batch_write_what_each_writes_alone(context: BatchContext) -> None:
    prompts = [[n, *range(60, 60 + 3 * n)] for n in range(3, 9)]
    alone = []
    for prompt in prompts:
        context.forget_all()
        sampler = context.sampler(GREEDY)
        alone.append(write(context, sampler, read(context, prompt), len(prompt), 8))
    context.forget_all()
    samplers = [context.sampler(GREEDY) for _ in prompts]
    together: list[list[int]] = [[] for _ in prompts]
    known = [0] * len(prompts)
    for step in range(8):
        waiting = {}
        context.clear()
        for n, prompt in enumerate(prompts):
            tokens = [*prompt, *together[n]][known[n] :]
            if len(tokens) <= context.room:
                waiting[n] = context.add(n, known[n], tokens, output=True)
                known[n] += len(tokens)
        assert len(waiting) == len(prompts) or step == 0
        assert context.decode() is Decoded.DONE
        for n, place in waiting.items():
            together[n].append(samplers[n].sample(place))
    for sampler in samplers:
        sampler.close()
    for one, other in zip(alone, together, strict=True):
        assert other == one[: len(other)]
        assert len(other) >= 7


@pytest.mark.parametrize("lanes", [None, 2])
def test_shared_beginnings_change_nothing(model: Model, lanes: int | None) -> None:
    options = ContextOptions(context=256, sequences=4, batch=64, threads=1, lanes=lanes)
    context = BatchContext(model, options)
    assert context.context == 256
    assert context.cells == (2 if lanes else 1) * 256
    alone = answer(context)
    context.forget_all()
    read(context, [*PROMPT, 7, 8, 9], sequence=3)
    context.copy(3, 0, len(PROMPT) - 1)
    context.forget(3)
    place = read(context, PROMPT, start=len(PROMPT) - 1)
    assert write(context, context.sampler(GREEDY), place, len(PROMPT), 12) == alone
    context.close()


def test_what_was_written_can_be_taken_back(context: BatchContext) -> None:
    alone = answer(context)
    assert context.can_trim
    assert context.forget(0, len(PROMPT) - 1)
    place = read(context, PROMPT, start=len(PROMPT) - 1)
    assert write(context, context.sampler(GREEDY), place, len(PROMPT), 12) == alone


def test_a_sliding_window_keeps_what_prefixes_need(native: NativeBuild, tmp_path: Path) -> None:
    with Model(tiny(native, tmp_path, "gemma3"), build=native) as model:
        context = BatchContext(model, OPTIONS)
        long = [5 + n % 300 for n in range(150)]
        place = read(context, long)
        alone = write(context, context.sampler(GREEDY), place, len(long), 6)
        assert context.forget(0, 20)
        place = read(context, long, start=20)
        assert write(context, context.sampler(GREEDY), place, len(long), 6) == alone
        context.close()


def test_a_batch_that_finds_no_cells_changes_nothing(model: Model) -> None:
    context = BatchContext(model, ContextOptions(context=256, sequences=2, batch=256, threads=1))
    assert context.cells == 256
    read(context, [5] * 200)
    context.clear()
    context.add(1, 0, [6] * 100, output=True)
    assert context.decode() is Decoded.FULL
    context.forget(0)
    assert context.decode() is Decoded.DONE
    context.close()


def test_a_batch_takes_no_more_than_it_holds(context: BatchContext) -> None:
    context.add(0, 0, [5] * 60, output=True)
    assert context.room == 4
    with pytest.raises(ValueError, match="5 tokens do not fit into a batch that has 60"):
        context.add(1, 0, [5] * 5, output=True)


def test_an_impossible_batch_is_an_error_with_the_reason(context: BatchContext) -> None:
    read(context, PROMPT)
    context.clear()
    context.add(0, 3, [5], output=True)
    with pytest.raises(ToolError, match="failed to compute"):
        context.decode()


def test_an_abort_ends_the_computation(model: Model) -> None:
    context = BatchContext(model, OPTIONS)
    context.add(0, 0, PROMPT, output=True)
    context.abort()
    assert context.decode() is Decoded.ABORTED
    context.close()


def test_a_place_without_output_cannot_be_sampled(context: BatchContext) -> None:
    read(context, PROMPT)
    with pytest.raises(IndexError, match="no output at 0"):
        context.sampler(GREEDY).sample(0)


@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_keys_and_values_of_every_type(model: Model, kind: str) -> None:
    # Blocks of 32 numbers do not fit into this model's heads of 16.
    head = HIDDEN // 4
    options = ContextOptions(
        context=256, sequences=2, batch=64, threads=1, key_type=kind, value_type=kind
    )
    if kind in ("f32", "f16", "bf16"):
        context = BatchContext(model, options)
        assert len(answer(context, count=4)) == 4
        context.close()
    else:
        assert head % 32
        with pytest.raises(ToolError, match="no room for a context"):
            BatchContext(model, options)


@pytest.mark.parametrize("flash", ["on", "off"])
def test_flash_attention_writes_the_same(model: Model, context: BatchContext, flash: str) -> None:
    options = ContextOptions(context=256, batch=64, threads=1, flash_attention=flash)  # type: ignore[arg-type]
    other = BatchContext(model, options)
    assert answer(other) == answer(context)
    other.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"key_type": "q9"}, "cannot be of type 'q9'"),
        ({"sequences": 0}, "0 sequences"),
        ({"sequences": 257}, "1 to 256"),
        ({"batch": 0}, "batch is 0"),
        ({"context": -1}, "context is -1"),
    ],
)
def test_a_context_that_cannot_be_is_refused(options: dict[str, int], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ContextOptions(**options)  # type: ignore[arg-type]


# Sampling.


def test_a_seed_repeats_an_answer(context: BatchContext) -> None:
    params = SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=5)
    first = answer(context, params)
    assert answer(context, params) == first
    other = SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=6)
    assert answer(context, other) != first


def test_the_likeliest_is_what_all_ways_to_be_greedy_take(context: BatchContext) -> None:
    likeliest = answer(context)
    for params in (
        SamplingParams(top_k=1),
        SamplingParams(temperature=0, logit_bias={7: 0.0}),
        SamplingParams(temperature=1e-9),
        SamplingParams(temperature=1, min_p=1.0, seed=3),
    ):
        assert answer(context, params) == likeliest


def test_a_bias_forces_and_forbids(context: BatchContext) -> None:
    forced = SamplingParams(temperature=0, logit_bias={77: 1000.0})
    assert set(answer(context, forced)) == {77}
    first = answer(context)[0]
    forbidden = SamplingParams(temperature=0, logit_bias={first: -math.inf})
    assert first not in answer(context, forbidden)


def test_no_token_at_all_is_survived(context: BatchContext) -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -math.inf))
    assert all(0 <= token < VOCAB for token in answer(context, params))


def test_penalties_count_the_prompt(context: BatchContext) -> None:
    place = read(context, PROMPT)
    logits = context._logits.view(place).copy()
    raised = SamplingParams(
        temperature=0,
        presence_penalty=-100,
        penalty_window=len(PROMPT),
    )
    sampler = context.sampler(raised)
    sampler.prime(PROMPT)
    assert sampler.sample(place) == max(PROMPT, key=lambda token: logits[token])
    sampler.close()


def test_dry_ends_a_repetition(context: BatchContext) -> None:
    loop = [5, 6, 7, 8] * 6
    place = read(context, loop)
    bias = {5: 12.0 + float(np.ptp(context._logits.view(place)))}
    for strength, repeats in ((0.0, True), (100.0, False)):
        params = SamplingParams(temperature=0, logit_bias=bias, dry_multiplier=strength)
        sampler = context.sampler(params)
        sampler.prime(loop)
        assert (sampler.sample(place) == 5) is repeats
        sampler.close()


def test_logprobs_are_those_of_the_softmax(context: BatchContext) -> None:
    place = read(context, PROMPT)
    logits = context._logits.view(place).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    sampler = context.sampler(GREEDY)
    chosen, *top = sampler.logprobs(place, 9, 5)
    assert chosen.token == 9
    assert chosen.logprob == pytest.approx(expected[9])
    assert [t.token for t in top] == list(np.argsort(-expected)[:5])
    everything = sampler.logprobs(place, 9, VOCAB)
    assert sum(math.exp(t.logprob) for t in everything[1:]) == pytest.approx(1)
    assert len(sampler.logprobs(place, 9, 0)) == 1


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 32}, "seed is 4294967296"),
        ({"logit_bias": {3: math.nan}}, "bias of token 3 is nan"),
        ({"logit_bias": {3: math.inf}}, "bias of token 3 is inf"),
        ({"grammar": "x" * 200_000}, "longer than 128 KiB"),
        ({"grammar": 'root ::= "\0"'}, "zero byte"),
        ({"grammar": "root ::= " + "(" * 100_000}, f"more than {MAX_GRAMMAR_DEPTH}"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(params: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        SamplingParams(**params)  # type: ignore[arg-type]


def test_a_bias_on_a_token_that_is_not_there_is_refused(context: BatchContext) -> None:
    with pytest.raises(UsageError, match=f"no token {VOCAB}"):
        context.sampler(SamplingParams(logit_bias={VOCAB: 1.0}))


# Grammars.


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_its_grammar(context: BatchContext, temperature: float) -> None:
    grammar = r'root ::= "{\"a\": " [1-9] [0-9]{0,2} "}"'
    params = SamplingParams(temperature=temperature, grammar=grammar, seed=2)
    sampler = context.sampler(params)
    place, tokens = read(context, PROMPT), list[int]()
    ends = context.vocabulary.end_tokens
    while (token := sampler.sample(place)) not in ends:
        tokens.append(token)
        context.clear()
        place = context.add(0, len(PROMPT) + len(tokens) - 1, [token], output=True)
        assert context.decode() is Decoded.DONE
    sampler.close()
    text = b"".join(map(context.vocabulary.piece, tokens)).decode()
    assert 0 <= json.loads(text)["a"] <= 999


def test_a_finished_grammar_allows_nothing_but_the_end(context: BatchContext) -> None:
    sampler = context.sampler(SamplingParams(temperature=0, grammar='root ::= ""'))
    place = read(context, PROMPT)
    for _ in range(3):
        assert sampler.sample(place) in context.vocabulary.end_tokens
    sampler.close()


@pytest.mark.parametrize(
    "grammar",
    [
        "this is no grammar",
        'other ::= "a"',
        "root ::= missing",
        'root ::= root "a"',
        'root ::= "a"{5000,}',
        "root ::= [",
        "\ud800",
        "a0 ::= a1\n" + "".join(f"a{n} ::= a{n + 1}\n" for n in range(1, 8000)),
    ],
)
def test_a_grammar_that_cannot_be_read_is_refused(context: BatchContext, grammar: str) -> None:
    with pytest.raises(UsageError, match="cannot read the grammar"):
        context.sampler(SamplingParams(grammar=grammar))


# LoRA adapters.


def test_an_adapter_changes_the_answer_by_its_scale(context: BatchContext) -> None:
    plain = answer(context)
    context.use_adapters((("style", 2.0),))
    styled = answer(context)
    assert styled != plain
    context.use_adapters((("style", 0.0),))
    assert answer(context) == plain
    context.use_adapters((("style", 2.0),))
    assert answer(context) == styled
    context.use_adapters(())
    assert answer(context) == plain


def test_an_adapter_that_is_not_there_is_refused(context: BatchContext) -> None:
    with pytest.raises(UsageError, match="no LoRA adapter 'other'"):
        context.check_adapters((("other", 1.0),))
    with pytest.raises(UsageError, match="is nan"):
        context.check_adapters((("style", math.nan),))
    context.check_adapters((("style", 1.0),))


def test_a_file_that_is_no_adapter_is_refused(
    gguf: Path, tmp_path: Path, native: NativeBuild
) -> None:
    with pytest.raises(UsageError, match="no LoRA adapter at"):
        Model(gguf, ModelOptions(adapters={"x": tmp_path / "none"}), build=native)
    with pytest.raises(UsageError, match="cannot use the LoRA adapter"):
        Model(gguf, ModelOptions(adapters={"x": gguf}), build=native)


# Embeddings.


def test_embeddings_are_of_the_text_and_disturb_nobody(context: BatchContext) -> None:
    place = read(context, PROMPT)
    before = context._logits.view(place).copy()
    first, second = context.embed(PROMPT), context.embed(PROMPT[:5])
    assert len(first) == len(second) == HIDDEN
    assert first != second
    assert context.embed(PROMPT) == first
    assert np.array_equal(context._logits.view(place), before)


# Devices.


class Told(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


def test_a_build_for_the_cpu_says_that_it_has_no_gpu(gguf: Path, native: NativeBuild) -> None:
    told = Told()
    with Model(gguf, ModelOptions(gpu_layers="all"), build=native, progress=told) as model:
        if native.backend == "cpu":
            assert model.gpu_layers == 0
            assert "CPU-only build" in told.warned[0]
        else:
            assert model.gpu_layers == -1
    assert any(d.kind == "cpu" and d.total_nbytes > 0 for d in devices.devices(native))


GPU = devices.Device("GPU0", "of the test", "gpu", free_nbytes=8 << 30, total_nbytes=8 << 30)


@pytest.mark.parametrize(
    ("wanted", "arrives"), [(None, 0), (0, 0), (3, 3), ("all", -1), ("auto", 3)]
)
def test_the_number_of_layers_reaches_llama_cpp(
    gguf: Path,
    native: NativeBuild,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Literal["all", "auto"] | int | None,
    arrives: int,
) -> None:
    library = load_llama_cpp(native)
    load, given = library.llama_model_load_from_file, []

    def loading(path: bytes, params: Any) -> Any:
        given.append(params.n_gpu_layers)
        return load(path, params)

    monkeypatch.setattr(library, "llama_model_load_from_file", loading)
    monkeypatch.setattr(devices, "places_for_layers", lambda build, endpoints: (GPU,))
    told = Told()
    with Model(gguf, ModelOptions(gpu_layers=wanted), build=native, progress=told) as model:
        assert given == [arrives] == [model.gpu_layers]
    assert told.warned == []


def test_a_build_with_rpc_but_no_gpu_has_no_place_for_layers(native: NativeBuild) -> None:
    if native.backend == "cpu":
        # llama.cpp says otherwise, because RPC is built in.
        assert load_llama_cpp(native).llama_supports_gpu_offload()
        assert devices.places_for_layers(native) == ()


def test_shares_of_layers_must_fit_the_devices(
    gguf: Path, native: NativeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "places_for_layers", lambda build, endpoints: (GPU,))
    for split, message in (((1.0, 1.0), "2 ways, and there are 1"), ((0.0,), "not all 0")):
        with pytest.raises(UsageError, match=message):
            Model(gguf, ModelOptions(gpu_layers=1, split=split), build=native)


def test_layers_fit_by_their_size() -> None:
    gib = 1 << 30
    fit = lambda free: devices.fitting_layers(  # noqa: E731
        free, model_nbytes=10 * gib, layers=39, cache_nbytes=2 * gib
    )
    assert fit(64 * gib) == 40
    assert fit(0) == 0
    assert fit(6 * gib + devices.RESERVE_NBYTES) == 20


def test_a_broken_model_is_refused_with_the_reason(
    gguf: Path, tmp_path: Path, native: NativeBuild
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-4096])
    with pytest.raises(IntegrityError, match="is truncated"):
        Model(cut, build=native)
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(gguf.read_bytes().replace(b"blk.1.attn_norm.weight", b"blk.1.some_norm.weight"))
    with pytest.raises(ToolError, match=r"cannot load .*'blk.1.attn_norm.weight' not found"):
        Model(odd, build=native)
