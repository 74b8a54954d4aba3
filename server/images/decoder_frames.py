"""The frames between the decoder pool and its children, over a child's stdin and stdout.

    to a child    u32 max_tiles (0: no limit of its own)   u64 length   the encoded file
    from a child  u32 length   msgpack of DecodeReply

Owns their layout and their bounds. Knows nothing of images or processes.
"""

from __future__ import annotations

import struct

import msgspec

from ...models.batch import ImageTiles

REQUEST_HEAD = struct.Struct(">IQ")
REPLY_HEAD = struct.Struct(">I")
MAX_REPLY_BYTES = 256 * 1024 * 1024


class DecodeReply(msgspec.Struct, frozen=True):
    """Tiles, or the client-safe reason why there are none.

    Both None: the child has started and waits.
    """

    tiles: ImageTiles | None = None
    error: str | None = None


def encode_reply(reply: DecodeReply) -> bytes:
    """One whole reply frame."""
    body = msgspec.msgpack.encode(reply)
    return REPLY_HEAD.pack(len(body)) + body


def decode_reply(body: bytes) -> DecodeReply:
    """The reply in a frame's body; raises msgspec.DecodeError if it is none."""
    return msgspec.msgpack.decode(body, type=DecodeReply)


def reply_length(head: bytes) -> int:
    """How long the body is that follows this head; raises ValueError beyond the bound."""
    (length,) = REPLY_HEAD.unpack(head)
    if length > MAX_REPLY_BYTES:
        raise ValueError(f"a decoder's reply of {length} bytes is over {MAX_REPLY_BYTES}")
    return int(length)
