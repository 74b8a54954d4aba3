"""What an engine has sent for one call of `generate` and its caller has not read.

Owns these outputs, and which of the call's choices are open. Knows nothing of the connection.
"""

from __future__ import annotations

import asyncio

from ..errors import EngineDeadError, EngineError
from ..messages import SequenceOutput


class RequestStream:
    """The outputs of one `generate` call that its caller has not read yet.

    open_ids: the choices without a final message. is_sent: the engine may know of them.
    has_started: it has reported that at least one choice started. Unread outputs of a choice are
    joined, so a slow caller costs only the memory of its token ids.
    """

    def __init__(self, choice_ids: list[str]) -> None:
        self._arrived = asyncio.Event()
        self._outputs: dict[str, SequenceOutput] = {}
        self._error: EngineError | None = None
        self.open_ids = dict.fromkeys(choice_ids)
        self.is_sent = False
        self.has_started = False

    def deliver(self, output: SequenceOutput) -> None:
        waiting = self._outputs.setdefault(output.request_id, output)
        if waiting is not output:
            # Fields that only the first output has stay as they are.
            waiting.token_ids += output.token_ids
            waiting.logprobs += output.logprobs
            waiting.finish_reason = output.finish_reason
            waiting.stop_token_id = output.stop_token_id
        if output.finish_reason is not None:
            self.open_ids.pop(output.request_id, None)
        self._arrived.set()

    def fail(self, request_id: str, error: EngineError) -> None:
        if isinstance(error, EngineDeadError):
            error.has_started = self.has_started
        self._error = self._error or error
        self.open_ids.pop(request_id, None)
        self._arrived.set()

    def leave(self, request_id: str) -> None:
        """Discard this choice."""
        self._outputs.pop(request_id, None)
        self.open_ids.pop(request_id, None)

    async def next(self) -> SequenceOutput:
        """The oldest unread output; raises an error only after all outputs."""
        while not self._outputs:
            if self._error is not None:
                try:
                    raise self._error
                finally:
                    # A kept error refers to its frames and they to this object: a cycle, which
                    # would keep the whole request alive until a full garbage collection.
                    self._error = None
            self._arrived.clear()
            await self._arrived.wait()
        return self._outputs.pop(next(iter(self._outputs)))
