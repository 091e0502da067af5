import dataclasses
from pathlib import Path

import pytest

from ggufkit import pipeline, settings
from ggufkit.errors import ToolError, UsageError
from ggufkit.evaluate import bandwidth, speed
from ggufkit.evaluate.results import read_results
from ggufkit.evaluate.speed import Bench, default_threads, describe
from ggufkit.llamacpp import host, toolchain
from ggufkit.llamacpp.benchmarking import GENERATION, PROMPT
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import SILENT, Silent
from ggufkit.store import Store
from ggufkit.values import BenchOptions

QUICK = BenchOptions(prompt=(16,), generation=(8,), repetitions=1)


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth is measured for real, but on little memory."""
    monkeypatch.setattr(bandwidth, "_SMALLEST", 16 << 20)
    monkeypatch.setattr(host, "last_level_cache_nbytes", lambda: 1 << 20)


def bench_on(store: Store, build: NativeBuild, options: BenchOptions) -> Bench:
    return Bench(store, build, options, again=False, progress=SILENT)


def test_measured_once(tiny_gguf: Path, native: NativeBuild, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, depth=(0, 64), threads=(1,))
    first = pipeline.bench([tiny_gguf], options=options, models_dir=tmp_path)
    assert [(r.work, r.tokens, r.depth) for r in first] == [
        *(("prompt", 16, 0), ("prompt", 16, 64)),
        *(("generation", 8, 0), ("generation", 8, 64)),
    ]
    for row in first:
        assert row.tokens_per_second > 0
        assert row.peak_rss_nbytes > row.file_nbytes == tiny_gguf.stat().st_size
        assert row.flash_attention
        assert row.threads == 1
        assert row.gpu_layers == 0
        assert row.bandwidth is not None
        assert (row.bandwidth_share is not None) == (row.work == "generation")
        assert row.machine == host.cpu_identity().partition(":")[0]
        assert not row.reused
    again = pipeline.bench([tiny_gguf], options=options, models_dir=tmp_path)
    assert again == [dataclasses.replace(row, reused=True) for row in first]
    stored = [s.value for s in read_results(Store(tmp_path)).speeds]
    assert sorted(stored, key=str) == sorted(again, key=str)


def test_the_share_is_bytes_over_bandwidth(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "measure_bandwidth", lambda threads, progress: 1e9 * threads)
    options = dataclasses.replace(QUICK, prompt=(), depth=(100,), threads=(1,))
    (row,) = pipeline.bench([tiny_gguf], options=options, models_dir=tmp_path)
    weights = sum(t.nbytes for t in read_gguf(tiny_gguf).tensors)  # the embedding is the output
    nbytes = weights + (100 + 8 / 2) * 2 * 2 * 64 * 2 * 2
    assert row.bandwidth == 1e9
    assert row.bandwidth_share == pytest.approx(row.tokens_per_second * nbytes / 1e9)


def test_again_measures_anew_and_keeps_the_old_on_failure(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(QUICK, prompt=())
    (first,) = pipeline.bench([tiny_gguf], options=options, models_dir=tmp_path)
    (anew,) = pipeline.bench([tiny_gguf], options=options, again=True, models_dir=tmp_path)
    assert not anew.reused
    assert len(list(tmp_path.glob("tiny-Q4_0/bench-*"))) == 1

    def fails(*_: object, **__: object) -> None:
        raise ToolError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(speed.benchmarking, "bench", fails)
        with pytest.raises(ToolError, match="no luck"):
            pipeline.bench([tiny_gguf], options=options, again=True, models_dir=tmp_path)
    (kept,) = pipeline.bench([tiny_gguf], options=options, models_dir=tmp_path)
    assert kept == dataclasses.replace(anew, reused=True)
    assert first.tokens == kept.tokens


def test_every_combination_is_measured(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    options = BenchOptions(
        prompt=(16, 32), generation=(8,), threads=(1, 2), batch=(16,), flash_attention=("on", "off")
    )
    wanted = bench_on(Store(tmp_path), native, options).settings(tiny_gguf)
    assert len(wanted) == len(set(wanted)) == 3 * 2 * 2
    assert [s.work for s in wanted] == [PROMPT] * 8 + [GENERATION] * 4
    assert {(s.batch, s.ubatch) for s in wanted} == {(16, 16)}  # cut down, as llama.cpp does


def test_a_sweep_changes_one_thing_at_a_time(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGUFKIT_THREADS", "6")
    options = BenchOptions(threads=(3,), sweep=True)
    wanted = bench_on(Store(tmp_path), native, options).settings(tiny_gguf)
    prompts = [s for s in wanted if s.work == PROMPT]
    plain = prompts[0]
    assert {s.threads for s in prompts} == {1, 2, 3, 4, 6}
    assert {s.ubatch for s in prompts} == {128, 256, 512}
    assert {s.flash_attention for s in prompts} == {"auto", "off"}
    assert {s.depth for s in prompts} == {0, 1024}  # it was trained with 2048 tokens
    assert {s.ubatch for s in wanted if s.work == GENERATION} == {512}
    for one in prompts[1:]:
        same = [
            f for f in dataclasses.fields(one) if getattr(one, f.name) == getattr(plain, f.name)
        ]
        assert len(same) == len(dataclasses.fields(one)) - 1


def test_a_context_beyond_the_trained_one(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path
) -> None:
    options = BenchOptions(prompt=(), generation=(49,), depth=(2000,))
    with pytest.raises(UsageError, match=r"trained with 2048 tokens .* 49 tokens at depth 2000"):
        pipeline.bench([tiny_gguf], options=options, models_dir=tmp_path)
    fits = dataclasses.replace(options, generation=(48,))
    assert len(bench_on(Store(tmp_path), native, fits).settings(tiny_gguf)) == 1


def test_gpu_layers_without_a_gpu(
    native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.backend == "cpu"
    for layers in (10, -1):
        options = dataclasses.replace(QUICK, gpu_layers=(0, layers))
        with pytest.raises(UsageError, match="CPU-only build") as caught:
            bench_on(Store(tmp_path), native, options)
        assert "--backend cuda" in caught.value.hint
    monkeypatch.setattr(toolchain, "devices", lambda build: ())
    cuda = dataclasses.replace(native, backend="cuda")
    with pytest.raises(UsageError, match="for cuda, but sees no such GPU"):
        bench_on(Store(tmp_path), cuda, options)


def test_where_there_is_a_gpu_it_is_used(
    tiny_gguf: Path, native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "devices", lambda build: ("CUDA0: a GPU",))
    cuda = dataclasses.replace(native, backend="cuda")
    plain = bench_on(Store(tmp_path), cuda, QUICK).settings(tiny_gguf)
    assert {s.gpu_layers for s in plain} == {-1}
    sweep = dataclasses.replace(QUICK, sweep=True)
    assert {s.gpu_layers for s in bench_on(Store(tmp_path), cuda, sweep).settings(tiny_gguf)} == {
        *(-1, 0)
    }


def test_more_threads_than_cores_are_told(
    native: NativeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGUFKIT_THREADS", "2")
    listener = Listener()
    options = dataclasses.replace(QUICK, threads=(2, 3))
    Bench(Store(tmp_path), native, options, again=False, progress=listener)
    assert "3 threads are more than the 2" in listener.warnings[0]


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "threads", lambda: 8)
    for cores, expected in ((4, 4), (None, 8), (16, 8)):
        monkeypatch.setattr(host, "physical_cores", lambda cores=cores: cores)
        assert default_threads() == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": (0,)},
        {"generation": (-1,)},
        {"threads": (0,)},
        {"batch": ()},
        {"depth": (-1,)},
        {"gpu_layers": (-2,)},
        {"repetitions": 0},
        {"flash_attention": ("maybe",)},
        {"prompt": (), "generation": ()},
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        BenchOptions(**wrong)  # type: ignore[arg-type]


def test_words_for_a_setting(native: NativeBuild, tiny_gguf: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, depth=(0, 64), threads=(1,))
    told = [describe(s) for s in bench_on(Store(tmp_path), native, options).settings(tiny_gguf)]
    assert told[0] == "pp16, 1 threads"
    assert told[3] == "tg8 @ d64, 1 threads"
