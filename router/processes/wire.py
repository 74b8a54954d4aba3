"""Frames on the socket between HTTP workers and the engine.

    0        4                    4 + length
    | length | one msgpack message |      length: big-endian uint32, in bytes

Owns the framing, its size limit and the codecs. Knows nothing of what the messages mean. msgpack
by msgspec is typed and bounded, and cannot run code as pickle can.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec

from ..errors import FrameTooLargeError, MalformedFrameError
from ..messages import FromEngine, ToEngine

HEADER_BYTES = 4
# Enough for the log-probabilities of the longest prompt.
DEFAULT_MAX_FRAME_BYTES = 268_435_456
# asyncio pauses the socket at twice this much unread data. The default of 64 KiB would pause it
# many times for one image.
READ_BUFFER_BYTES = 4 * 1024 * 1024

Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: msgspec.Struct, max_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> bytes:
    """One frame with `message`, ready to be written.

    Raises FrameTooLargeError if its message has more than `max_bytes`.
    """
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    length = len(frame) - HEADER_BYTES
    _check_length(length, max_bytes)
    frame[:HEADER_BYTES] = length.to_bytes(HEADER_BYTES, "big")
    return bytes(frame)


async def read_message(
    reader: asyncio.StreamReader,
    decoder: msgspec.msgpack.Decoder[Message],
    max_bytes: int = DEFAULT_MAX_FRAME_BYTES,
) -> Message | None:
    """The next message, or None if the peer closed the connection between two frames.

    Raises FrameTooLargeError before reading a body over `max_bytes`, and MalformedFrameError for a
    body that is cut short or is not an expected message.
    """
    header = await _read_exactly(reader, HEADER_BYTES, may_end=True)
    if header is None:
        return None
    length = int.from_bytes(header, "big")
    _check_length(length, max_bytes)
    body = await _read_exactly(reader, length, may_end=False)
    try:
        return decoder.decode(body or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Only the reason: a frame's content may be a prompt and must not be logged.
        raise MalformedFrameError(f"a frame of {length} bytes is not a message: {error}") from None


async def _read_exactly(
    reader: asyncio.StreamReader, num_bytes: int, *, may_end: bool
) -> bytes | None:
    try:
        return await reader.readexactly(num_bytes)
    except asyncio.IncompleteReadError as error:
        if may_end and not error.partial:
            return None
        raise MalformedFrameError(
            f"the connection ended after {len(error.partial)} of {num_bytes} bytes"
        ) from None


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise FrameTooLargeError(
            f"a frame has {length} bytes; the limit is {max_bytes}: raise max_frame_bytes"
        )
