"""What a stream needs of each API's answers: its frames, its failures and its end.

Owns no shape. Knows nothing of how frames are sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from ..errors import ApiError, frame_body
from ..generation.events import Event


class StreamedAnswers:
    """The answers to one request as frames; an API overrides what differs.

    is_named: each frame has an `event:` line with its content's type. has_done: the stream ends
    with `data: [DONE]`, which OpenAI's clients wait for and Llama Stack's raise on.
    """

    __slots__ = ()

    is_named: ClassVar[bool] = False
    has_done: ClassVar[bool] = False

    def first(self) -> Sequence[Mapping[str, object]]:
        """The frames before the first event."""
        raise NotImplementedError

    def chunks(self, event: Event) -> Sequence[Mapping[str, object]]:
        """The frames that report one event."""
        raise NotImplementedError

    def failure(self, error: ApiError) -> Mapping[str, object]:
        """The last frame of a stream that failed."""
        return frame_body(error)

    async def store(self, event: Event) -> None:
        """Keep what must be kept before the frames of an event are made."""
