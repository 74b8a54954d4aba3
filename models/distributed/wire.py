"""Frames between the first rank and another: steps to it, one RankReady back.

msgpack of plain types over a socket pair of a process and its child, so all input is trusted.

    4 bytes  length, big endian      then msgpack: RankSettings, a RankStep, or RankReady
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from ..batch import AdapterRef, StepBatch
from ..settings.runner_config import RunnerConfig

_LENGTH_BYTES = 4


class RankSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The first message to a rank's process; see `create_runner`."""

    rank: int
    size: int
    meeting_place: str
    model: str
    config: RunnerConfig


class RankReady(msgspec.Struct, frozen=True):
    """A rank has loaded its share; else `error` is one line with the reason."""

    error: str | None = None


class RankStep(msgspec.Struct, frozen=True):
    """A step, and the adapters that a rank reads and forgets before it."""

    batch: StepBatch
    read: Sequence[AdapterRef] = ()
    forgotten: Sequence[str] = ()


settings_decoder = msgspec.msgpack.Decoder(RankSettings)
step_decoder = msgspec.msgpack.Decoder(RankStep)
ready_decoder = msgspec.msgpack.Decoder(RankReady)
# A view of a sequence's blocks is sent as a list.
_encoder = msgspec.msgpack.Encoder(enc_hook=list)


def frame_of(message: RankSettings | RankStep | RankReady) -> bytes:
    """The message after its length; a step is sent without its grammars.

    Only the first rank needs the grammars, since the scheduler uses only its tokens.
    """
    if isinstance(message, RankStep) and any(s.matcher for s in message.batch.sequences):
        sequences = [replace(s, matcher=None) for s in message.batch.sequences]
        batch = replace(message.batch, sequences=sequences)
        message = msgspec.structs.replace(message, batch=batch)
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def receive(connection: socket.socket) -> bytes | None:
    """The next frame's body; None if the other side has closed the socket."""
    length = _receive_exactly(connection, _LENGTH_BYTES)
    return None if length is None else _receive_exactly(connection, int.from_bytes(length, "big"))


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    buffer = bytearray(count)
    view, filled = memoryview(buffer), 0
    while filled < count:
        try:
            received = connection.recv_into(view[filled:])
        except OSError:
            return None
        if received == 0:
            return None
        filled += received
    return bytes(buffer)
