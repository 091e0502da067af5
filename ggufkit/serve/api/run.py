"""Serving models from the first to the last minute."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ggufkit.errors import GgufkitError, UsageError
from ggufkit.llamacpp import host as machine
from ggufkit.llamacpp.gguf import read_gguf
from ggufkit.llamacpp.metadata import Metadata, split_parts
from ggufkit.progress import SILENT, Progress
from ggufkit.serve.api.answering import Service
from ggufkit.serve.api.app import create_app
from ggufkit.serve.api.errors import ApiError
from ggufkit.serve.api.models import Models, Offer
from ggufkit.serve.api.options import ServeOptions
from ggufkit.serve.api.server import Server, listen, silence_logs
from ggufkit.serve.hosting import Hosted, HostOptions, load, needed_nbytes

_SHARE = 0.8
"""Of this machine's memory that several models may take together."""
_GIB = 1 << 30


def run(
    models: Mapping[str, Path],
    options: ServeOptions | None = None,
    *,
    progress: Progress = SILENT,
    on_start: Callable[[str, Hosted], None] = lambda address, first: None,
) -> None:
    """Serve models until told to end; see :func:`ggufkit.pipeline.serve`.

    Args:
        models: GGUFs by the name that clients call them; the first is loaded at once.
        options: how.
        progress: told what is going on.
        on_start: called with the address and the first model when it listens.

    Raises:
        UsageError: if the address cannot be listened on, or options clash.
        GgufkitError: if the first model cannot be loaded.
    """
    options = options or ServeOptions()
    if not all(options.keys):
        raise UsageError("an API key is empty")
    if options.ui:
        _check_page()
    if len(models) > 1 and options.hosting.model.adapters:
        raise UsageError(
            "LoRA adapters fit one model, and several are served", "Serve that model alone"
        )
    offers = [_offer(name, path, options.hosting, progress) for name, path in models.items()]
    limit = _memory_limit(offers, options.memory_nbytes)
    with listen(options.host, options.port) as sock:
        if not options.keys and not _is_local(options.host):
            progress.warn(
                f"everybody who reaches {options.host} can use the models; "
                "to ask for a key: --api-key KEY"
            )
        asyncio.run(_serve(offers, limit, options, sock, on_start))


def _check_page() -> None:
    """Look for what the page needs before models are loaded."""
    try:
        import ggufkit.serve.ui.mounting  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"for the web page, the package '{error.name}' is needed",
            "pip install 'ggufkit[ui]'",
        ) from error


def _offer(name: str, path: Path, hosting: HostOptions, progress: Progress) -> Offer:
    metadata = Metadata(read_gguf(path))
    nbytes = sum(part.stat().st_size for part in split_parts(metadata.gguf) if part.exists())
    return Offer(
        name=name,
        nbytes=needed_nbytes(metadata, nbytes, hosting),
        load=partial(_load, name, path, hosting, progress),
        created=int(path.stat().st_mtime),
    )


def _load(name: str, path: Path, hosting: HostOptions, progress: Progress) -> Hosted:
    progress.say(f"loading {name}: {path}")
    return load(name, path, hosting, progress)


def _memory_limit(offers: list[Offer], asked: int | None) -> int | None:
    if asked is not None:
        for offer in offers:
            if offer.nbytes > asked:
                raise UsageError(
                    f"the model '{offer.name}' takes {offer.nbytes / _GIB:.1f} GiB, "
                    f"and {asked / _GIB:.1f} GiB are allowed",
                    "Allow more with --memory, or less context with -c",
                )
        return asked
    total = machine.total_memory_nbytes()
    return int(total * _SHARE) if total and len(offers) > 1 else None


async def _serve(
    offers: list[Offer],
    limit: int | None,
    options: ServeOptions,
    sock: socket.socket,
    on_start: Callable[[str, Hosted], None],
) -> None:
    service = Service(Models(offers, limit_nbytes=limit), options.limits)
    try:
        async with service.models.use(offers[0].name) as first:
            pass
    except ApiError as error:
        # Who types commands is told what is wrong itself.
        raise error.__cause__ if isinstance(error.__cause__, GgufkitError) else error from None
    silence_logs()
    app = create_app(
        service,
        keys=options.keys,
        origins=options.origins,
        own_names=not options.keys and _is_local(options.host),
        ui=options.ui,
    )
    started = partial(on_start, _address(sock), first)
    await Server(app, service, started).serve([sock])


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
