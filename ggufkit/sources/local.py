"""Models on this machine: a checkpoint directory or a GGUF file."""

from pathlib import Path

from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.sources._request import Request, model_name
from ggufkit.values import Checkpoint

PREFIXES = ("local",)


def fetch(name: str, request: Request) -> Checkpoint | Path:
    """Look at a path; nothing is copied.

    Raises:
        SourceError: it is neither a directory nor a GGUF.
        CheckpointError, IntegrityError: the checkpoint is not usable.
    """
    path = Path(name).expanduser()
    if path.is_file():
        read_gguf(path, arrays=False)
        return path
    return request.checkpoint(path, model_name(str(path.resolve())), str(path.resolve()))
