"""The frames between the decoder pool and its children, over a child's stdin and stdout.

    to a child    u32 max_tiles (0: the checkpoint's limit)   u64 length   the encoded file
    from a child  u32 length   msgpack of DecodeReply

Owns their layout and their size limits. Knows nothing of images or processes.
"""

from __future__ import annotations

import struct

import msgspec

from ...models.batch import ImageTiles

REQUEST_HEAD = struct.Struct(">IQ")
REPLY_HEAD = struct.Struct(">I")
MAX_REPLY_BYTES = 256 * 1024 * 1024


class DecodeReply(msgspec.Struct, frozen=True):
    """Tiles, or an error text that is safe for the client.

    Both None: the child has started and is ready.
    """

    tiles: ImageTiles | None = None
    error: str | None = None


def encode_reply(reply: DecodeReply) -> bytes:
    """One reply frame."""
    body = msgspec.msgpack.encode(reply)
    return REPLY_HEAD.pack(len(body)) + body


def decode_reply(body: bytes) -> DecodeReply:
    """The reply in a frame's body. Raises msgspec.DecodeError if it is invalid."""
    return msgspec.msgpack.decode(body, type=DecodeReply)


def reply_length(head: bytes) -> int:
    """The length of the body after this head. Raises ValueError if it is over the limit."""
    (length,) = REPLY_HEAD.unpack(head)
    if length > MAX_REPLY_BYTES:
        raise ValueError(f"a decoder's reply of {length} bytes is over {MAX_REPLY_BYTES}")
    return int(length)
