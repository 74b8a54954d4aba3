"""The examples of docs/tool-calls.md, run as they stand against a scripted model."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

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

from vlmserve.server.settings import ServerSettings

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "tool-calls.md"
TOKENIZER = meta_like_tokenizer()
CALL = '{"name": "get_weather", "parameters": {"city": "Zürich"}}'
DEADLINE_S = 120.0


def calls_once_a_question(request):
    """A call, and text where the prompt ends in a result."""
    prompt = TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False)
    answer = "Yes: 30 degrees." if "<|start_header_id|>ipython" in prompt else CALL
    return list(tokens_one_by_one(TOKENIZER, answer))


async def run_examples(url):
    """The document's Python as one program; gives the lines that it prints."""
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    code = "\n".join(examples).replace("http://127.0.0.1:8000", url)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = await child.communicate()
    assert child.returncode == 0, errors.decode()
    return output.decode().splitlines()


def test_the_documented_round_trip_and_stream_run_as_they_stand(tmp_path):
    async def run():
        options = ServerSettings(
            model=str(write_checkpoint(tmp_path, TOOL_TEMPLATE)),
            engine_socket="",
            served_model_names=[MODEL],
        )
        engine = ScriptedEngine(calls_once_a_question)
        parts = {"engine_client": engine, "images": OneTileImages()}
        async with asyncio.timeout(DEADLINE_S), running_server(options, **parts) as url:
            return await run_examples(url)

    assert asyncio.run(run()) == ["Yes: 30 degrees.", 'get_weather {"city": "Zürich"}']
