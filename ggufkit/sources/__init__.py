"""Where models come from: one module per origin, found by its name.

A module of this package whose name has no leading underscore is a source. It
has ``PREFIXES``, the words before the colon that it answers to, and
``fetch(name, request)``, which gives a :class:`~ggufkit.values.Checkpoint` or
the path of a GGUF. A new source is one new file; nothing else names it.
"""

import pkgutil
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ggufkit import settings
from ggufkit.errors import SourceError, UsageError
from ggufkit.progress import SILENT, Progress
from ggufkit.sources._request import Request
from ggufkit.store import Store
from ggufkit.values import Checkpoint

_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?")
_PREFIX = re.compile(r"([a-z]{2,}):(.*)", re.DOTALL)


def resolve(
    model: str,
    *,
    models_dir: Path,
    hub: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> Checkpoint | Path:
    """Find a model by what the user calls it, and fetch it if it is not here.

    Args:
        model: a checkpoint directory, a GGUF file, ``hf:ORG/NAME[@REV]``,
            ``ms:ORG/NAME[@REV]``, a bare ``ORG/NAME``, or ``demo``. What
            exists on disk wins over a bare ``ORG/NAME``.
        models_dir: root of the store that downloads land in.
        hub: hub of a bare ``ORG/NAME`` (default: the environment's setting).
        revision: branch, tag or commit; ``@REV`` in ``model`` says the same.
        trust_remote_code: accept a checkpoint that brings Python code.
        allow_pickle: accept pickled weights if there are no others.
        progress: who to tell.

    Returns:
        A checked checkpoint, or the path of a GGUF file.

    Raises:
        UsageError: there is no such hub, or the name is malformed.
        SourceError: nothing there goes by that name, or it cannot be fetched.
        CheckpointError: what is there is incomplete or of a refused kind.
        IntegrityError: a file is truncated or malformed.
    """
    if hub and hub not in settings.HUBS:
        raise UsageError(f"'{hub}' is not a hub", f"Use one of: {', '.join(settings.HUBS)}")
    if not model:
        raise UsageError("The model's name is empty", "Name one, for example: demo")
    request = Request(
        Store(models_dir),
        hub or settings.hub(),
        revision,
        trust_remote_code,
        allow_pickle,
        progress,
    )
    source, name = _find_source(model, request.hub)
    result: Checkpoint | Path = source.fetch(name, request)
    return result


def sources() -> dict[str, ModuleType]:
    """All sources by prefix.

    Raises:
        ImportError: a source cannot be imported; a broken one is never passed over.
    """
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name.startswith("_"):
            continue
        module = import_module(f"{__name__}.{info.name}")
        for prefix in module.PREFIXES:
            if prefix in found:
                raise ImportError(
                    f"{module.__name__} and {found[prefix].__name__}: both '{prefix}'"
                )
            found[prefix] = module
    return found


def _find_source(model: str, hub: str) -> tuple[ModuleType, str]:
    known = sources()
    match = _PREFIX.fullmatch(model)
    if match and match[1] in known:
        return known[match[1]], match[2]
    if model in known and not getattr(known[model], "NEEDS_NAME", True):
        return known[model], ""
    path = Path(model).expanduser()
    if not path.exists():
        if _REPOSITORY.fullmatch(model):
            return known[hub], model
        if match:
            raise SourceError(
                f"'{model}' begins with '{match[1]}:', which is no source",
                f"Known are: {', '.join(f'{p}:' for p in sorted(known))}",
            )
        raise SourceError(
            f"There is no {model}",
            "Name a checkpoint directory, a GGUF file, hf:ORG/NAME, ms:ORG/NAME, or demo",
        )
    return known["local"], str(path)
