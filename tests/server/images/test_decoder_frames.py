"""A decoder's frames: what a child that an image has taken over may write."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import msgspec
import pytest
from support.fake_runner import fake_image

from vlmserve.models.batch import ImageTiles
from vlmserve.server.images.decoder_frames import (
    MAX_REPLY_BYTES,
    REPLY_HEAD,
    DecodeReply,
    ReplyHead,
    encode_reply,
)
from vlmserve.server.images.decoders import read_reply


def read(frame: bytes) -> DecodeReply:
    async def run() -> DecodeReply:
        reader = asyncio.StreamReader()
        reader.feed_data(frame)
        reader.feed_eof()
        return await read_reply(reader)

    return asyncio.run(run())


@pytest.mark.parametrize(
    "reply", [DecodeReply(), DecodeReply(error="no"), DecodeReply(fake_image("p", 3))]
)
def test_a_reply_comes_out_as_it_went_in(reply: DecodeReply) -> None:
    assert read(b"".join(encode_reply(reply))) == reply


@pytest.mark.parametrize("num_bytes", [0, 11, 13])
def test_tiles_of_another_length_than_they_claim_are_refused(num_bytes: int) -> None:
    """The engine would end the connection of the whole worker for it."""
    image = fake_image("p", 1)  # of 12 bytes
    reply = DecodeReply(ImageTiles.of(image.ref, bytes(num_bytes)))
    with pytest.raises(ValueError, match=f"{num_bytes} bytes of an image of 12"):
        read(b"".join(encode_reply(reply)))


def test_a_reply_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="is over"):
        read(REPLY_HEAD.pack(10, MAX_REPLY_BYTES))


def test_a_reply_that_is_cut_or_nonsense_is_refused() -> None:
    frame = b"".join(encode_reply(DecodeReply(fake_image("p", 3))))
    with pytest.raises(asyncio.IncompleteReadError):
        read(frame[:-1])
    body = msgspec.msgpack.encode(ReplyHead(error="no"))[:-1] + b"\xc1"
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        read(REPLY_HEAD.pack(len(body), 0) + body)


def test_a_child_imports_neither_asyncio_nor_numpy():
    """Each would be a third of its start, and two children start with each server."""
    code = (
        "import sys, vlmserve.server.images.decoder_child\n"
        "print({'asyncio', 'numpy', 'importlib.metadata'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
