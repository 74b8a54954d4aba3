"""Two API keys on one whole server: one floods, or both do with weights. Counted in events."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

KEYS = "heavy weight=3\nlight weight=1\n"
DEADLINE_S = 240.0


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEYS)
    return str(file)


def ask(server, key: str, text: str, max_tokens: int) -> int:
    """One answer of exactly max_tokens tokens; returns how many it has."""
    body = {
        "model": "vlmserve-tiny-vision",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


@pytest.mark.slow
def test_row_70_a_flood_of_one_key_ends_no_answer_before_anothers_small_ones(
    start_faulty_server, key_file, wait_for
):
    """All places were the flooder's until its first answers ended, 300 steps later."""
    server = start_faulty_server(
        server={"api_key_file": key_file},
        engine={"max_num_seqs": 4, "heartbeat_interval_s": 0.05},
    )
    server.suffer("slow 0.03")
    num_flood_ended = 0

    def flood(number: int) -> None:
        nonlocal num_flood_ended
        ask(server, "heavy", f"flood {number}", 300)
        num_flood_ended += 1

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    try:
        running = lambda: metric(server, "light", "num_requests_running")  # noqa: E731
        assert wait_for(lambda: running() == 4, DEADLINE_S)
        for number in range(5):
            assert ask(server, "light", f"small {number}", 1) == 1
        assert num_flood_ended == 0
    finally:
        server.suffer("")
        for thread in threads:
            thread.join()
    assert num_flood_ended == 12, "preempted answers end all the same"


def metric(server, key: str, name: str) -> float:
    request = urllib.request.Request(
        f"{server.url}/metrics", headers={"Authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        for line in answer.read().decode().splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
    raise KeyError(name)


@pytest.mark.slow
def test_row_70_weights_of_3_to_1_divide_the_tokens_of_a_whole_server_within_a_tenth(
    start_faulty_server, key_file
):
    server = start_faulty_server(
        supervision={"num_workers": 2},
        server={"api_key_file": key_file},
        engine={"max_num_seqs": 8},
    )
    counts = {"heavy": 0, "light": 0}
    lock, is_over = threading.Lock(), threading.Event()

    def client(key: str, number: int) -> None:
        """Ask again and again, so that each key always has requests waiting."""
        while not is_over.is_set():
            try:
                num_tokens = ask(server, key, f"{key} {number}", 200)
            except urllib.error.HTTPError as error:
                if error.code != 503:  # the second worker has not found its engine yet
                    raise
                continue
            with lock:
                counts[key] += num_tokens
                if sum(counts.values()) >= 200 * 160:
                    is_over.set()

    with ThreadPoolExecutor(48) as pool:
        jobs = [pool.submit(client, key, n) for n in range(24) for key in counts]
        assert is_over.wait(DEADLINE_S)
        at_end = dict(counts)
        for job in jobs:
            job.result()
    assert at_end["heavy"] / at_end["light"] == pytest.approx(3.0, rel=0.1)
