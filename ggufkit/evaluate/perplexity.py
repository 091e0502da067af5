"""Perplexity as llama-perplexity measures it, kept as a stage."""

from pathlib import Path

from ggufkit import settings
from ggufkit.llamacpp import toolchain
from ggufkit.llamacpp.toolchain import NativeBuild
from ggufkit.progress import Progress
from ggufkit.store import Store
from ggufkit.values import EvalResult, Json, Text, to_json

_VERSION = 1


def measure(
    store: Store,
    build: NativeBuild,
    model: Path,
    text: Text,
    *,
    context: int,
    chunks: int | None,
    gpu_layers: int,
    overlap: float | None = None,
    notes: tuple[str, ...] = (),
    progress: Progress,
) -> EvalResult:
    """Perplexity of one model on one text.

    The number is llama-perplexity's own: chunks of ``context`` tokens, the
    second half of each scored, the first token replaced by BOS if the
    vocabulary says so.

    Args:
        store: keeps the result, so that asking again is instant.
        build: whose llama-perplexity to run.
        model: the GGUF.
        text: what to read.
        context: tokens per chunk.
        chunks: how many chunks at most; None for all.
        gpu_layers: layers to put on a GPU.
        overlap: share of the text that the model was calibrated on, to be kept with
            the result; see :mod:`ggufkit.evaluate.leaks`.
        notes: what else is to be kept with it.
        progress: told the running estimate, chunk by chunk.

    Raises:
        GgufkitError: if the text is shorter than two contexts.
    """
    file_nbytes = model.stat().st_size
    title = f"perplexity of {model.stem} on {text.name}"

    def work(directory: Path) -> dict[str, Json]:
        with progress.task(title, chunks, "chunks") as task:

            def on_estimate(done: int, total: int | None, estimate: float) -> None:
                if total:
                    task.set_total(total)
                task.update(done, f"PPL {estimate:.4f}")

            told = toolchain.perplexity(
                build,
                model,
                text.path,
                context=context,
                chunks=chunks,
                gpu_layers=gpu_layers,
                threads=settings.threads(),
                log=store.log(f"perplexity-{model.stem}"),
                text_name=text.name,
                on_estimate=on_estimate,
            )
        facts: dict[str, Json] = to_json(told)
        facts |= {"model": str(model), "text": text.name, "file_nbytes": file_nbytes}
        return facts | {"overlap": overlap, "notes": list(notes)}

    artifact = store.run(
        "evaluate",
        version=_VERSION,
        model=name_in_store(store, model),
        inputs={"model": store.digest(model, progress).sha256, "text": text.digest},
        options={"context": context, "chunks": chunks, "gpu_layers": gpu_layers},
        tool={"llama.cpp": build.commit, "backend": build.backend},
        work=work,
        progress=progress,
    )
    facts = artifact.manifest.facts
    return EvalResult(
        model=model,
        text=text.name,
        perplexity=facts["perplexity"],
        error=facts["error"],
        tokens=facts["tokens"],
        chunks=facts["chunks"],
        context=facts["context"],
        tokens_per_second=facts["chunks"] * facts["context"] / facts["seconds"],
        peak_rss_nbytes=facts["peak_rss_nbytes"],
        file_nbytes=file_nbytes,
        seconds=facts["seconds"],
        reused=artifact.reused,
        overlap=overlap,
        notes=notes,
    )


def name_in_store(store: Store, model: Path) -> str:
    """Where results of a model are kept: its directory in the store, or the file's own name."""
    try:
        return model.resolve().relative_to(store.root.resolve()).parts[0]
    except ValueError:
        return model.stem
