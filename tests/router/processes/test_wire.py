"""Frames on the engine's socket: what goes in comes out, and nothing else does."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wire_messages import FROM_ENGINE, TO_ENGINE

from vlmserve.models.batch import ImageSpan
from vlmserve.router.errors import FrameTooLargeError, MalformedFrameError
from vlmserve.router.messages import (
    AbortRequests,
    AddRequest,
)
from vlmserve.router.processes import wire


def read_all(data: bytes, decoder=wire.to_engine_decoder, max_bytes: int = 1000) -> list:
    async def read() -> list:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        messages = []
        while (message := await wire.read_message(reader, decoder, max_bytes)) is not None:
            messages.append(message)
        return messages

    return asyncio.run(read())


def test_every_message_comes_out_as_it_went_in():
    frames = b"".join(wire.encode_frame(message) for message in TO_ENGINE)
    assert read_all(frames) == TO_ENGINE
    frames = b"".join(wire.encode_frame(message) for message in FROM_ENGINE)
    assert read_all(frames, wire.from_engine_decoder) == FROM_ENGINE


def test_a_frame_over_the_limit_is_refused_before_its_body_is_read():
    with pytest.raises(FrameTooLargeError, match="4294967295 bytes; the limit is 1000"):
        read_all(b"\xff\xff\xff\xff")
    with pytest.raises(FrameTooLargeError):
        wire.encode_frame(AbortRequests(["a" * 100]), max_bytes=50)


def test_a_frame_at_the_limit_passes():
    frame = wire.encode_frame(AbortRequests(["a"]))
    limit = len(frame) - wire.HEADER_BYTES
    assert read_all(frame, max_bytes=limit) == [AbortRequests(["a"])]
    with pytest.raises(FrameTooLargeError):
        read_all(frame, max_bytes=limit - 1)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00",
        b"\x00\x00\x00\x05abc",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x01\xc1",
        wire.encode_frame(FROM_ENGINE[2]),
        wire.encode_frame(AbortRequests(["a"])).replace(b"request_ids", b"request_idz"),
    ],
)
def test_what_is_no_message_is_a_malformed_frame(data):
    with pytest.raises(MalformedFrameError):
        read_all(data)


def test_values_out_of_range_are_refused():
    bad = AddRequest(request_id="a", prompt_token_ids=[1], max_tokens=1, spans=[ImageSpan(-1)])
    with pytest.raises(MalformedFrameError):
        read_all(wire.encode_frame(bad))


def test_a_deeply_nested_frame_is_refused():
    body = b"\x91" * 200_000
    with pytest.raises(MalformedFrameError):
        read_all(len(body).to_bytes(4, "big") + body, max_bytes=10**6)


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_wire_error(data):
    try:
        read_all(data)
    except (MalformedFrameError, FrameTooLargeError):
        return


@given(st.binary(max_size=100))
def test_any_body_is_a_message_or_a_wire_error(body):
    try:
        messages = read_all(len(body).to_bytes(4, "big") + body)
    except MalformedFrameError:
        return
    assert len(messages) == 1
