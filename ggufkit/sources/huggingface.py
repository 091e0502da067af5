"""Models of the Hugging Face Hub: ``hf:ORG/NAME[@REVISION]``."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ggufkit.errors import SourceError
from ggufkit.foreign import is_ours, reason_of
from ggufkit.sources._hub import Listing, fetch_repository, split_revision, unreachable
from ggufkit.sources._request import Request
from ggufkit.values import Checkpoint

PREFIXES = ("hf", "huggingface")

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(name: str, request: Request) -> Checkpoint:
    """Fetch the files that conversion needs, at one commit.

    A branch or tag is resolved to its commit first, and the commit is what
    the origin records. With a full commit and an earlier fetch, no network is
    needed.

    Raises:
        SourceError: no such repository or revision, no access, or no network.
        CheckpointError: the repository is not a usable checkpoint.
    """
    import huggingface_hub

    repository, revision = split_revision(name, request.revision)
    api = huggingface_hub.HfApi(library_name="ggufkit")

    def info(at: str | None, sizes: bool) -> Any:
        with _translated(repository, at, request):
            return api.model_info(repository, revision=at, files_metadata=sizes)

    def list_files() -> Listing:
        siblings = info(commit, sizes=True).siblings or []
        return Listing(commit, {s.rfilename: int(s.size or 0) for s in siblings})

    def download(patterns: list[str], directory: Path) -> None:
        with _translated(repository, commit, request):
            huggingface_hub.snapshot_download(
                repository,
                revision=commit,
                local_dir=directory,
                allow_patterns=patterns,
                tqdm_class=_no_bars(),
                endpoint=api.endpoint,
            )

    pinned = revision is not None and _COMMIT.fullmatch(revision)
    commit = str(revision if pinned else info(revision, sizes=False).sha)
    return fetch_repository(
        "hf",
        repository,
        commit,
        request,
        list_files=list_files,
        download=download,
        tool={"huggingface_hub": huggingface_hub.__version__},
    )


def _no_bars() -> Any:
    """A tqdm class that draws nothing: progress is told by the size on disk."""
    from huggingface_hub.utils.tqdm import tqdm

    def disabled(bar: Any, *args: Any, **kwargs: Any) -> None:
        tqdm.__init__(bar, *args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return type("Quiet", (tqdm,), {"__init__": disabled})


@contextmanager
def _translated(repository: str, revision: str | None, request: Request) -> Iterator[None]:
    """Turn the hub's exceptions into errors that say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            f"hf:{repository} is gated: its owner gives access on request",
            f"Ask for access on the page of {repository}, then log in: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"hf:{repository} has no revision '{revision}'",
            "Leave out @REVISION for the newest, or look up branches, tags and commits on its page",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise SourceError(
            f"hf:{repository} does not exist on Hugging Face, or is private",
            f"Check the name; log in if it is private (hf auth login); "
            f"on ModelScope it would be ms:{repository}",
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise unreachable("Hugging Face", "hf", repository, error, request) from error
    except Exception as error:
        # The hub's HTTP library differs between its versions: requests, httpx, httpx2.
        if type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise unreachable("Hugging Face", "hf", repository, error, request) from error
        if is_ours(error):
            raise
        raise SourceError(
            f"hf:{repository} cannot be fetched: {reason_of(error)}",
            "Try again; what was fetched so far is kept",
        ) from error
