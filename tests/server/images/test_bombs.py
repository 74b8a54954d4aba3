"""Bombs of every format that Pillow opens: an answer or a 400, within bounds, whatever they hold.

A bomb costs its decoder at most the CPU time and memory that a picture may take; then the decoder
is replaced. Formats that are not accepted reach no decoder.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os

import pytest
from PIL import Image
from support.bombs import BUILDERS, REJECTED
from support.invariants import peak_bytes, resident_bytes
from support.pictures import TILING, encoded, picture
from support.polling import FAR_S, until

from vlmserve.server.images import decoders
from vlmserve.server.images.decoders import DecoderPool
from vlmserve.server.images.settings import ImageError, ImageSettings
from vlmserve.server.images.tiling import cut

SETTINGS = ImageSettings(decode_timeout_s=1.0)
# Of the process that sends: copies of a file on its way to a decoder, never what it expands to.
SENT_COPIES = 4
PID = os.getpid()
ACCEPTED = {"GIF", "JPEG", "MPO", "PNG", "WEBP"}


# Those that cost under a second, for every run.
QUICK = (
    *("zTXt of 2 GB", "iCCP of 2 GB", "EXIF in a loop", "MPO of a million pictures"),
    *("GIF of a million frames", "GIF with a frame beyond its screen", "WebP of 150,000 frames"),
)


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(BUILDERS), marks=pytest.mark.slow)])
def test_row_68_a_bomb_costs_one_picture_its_bounds_and_no_more(names, monkeypatch) -> None:
    # However long a busy machine takes to give a decoder its CPU time.
    monkeypatch.setattr(decoders, "WAIT_FACTOR", 1_000)

    async def use() -> None:
        async with DecoderPool(SETTINGS, TILING) as pool:
            base = max(map(resident_bytes, pool.pids))
            for name in names:
                async with asyncio.timeout(FAR_S):
                    await defuse(pool, name, base)

    asyncio.run(use())


async def defuse(pool: DecoderPool, name: str, base: int) -> None:
    """Send one bomb, and then a small picture."""
    data = BUILDERS[name]()
    own = resident_bytes(PID)
    peaks = asyncio.create_task(highest(pool, base))
    with contextlib.suppress(ImageError):
        await pool.decode(data)
    assert await ended(peaks) <= SETTINGS.decoder_memory_bytes + len(data), name
    assert resident_bytes(PID) - own < SENT_COPIES * len(data) + 50_000_000, name
    await until(lambda: len(pool.pids) == 2)
    assert (await pool.decode(encoded(picture()))).data == cut(picture(), TILING).data


async def highest(pool: DecoderPool, base: int) -> int:
    """The most that a decoder has grown until cancelled."""
    most = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            for pid in pool.pids:
                with contextlib.suppress(OSError, StopIteration):
                    most = max(most, peak_bytes(pid) - base)
            await asyncio.sleep(0.02)
    return most


async def ended(task: asyncio.Task[int]) -> int:
    await asyncio.sleep(0.05)
    task.cancel()
    return await task


def files_of_other_formats() -> dict[str, bytes]:
    """A small picture in each format that Pillow writes and the server does not accept."""
    Image.init()
    found = dict(REJECTED)
    for name in sorted(Image.SAVE.keys() - ACCEPTED):
        for mode in ("RGB", "RGBA", "L", "P", "1", "F"):
            buffer = io.BytesIO()
            with contextlib.suppress(Exception):
                picture().convert(mode).save(buffer, name)
                found[name] = buffer.getvalue()
                break
    return found


def test_row_68_formats_that_are_not_accepted_reach_no_decoder(monkeypatch) -> None:
    files = files_of_other_formats()
    assert {"TIFF", "JPEG2000", "ICO", "ICNS", "BMP", "QOI", "DDS", "PCX", "AVIF"} <= files.keys()

    async def use() -> None:
        async with DecoderPool(SETTINGS, TILING) as pool:
            monkeypatch.setattr(pool, "_take_idle", None)
            for name, data in files.items():
                with pytest.raises(ImageError, match=r"^image ") as raised:
                    await pool.decode(data)
                assert "send a JPEG, PNG, WebP or GIF" in raised.value.message or (
                    "convert it to JPEG or PNG" in raised.value.message
                ), name

    asyncio.run(use())
