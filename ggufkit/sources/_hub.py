"""What the two hubs have in common: which files to fetch, and the stage that does it."""

import glob
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ggufkit.checkpoint import open_config
from ggufkit.errors import CheckpointError, SourceError, UsageError
from ggufkit.sources._request import Request, model_name
from ggufkit.store import require_space
from ggufkit.values import Checkpoint, Json

_WEIGHTS = re.compile(r"model[^/]*\.safetensors")
_PICKLES = re.compile(r"pytorch_model[^/]*\.bin")
_COMPANIONS = re.compile(
    r"[^/]+\.(json|txt|jinja|tiktoken)|[^/]*\.model|README\.md|LICEN[SC]E[^/]*|NOTICE[^/]*"
    r"|additional_chat_templates/[^/]+\.jinja",
    re.IGNORECASE,
)
_CODE = re.compile(r"[^/]+\.py")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one revision.

    Attributes:
        revision: what pins them: a commit, or a digest over their digests.
        files: name to size in bytes.
    """

    revision: str
    files: Mapping[str, int]


def split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """Split ``ORG/NAME@REV``.

    Raises:
        UsageError: it is not ``ORG/NAME``, or two different revisions are asked for.
    """
    repository, _, written = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"'{name}' is not of the form ORG/NAME or ORG/NAME@REVISION")
    if written and revision and written != revision:
        raise UsageError(
            f"Two revisions are asked for: {written} and {revision}", "Give one of them"
        )
    return repository, written or revision


def wanted(
    files: Mapping[str, int], *, trust_remote_code: bool, allow_pickle: bool, what: str
) -> tuple[list[str], list[str]]:
    """The files that conversion needs: small ones first, then weights.

    Raises:
        CheckpointError: there are no weights that may be fetched.
    """
    small = [n for n in files if _COMPANIONS.fullmatch(n)]
    if trust_remote_code:
        small += [n for n in files if _CODE.fullmatch(n)]
    weights = [n for n in files if _WEIGHTS.fullmatch(n)]
    if weights:
        return sorted(small), sorted(weights)
    pickles = sorted(n for n in files if _PICKLES.fullmatch(n))
    if pickles and allow_pickle:
        return sorted(small), pickles
    if pickles:
        raise CheckpointError(
            f"{what} has pickled weights only ({pickles[0]}): "
            "loading a pickle can run any code that its author put there",
            "Look for a safetensors version; if you trust the author, add --allow-pickle",
        )
    if ggufs := sorted(n for n in files if n.endswith(".gguf")):
        raise CheckpointError(
            f"{what} holds GGUF files ({ggufs[0]}), not a checkpoint",
            "Name the original model that they were made from",
        )
    raise CheckpointError(
        f"{what} has no weights (no model*.safetensors)", "Is it a data set, or an adapter?"
    )


def fetch_repository(
    prefix: str,
    repository: str,
    commit: str,
    request: Request,
    *,
    list_files: Callable[[], Listing],
    download: Callable[[list[str], Path], None],
    tool: Mapping[str, Json],
) -> Checkpoint:
    """Run the stage ``fetch``: small files, a look at them, then the weights.

    Args:
        prefix: the hub's prefix, such as ``hf``.
        repository: ``ORG/NAME``.
        commit: what pins the revision.
        request: how to fetch.
        list_files: lists the repository at that commit.
        download: fetches files (as glob patterns) into a directory, resuming.
        tool: kept for the manifest; not part of the key, as the files are pinned.
    """
    name = model_name(repository)
    progress = request.progress

    def work(directory: Path) -> dict[str, Json]:
        listing = list_files()
        small, weights = wanted(
            listing.files,
            trust_remote_code=request.trust_remote_code,
            allow_pickle=request.allow_pickle,
            what=f"{prefix}:{repository}",
        )
        nbytes = sum(listing.files[n] for n in small + weights)
        require_space(directory, nbytes - _tree_nbytes(directory), f"fetching {repository}")
        with progress.task(f"fetch {repository}", nbytes, "bytes") as task:
            with _watched(directory, task.update):
                download([glob.escape(n) for n in small], directory)
                open_config(directory, trust_remote_code=request.trust_remote_code)
                download([glob.escape(n) for n in weights], directory)
            if absent := [n for n in small + weights if not (directory / n).is_file()]:
                raise SourceError(
                    f"{prefix}:{repository}: the download lacks {', '.join(absent)}",
                    "Run the same command again: it goes on where it stopped",
                )
            task.update(nbytes)
        return {"files": len(small) + len(weights), "nbytes": nbytes, **tool}

    artifact = request.store.run(
        "fetch",
        version=1,
        model=name,
        inputs={"hub": prefix, "repository": repository, "revision": commit},
        options={
            "code": request.trust_remote_code,
            "pickle": request.allow_pickle,
        },
        tool={},
        work=work,
        resume=True,
        progress=progress,
    )
    return request.checkpoint(artifact.path, name, f"{prefix}:{repository}@{commit}")


def fetched_before(prefix: str, repository: str, request: Request) -> str:
    """A hint that names an earlier fetch of the same repository, if there is one."""
    for artifact in request.store.artifacts("fetch"):
        inputs = artifact.manifest.inputs
        if (inputs.get("hub"), inputs.get("repository")) == (prefix, repository):
            return f"; an earlier fetch is here: {prefix}:{repository}@{inputs['revision']}"
    return ""


@contextmanager
def _watched(directory: Path, update: Callable[[float], None]) -> Iterator[None]:
    """Report what arrives on disk.

    The hubs' own progress hooks differ from each other and from version to
    version; the bytes on the disk do not.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            update(_tree_nbytes(directory))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _tree_nbytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # renamed between listing and looking
    return total


def unreachable(
    hub: str, prefix: str, repository: str, error: Exception, request: Request
) -> SourceError:
    """The error for a hub that does not answer."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return SourceError(
        f"{hub} cannot be reached to fetch {repository}: {reason}",
        "Check the network, or name a directory on this machine"
        + fetched_before(prefix, repository, request),
    )
