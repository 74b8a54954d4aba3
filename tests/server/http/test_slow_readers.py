"""Clients that do not read their answers: bounded, cut, and freed in the engine.

In one process, where the engine's own counts can be read;
`tests/whole/test_server_faults.py` asks the same of a whole server.
"""

import asyncio
import contextlib
import socket

import httpx2
import pytest
from support.engine_side import engine_at
from support.fake_runner import OrdinaryRunner, fake_info
from support.http_side import running_server
from support.http_to_engine import until_ready
from support.invariants import CHAT, COMPLETIONS, body_for, raw_post
from support.polling import until

from vlmserve.models.batch import PoolSizes
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.server.settings import ServerSettings

MODEL = "vlmserve-tiny-vision"
READER_TIMEOUT_S = 0.4
SLOW_READER_TIMEOUT_S = 3.0
ROUNDS_S = 120.0


async def deaf_client(url, route, max_tokens=2000, **more):
    """A request whose answer is never read; little of it fits the kernel's buffers."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", int(url.rsplit(":", 1)[1])))
    body = body_for(route, max_tokens=max_tokens, stream=True, **more)
    await loop.sock_sendall(client, raw_post(route, body))
    return client


def serve(tmp_path, scenario, reader_timeout_s=READER_TIMEOUT_S):
    """Run scenario(url, engine, app's connections' largest buffer) on a server of tiny buffers."""

    async def run():
        pools = PoolSizes(num_text_blocks=512, num_image_blocks=8, block_size=16)
        runner = OrdinaryRunner(fake_info(pools, 4096))
        settings = ServerSettings(
            model=str(CHECKPOINT),
            engine_socket=str(tmp_path / "engine.sock"),
            served_model_names=[MODEL],
            reader_timeout_s=reader_timeout_s,
            send_buffer_bytes=4096,
        )
        async with (
            engine_at(settings.engine_socket, runner) as engine,
            running_server(settings) as url,
        ):
            async with httpx2.AsyncClient(base_url=url) as client:
                await until_ready(client)
            await scenario(url, engine)

    asyncio.run(run())


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_row_30_a_client_that_does_not_read_is_cut_and_its_blocks_are_freed(
    tmp_path, route, caplog
):
    """It held its blocks until its last token, and its connection for good."""

    async def scenario(url, engine):
        client = await deaf_client(url, route)
        await until(lambda: engine.stats().num_running == 1)
        began = asyncio.get_running_loop().time()
        await until(lambda: engine.stats().num_running == 0)
        assert asyncio.get_running_loop().time() - began < ROUNDS_S
        assert engine.stats().text_blocks_used == 0
        assert not engine.snapshot().open
        client.close()

    serve(tmp_path, scenario)
    (line,) = [one.getMessage() for one in caplog.records if "reads nothing" in one.getMessage()]
    num_unsent = int(line.split("with ")[1].split()[0])
    assert 0 < num_unsent < 1_000_000


def test_row_30_a_client_that_reads_slowly_is_served_to_the_end(tmp_path, caplog):
    async def scenario(url, engine):
        more = {"ignore_eos": True, "max_tokens": 1_200}
        loop = asyncio.get_running_loop()
        received = b""
        slow_until = loop.time() + 1.1 * SLOW_READER_TIMEOUT_S
        with contextlib.closing(await deaf_client(url, CHAT, **more)) as client:
            # A fiftieth of the timeout a pause, so at most 56 KiB come in the slow part.
            while loop.time() < slow_until:
                received += await loop.sock_recv(client, 1_024)
                await asyncio.sleep(SLOW_READER_TIMEOUT_S / 50)
            assert b"[DONE]" not in received, "the answer is too short to be read slowly"
            async with asyncio.timeout(ROUNDS_S):
                while b"[DONE]" not in received:
                    received += await loop.sock_recv(client, 65_536)
        assert b'"error"' not in received

    serve(tmp_path, scenario, SLOW_READER_TIMEOUT_S)
    assert "reads nothing" not in caplog.text
