"""Runs the checks of a client, which `tests/clients/` has, in the client's own environment.

Beside the server under test there is one with a scripted engine, which fails on demand.
"""

import asyncio
import base64
from pathlib import Path

import numpy
from support.client_environments import CHECKS_TIMEOUT_S, checks_environment
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    meta_like_tokenizer,
    running_server,
    tokens_one_by_one,
)

from vlmserve.models.bundled.dataset.questions import ask
from vlmserve.router.errors import EngineDeadError, QueueFullError
from vlmserve.server.settings import ServerSettings

TOKENIZER = meta_like_tokenizer()
CALL = '{"name": "turn", "parameters": {"to": "left"}}'
PING_INTERVAL_S = 0.02


def by_the_question(request):
    """Answers by the last turn's word: a call, a failure at once or midway, or a sentence."""
    prompt = TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False)
    *_, last, _ = prompt.split("<|eot_id|>")
    if "ipython<|end_header_id|>" in last:
        return list(tokens_one_by_one(TOKENIZER, "It is done."))
    if last.endswith("Call"):
        return list(tokens_one_by_one(TOKENIZER, CALL))
    if "Busy" in last:
        return [QueueFullError("the queue is full", retry_after_s=2.0)]
    if last.endswith("Break"):
        return [*tokens_one_by_one(TOKENIZER, "What", None), EngineDeadError("gone")]
    answer = list(tokens_one_by_one(TOKENIZER, "What is in this image?"))
    if last.endswith("Slow"):
        # A silence before each token in which some comments are sent.
        return [part for output in answer for part in (5 * PING_INTERVAL_S, output)]
    return answer


def variables_of(picture, folder: Path) -> dict[str, str]:
    """A drawn picture as the environment variables of the checks."""
    question = ask(picture.scene, "describe", numpy.random.default_rng(1))
    path = folder / "other.png"
    path.write_bytes(base64.b64decode(picture.url.partition(",")[2]))
    return {
        "OTHER_PICTURE": str(path),
        "OTHER_QUESTION": question.text,
        "OTHER_ANSWER": question.answer,
    }


async def run_checks(command, checkpoint, **environment):
    """The exit status and the output of the checks, while the scripted server runs."""
    settings = ServerSettings(
        model=str(checkpoint),
        engine_socket="",
        served_model_names=[MODEL],
        api_keys=["secret"],
        # A failure behind the first token must find the stream open.
        first_output_wait_s=0.2,
        stream_ping_interval_s=PING_INTERVAL_S,
    )
    parts = {"engine_client": ScriptedEngine(by_the_question), "images": OneTileImages()}
    async with running_server(settings, **parts) as scripted_url:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=checks_environment(SCRIPTED_URL=scripted_url, SCRIPTED_MODEL=MODEL, **environment),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), CHECKS_TIMEOUT_S)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return process.returncode, output.decode()
