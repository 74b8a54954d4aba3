"""The server under real clients: each in an environment of its own, plain and streamed.

What is checked stands in `tests/clients/`, and runs there. One server is the bundled model's, which
sees; the other has a scripted engine, which fails and calls tools on demand.
"""

import asyncio
import base64

import numpy
import pytest
from support.client_environments import (
    CHECKS_TIMEOUT_S,
    PINS,
    checks_command,
    checks_environment,
)
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    meta_like_tokenizer,
    running_server,
    tokens_one_by_one,
    write_checkpoint,
)
from support.tool_template import TOOL_TEMPLATE

from vlmserve.models.bundled.dataset.questions import ask
from vlmserve.router.errors import EngineDeadError, QueueFullError
from vlmserve.server.settings import ServerSettings

TOKENIZER = meta_like_tokenizer()
CALL = '{"name": "turn", "parameters": {"to": "left"}}'
PING_INTERVAL_S = 0.02
OPENAI = ("openai_sdk.py", "openai_echoes.py")
STACK = ("llama_stack.py",)
CLIENTS = {
    "openai": OPENAI,
    "openai-1": OPENAI,
    "openai-node": ("openai_node.test.mjs",),
    "openai-agents": ("openai_agents.py",),
    "anthropic": ("anthropic_sdk.py",),
    "litellm": ("litellm_sdk.py",),
    "instructor": ("instructor_sdk.py",),
    "langchain": ("langchain_chat.py",),
    "langchain-nvidia": ("langchain_nvidia.py",),
    "llama-index": ("llama_index_llm.py",),
    "vercel-ai": ("vercel_ai.test.mjs",),
    "guidellm": ("guidellm_run.py",),
    "lm-eval": ("lm_eval_run.py",),
    "aiperf": ("aiperf_run.py",),
    "llama-stack-0.0.50": STACK,
    "llama-stack-0.0.61": STACK,
    "llama-stack-0.0.63": STACK,
    "llama-stack-0.1.9": STACK,
    "llama-stack-0.2.12": STACK,
}
OF_NODE = {"openai-node", "vercel-ai"}


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


@pytest.fixture
def other_picture(draw_picture, tmp_path):
    """A picture drawn for this test, as the environment variables of the checks."""
    picture = draw_picture(1003, num_shapes=2)
    question = ask(picture.scene, "describe", numpy.random.default_rng(1))
    path = tmp_path / "other.png"
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


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_the_client_works_unchanged(client, server, other_picture, tmp_path):
    command = checks_command(client, CLIENTS[client])
    checkpoint = write_checkpoint(tmp_path / "checkpoint", TOOL_TEMPLATE)
    names = {"SERVER_URL": server.url, "SERVER_MODEL": "vlmserve-tiny-vision"}
    status, output = asyncio.run(run_checks(command, checkpoint, **names, **other_picture))
    assert status == 0, output


def test_every_pinned_client_is_tested():
    pinned = {path.stem for path in PINS.glob("*.txt")}
    # Today's openai is the project's own; both of node's clients share an environment.
    assert pinned == set(CLIENTS) - {"openai"} - OF_NODE | {"node"}
