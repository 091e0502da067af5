"""What every source is told besides the model's name."""

import re
from dataclasses import dataclass
from pathlib import Path

from ggufkit.checkpoint import digest_checkpoint, open_checkpoint
from ggufkit.progress import Progress
from ggufkit.store import Store
from ggufkit.values import Checkpoint


@dataclass(frozen=True)
class Request:
    """How to fetch.

    Attributes:
        store: the models directory.
        hub: hub of a bare ``ORG/NAME``.
        revision: branch, tag or commit, if one was asked for.
        trust_remote_code: accept a checkpoint that brings Python code.
        allow_pickle: accept pickled weights if there are no others.
        progress: who to tell.
    """

    store: Store
    hub: str
    revision: str | None
    trust_remote_code: bool
    allow_pickle: bool
    progress: Progress

    def checkpoint(
        self, path: Path, name: str, origin: str, notes: tuple[str, ...] = ()
    ) -> Checkpoint:
        """Check a directory and make the value that stands for it."""
        open_checkpoint(
            path, trust_remote_code=self.trust_remote_code, allow_pickle=self.allow_pickle
        )
        digest = digest_checkpoint(path, lambda p: self.store.digest(p, self.progress).sha256)
        return Checkpoint(path, name, origin, digest, notes)


def model_name(text: str) -> str:
    """A name for files and directories, out of a path's or repository's last component."""
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return re.sub(r"[^\w.+-]+", "-", last).strip(".-") or "model"
