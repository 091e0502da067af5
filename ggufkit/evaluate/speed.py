"""Tokens per second as llama-bench measures them, each setting kept as a stage."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ggufkit import settings
from ggufkit.errors import UsageError
from ggufkit.evaluate import bandwidth
from ggufkit.evaluate.perplexity import name_in_store
from ggufkit.llamacpp import benchmarking, host, toolchain
from ggufkit.llamacpp.benchmarking import GENERATION, PROMPT, BenchSetting
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Progress, Task
from ggufkit.store import Store
from ggufkit.values import BenchOptions, Json, SpeedResult, to_json

_STAGE = "bench"
_VERSION = 1
_SWEEP_DEPTHS = (1024, 4096)
_SWEEP_UBATCHES = (128, 256, 512, 1024)


class Bench:
    """A machine that models are measured on, with one build.

    Args:
        store: keeps the results.
        build: whose llama-bench to run.
        options: what to measure.
        again: measure anew what is there already.
        progress: told what is measured, how far it is, and what is dubious.

    Raises:
        UsageError: if GPU layers are asked for and there is no GPU.
    """

    def __init__(
        self,
        store: Store,
        build: NativeBuild,
        options: BenchOptions,
        *,
        again: bool,
        progress: Progress,
    ) -> None:
        self._store = store
        self._build = build
        self._options = options
        self._again = again
        self._progress = progress
        self._gpus = () if build.backend == "cpu" else toolchain.devices(build)
        self._bandwidths: dict[int, float | None] = {}
        if any(options.gpu_layers) and not self._gpus:
            raise _no_gpu(build)
        cores = settings.threads()
        if max(options.threads, default=0) > cores:
            progress.warn(
                f"{max(options.threads)} threads are more than the {cores} that can run at once "
                "here: they will wait for each other"
            )

    def settings(self, model: Path) -> list[BenchSetting]:
        """What is measured of a model: prompts first, then generation.

        Raises:
            UsageError: if the context would be longer than the model was trained with.
        """
        trained = Metadata(read_gguf(model, arrays=False)).trained_context
        wanted: list[BenchSetting] = []
        for plain in self._grid():
            if trained and plain.depth + plain.tokens > trained:
                raise UsageError(
                    f"{model.name} was trained with {trained} tokens of context; "
                    f"{plain.tokens} tokens at depth {plain.depth} are more",
                    f"Ask for at most {trained} in all, with -d, -p and -n",
                )
            wanted.append(plain)
            if self._options.sweep:
                wanted += self._variations(plain, trained)
        return list(dict.fromkeys(wanted))

    def _grid(self) -> Iterator[BenchSetting]:
        given = self._options
        threads = given.threads or (default_threads(),)
        layers = given.gpu_layers or ((-1,) if self._gpus else (0,))
        works = [(PROMPT, n) for n in given.prompt] + [(GENERATION, n) for n in given.generation]
        rest = (given.batch, given.ubatch, given.flash_attention, layers)
        for (work, tokens), depth, count, batch, ubatch, attention, ngl in itertools.product(
            works, given.depth, threads, *rest
        ):
            # llama.cpp cuts a larger ubatch down to the batch without a word.
            ubatch = min(ubatch, batch)
            yield BenchSetting(work, tokens, depth, count, batch, ubatch, attention, ngl)

    def _variations(self, plain: BenchSetting, trained: int | None) -> Iterator[BenchSetting]:
        """The setting with one thing changed at a time."""
        powers = itertools.takewhile(lambda n: n < settings.threads(), (1 << n for n in range(16)))
        for threads in (*powers, settings.threads()):
            yield replace(plain, threads=threads)
        for depth in _SWEEP_DEPTHS:
            if not trained or depth + plain.tokens <= trained:
                yield replace(plain, depth=depth)
        for ubatch in _SWEEP_UBATCHES:
            # Generation is one token at a time; and more than the prompt has is never used.
            if plain.work == PROMPT and ubatch <= min(plain.batch, plain.tokens):
                yield replace(plain, ubatch=ubatch)
        yield replace(plain, flash_attention="on" if plain.flash_attention == "off" else "off")
        if self._gpus:
            yield replace(plain, gpu_layers=0)

    def measure(self, model: Path) -> list[SpeedResult]:
        """Measure one model in all settings, or take what was measured before.

        Raises:
            UsageError: as :meth:`settings` does.
            ToolError: if llama-bench fails.
        """
        wanted = self.settings(model)
        header = read_gguf(model)
        weights = bandwidth.weights_nbytes_per_token(header)
        cache = bandwidth.cache_nbytes_per_token(header)
        self._tell_cached(model, weights)
        passes = 1 + self._options.repetitions
        results = []
        with self._progress.task(f"measuring {model.stem}", passes * len(wanted), "passes") as task:
            for number, setting in enumerate(wanted):
                task.update(passes * number, describe(setting))
                # On average, half of the generated tokens are in the context too.
                nbytes = weights + cache * (setting.depth + setting.tokens / 2)
                on_pass = partial(_add, task, passes * number)
                results.append(self._measure_setting(model, setting, nbytes, on_pass))
        return results

    def _tell_cached(self, model: Path, nbytes: int) -> None:
        cached = host.last_level_cache_nbytes()
        if self._options.generation and not self._gpus and nbytes < cached:
            self._progress.say(
                f"what {model.stem} reads to write a token ({nbytes / 2**20:.0f} MiB) fits into "
                f"the last-level cache ({cached / 2**20:.0f} MiB): it may be faster than memory is"
            )

    def _measure_setting(
        self,
        model: Path,
        setting: BenchSetting,
        nbytes_per_token: float,
        on_pass: Callable[[int], None],
    ) -> SpeedResult:
        def work(_: Path) -> dict[str, Json]:
            return self._facts(model, setting, nbytes_per_token, on_pass)

        gpus = list(self._gpus) if setting.gpu_layers else []
        identity: dict[str, Any] = {
            "version": _VERSION,
            "model": name_in_store(self._store, model),
            "inputs": {"model": self._store.digest(model, self._progress).sha256},
            "options": {**to_json(setting), "repetitions": self._options.repetitions},
            "tool": {
                "llama.cpp": self._build.commit,
                "backend": self._build.backend,
                "binary": self._build.digest_of("llama-bench"),
                "machine": [host.cpu_identity(), *gpus],
            },
            "progress": self._progress,
        }
        if self._again and (old := self._store.find(_STAGE, **identity)):
            # What was measured is only thrown away for something that has been measured.
            facts = work(old.path)
            self._store.remove(old)
            artifact = self._store.run(_STAGE, work=lambda _: facts, **identity)
        else:
            artifact = self._store.run(_STAGE, work=work, **identity)
        facts = artifact.manifest.facts | {"model": model, "reused": artifact.reused}
        return SpeedResult(**{f.name: facts[f.name] for f in fields(SpeedResult)})

    def _facts(
        self,
        model: Path,
        setting: BenchSetting,
        nbytes_per_token: float,
        on_pass: Callable[[int], None],
    ) -> dict[str, Json]:
        width = self._bandwidth(setting.threads) if setting.gpu_layers == 0 else None
        told = benchmarking.bench(
            self._build,
            model,
            setting,
            repetitions=self._options.repetitions,
            log=self._store.log(f"bench-{model.stem}"),
            on_pass=on_pass,
        )
        read = nbytes_per_token if setting.work == GENERATION else None
        # What came of flash attention, in place of what was asked for.
        facts: dict[str, Json] = to_json(setting) | to_json(told)
        return facts | {
            "model": str(model),
            "file_nbytes": model.stat().st_size,
            "nbytes_per_token": read,
            "bandwidth": width,
            "bandwidth_share": told.tokens_per_second * read / width if read and width else None,
            "machine": host.cpu_identity().partition(":")[0],
        }

    def _bandwidth(self, threads: int) -> float | None:
        if threads not in self._bandwidths:
            self._bandwidths[threads] = bandwidth.measure_bandwidth(threads, self._progress)
        return self._bandwidths[threads]


def default_threads() -> int:
    """As many threads as there are physical cores, within the setting's number."""
    return min(settings.threads(), host.physical_cores() or settings.threads())


def describe(setting: BenchSetting) -> str:
    """A setting in llama-bench's words, such as ``pp512 @ d2048, 4 threads``."""
    kind = "pp" if setting.work == PROMPT else "tg"
    depth = f" @ d{setting.depth}" if setting.depth else ""
    return f"{kind}{setting.tokens}{depth}, {setting.threads} threads"


def _add(task: Task, before: int, done: int) -> None:
    task.update(before + done)


def _no_gpu(build: NativeBuild) -> UsageError:
    if build.backend == "cpu":
        return UsageError(
            "this is a CPU-only build of llama.cpp: it cannot put layers on a GPU",
            "Leave out -ngl, or: ggufkit build --backend cuda (or vulkan, metal, hip)",
        )
    return UsageError(
        f"this build of llama.cpp is for {build.backend}, but sees no such GPU here",
        "Leave out -ngl, or look at what is seen: ggufkit doctor",
    )
