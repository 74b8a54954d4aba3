"""A worker's calls about adapters on one connection: load and unload, each with one answer.

Owns the calls without an answer. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

from ...models.batch import AdapterInfo, AdapterRef
from ..errors import AdapterUnusableError, EngineDeadError
from ..messages import (
    AdapterAnswer,
    AdapterFailed,
    AdapterReady,
    LoadAdapter,
    UnloadAdapter,
)


class AdapterCalls:
    """send: sends a message to the engine. Raises EngineDeadError."""

    def __init__(self, send: Callable[[LoadAdapter | UnloadAdapter], Awaitable[None]]) -> None:
        self._send = send
        self._open: dict[str, asyncio.Future[AdapterAnswer]] = {}

    async def load(self, adapter: AdapterRef) -> AdapterInfo:
        """Have the engine read an adapter. Raises AdapterUnusableError or EngineDeadError."""
        answer = await self._call(LoadAdapter(call_id=uuid.uuid4().hex, adapter=adapter))
        if isinstance(answer, AdapterFailed):
            raise AdapterUnusableError(answer.message)
        assert isinstance(answer, AdapterReady), "the engine answered another call"
        return answer.info

    async def unload(self, digest: str) -> None:
        """Return when the engine has no open request with this adapter and has forgotten it.

        Raises EngineDeadError.
        """
        await self._call(UnloadAdapter(call_id=uuid.uuid4().hex, digest=digest))

    def receive(self, answer: AdapterAnswer) -> None:
        """The engine's answer to a call. Ignored if the caller is gone."""
        call = self._open.get(answer.call_id)
        if call is not None and not call.done():
            call.set_result(answer)

    def fail(self, reason: str) -> None:
        """The connection is lost: all calls fail."""
        for call in self._open.values():
            if not call.done():
                call.set_exception(EngineDeadError(reason))

    async def _call(self, message: LoadAdapter | UnloadAdapter) -> AdapterAnswer:
        call: asyncio.Future[AdapterAnswer] = asyncio.get_running_loop().create_future()
        self._open[message.call_id] = call
        try:
            await self._send(message)
            return await call
        finally:
            del self._open[message.call_id]
