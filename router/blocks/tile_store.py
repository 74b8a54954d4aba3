"""The tiles of images that no step has encoded yet, and which workers were asked for them.

Owns each image's tiles from their arrival to the step that encodes it: once, however many answers
wait for it. Knows nothing of sockets, of queues or of steps.

A request comes without its tiles. Those that the pool does not have are asked from the worker whose
answer wants them first; others wait for the same reply. If that request ends before, the next one's
worker is asked. An encoded image is forgotten here: who needs it after its eviction asks again.

If host memory has an image that was encoded before (`Host`), it is read and no worker is asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ...models.batch import ImageRef, ImageTiles
from ..errors import MalformedFrameError
from ..messages import AddRequest, ImagePiece, NeedImage
from .image_pool import ImageKey, ImagePool


class Wanting(Protocol):
    """An answer that needs images: `scheduler/sequence.py`.

    lacking: its images that are neither encoded nor here. The store changes it.
    """

    worker_id: int
    request: AddRequest
    image_keys: list[ImageKey]
    lacking: set[ImageKey]


W = TypeVar("W", bound=Wanting)
# Sends a question to a worker.
Ask = Callable[[int, NeedImage], None]


class Host(Protocol):
    """Encoded images in host memory: `engine/host_images.py`."""

    def start_read(self, key: ImageKey) -> bool:
        """Read an image if it is there; `take_stored` gets it. False: it is not there."""
        ...

    def keep_as(self, key: ImageKey) -> str:
        """The name under which to keep an image that is encoded now; empty if not at all."""
        ...


def ask_nobody(worker_id: int, question: NeedImage) -> None:
    """An `Ask` for callers in this process, whose requests come with their tiles."""


@dataclass(slots=True)
class _Coming:
    """An image that a worker was asked for, and the part of it that has arrived."""

    key: ImageKey
    image: ImageRef
    worker_id: int
    request_id: str
    data: bytearray = field(default_factory=bytearray)


class TileStore(Generic[W]):
    """The tiles that answers wait for. pool: what is encoded."""

    def __init__(self, pool: ImagePool, ask: Ask = ask_nobody) -> None:
        self._pool = pool
        self._ask = ask
        self._numbers = itertools.count()
        self._wanting: dict[ImageKey, dict[W, None]] = {}
        self._tiles: dict[ImageKey, ImageTiles] = {}
        self._coming: dict[int, _Coming] = {}
        self._questions: dict[ImageKey, int] = {}
        self.host: Host | None = None
        self._reading: set[ImageKey] = set()
        self._stored: dict[ImageKey, memoryview] = {}

    @property
    def num_bytes(self) -> int:
        """The bytes of tiles that are here."""
        whole = sum(image.num_bytes for image in self._tiles.values())
        whole += sum(map(len, self._stored.values()))
        return whole + sum(len(coming.data) for coming in self._coming.values())

    @property
    def num_images(self) -> int:
        """How many images are here or on their way."""
        return len(self._wanting)

    def want(self, sequence: W) -> bool:
        """Keep what is not encoded of the images of `sequence` until it is, or until `leave`.

        Asks for what is not here. Returns True if tiles are lacking, so that it cannot run yet.
        """
        for key, image in zip(sequence.image_keys, sequence.request.images, strict=True):
            if self._pool.has_encoded(key):
                continue
            self._wanting.setdefault(key, {})[sequence] = None
            if key in self._tiles or key in self._stored:
                continue
            if isinstance(image, ImageTiles):  # of a caller in this process
                self._tiles[key] = image
                continue
            sequence.lacking.add(key)
            if key not in self._questions and key not in self._reading:
                self._find(key, sequence)
        return bool(sequence.lacking)

    def take(self, key: ImageKey) -> ImageTiles:
        """The tiles of an image that a running answer wants."""
        return self._tiles[key]

    def stored(self, key: ImageKey) -> memoryview | None:
        """The blocks' bytes of an image that was encoded before; None without them."""
        return self._stored.get(key)

    def keep_as(self, key: ImageKey) -> str:
        """See `Host.keep_as`."""
        return "" if self.host is None else self.host.keep_as(key)

    def take_stored(self, key: ImageKey, data: memoryview | None) -> list[W]:
        """What host memory has of an image; None: it must be encoded. Returns as `receive`."""
        self._reading.discard(key)
        if not (wanting := self._wanting.get(key)):
            return []
        if data is None:
            self._ask_for(key, next(iter(wanting)))
            return []
        self._stored[key] = data
        return self._complete(key)

    def receive(self, worker_id: int, piece: ImagePiece) -> list[W]:
        """Add the next bytes of an image. Returns the answers that lack nothing any more.

        Ignores a piece for which no answer waits now. Raises MalformedFrameError.
        """
        coming = self._coming.get(piece.question)
        if coming is None or coming.worker_id != worker_id:
            return []
        num_here, num_bytes = len(coming.data), coming.image.num_bytes
        if piece.offset != num_here or num_here + len(piece.data) > num_bytes:
            raise MalformedFrameError(
                f"{len(piece.data)} bytes at {piece.offset} of an image of {num_bytes}, of which "
                f"{num_here} are here"
            )
        coming.data += piece.data
        if len(coming.data) < num_bytes:
            return []
        self._forget_question(coming.key)
        self._tiles[coming.key] = ImageTiles.of(coming.image, coming.data)
        return self._complete(coming.key)

    def _complete(self, key: ImageKey) -> list[W]:
        lacking = [one for one in self._wanting[key] if key in one.lacking]
        for sequence in lacking:
            sequence.lacking.remove(key)
        return [sequence for sequence in lacking if not sequence.lacking]

    def forget_encoded(self, key: ImageKey) -> None:
        """A step has encoded this image, if the pool still knows it."""
        if self._pool.has_encoded(key):
            self._tiles.pop(key, None)
            self._stored.pop(key, None)
            self._wanting.pop(key, None)

    def leave(self, sequence: W) -> None:
        """This answer has ended. What it alone wanted is forgotten."""
        sequence.lacking.clear()
        for key in set(sequence.image_keys):
            wanting = self._wanting.get(key, {})
            if sequence not in wanting:
                continue
            del wanting[sequence]
            if not wanting:
                del self._wanting[key]
                self._tiles.pop(key, None)
                self._stored.pop(key, None)
                self._forget_question(key)
            elif not self._will_come(key, wanting):
                self._forget_question(key)
                self._ask_for(key, next(iter(wanting)))

    def _will_come(self, key: ImageKey, wanting: Iterable[W]) -> bool:
        """True if the image is here, or was asked of a request that is still open."""
        if key not in self._questions:
            return True
        coming = self._coming[self._questions[key]]
        asked = coming.worker_id, coming.request_id
        return any((one.worker_id, one.request.request_id) == asked for one in wanting)

    def _find(self, key: ImageKey, sequence: W) -> None:
        if self.host is not None and self.host.start_read(key):
            self._reading.add(key)
        else:
            self._ask_for(key, sequence)

    def _ask_for(self, key: ImageKey, sequence: W) -> None:
        image = sequence.request.images[sequence.image_keys.index(key)]
        worker_id, request_id = sequence.worker_id, sequence.request.request_id
        question = next(self._numbers)
        self._questions[key] = question
        self._coming[question] = _Coming(key, image, worker_id, request_id)
        self._ask(
            worker_id,
            NeedImage(question=question, request_id=request_id, content_hash=key.content_hash),
        )

    def _forget_question(self, key: ImageKey) -> None:
        question = self._questions.pop(key, None)
        if question is not None:
            del self._coming[question]
