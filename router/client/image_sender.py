"""Sends an engine the tiles that it asks for, in pieces; requests and aborts pass between them.

Owns which images the open requests on one connection have, and what was asked for. An image that
several requests share is here once. Knows nothing of what the engine has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from ...models.batch import ImageTiles
from ..errors import EngineDeadError
from ..messages import AddRequest, ImagePiece, NeedImage

# One turn of the event loop copies a few times as much at most: some 0.2 ms. Smaller pieces need
# more turns, and in the engine each may have to wait for Python's lock while a step runs.
PIECE_BYTES = 262_144


class ImageSender:
    """Answers the questions of one engine in their order, until `stop`.

    send: sends a piece when the engine has read most of what was sent before; raises
    EngineDeadError if the connection is lost.
    """

    def __init__(self, send: Callable[[ImagePiece], Awaitable[None]]) -> None:
        self._send = send
        self._images: dict[str, dict[bytes, ImageTiles]] = {}
        self._questions: deque[NeedImage] = deque()
        self._task: asyncio.Task[None] | None = None

    def open(self, requests: Sequence[AddRequest]) -> None:
        """Keep the images of these requests, which the engine may ask for until `close`."""
        for request in requests:
            tiles = [image for image in request.images if isinstance(image, ImageTiles)]
            if tiles:
                self._images[request.request_id] = {one.content_hash: one for one in tiles}

    def close(self, requests: Sequence[AddRequest]) -> None:
        """These requests have ended: nothing more of their images is sent."""
        for request in requests:
            self._images.pop(request.request_id, None)

    def answer(self, question: NeedImage) -> None:
        """Send this image after those that were asked for before."""
        self._questions.append(question)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="image-sender")

    def stop(self) -> None:
        """Send nothing more: the connection is closed."""
        self._questions.clear()
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        with contextlib.suppress(EngineDeadError):
            while self._questions:
                await self._send_image(self._questions.popleft())
        self._task = None

    async def _send_image(self, question: NeedImage) -> None:
        offset = 0
        while (image := self._find(question)) is not None and offset < len(image.data):
            data = bytes(memoryview(image.data)[offset : offset + PIECE_BYTES])
            await self._send(ImagePiece(question=question.question, offset=offset, data=data))
            offset += len(data)
            # The loop has other work, and the engine may have read everything already.
            await asyncio.sleep(0)

    def _find(self, question: NeedImage) -> ImageTiles | None:
        """The image; None if its request has ended."""
        return self._images.get(question.request_id, {}).get(question.content_hash)
