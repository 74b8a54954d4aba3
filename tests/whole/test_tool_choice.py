"""tool_choice required and named, over HTTP with the bundled model: what comes always parses."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from vlmserve.models.bundled.pictures import data_url

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "tool-calls.md"
MODEL = "vlmserve-tiny-vision"
SIDES = ["left", "right"]
LOOK = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/side"}, "times": {"type": "integer", "maximum": 3}},
    "required": ["at"],
    "additionalProperties": False,
    "$defs": {"side": {"enum": SIDES}},
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": LOOK}},
    {"type": "function", "function": {"name": "count"}},
]
STACK_TOOLS = [
    {"tool_name": "count", "parameters": {}},
    {"tool_name": "move", "parameters": {"far": {"param_type": "bool"}}},
]


def ask(server, path="/v1/chat/completions", **fields):
    body = {"messages": [{"role": "user", "content": "Look around."}]} | fields
    body |= {"model": MODEL} if "completions" in path else {"model_id": MODEL}
    answer = httpx2.post(server.url + path, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


def check_call(name, arguments):
    assert name in ("look", "count")
    if name == "count":
        assert arguments == {}
        return
    assert arguments["at"] in SIDES
    assert set(arguments) <= {"at", "times"}
    assert arguments.get("times", 0) <= 3


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_that_must_come_comes_and_fits_its_schema(server, choice, temperature):
    num_whole = 0
    for seed in range(4):
        fields = {"tools": TOOLS, "tool_choice": choice, "temperature": temperature, "seed": seed}
        (one,) = ask(server, max_tokens=150, **fields).json()["choices"]
        calls = [call["function"] for call in one["message"]["tool_calls"]]
        assert one["message"]["content"] is None
        assert one["finish_reason"] in ("tool_calls", "length")
        num_whole += one["finish_reason"] == "tool_calls"
        whole = calls if one["finish_reason"] == "tool_calls" else calls[:-1]
        for call in whole:
            check_call(call["name"], json.loads(call["arguments"]))
            assert choice == "required" or call["name"] == "look"
    assert num_whole


def test_one_required_call_is_one_and_ends_by_itself(server):
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    for seed in range(6):
        (one,) = ask(server, seed=seed, **fields).json()["choices"]
        (call,) = one["message"]["tool_calls"]
        assert one["finish_reason"] == "tool_calls"
        check_call(call["function"]["name"], json.loads(call["function"]["arguments"]))


def test_required_calls_stream_as_they_come_plain(server):
    fields = {"tools": TOOLS, "tool_choice": "required", "seed": 3, "max_tokens": 150, "n": 2}
    plain = [
        [call["function"] for call in choice["message"]["tool_calls"]]
        for choice in ask(server, **fields).json()["choices"]
    ]
    streamed = [[], []]
    for line in ask(server, stream=True, **fields).text.splitlines():
        if not line.startswith("data: {"):
            continue
        (choice,) = json.loads(line[6:])["choices"]
        calls = streamed[choice["index"]]
        for part in choice["delta"].get("tool_calls", []):
            if part["index"] == len(calls):
                calls.append(part["function"])
            else:
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    assert streamed == plain


@pytest.mark.parametrize("tool_format", ["json", "function_tag", "python_list"])
def test_llama_stack_requires_calls_in_every_format(server, tool_format):
    for choice in ("required", "move"):
        answer = ask(
            server,
            "/v1/inference/chat-completion",
            tools=STACK_TOOLS,
            tool_config={"tool_choice": choice, "tool_prompt_format": tool_format},
            sampling_params={"max_tokens": 400},
        )
        message = answer.json()["completion_message"]
        assert message["tool_calls"]
        assert message["stop_reason"] == "end_of_turn"
        assert message["content"] == ""
        for call in message["tool_calls"]:
            assert (call["tool_name"], list(call["arguments"])) in (
                [("move", ["far"])] if choice == "move" else [("move", ["far"]), ("count", [])]
            )


def test_a_schema_that_cannot_be_compiled_is_a_400_that_names_it(server):
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "["}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": bad}}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "tools": tools}
    path = f"{server.url}/v1/chat/completions"
    refused = httpx2.post(path, json=body | {"tool_choice": "required"}, timeout=120)
    param = "tools[0].function.parameters"
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    # Where the model is free to call, the schema is only told of.
    assert httpx2.post(path, json=body | {"max_tokens": 4}, timeout=120).status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_documented_curl_gets_its_call(server):
    (command,) = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    command = command.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    (choice,) = json.loads(done.stdout)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "turn"
    assert json.loads(call["function"]["arguments"])["to"] in SIDES


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_required_call_beside_a_picture_fits_its_schema(server, choice):
    picture = {
        "type": "image_url",
        "image_url": {"url": data_url(Image.new("RGB", (64, 64), "red"))},
    }
    turns = [{"role": "user", "content": [picture, {"type": "text", "text": "Look at it."}]}]
    later = [
        *turns,
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "?"},
    ]
    for messages in (turns, later):
        fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
        (one,) = ask(server, messages=messages, seed=1, **fields).json()["choices"]
        (call,) = one["message"]["tool_calls"]
        check_call(call["function"]["name"], json.loads(call["function"]["arguments"]))
