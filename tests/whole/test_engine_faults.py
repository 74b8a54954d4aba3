"""What neighbours, faults and exhausted pools must not do to a request, seen from the routes.

Rows 28, 39 and 50 in one process, where the scheduler can be asked to check its pools;
`tests/whole/test_server_faults.py` asks the same of a whole server. Row 40 looks into the pools'
tensors, which no server shows.
"""

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from support.engine_side import engine_at, engine_socket
from support.fake_runner import FakeRunner, fake_info
from support.http_to_engine import body_of, server_at, until_free, until_ready
from support.invariants import (
    CHAT,
    COMPLETIONS,
    GENERATION_ROUTES,
    STACK_ROUTES,
    TEXT_ROUTES,
    Standing,
    assert_error,
    assert_stream_error,
    body_for,
    text_of,
)
from support.polling import until
from support.stepped import SteppedEngine

from vlmserve.models.batch import PoolSizes
from vlmserve.router.messages import AddRequest
from vlmserve.router.processes import wire

# One of each kind; `tests/whole/test_server_faults.py` goes through them all.
ROUTES = [CHAT, STACK_ROUTES[0], COMPLETIONS]


def bodies_of(route, count=10):
    """Requests of several lengths, with and without pictures; some begin alike."""
    texts = [f"{'Look at this. ' * (i % 3)}{i}?" for i in range(count)]
    pictures = [[f"picture {i % 4}"] * (i % 3) for i in range(count)]
    return [
        body_of(route, text, images=images if route in GENERATION_ROUTES else [], max_tokens=40)
        for text, images in zip(texts, pictures, strict=True)
    ]


async def posted(client, route, bodies):
    answers = await asyncio.gather(*(client.post(route, json=body) for body in bodies))
    assert [one.status_code for one in answers] == [200] * len(bodies)
    return [text_of(one.json()) for one in answers]


@pytest.mark.parametrize("route", ROUTES)
def test_row_28_an_exhausted_cache_preempts_and_changes_no_greedy_answer(tmp_path, route):
    """Nobody is refused, nothing stands still, and all blocks come back."""

    async def scenario():
        path = tmp_path / "engine.sock"
        async with engine_at(path, FakeRunner()), server_at(path) as client:
            await until_ready(client)
            roomy = await posted(client, route, bodies_of(route))
        pools = PoolSizes(num_text_blocks=14, num_image_blocks=6, block_size=16)
        tight = FakeRunner(fake_info(pools))
        async with engine_at(path, tight) as engine, server_at(path) as client:
            await until_ready(client)
            assert await posted(client, route, bodies_of(route)) == roomy
            assert engine.stats().num_preemptions > 0
            await until_free(engine)

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["raise", pytest.param("memory", marks=pytest.mark.slow)])
def test_row_29_a_failed_step_is_a_500_for_those_in_it_and_for_nobody_else(
    start_faulty_server, wait_for, fault
):
    """On every route, streamed or not; the cause stays in the log."""
    server = start_faulty_server(engine={"max_num_seqs": 2})
    standing = Standing(server, is_warm=True)
    with standing.holds():
        for route in TEXT_ROUTES:
            for stream in (False, True):
                server.suffer(fault)
                answer = standing.post(route, body_for(route, stream=stream))
                assert_error(answer, 500)
                assert b"secret" not in answer.body
                server.suffer("")
                assert standing.post(route, body_for(route, stream=stream)).status == 200
        server.suffer("slow 0.05")
        with ThreadPoolExecutor(6) as pool:
            body = body_for(CHAT, max_tokens=30, stream=True, ignore_eos=True)
            before = standing.metrics()
            crowd = [pool.submit(standing.post, CHAT, body) for _ in range(6)]

            def grown(name):
                return standing.metrics()[name] - before[name]

            assert wait_for(lambda: standing.metrics()["num_requests_waiting"] == 4)
            assert wait_for(lambda: grown("generation_tokens_total") > 20)
            server.suffer(fault)
            assert wait_for(lambda: grown("request_failure_total") > 0)
            server.suffer("")
            answers = [one.result() for one in crowd]
        failed = [one for one in answers if one.status == 500 or "error" in one.frames[-2]]
        for one in failed:
            if one.status == 200:
                assert assert_stream_error(one)["type"] == "server_error"
            assert b"secret" not in one.body
        assert len(failed) >= 2


@pytest.mark.parametrize("route", ROUTES)
def test_row_39_company_that_joins_and_leaves_changes_no_answer(tmp_path, route):
    async def scenario():
        path = tmp_path / "engine.sock"
        options = {"max_num_seqs": 4, "max_num_batched_tokens": 24}
        async with engine_at(path, FakeRunner(), **options) as engine, server_at(path) as client:
            await until_ready(client)
            alone = [(await posted(client, route, [one]))[0] for one in bodies_of(route)]
            guests = [
                asyncio.create_task(client.post(route, json=body_of(route, f"{i}", max_tokens=300)))
                for i in range(8)
            ]
            staying = asyncio.create_task(posted(client, route, bodies_of(route)))
            for guest in guests:
                before = engine.stats().num_steps
                await until(lambda n=before: engine.stats().num_steps > n or staying.done())
                guest.cancel()
            assert await staying == alone
            await asyncio.gather(*guests, return_exceptions=True)
            await until_free(engine)

    asyncio.run(scenario())


def test_row_40_what_freed_blocks_held_is_overwritten_before_the_next_step():
    """In the debug mode, which the random mixes of the soak test run in."""
    from support import oracle as models

    from vlmserve.models.kv_cache.paged_cache import POISON

    runner = models.runner("tiny")
    engine = SteppedEngine(runner, {"poison_freed_blocks": True, "prefix_cache": False})
    first = models.prompt("first", "|a secret", [models.image(1, 1)])
    request = AddRequest(
        request_id="first",
        prompt_token_ids=first.token_ids,
        images=first.images,
        spans=first.spans,
        max_tokens=2,
    )
    engine.add(request)
    engine.run()
    text = next(i for i in range(9) if i not in runner.pools.cross_layers)
    assert (runner.pools.layers[text].keys[0] != POISON).any(), "the first block held a prompt"
    engine.add(AddRequest(request_id="second", prompt_token_ids=[1] * 2, max_tokens=1))
    engine.step()
    used = set(engine.sequences["second"].block_ids) | {0}
    num_blocks = -(-len(first.token_ids) // models.BLOCK_SIZE)
    for block_id in set(range(num_blocks)) - used:
        assert (runner.pools.layers[text].keys[block_id] == POISON).all()
        assert (runner.pools.layers[text].values[block_id] == POISON).all()
    # The second's own block holds its two tokens, and nothing of the first behind them.
    assert (runner.pools.layers[text].keys[0][2:] == POISON).all()


@pytest.mark.parametrize(
    "frame",
    [
        (2**31).to_bytes(4, "big"),
        (5).to_bytes(4, "big") + b"\xc1junk",
        (3).to_bytes(4, "big") + b"\x93\x01",
        b"\0\0",
        wire.encode_frame(AddRequest(request_id="x", prompt_token_ids=[1], max_tokens=1))[:-2],
    ],
    ids=["oversized", "malformed", "short", "cut head", "cut body"],
)
def test_row_44_a_bad_frame_drops_only_the_peer_that_sent_it(standing, frame):
    """On the socket of a real engine, which only its owner may open."""
    path = engine_socket(standing.engine_pid)
    mode = os.stat(path).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600

    async def send():
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(frame)
        writer.write_eof()
        async with asyncio.timeout(30):
            while await reader.read(65536):
                pass
        writer.close()

    asyncio.run(send())


@pytest.mark.parametrize("route", ROUTES)
def test_row_50_a_cancel_that_races_with_the_end_frees_once(tmp_path, route):
    """The pools assert that nothing is freed twice; whoever stays gets the whole answer."""

    async def scenario():
        path = tmp_path / "engine.sock"
        async with engine_at(path, FakeRunner()) as engine, server_at(path) as client:
            await until_ready(client)
            began = asyncio.get_running_loop().time()
            await posted(client, route, [body_of(route, max_tokens=3)])
            usual_s = asyncio.get_running_loop().time() - began
            num_left = 0
            images = ["p"] if route in GENERATION_ROUTES else []
            for i in range(60):
                call = asyncio.create_task(
                    client.post(route, json=body_of(route, f"{i}", images=images, max_tokens=3))
                )
                # From far before the usual end to far behind it.
                await asyncio.wait([call], timeout=usual_s * i / 30)
                num_left += not call.done()
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                await until(lambda: not engine._open)
                engine.scheduler.check()
            assert num_left, "no cancel came before the end"
            await until_free(engine)
            assert isinstance(await client.post(route, json=body_of(route)), httpx2.Response)

    asyncio.run(scenario())
