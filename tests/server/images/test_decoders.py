"""Decoder processes: hostile, broken and odd pictures cost one answer, never the pool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from PIL import Image
from support.pictures import (
    HEADERS,
    SETTINGS,
    TILING,
    bombs,
    encoded,
    noise,
    picture,
)
from support.polling import FAR_S, until, wait_until

from vlmserve.models.batch import ImageTiles
from vlmserve.server.errors import NotReadyError
from vlmserve.server.images import decoders
from vlmserve.server.images.decoder_child import DecoderConfig
from vlmserve.server.images.decoder_frames import PIECE_BYTES
from vlmserve.server.images.decoders import DecoderPool
from vlmserve.server.images.decoding import content_hash
from vlmserve.server.images.settings import ImageError, ImageSettings, PoolClosed
from vlmserve.server.images.tiling import TilingConfig, cut

CHILD = "vlmserve.server.images.decoder_child"


def with_pool(
    use: Callable[[DecoderPool], Awaitable[None]], settings: ImageSettings = SETTINGS
) -> None:
    async def run() -> None:
        async with asyncio.timeout(FAR_S), DecoderPool(settings, TILING) as pool:
            await use(pool)

    asyncio.run(run())


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def read_proc(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


def test_hostile_and_broken_pictures_are_refused_and_leave_the_children_alive() -> None:
    async def use(pool: DecoderPool) -> None:
        pids = pool.pids
        for name, data in bombs().items():
            if name not in ("text bomb", "profile bomb"):
                with pytest.raises(ImageError, match=r"^image "):
                    await pool.decode(data)
                continue
            with contextlib.suppress(ImageError):
                assert (await pool.decode(data)).data == cut(picture(), TILING).data
        assert pool.pids == pids
        assert (await pool.decode(encoded(picture()))).data == cut(picture(), TILING).data

    with_pool(use)


def test_pictures_with_flipped_bytes_never_end_a_child() -> None:
    """A small seeded sample of a fuzzer over all four formats."""
    rng = random.Random(11)
    seeds = [data for data, _ in HEADERS[:7]]

    async def use(pool: DecoderPool) -> None:
        pids = pool.pids
        for _ in range(200):
            data = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(ImageError):
                assert (await pool.decode(bytes(data))).num_tiles > 0
        assert pool.pids == pids

    with_pool(use)


def test_memory_of_a_child_is_capped() -> None:
    """A picture within every limit, but over what this child may take, is a plain refusal."""
    settings = ImageSettings(decoder_memory_bytes=32 * 1024 * 1024)

    async def use(pool: DecoderPool) -> None:
        pids = pool.pids
        with pytest.raises(ImageError, match=r"memory|broken"):
            await pool.decode(encoded(Image.new("RGB", (4900, 4900))))
        assert pool.pids == pids
        assert (await pool.decode(encoded(picture()))).num_tiles > 0

    with_pool(use, settings)


def test_row_14_a_decoder_has_limits_of_memory_and_time_of_its_own() -> None:
    """They hold when its parent no longer can: each picture may compute for three deadlines."""

    async def use(pool: DecoderPool) -> None:
        await asyncio.gather(*(pool.decode(encoded(picture())) for _ in range(8)))
        limits = [read_proc(pid, "limits").decode().splitlines() for pid in pool.pids]
        for lines in limits:
            of = {line[:26].strip(): line[26:].split()[0] for line in lines}
            assert int(of["Max address space"]) < 4 << 30
            assert 15 <= int(of["Max cpu time"]) < 60
            assert of["Max file size"] == of["Max core file size"] == "0"

    with_pool(use)


def test_row_14_a_decoder_that_computes_for_too_long_ends_itself() -> None:
    script = (
        "from vlmserve.server.images.decoder_child import limit_cpu\n"
        "limit_cpu(0.1)\n"
        "while True: pass"
    )
    result = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert result.returncode == -signal.SIGXCPU


@pytest.mark.slow
def test_row_10_rotated_jpeg_of_100_megapixels_takes_under_200_megabytes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noisy = Image.fromarray(noise(1250, 1250)).resize((10_000, 10_000))
    data = encoded(noisy, "JPEG", quality=60, exif=exif)
    del noisy

    async def use(pool: DecoderPool) -> None:
        assert (await pool.decode(data)).num_tiles == 4
        peaks = [
            int(line.split()[1])
            for pid in pool.pids
            for line in read_proc(pid, "status").decode().splitlines()
            if line.startswith("VmHWM")
        ]
        assert len(peaks) == 2
        assert max(peaks) < 200_000  # kB

    with_pool(use, ImageSettings(max_image_bytes=len(data), decode_timeout_s=25.0))


def test_max_tiles_reaches_the_child() -> None:
    async def use(pool: DecoderPool) -> None:
        data = encoded(picture(60, 200))
        full, one = await pool.decode(data), await pool.decode(data, 1)
        assert (full.num_tiles, one.num_tiles) == (4, 1)
        assert full.content_hash == content_hash(data, TILING, None)
        assert one.content_hash == content_hash(data, TILING, 1)

    with_pool(use)


@pytest.mark.parametrize(
    ("ends_by", "failure"), [(signal.SIGKILL, NotReadyError), (signal.SIGSEGV, ImageError)]
)
def test_killed_child_is_replaced_and_only_its_picture_fails(ends_by, failure) -> None:
    """The system's kill was a 400 that blamed the client; a crash is its picture's doing."""

    async def use(pool: DecoderPool) -> None:
        data = encoded(picture())
        before = pool.pids
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.decode(data)) for _ in range(2)]
        await until(lambda: pool.num_busy == 2)
        os.kill(before[0], ends_by)
        for pid in before:
            with contextlib.suppress(ProcessLookupError):  # the killed one may be gone
                os.kill(pid, signal.SIGCONT)
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert {type(result) for result in results} == {failure, ImageTiles}
        await until(lambda: len(pool.pids) == 2 and before[0] not in pool.pids)
        await asyncio.gather(*(pool.decode(data) for _ in range(4)))
        assert not is_running(before[0])

    with_pool(use)


def test_child_that_gets_no_core_is_replaced_after_a_while_and_its_picture_is_not_blamed() -> None:
    """It was a 400 that asked to scale the picture down, after decode_timeout_s."""
    settings = ImageSettings(decode_timeout_s=0.5)

    async def use(pool: DecoderPool) -> None:
        data = encoded(picture())
        hung = pool.pids[0]
        os.kill(hung, signal.SIGSTOP)
        results = await asyncio.gather(
            *(pool.decode(data) for _ in range(6)), return_exceptions=True
        )
        (failure,) = (result for result in results if isinstance(result, NotReadyError))
        assert failure.retry_after_s == 1.0
        assert sum(isinstance(result, ImageTiles) for result in results) == 5
        await until(lambda: len(pool.pids) == 2 and hung not in pool.pids)
        assert not is_running(hung)

    with_pool(use, settings)


def test_child_that_waits_for_a_core_longer_than_an_image_may_compute_still_answers() -> None:
    settings = ImageSettings(decode_timeout_s=0.5)

    async def use(pool: DecoderPool) -> None:
        for pid in pool.pids:
            os.kill(pid, signal.SIGSTOP)
        job = asyncio.create_task(pool.decode(encoded(picture())))
        await asyncio.sleep(1.0)
        assert not job.done()
        for pid in pool.pids:
            os.kill(pid, signal.SIGCONT)
        assert (await job).num_tiles > 0

    with_pool(use, settings)


def test_picture_that_takes_too_much_cpu_time_is_refused_and_its_child_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoders, "WAIT_FACTOR", 10_000)  # however busy the machine is
    settings = ImageSettings(decode_timeout_s=0.02)

    async def use(pool: DecoderPool) -> None:
        before = pool.pids
        with pytest.raises(ImageError, match=r"over 0\.02 s of CPU time: scale it down"):
            await pool.decode(encoded(Image.new("RGB", (4_900, 4_900))))
        await until(lambda: len(pool.pids) == 2 and set(before) != set(pool.pids))

    with_pool(use, settings)


def test_child_that_died_while_idle_costs_no_picture() -> None:
    async def use(pool: DecoderPool) -> None:
        victims = pool.pids
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: not pool.pids)
        assert (await pool.decode(encoded(picture()))).num_tiles > 0
        assert not set(victims) & set(pool.pids)

    with_pool(use)


def test_cancelled_decodes_leave_every_answer_with_its_question() -> None:
    async def use(pool: DecoderPool) -> None:
        rng = random.Random(2)
        images = [picture(rng.randint(1, 200), rng.randint(1, 200)) for _ in range(60)]
        jobs = [asyncio.create_task(pool.decode(encoded(image))) for image in images]
        for index, job in enumerate(jobs):
            if index % 3 == 0:
                await asyncio.sleep(rng.random() * 0.004)
                job.cancel()
        results = await asyncio.gather(*jobs, return_exceptions=True)
        for image, result in zip(images, results, strict=True):
            if isinstance(result, ImageTiles):
                assert result.data == cut(image, TILING).data
            else:
                assert isinstance(result, asyncio.CancelledError)
        assert sum(isinstance(result, ImageTiles) for result in results) >= 40

    with_pool(use)


def test_cancelled_decode_of_a_hung_child_frees_it_at_the_deadline() -> None:
    settings = ImageSettings(decode_timeout_s=0.5)

    async def use(pool: DecoderPool) -> None:
        before = pool.pids
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.decode(encoded(picture()))) for _ in range(2)]
        await until(lambda: pool.num_busy == 2)
        for job in jobs:
            job.cancel()
        assert (await pool.decode(encoded(picture()))).num_tiles > 0
        await until(lambda: len(pool.pids) == 2 and not set(before) & set(pool.pids))

    with_pool(use, settings)


def test_closing_ends_all_children_and_all_that_wait() -> None:
    async def run() -> None:
        pool = DecoderPool(SETTINGS, TILING)
        await pool.open()
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.decode(encoded(picture()))) for _ in range(5)]
        await until(lambda: pool.num_busy == 2)
        async with asyncio.timeout(FAR_S):
            await pool.close()
            results = await asyncio.gather(*jobs, return_exceptions=True)
        assert {type(result) for result in results} == {PoolClosed}
        assert not any(is_running(pid) for pid in pids)
        assert pool.pids == []
        with pytest.raises(PoolClosed):
            await pool.decode(encoded(picture()))

    asyncio.run(run())


def test_pool_leaves_no_descriptor_open() -> None:
    async def run() -> None:
        async with DecoderPool(SETTINGS, TILING) as pool:
            await pool.decode(encoded(picture()))

    asyncio.run(run())
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(run())
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_decoder_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        ImageSettings(num_decoders=1)


# ---- the child's own process


def start_child(parent_pid: int) -> subprocess.Popen[bytes]:
    config = msgspec.json.encode(DecoderConfig(SETTINGS, TILING, parent_pid)).decode()
    return subprocess.Popen(
        [sys.executable, "-P", "-m", CHILD, config], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("rest", [b"", b"\0\0", b"\0\0\0\0" + (100).to_bytes(8, "big") + b"cut"])
def test_child_ends_with_its_stdin(rest: bytes) -> None:
    with start_child(os.getpid()) as child:
        out, _ = child.communicate(rest, timeout=60)
        assert child.returncode == 0
        assert len(out) == 12 + int.from_bytes(out[:4], "big"), "one frame: ready"
        assert out[4:12] == bytes(8), "without tiles"


def test_child_of_another_parent_ends_at_once() -> None:
    with start_child(1) as child:
        assert child.wait(timeout=60) == 0


def test_children_die_with_their_parent() -> None:
    """The parent is killed, so that nothing of it can clean up."""
    code = """
import asyncio
from vlmserve.server.images.decoders import DecoderPool
from vlmserve.server.errors import NotReadyError
from vlmserve.server.images import decoders
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.images.tiling import TilingConfig
async def main():
    async with DecoderPool(ImageSettings(), TilingConfig()) as pool:
        print(*pool.pids, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(text) for text in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        parent.kill()
        parent.wait()
        assert wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_child_knows_four_formats_and_no_torch() -> None:
    """Pillow's EXIF reader brings TIFF along; images are opened by the name of one format only."""
    code = """
import sys
from PIL import Image
from vlmserve.server.images import decoder_child
from vlmserve.server.images.decoding import prepare_pillow, decode
from vlmserve.server.errors import NotReadyError
from vlmserve.server.images import decoders
from vlmserve.server.images.settings import ImageSettings, ImageError
from vlmserve.server.images.tiling import TilingConfig
prepare_pillow(ImageSettings())
for data in (bytes(100), b"GIF89a" + bytes(100), b"\\xff\\xd8\\xff" + bytes(100)):
    try:
        decode(data, ImageSettings(), TilingConfig(), None)
    except Exception:
        pass
print(sorted(Image.OPEN))
print([name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "sanic")])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.splitlines() == ["['GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP']", "[]"]


def test_live_child_has_no_torch_and_none_of_the_servers_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLMSERVE_API_KEY", "a secret")

    async def use(pool: DecoderPool) -> None:
        await pool.decode(encoded(picture()))
        for pid in pool.pids:
            assert b"torch" not in read_proc(pid, "maps")
            assert b"a secret" not in read_proc(pid, "environ")

    with_pool(use)


def test_signals_to_the_whole_group_leave_children_to_their_parent() -> None:
    async def use(pool: DecoderPool) -> None:
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        await asyncio.gather(*(pool.decode(encoded(picture())) for _ in range(4)))
        assert pool.pids == pids

    with_pool(use)


def test_image_side_never_imports_torch() -> None:
    code = (
        "import sys, vlmserve.server.images.loader;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.strip() == "[]"


def test_no_turn_of_the_loop_copies_a_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of up to 20 MB was one write, and its 3.8 MB of tiles one read."""
    reads: list[int] = []
    writes: list[int] = []
    read, write = asyncio.StreamReader.readexactly, asyncio.StreamWriter.write

    async def counted_read(reader: asyncio.StreamReader, num_bytes: int) -> bytes:
        reads.append(num_bytes)
        return await read(reader, num_bytes)

    def counted_write(writer: asyncio.StreamWriter, data: bytes) -> None:
        writes.append(len(data))
        write(writer, data)

    async def run() -> None:
        large = TilingConfig(tile_size=560, max_image_tiles=4)
        async with asyncio.timeout(FAR_S), DecoderPool(SETTINGS, large) as pool:
            monkeypatch.setattr(asyncio.StreamReader, "readexactly", counted_read)
            monkeypatch.setattr(asyncio.StreamWriter, "write", counted_write)
            data = encoded(picture(600, 600))
            tiles = await pool.decode(data)
            assert len(tiles.data) == tiles.num_bytes > 3_700_000
            assert sum(reads) > 3_700_000
            assert sum(writes) > len(data) > 500_000
            assert max(reads + writes) == PIECE_BYTES

    asyncio.run(run())
