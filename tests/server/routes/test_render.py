"""POST .../render: the prompt of a request, its images, and how it was made; continuations."""

import asyncio

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    frames_of,
    meta_like_tokenizer,
    tokens_one_by_one,
    write_checkpoint,
)

TOKENIZER = meta_like_tokenizer()
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
QUESTION = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is in this image?"}]}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("render"))


def ask(checkpoint, *bodies):
    """Post each (path, body) to one server: the responses, and the requests to its engine."""

    async def run():
        engine = ScriptedEngine(lambda request: list(tokens_one_by_one(TOKENIZER, " a helpful")))
        async with client_of(checkpoint, engine) as client:
            responses = [await client.post(path, json={"model": MODEL} | b) for path, b in bodies]
            metrics = (await client.get("/metrics")).text
        return responses, engine.requests, metrics

    return asyncio.run(run())


def test_a_rendered_chat_is_the_prompt_that_the_engine_gets(checkpoint):
    body = {"messages": [QUESTION]}
    (rendered, answered), requests, _ = ask(checkpoint, (f"{CHAT}/render", body), (CHAT, body))
    answer = rendered.json()
    assert len(requests) == 1, "to render generates nothing"
    (prompt,) = answer["prompts"]
    assert prompt["token_ids"] == requests[0].prompt_token_ids
    assert len(prompt["token_ids"]) == 17
    digest = requests[0].images[0].content_hash.hex()
    image = {"position": 5, "num_tokens": 1, "num_tiles": 1, "digest": digest}
    assert prompt["images"] == [image]
    # As routers for vLLM read it.
    assert answer["token_ids"] == prompt["token_ids"]
    assert answer["features"] == {
        "mm_hashes": {"image": [digest]},
        "mm_placeholders": {"image": [{"offset": 5, "length": 1}]},
    }
    assert answered.headers["x-image-digests"] == digest
    assert prompt["text"].startswith("<|begin_of_text|><|start_header_id|>user")
    assert answer["format"] == "chat_template"
    assert answer["reason"] is None
    assert answer["chat_template"] == "chat_template.jinja"
    assert answer["content_format"] == "both"


@pytest.mark.parametrize(
    "reason", ["system_and_images", "several_calls", "text_and_calls", "no_template"]
)
def test_metas_format_is_named_logged_once_and_counted(checkpoint, tmp_path, caplog, reason):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talks = {
        "system_and_images": [SYSTEM, QUESTION],
        "several_calls": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call, call | {"id": "b"}]},
        ],
        "text_and_calls": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        ],
        "no_template": [QUESTION],
    }
    folder = write_checkpoint(tmp_path, None) if reason == "no_template" else checkpoint
    body = (f"{CHAT}/render", {"messages": talks[reason]})
    responses, _, metrics = ask(folder, body, body)
    for response in responses:
        assert response.json()["format"] == "meta"
        assert response.json()["reason"] == reason
        assert response.json()["chat_template"] is None
    assert f'vlmserve_meta_format_prompts_total{{reason="{reason}"}} 2.0' in metrics
    warnings = [one for one in caplog.records if "Meta's format" in one.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].levelname == "WARNING"


def test_a_rendered_completion_has_each_prompt(checkpoint):
    body = {"prompt": ["What is", "You are"]}
    (rendered,), requests, _ = ask(checkpoint, (f"{COMPLETIONS}/render", body))
    answer = rendered.json()
    assert requests == []
    assert answer["format"] == "text"
    assert [one["text"] for one in answer["prompts"]] == [
        "<|begin_of_text|>What is",
        "<|begin_of_text|>You are",
    ]
    assert [one["images"] for one in answer["prompts"]] == [[], []]


def test_what_cannot_be_asked_cannot_be_rendered(checkpoint):
    bodies = [
        (f"{CHAT}/render", {"messages": []}),
        (f"{CHAT}/render", {"messages": [QUESTION], "chat_template": "x"}),
        (f"{COMPLETIONS}/render", {"prompt": [999_999]}),
    ]
    responses, _, _ = ask(checkpoint, *bodies)
    params = [error_of(response, 400)["param"] for response in responses]
    assert params == ["messages", "chat_template", "prompt"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_last_answer_is_continued_with_its_image(checkpoint, is_streamed):
    turns = [QUESTION, {"role": "assistant", "content": "You are"}]
    body = {"messages": turns, "continue_final_message": True}
    asked = {"stream": True} if is_streamed else {}
    (rendered, answer), requests, _ = ask(
        checkpoint, (f"{CHAT}/render", body), (CHAT, body | asked)
    )
    (prompt,) = rendered.json()["prompts"]
    assert prompt["text"].endswith("assistant<|end_header_id|>\n\nYou are")
    assert requests[0].prompt_token_ids == prompt["token_ids"]
    assert len(requests[0].images) == 1
    if is_streamed:
        assert " a" in "".join(frames_of(answer))
    else:
        assert answer.json()["choices"][0]["message"]["content"] == " a helpful"


def test_the_header_of_the_answer_is_left_out_when_asked(checkpoint):
    body = {"messages": [QUESTION], "add_generation_prompt": False}
    (rendered,), _, _ = ask(checkpoint, (f"{CHAT}/render", body))
    assert rendered.json()["prompts"][0]["text"].endswith("What is in this image?<|eot_id|>")
    both = body | {"add_generation_prompt": True, "continue_final_message": True}
    (refused,), _, _ = ask(checkpoint, (CHAT, both))
    assert error_of(refused, 400)["param"] == "continue_final_message"
