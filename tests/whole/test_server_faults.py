"""Rows 28, 30 to 32, 39, 49 and 50 with all processes real, and the four standing assertions.

The engine hashes instead of computing (`support/faulty_engine.py`), so that a row's faults can be
had on demand and its answers told from wrong ones. What only a look into the engine shows
(pools, counters, the moment of a cancel) is tested in one process, by the rows' other tests.
"""

import base64
import contextlib
import random
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from support.invariants import (
    CHAT,
    COMPLETIONS,
    GENERATION_ROUTES,
    SLACK,
    TEXT_ROUTES,
    Standing,
    assert_error,
    body_for,
    raw_post,
    text_of,
)
from support.pictures import encoded, noise

from processes import stopped

REFUSAL_S = 0.05
READER_TIMEOUT_S = 0.2
# As an answer of any length stops nowhere of itself, this is one that outlasts every test.
ENDLESS = 3000
SEED = 20_261_126
# What the engine tells comes by its heartbeat: often, so that tests wait little for it.
OFTEN = {"heartbeat_interval_s": 0.05}
# Until a small picture has come to a decoder.
DECODING_S = 0.3
# What the log has of an answer that was cut.
CUT = r"with (\d+) bytes unsent: its client reads nothing"


def picture_url(number: int) -> str:
    """One of many small pictures."""
    data = encoded(Image.fromarray(noise(20, 10, seed=number)))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def body_of(route, text="Hi", *, pictures=(), **more):
    """A body with these pictures, by number; without any where the route takes none."""
    urls = [picture_url(one) for one in pictures] if route in GENERATION_ROUTES else []
    return body_for(route, text, images=urls, **more)


def said(answer):
    """The text of an answer that is a plain one."""
    assert answer.status == 200, answer.body[:500]
    return text_of(answer.json)


@contextlib.contextmanager
def leaving(server, route, body):
    """A client whose request is sent when the block starts, and that has left when it ends."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(raw_post(route, body))
        yield client


def until_figure(standing, wait_for, name, count):
    assert wait_for(lambda: standing.metrics()[name] == count), (name, standing.metrics())


# Little room: rows 28, 39 and 50


@pytest.fixture(scope="module")
def tight(start_shared_faulty_server):
    """A server whose pools are exhausted by a few requests."""
    pools = {"num_text_blocks": 16, "num_image_blocks": 6, "block_size": 16}
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 40}
    return start_shared_faulty_server(engine=pools | limits | OFTEN)


def crowd_of(route):
    """Requests of several lengths, with and without pictures; some begin alike."""
    return [
        body_of(
            route,
            f"{'Look at this. ' * (i % 3)}{i}?",
            pictures=[i % 4] * (i % 3),
            max_tokens=40,
        )
        for i in range(6)
    ]


def test_row_28_an_exhausted_cache_preempts_and_answers_the_same(tight, wait_for):
    standing = Standing(tight, is_warm=True)
    with standing.holds(), ThreadPoolExecutor(6) as pool:
        for route in TEXT_ROUTES:
            bodies = crowd_of(route)
            tight.suffer("")
            alone = [said(standing.post(route, one)) for one in bodies]
            assert len(set(alone)) > 1, "or a mix-up would not be seen"
            before = standing.metrics()["num_preemptions_total"]
            # So that all have come before the first one ends.
            tight.suffer("slow 0.005")
            together = list(pool.map(lambda one, r=route: standing.post(r, one), bodies))
            assert [said(one) for one in together] == alone
            assert wait_for(lambda b=before: standing.metrics()["num_preemptions_total"] > b)
        tight.suffer("")


def test_row_39_company_that_joins_and_leaves_changes_no_answer(tight):
    standing = Standing(tight, is_warm=True)
    rng = random.Random(SEED)

    def visit(route, delay_s):
        with leaving(tight, route, body_of(route, "I go", pictures=[9], max_tokens=100)):
            time.sleep(delay_s)

    with standing.holds(), ThreadPoolExecutor(10) as pool:
        for route in TEXT_ROUTES:
            bodies = crowd_of(route)[:4]
            tight.suffer("")
            alone = [said(standing.post(route, one)) for one in bodies]
            tight.suffer("slow 0.003")
            guests = [pool.submit(visit, route, rng.uniform(0.0, 0.3)) for _ in range(6)]
            staying = [pool.submit(standing.post, route, one) for one in bodies]
            assert [said(one.result(60 * SLACK)) for one in staying] == alone
            for guest in guests:
                guest.result()
        tight.suffer("")


def test_row_50_a_cancel_that_races_with_the_end_frees_once(tight):
    """Clients leave from far before an answer's usual end to far behind it."""
    standing = Standing(tight, is_warm=True)
    count = 24
    with standing.holds():
        failures = standing.metrics()["request_failure_total"]
        for route in TEXT_ROUTES:
            body = body_of(route, pictures=[3], max_tokens=3)
            usual_s = min(standing.post(route, body).seconds for _ in range(3))
            for i in range(count):
                with leaving(tight, route, body):
                    time.sleep(usual_s * 2 * i / count)
        assert standing.metrics()["request_failure_total"] == failures


# Little queue: rows 31 and 32


@pytest.fixture(scope="module")
def narrow(start_shared_faulty_server):
    """A server with one place, and a queue with limits of each kind that a test reaches."""
    limits = {"max_queue_requests": 3, "max_queue_tokens": 200, "max_queue_bytes": 30_000}
    return start_shared_faulty_server(engine={"max_num_seqs": 1} | limits | OFTEN)


# What waits, what comes then, and the option that its refusal names.
FILLING = {
    "count": ([{}] * 3, {}, "--max-queue-requests"),
    "tokens": ([LONG := {"text": "word " * 100}], LONG, "--max-queue-tokens"),
    "bytes": ([{"pictures": [1]}] * 2, {"pictures": [1, 2]}, "--max-queue-bytes"),
}


@pytest.mark.parametrize("limit", FILLING)
def test_row_31_a_full_queue_is_a_429_with_retry_after_at_once_while_a_step_runs(
    narrow, wait_for, limit
):
    waiting, late, option = FILLING[limit]
    routes = GENERATION_ROUTES if limit == "bytes" else TEXT_ROUTES
    standing = Standing(narrow, is_warm=True)
    if limit == "bytes":
        # Their pixels are known, so that only the queue can refuse them.
        assert standing.post(routes[0], body_of(routes[0], pictures=[1, 2])).status == 200
    with standing.holds(), ThreadPoolExecutor(4) as pool:
        narrow.suffer("slow 0.05")
        first = routes[0]
        taken = [pool.submit(standing.post, first, body_of(first, max_tokens=100))]
        until_figure(standing, wait_for, "num_requests_running", 1)
        for number, fields in enumerate(waiting, 1):
            taken.append(pool.submit(standing.post, first, body_of(first, **fields)))
            until_figure(standing, wait_for, "num_requests_waiting", number)
        for route in routes:
            for stream in (False, True):
                answer = standing.post(route, body_of(route, **late, stream=stream))
                error = assert_error(answer, 429)
                assert error["type"] == "rate_limit_error"
                assert option in error["message"]
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.seconds < REFUSAL_S * SLACK
        assert [one.done() for one in taken] == [False] * len(taken)
        narrow.suffer("")
        assert [one.result().status for one in taken] == [200] * len(taken)


def test_row_32_counters_are_back_whatever_becomes_of_the_requests(narrow, wait_for):
    """Answered, refused, past their time, left, and failed in a step: nothing stays counted."""
    standing = Standing(narrow, is_warm=True)
    with standing.holds(), ThreadPoolExecutor(8) as pool:
        for route in TEXT_ROUTES:
            narrow.suffer("slow 0.1")
            body = body_of(route, max_tokens=60)
            calls = [pool.submit(standing.post, route, body)]
            until_figure(standing, wait_for, "num_requests_running", 1)
            with leaving(narrow, route, body):
                until_figure(standing, wait_for, "num_requests_waiting", 1)
            until_figure(standing, wait_for, "num_requests_waiting", 0)
            # Three of them have to wait, and the others are refused.
            for stream in [False, True] * 3:
                calls.append(pool.submit(standing.post, route, body | {"stream": stream}))
            assert wait_for(lambda calls=calls: sum(one.done() for one in calls) == 3)
            narrow.suffer("raise")
            statuses = Counter(one.result(60 * SLACK).status for one in calls)
            assert statuses.pop(429) == 3
            assert statuses[500] >= 1
            assert set(statuses) <= {200, 500}, "a stream that has begun ends by an event"
            narrow.suffer("slow 0.02")
            if route in (CHAT, COMPLETIONS):
                late = body_of(route, max_tokens=ENDLESS, timeout_s=0.3, ignore_eos=True)
                assert assert_error(standing.post(route, late), 504)["code"] == "timeout"
            narrow.suffer("")
            assert standing.post(route, body_of(route)).status == 200


# Clients that go or do not read: rows 30 and 49


@pytest.fixture(scope="module")
def hasty(start_shared_faulty_server):
    """A server that gives up soon on who does not read; it may ask loopback for pictures."""
    return start_shared_faulty_server(
        server={
            "reader_timeout_s": READER_TIMEOUT_S,
            "send_buffer_bytes": 4096,
            "images": {"allow_private_addresses": True, "tile_cache_bytes": 0},
        },
        engine={"max_num_seqs": 1} | OFTEN,
    )


def test_row_30_a_client_that_does_not_read_is_cut_and_its_blocks_are_freed(hasty, wait_for):
    standing = Standing(hasty, is_warm=True)
    # The answer is far from its end when its client is given up.
    hasty.suffer("slow 0.002")
    with standing.holds(), contextlib.ExitStack() as stack:
        for number, route in enumerate(TEXT_ROUTES, 1):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", hasty.port))
            client.sendall(raw_post(route, body_for(route, max_tokens=ENDLESS, stream=True)))
            assert wait_for(lambda n=number: len(kept_for_deaf_clients(hasty)) == n)
            until_figure(standing, wait_for, "num_requests_running", 0)
    assert all(0 < one < 1_000_000 for one in kept_for_deaf_clients(hasty))


def kept_for_deaf_clients(server) -> list[int]:
    """How many bytes were unsent of each answer that was cut."""
    return [int(one) for one in re.findall(CUT, server.log.read_text())]


@contextlib.contextmanager
def silent_site():
    """The URL of a picture on loopback that never comes, and how many are asking for it."""
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        asking = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    asking.append(stack.enter_context(listening.accept()[0]))

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/a.png", asking
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def num_left(hasty):
    """How many clients the log says went away."""
    return lambda: hasty.log.read_text().count("status=499")


def test_row_49_a_client_that_leaves_the_queue_the_prefill_or_the_answer_frees_it(
    hasty, wait_for, num_left
):
    """On every route; in a step that takes a second, in the stream and before a plain answer."""
    standing = Standing(hasty, is_warm=True)
    with standing.holds():
        for route in TEXT_ROUTES:
            before = num_left()
            hasty.suffer("slow 0.02")
            with leaving(hasty, route, body_for(route, max_tokens=ENDLESS)):
                until_figure(standing, wait_for, "num_requests_running", 1)
                with leaving(hasty, route, body_for(route, max_tokens=ENDLESS)):
                    until_figure(standing, wait_for, "num_requests_waiting", 1)
                until_figure(standing, wait_for, "num_requests_waiting", 0)
            until_figure(standing, wait_for, "num_requests_running", 0)
            with leaving(hasty, route, body_for(route, max_tokens=ENDLESS, stream=True)) as client:
                received = b""
                while received.count(b"data: ") < 2:
                    received += client.recv(4096)
            until_figure(standing, wait_for, "num_requests_running", 0)
            hasty.suffer("slow 1")
            with leaving(hasty, route, body_for(route, max_tokens=ENDLESS)):
                until_figure(standing, wait_for, "num_requests_running", 1)
            hasty.suffer("")
            assert wait_for(lambda b=before: num_left() == b + 4)


def test_row_49_a_client_that_leaves_while_its_picture_comes_or_is_decoded_frees_it(
    hasty, wait_for, num_left
):
    standing = Standing(hasty, is_warm=True)
    hasty.suffer("")
    with silent_site() as (url, asking), standing.holds():
        for number, route in enumerate(GENERATION_ROUTES, 1):
            before = num_left()
            with leaving(hasty, route, body_for(route, images=[url])):
                assert wait_for(lambda n=number: len(asking) == n)
            with stopped(standing.pids("decoder")):
                with leaving(hasty, route, body_for(route, images=[picture_url(number)])):
                    # Nobody tells when the picture is with a decoder; there it stays.
                    time.sleep(DECODING_S)
                assert wait_for(lambda b=before: num_left() == b + 2)
