"""The frames between the decoder pool and its children, over a child's stdin and stdout.

    to a child    u32 max_tiles (0: the checkpoint's limit)   u64 length   the encoded file
    from a child  u32 length   u64 length   msgpack of a ReplyHead   the tiles

Owns their layout, their size limits, and that no turn of the pool's event loop copies a whole
picture. Knows nothing of images or processes.
"""

from __future__ import annotations

import asyncio
import struct

import msgspec

from ...models.batch import ImageRef, ImageTiles

REQUEST_HEAD = struct.Struct(">IQ")
REPLY_HEAD = struct.Struct(">IQ")
MAX_REPLY_BYTES = 256 * 1024 * 1024
# Read and written at a time.
PIECE_BYTES = 65_536


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


async def read_reply(reader: asyncio.StreamReader) -> DecodeReply:
    """The next reply. Raises IncompleteReadError at the end of the stream.

    Raises ValueError or msgspec.DecodeError if it is invalid.
    """
    length, num_tile_bytes = REPLY_HEAD.unpack(await reader.readexactly(REPLY_HEAD.size))
    if length + num_tile_bytes > MAX_REPLY_BYTES:
        raise ValueError(
            f"a decoder's reply of {length + num_tile_bytes} bytes is over {MAX_REPLY_BYTES}"
        )
    head = msgspec.msgpack.decode(await _read(reader, length), type=ReplyHead)
    data = await _read(reader, num_tile_bytes)
    if head.image is None:
        return DecodeReply(error=head.error)
    if len(data) != head.image.num_bytes:
        raise ValueError(f"{len(data)} bytes of an image of {head.image.num_bytes}")
    return DecodeReply(ImageTiles.of(head.image, data))


async def write_request(writer: asyncio.StreamWriter, data: bytes, max_tiles: int | None) -> None:
    """Send one encoded file. Raises ConnectionError or RuntimeError if the child is gone."""
    writer.write(REQUEST_HEAD.pack(max_tiles or 0, len(data)))
    view = memoryview(data)
    for offset in range(0, len(data), PIECE_BYTES):
        writer.write(bytes(view[offset : offset + PIECE_BYTES]))
        await writer.drain()
        await asyncio.sleep(0)  # also if the pipe took all of it


async def _read(reader: asyncio.StreamReader, num_bytes: int) -> bytearray:
    data = bytearray()
    while len(data) < num_bytes:
        data += await reader.readexactly(min(PIECE_BYTES, num_bytes - len(data)))
        await asyncio.sleep(0)  # also if more of it is here already
    return data
