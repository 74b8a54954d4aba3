"""`vlmserve chat`: questions from a pipe, commands behind a slash, errors in words."""

import asyncio
import json
import os
import sys

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)

from vlmserve.router.errors import EngineDeadError

TOKENIZER = meta_like_tokenizer()
PNG = b"\x89PNG\r\n\x1a\n"


def says(text):
    return lambda request: tokens_one_by_one(TOKENIZER, text)


def talk(checkpoint, lines, *options, script=None, env=None, **settings):
    """The exit status, what was printed, the errors, and what the engine got."""

    async def run():
        engine = ScriptedEngine(script or says("What is"))
        async with client_of(checkpoint, engine, **settings) as client:
            url = str(client.base_url)
            code, output, errors = await command("--url", url, *options, lines=lines, env=env)
        return code, output, errors, engine.requests

    return asyncio.run(run())


async def command(*options, lines="", env=None):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vlmserve.server", "chat", *options,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, env=os.environ | {"no_proxy": "*"} | (env or {}),
    )  # fmt: skip
    output, errors = await process.communicate(lines.encode())
    return process.returncode, output.decode(), errors.decode()


def prompt_of(request):
    return TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False)


def test_a_conversation_is_kept_with_its_picture_and_saved_as_a_request(checkpoint, tmp_path):
    picture, saved = tmp_path / "a.png", tmp_path / "talk.json"
    picture.write_bytes(PNG)
    lines = f"What\n/image {picture}\nis this\n/system You are helpful\n/save {saved}\n/quit\nlost"
    code, output, errors, requests = talk(checkpoint, lines, "--temperature", "0")
    assert (code, output) == (0, "What is\nWhat is\n")
    assert f"wrote {saved}" in errors
    first, second = requests
    assert [len(first.images), len(second.images)] == [0, 1]
    assert "What is<|eot_id|>" in prompt_of(second)
    body = json.loads(saved.read_text())
    assert (body["model"], body["temperature"]) == (MODEL, 0)
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert body["messages"][3]["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )


def test_a_picture_of_the_command_line_goes_with_the_first_question(checkpoint, tmp_path):
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"\xff\xd8\xff\xe0")
    code, _, _, (first, second) = talk(checkpoint, "What\n/clear\nis", "--image", str(picture))
    assert code == 0
    assert [len(first.images), len(second.images)] == [1, 0]
    assert "What<|eot_id|>" not in prompt_of(second)


def test_what_goes_wrong_is_said_and_the_conversation_goes_on(checkpoint, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("no picture")
    lines = f"/image {text}\n/image /nowhere/a.png\n/fly\nWhat\n"
    code, output, errors, _ = talk(checkpoint, lines)
    assert (code, output) == (1, "What is\n")
    assert "is not a PNG, JPEG, GIF or WebP file" in errors
    assert "cannot read /nowhere/a.png" in errors
    assert "/fly is no command" in errors


def test_an_answer_that_breaks_off_keeps_what_came_and_is_reported(checkpoint):
    def script(request):
        return [*tokens_one_by_one(TOKENIZER, "What is", None), 2.0, EngineDeadError("gone")]

    code, output, errors, _ = talk(checkpoint, "What\n", script=script, first_output_wait_s=0.1)
    assert (code, output) == (1, "What is\n")
    assert "the engine is not available" in errors


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_the_right_key_the_command_ends_with_the_servers_reason(checkpoint, key):
    code, output, errors, _ = talk(
        checkpoint, "What\n", env={"VLMSERVE_API_KEY": key}, api_keys=["right"]
    )
    assert (code, output) == (1, "")
    assert "a valid API key is required" in errors


def test_the_key_comes_from_the_environment(checkpoint):
    env = {"OTHER_KEY": "right"}
    code, output, _, _ = talk(
        checkpoint, "What\n", "--api-key-env", "OTHER_KEY", env=env, api_keys=["right"]
    )
    assert (code, output) == (0, "What is\n")


def test_a_server_that_cannot_be_reached_is_named(unused_port):
    url = f"http://127.0.0.1:{unused_port}"
    code, _, errors = asyncio.run(command("--url", url, lines="What\n"))
    assert code == 1
    assert f"{url} cannot be reached" in errors
