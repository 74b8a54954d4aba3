"""The frames between the decoder pool and its children, over a child's stdin and stdout.

    to a child    u32 max_tiles (0: the checkpoint's limit)   u64 length   the encoded file
    from a child  u32 length   u64 length   msgpack of a ReplyHead   the tiles

Owns their layout and their size limits, and what a child is started with. Knows nothing of images
or processes, nor of asyncio, which would be a third of a child's imports.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec

from ...models.batch import ImageRef, ImageTiles
from .settings import ImageSettings
from .tiling import TilingConfig

REQUEST_HEAD = struct.Struct(">IQ")
REPLY_HEAD = struct.Struct(">IQ")
MAX_REPLY_BYTES = 256 * 1024 * 1024
# Read and written at a time.
PIECE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The configuration of a child. parent_pid: the child exits with this process."""

    settings: ImageSettings
    tiling: TilingConfig
    parent_pid: int


class DecodeReply(msgspec.Struct, frozen=True):
    """Tiles, or an error text that is safe for the client.

    Both None: the child has started and is ready.
    """

    tiles: ImageTiles | None = None
    error: str | None = None


class ReplyHead(msgspec.Struct, frozen=True):
    """A reply without its tiles, which follow."""

    image: ImageRef | None = None
    error: str | None = None


def encode_reply(reply: DecodeReply) -> list[bytes]:
    """The parts of one reply frame."""
    tiles = reply.tiles
    image, data = (None, b"") if tiles is None else (tiles.ref, tiles.data)
    body = msgspec.msgpack.encode(ReplyHead(image, reply.error))
    return [REPLY_HEAD.pack(len(body), len(data)), body, data]
