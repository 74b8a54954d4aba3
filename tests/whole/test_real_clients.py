"""The server under real clients: each in an environment of its own, plain and streamed.

What is checked stands in `tests/clients/`, and runs there. One server is the bundled model's, which
sees; the other has a scripted engine, which fails and calls tools on demand.
"""

import asyncio

import pytest
from support.client_checks import run_checks, variables_of
from support.client_environments import PINS, checks_command
from support.http_side import write_checkpoint
from support.tool_template import TOOL_TEMPLATE

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


@pytest.fixture
def other_picture(draw_picture, tmp_path):
    """A picture drawn for this test, as the environment variables of the checks."""
    return variables_of(draw_picture(1003, num_shapes=2), tmp_path)


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
