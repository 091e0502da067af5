"""Models on this machine: a checkpoint directory or a GGUF file."""

from pathlib import Path

from ggufkit.errors import IntegrityError, SourceError
from ggufkit.sources._request import Request, model_name
from ggufkit.values import Checkpoint

PREFIXES = ("local",)

_MAGIC = b"GGUF"


def fetch(name: str, request: Request) -> Checkpoint | Path:
    """Look at a path; nothing is copied.

    Raises:
        SourceError: it is neither a directory nor a GGUF.
        CheckpointError, IntegrityError: the checkpoint is not usable.
    """
    path = Path(name).expanduser()
    if path.is_file():
        _check_gguf(path)
        return path
    return request.checkpoint(path, model_name(str(path.resolve())), str(path.resolve()))


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == _MAGIC:
        return
    if path.suffix.lower() == ".gguf":
        raise IntegrityError(
            f"{path} is not a GGUF: it begins with {magic!r}, not {_MAGIC!r}",
            "Fetch the file again",
        )
    raise SourceError(
        f"{path} is neither a GGUF nor a checkpoint directory",
        "Name the directory that holds config.json and the safetensors files",
    )
