"""Models of ModelScope: ``ms:ORG/NAME[@REVISION]``."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path

from ggufkit.errors import SourceError
from ggufkit.foreign import is_ours, reason_of
from ggufkit.sources._hub import Listing, fetch_repository, split_revision, unreachable
from ggufkit.sources._request import Request
from ggufkit.values import Checkpoint

PREFIXES = ("ms", "modelscope")

DEFAULT_REVISION = "master"


def fetch(name: str, request: Request) -> Checkpoint:
    """Fetch the files that conversion needs, at one state of a revision.

    ModelScope tells the digest of each file of a branch or tag; what is
    recorded is the revision's name and a digest over these.

    Raises:
        SourceError: no such repository or revision, no access, or no network.
        CheckpointError: the repository is not a usable checkpoint.
    """
    import modelscope

    repository, asked = split_revision(name, request.revision)
    revision, _, pin = (asked or DEFAULT_REVISION).partition("+")
    with _translated(repository, revision, request):
        listing = _list_files(repository, revision)
    if pin and pin != listing.revision:
        raise SourceError(
            f"ms:{repository}@{revision} is now at {listing.revision}, no longer at {pin}",
            f"Take what is there now: ms:{repository}@{revision}",
        )

    def download(patterns: list[str], directory: Path) -> None:
        with _translated(repository, revision, request), _no_bars():
            modelscope.snapshot_download(
                repository, revision=revision, local_dir=str(directory), allow_patterns=patterns
            )

    return fetch_repository(
        "ms",
        repository,
        f"{revision}+{listing.revision}",
        request,
        list_files=lambda: listing,
        download=download,
        tool={"modelscope": modelscope.__version__},
    )


def _list_files(repository: str, revision: str) -> Listing:
    from modelscope_hub import HubApi

    files = HubApi().list_repo_files(repository, "model", revision=revision, recursive=True)
    blobs = [file for file in files if not file.is_dir]
    spelled = sorted(f"{file.path}\0{file.sha256}\0{file.size}\n" for file in blobs)
    digest = hashlib.sha256("".join(spelled).encode()).hexdigest()[:16]
    return Listing(digest, {file.path: file.size for file in blobs})


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep modelscope from drawing bars of its own; it offers no switch for them."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    draw = tqdm.__init__
    tqdm.__init__ = partialmethod(draw, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = draw


@contextmanager
def _translated(repository: str, revision: str, request: Request) -> Iterator[None]:
    """Turn the hub's exceptions into errors that say what to do."""
    from modelscope_hub import errors

    try:
        yield
    except errors.NotExistError as error:
        raise SourceError(
            f"ms:{repository} has no revision '{revision}' on ModelScope, or does not exist",
            f"Check the name and the revision; on Hugging Face it would be hf:{repository}",
        ) from error
    except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
        raise SourceError(
            f"ms:{repository} is not open to everybody",
            "Ask for access on its page, then log in: modelscope login --token TOKEN",
        ) from error
    except (errors.HubError, OSError) as error:
        raise unreachable("ModelScope", "ms", repository, error, request) from error
    except Exception as error:
        if is_ours(error):
            raise
        raise SourceError(
            f"ms:{repository} cannot be fetched: {reason_of(error)}",
            "Try again; what was fetched so far is kept",
        ) from error
