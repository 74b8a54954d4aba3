"""--image-cache-host over a whole server: an engine is killed, and its images are still there."""

import base64
import json
import os
import signal
import urllib.request
from pathlib import Path

import pytest
from support.invariants import Standing
from support.pictures import encoded, picture

from vlmserve.router.processes.memory_folder import PREFIX, ROOT


def data_url() -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(picture(300, 200))).decode()


def answer(server, *turns: str) -> str:
    """What the model says after these turns about one picture."""
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": turns[0]}]}]
    for index, text in enumerate(turns[1:]):
        messages.append({"role": "assistant" if index % 2 == 0 else "user", "content": text})
    body = {"model": "vlmserve-tiny-vision", "messages": messages, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def folders() -> set[Path]:
    return set(ROOT.glob(f"{PREFIX}*"))


@pytest.mark.slow
def test_a_killed_engine_answers_the_second_turn_without_encoding(start_server, wait_for) -> None:
    before = folders()
    server = start_server("--image-cache-host", "64MiB", "--image-cache-dtype", "int8")
    first = answer(server, "How many shapes are there?")
    second_turn = ("How many shapes are there?", first, "What is the background?")
    second = answer(server, *second_turn)
    # the engine reports its counts now and then
    assert wait_for(lambda: server.metric("vlmserve_images_encoded_total") == 1, 60)
    (folder,) = folders() - before
    assert folder.stat().st_mode & 0o777 == 0o700
    assert wait_for(lambda: server.metric("vlmserve_image_host_bytes") > 0)
    os.kill(Standing(server).engine_pid, signal.SIGKILL)
    assert wait_for(lambda: "another" in server.log.read_text())
    assert wait_for(lambda: server.metric("vlmserve_images_encoded_total") == 0, 120)
    assert wait_for(lambda: is_answering(server, second_turn, second), 120)
    assert wait_for(lambda: server.metric("vlmserve_image_host_hits_total") == 1)
    assert server.metric("vlmserve_images_encoded_total") == 0
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    assert not folder.exists()


def is_answering(server, turns: tuple[str, ...], expected: str) -> bool:
    try:
        found = answer(server, *turns)
    except OSError:  # the engine still loads
        return False
    assert found == expected
    return True
