"""How long a client waits between connections that do not last."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from support.fake_clock import Clock

from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.client.reconnect_pause import FIRST_PAUSE_S, LONGEST_PAUSE_S, ReconnectPause
from vlmserve.router.errors import EngineDeadError

NUM_DIALS = 5
DEADLINE_S = 120.0


def test_pauses_double_up_to_the_longest_and_a_lasting_connection_ends_them():
    clock = Clock()
    pause = ReconnectPause(clock)
    assert pause.left_s() == 0
    pauses = []
    for _ in range(8):
        pause.connected()
        pause.lost()
        pauses.append(round(pause.left_s(), 6))
        clock.now += pause.left_s()
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert pauses[0] == FIRST_PAUSE_S
    assert pauses[-1] == LONGEST_PAUSE_S
    pause.connected()
    clock.now += 60
    pause.lost()
    assert pause.left_s() == 0


def test_an_engine_that_closes_each_connection_is_not_dialed_without_a_pause(tmp_path: Path):
    """Before: 2,972 connections in half a second."""
    dials: list[float] = []

    async def close_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dials.append(time.monotonic())
        writer.close()

    async def main() -> None:
        path = str(tmp_path / "engine.sock")
        server = await asyncio.start_unix_server(close_at_once, path)
        lost = asyncio.Event()
        client = EngineClient(path, on_dead=lost.set)
        async with server, asyncio.timeout(DEADLINE_S):
            while len(dials) < NUM_DIALS:
                lost.clear()
                with contextlib.suppress(EngineDeadError):
                    await client.connect(0.25)
                    await lost.wait()
        await client.close()

    asyncio.run(main())
    # The sum of the pauses before the fifth; a slow machine only makes it longer.
    assert dials[-1] - dials[0] >= 0.9 * (0.05 + 0.1 + 0.2 + 0.4)
