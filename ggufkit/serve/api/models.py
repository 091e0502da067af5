"""The models that are served: loaded when asked for, as many at once as memory holds."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ggufkit.errors import GgufkitError
from ggufkit.serve.api.errors import ApiError, as_api_error
from ggufkit.serve.hosting import Hosted

_GIB = 1 << 30


@dataclass(frozen=True)
class Offer:
    """A model that can be asked for.

    Attributes:
        name: what clients call it.
        nbytes: memory that it takes when loaded, roughly.
        load: loads it; may take long.
        created: when its file was written, in seconds since 1970.
    """

    name: str
    nbytes: int
    load: Callable[[], Hosted]
    created: int = 0


class _Entry:
    """An offer, who is using it, and whether it is loaded."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.hosted: Hosted | None = None
        self.loading: asyncio.Task[Hosted] | None = None
        self.users = 0
        self.used = 0.0


class Models:
    """All models that are offered. To be used from one event loop.

    Args:
        offers: the models; the first is what a client gets that names none, if it
            is the only one.
        limit_nbytes: memory that loaded models may take together; None for no
            limit. A model that is larger by itself is loaded alone.
        wait_seconds: how long a request waits for others to free memory.
    """

    def __init__(
        self,
        offers: Sequence[Offer],
        *,
        limit_nbytes: int | None = None,
        wait_seconds: float = 60.0,
    ) -> None:
        self._entries = {offer.name: _Entry(offer) for offer in offers}
        self._limit = limit_nbytes
        self._wait = wait_seconds
        self._freed = asyncio.Event()
        self._one_load = asyncio.Lock()
        self._closing = False

    @property
    def offers(self) -> list[Offer]:
        """All models."""
        return [entry.offer for entry in self._entries.values()]

    @property
    def loaded(self) -> list[Hosted]:
        """Those in memory."""
        return [entry.hosted for entry in self._entries.values() if entry.hosted]

    @property
    def closing(self) -> bool:
        """Whether nothing new is taken."""
        return self._closing

    def find(self, name: str | None) -> Offer:
        """The model that is meant.

        Raises:
            ApiError: if there is none.
        """
        return self._find(name).offer

    def _find(self, name: str | None) -> _Entry:
        if name is None and len(self._entries) == 1:
            return next(iter(self._entries.values()))
        if name is None:
            raise ApiError(400, "there are several models; name one", param="model")
        if name not in self._entries:
            known = ", ".join(self._entries)
            message = f"there is no model '{name[:100]}'; there are: {known}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return self._entries[name]

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Hosted]:
        """Have a model; it stays in memory meanwhile.

        Raises:
            ApiError: if there is none of this name, or it cannot be had.
        """
        entry = self._find(name)
        if self._closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        entry.users += 1
        try:
            yield await self._ready(entry)
        finally:
            entry.users -= 1
            entry.used = time.monotonic()
            self._freed.set()

    async def _ready(self, entry: _Entry) -> Hosted:
        if entry.hosted is not None and entry.hosted.engine.healthy:
            return entry.hosted
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load(entry))
        # Who goes away does not end the loading that others wait for.
        return await asyncio.shield(entry.loading)

    async def _load(self, entry: _Entry) -> Hosted:
        try:
            async with self._one_load:
                if entry.hosted is not None:  # its engine has failed
                    await self._unload(entry)
                await self._make_room(entry.offer)
                entry.hosted = await asyncio.to_thread(entry.offer.load)
                return entry.hosted
        except ApiError:
            raise
        except GgufkitError as error:
            told = as_api_error(error)
            message = f"the model '{entry.offer.name}' cannot be loaded: {told.message}"
            raise ApiError(500, message, code="model_not_loaded") from error
        finally:
            entry.loading = None

    async def _make_room(self, offer: Offer) -> None:
        if self._limit is None:
            return
        try:
            async with asyncio.timeout(self._wait):
                while loaded := [e for e in self._entries.values() if e.hosted]:
                    if sum(e.offer.nbytes for e in loaded) + offer.nbytes <= self._limit:
                        return
                    idle = [e for e in loaded if e.users == 0]
                    self._freed.clear()
                    if idle:
                        await self._unload(min(idle, key=lambda e: e.used))
                    else:
                        await self._freed.wait()
        except TimeoutError:
            message = (
                f"the model '{offer.name}' takes {offer.nbytes / _GIB:.1f} GiB, and others that "
                "are in use leave no room for it"
            )
            raise ApiError(503, message, code="no_memory", retry_seconds=10) from None

    async def _unload(self, entry: _Entry) -> None:
        hosted, entry.hosted = entry.hosted, None
        assert hosted is not None
        await asyncio.to_thread(hosted.close)

    def refuse(self) -> None:
        """Take nothing new from now on."""
        self._closing = True

    async def close(self) -> None:
        """Cancel what is left, and free all memory."""
        self._closing = True
        loading = [e.loading for e in self._entries.values() if e.loading]
        await asyncio.gather(*loading, return_exceptions=True)
        for entry in self._entries.values():
            if entry.hosted is not None:
                await self._unload(entry)
