"""POST /v1/responses and the kept responses, through the OpenAI SDK and a scripted engine."""

import asyncio
import contextlib
import json
import sqlite3

import openai
import pytest
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    client_of,
    error_of,
    meta_like_tokenizer,
    tokens_one_by_one,
    write_checkpoint,
)
from support.tool_template import TOOL_TEMPLATE

from vlmserve.router.errors import EngineDeadError
from vlmserve.server.api import response_store

TOKENIZER = meta_like_tokenizer()
PATH = "/v1/responses"
ANSWER = "This image shows a böardwalk 🐻 in a field."
ARGUMENTS = '{"city": "Zürich"}'
CALL = '{"name": "get_weather", "parameters": ' + ARGUMENTS + "}"
TOOLS = [
    {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    }
]
PICTURE = {"type": "input_image", "image_url": "https://host/a.png", "detail": "auto"}
BODY = {"model": MODEL, "input": "What is in this image?"}


@pytest.fixture(scope="module")
def tool_checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE)


def says(text, finish_reason="stop"):
    return lambda request: list(tokens_one_by_one(TOKENIZER, text, finish_reason))


def serve(checkpoint, use, script=None, **options):
    """`use(client, sdk, engine)` against a server; what it gives."""

    async def run():
        engine = ScriptedEngine(script or says(ANSWER))
        async with (
            client_of(checkpoint, engine, **options) as client,
            openai.AsyncOpenAI(
                base_url=f"{client.base_url}/v1", api_key="key", max_retries=0
            ) as sdk,
        ):
            return await use(client, sdk, engine)

    return asyncio.run(run())


def post(checkpoint, body, script=None, **options):
    async def use(client, sdk, engine):
        return await client.post(PATH, json=body)

    return serve(checkpoint, use, script, **options)


def prompt_of(request):
    return TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False)


def test_the_sdk_reads_a_whole_response(checkpoint):
    async def use(client, sdk, engine):
        return await sdk.responses.create(**BODY, max_output_tokens=64, temperature=0)

    response = serve(checkpoint, use)
    assert response.output_text == ANSWER
    assert (response.status, response.model, response.store) == ("completed", MODEL, True)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.id.startswith("resp_")


def test_the_sdk_reads_the_events_of_a_stream(checkpoint):
    async def use(client, sdk, engine):
        stream = await sdk.responses.create(**BODY, stream=True)
        return [event async for event in stream]

    events = serve(checkpoint, use)
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(types[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWER
    assert events[2].item.content == []
    assert events[-1].response.output_text == ANSWER


def test_the_sdk_s_stream_helper_gathers_the_response(checkpoint):
    async def use(client, sdk, engine):
        async with sdk.responses.stream(**BODY) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_response()

    assert serve(checkpoint, use).output_text == ANSWER


def test_a_response_continues_an_earlier_one_with_its_picture(checkpoint):
    images = OneTileImages()

    async def use(client, sdk, engine):
        turn = [PICTURE, {"type": "input_text", "text": "What is in this image?"}]
        first = await sdk.responses.create(model=MODEL, input=[{"role": "user", "content": turn}])
        second = await sdk.responses.create(
            model=MODEL, input="Are you a helpful assistant?", previous_response_id=first.id
        )
        return first, second, engine.requests

    first, second, requests = serve(checkpoint, use, images=images)
    assert second.previous_response_id == first.id
    assert len(requests[1].images) == 1
    prompt = prompt_of(requests[1])
    assert prompt.index("What is in this image?") < prompt.index("Are you a helpful")
    assert "böardwalk" in prompt


def test_instructions_are_of_one_response_alone(checkpoint):
    async def use(client, sdk, engine):
        first = await sdk.responses.create(**BODY, instructions="You are a helpful assistant.")
        await sdk.responses.create(**BODY, previous_response_id=first.id)
        return engine.requests

    first, second = map(prompt_of, serve(checkpoint, use))
    assert "You are a helpful assistant." in first
    assert "You are a helpful assistant." not in second


def test_a_kept_response_can_be_read_listed_and_deleted(checkpoint):
    async def use(client, sdk, engine):
        response = await sdk.responses.create(**BODY)
        again = await sdk.responses.retrieve(response.id)
        items = await sdk.responses.input_items.list(response.id)
        await sdk.responses.delete(response.id)
        gone = await client.get(f"{PATH}/{response.id}")
        continued = await client.post(PATH, json=BODY | {"previous_response_id": response.id})
        return response, again, items.data, gone, continued

    response, again, items, gone, continued = serve(checkpoint, use)
    assert again.model_dump() == response.model_dump()
    assert [item.content for item in items] == ["What is in this image?"]
    assert error_of(gone, 404)["code"] == "not_found"
    assert error_of(continued, 400)["param"] == "previous_response_id"


def test_a_kept_response_is_not_streamed_again(checkpoint):
    """The SDK found no event in the JSON, without an error."""

    async def use(client, sdk, engine):
        response = await sdk.responses.create(model=MODEL, input="What")
        assert (await client.get(f"{PATH}/{response.id}?stream=false")).status_code == 200
        with pytest.raises(openai.BadRequestError, match="leave stream out"):
            await sdk.responses.retrieve(response.id, stream=True)

    serve(checkpoint, use)


def test_pages_of_input_items(checkpoint):
    async def use(client, sdk, engine):
        turns = [{"role": "user", "content": f"What {number}"} for number in range(5)]
        response = await sdk.responses.create(model=MODEL, input=turns)
        path = f"{PATH}/{response.id}/input_items"
        first = (await client.get(f"{path}?limit=2&order=asc")).json()
        rest = (await client.get(f"{path}?order=asc&after={first['last_id']}")).json()
        wrong = await client.get(f"{path}?limit=0")
        return first, rest, wrong

    first, rest, wrong = serve(checkpoint, use)
    assert [item["content"] for item in first["data"]] == ["What 0", "What 1"]
    assert first["has_more"]
    assert [item["content"] for item in rest["data"]] == ["What 2", "What 3", "What 4"]
    assert not rest["has_more"]
    assert error_of(wrong, 400)["param"] == "limit"


def test_a_response_belongs_to_its_key(checkpoint):
    keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]

    async def use(client, sdk, engine):
        made = (await client.post(PATH, json=BODY, headers=keys[0])).json()
        path = f"{PATH}/{made['id']}"
        body = BODY | {"previous_response_id": made["id"]}
        return [
            (await client.get(path, headers=keys[1])).status_code,
            (await client.delete(path, headers=keys[1])).status_code,
            (await client.post(PATH, json=body, headers=keys[1])).status_code,
            (await client.get(path, headers=keys[0])).status_code,
        ]

    assert serve(checkpoint, use, api_keys=["one", "two"]) == [404, 404, 400, 200]


@pytest.mark.parametrize(("settings", "fields"), [
    ({}, {"store": False}),
    ({"responses_store": "off"}, {}),
])  # fmt: skip
def test_what_is_not_kept_cannot_be_read(checkpoint, settings, fields):
    async def use(client, sdk, engine):
        made = (await client.post(PATH, json=BODY | fields)).json()
        return made["store"], (await client.get(f"{PATH}/{made['id']}")).status_code

    assert serve(checkpoint, use, **settings) == (False, 404)


def test_store_where_nothing_is_kept_is_a_400_with_the_option(checkpoint):
    response = post(checkpoint, BODY | {"store": True}, responses_store="off")
    assert "--responses-store" in error_of(response, 400)["message"]


def test_a_file_keeps_responses_over_a_restart(checkpoint, tmp_path):
    file = str(tmp_path / "responses.db")

    async def make(client, sdk, engine):
        return (await sdk.responses.create(**BODY)).id

    async def read(client, sdk, engine):
        return (await sdk.responses.retrieve(made)).output_text

    made = serve(checkpoint, make, responses_store=file)
    assert serve(checkpoint, read, responses_store=file) == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_row_67_a_store_that_cannot_be_written_costs_no_answer(
    checkpoint, tmp_path, stream, monkeypatch, caplog
):
    """A full disk, a quota or a lock: the client got a 500 for an answer that was complete."""
    monkeypatch.setattr(response_store, "BUSY_TIMEOUT_S", 0.01)
    file = str(tmp_path / "responses.db")

    async def use(client, sdk, engine):
        with contextlib.closing(sqlite3.connect(file)) as other:
            other.execute("BEGIN IMMEDIATE")
            first = await whole(sdk, stream)
        second = await whole(sdk, stream)
        return first, second, (await client.get(f"{PATH}/{first.id}")).status_code

    first, second, status = serve(checkpoint, use, responses_store=file)
    assert (first.output_text, first.store, status) == (ANSWER, False, 404)
    assert (second.output_text, second.store) == (ANSWER, True)
    assert f"database is locked; the response {first.id} is not stored" in caplog.text


async def whole(sdk, stream):
    made = await sdk.responses.create(**BODY, stream=stream)
    return [event async for event in made][-1].response if stream else made


def test_row_67_a_store_that_cannot_be_read_is_a_503(checkpoint, tmp_path):
    file = str(tmp_path / "responses.db")

    async def use(client, sdk, engine):
        made = await sdk.responses.create(**BODY)
        with contextlib.closing(sqlite3.connect(file)) as other:
            other.execute("DROP TABLE responses")
        path = f"{PATH}/{made.id}"
        return [
            await client.get(path),
            await client.get(f"{path}/input_items"),
            await client.delete(path),
            await client.post(PATH, json=BODY | {"previous_response_id": made.id}),
            await client.post(PATH, json=BODY),
        ]

    *reads, answer = serve(checkpoint, use, responses_store=file)
    for response in reads:
        assert "cannot be read at the moment" in error_of(response, 503)["message"]
        assert response.headers["retry-after"] == "1"
    assert answer.json()["store"] is False


def test_a_response_larger_than_the_store_is_reported_as_not_stored(checkpoint):
    async def use(client, sdk, engine):
        made = await sdk.responses.create(**BODY)
        return made.store, (await client.get(f"{PATH}/{made.id}")).status_code

    assert serve(checkpoint, use, responses_store_bytes=100) == (False, 404)


def test_a_streamed_response_is_kept_before_its_end_is_sent(checkpoint):
    async def use(client, sdk, engine):
        stream = await sdk.responses.create(**BODY, stream=True)
        async for event in stream:
            if event.type == "response.completed":
                return event.response, await sdk.responses.retrieve(event.response.id)

    sent, kept = serve(checkpoint, use)
    assert kept.output_text == sent.output_text == ANSWER


def test_calls_and_their_results_go_round(tool_checkpoint):
    async def use(client, sdk, engine):
        first = await sdk.responses.create(**BODY, tools=TOOLS)
        [call] = first.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is hot."}
        by_id = await sdk.responses.create(
            model=MODEL, tools=TOOLS, input=[result], previous_response_id=first.id
        )
        echoed = await sdk.responses.create(
            model=MODEL, tools=TOOLS, store=False,
            input=[{"role": "user", "content": BODY["input"]}, call, result],
        )  # fmt: skip
        return call, by_id, echoed, engine.requests

    call, _, _, requests = serve(tool_checkpoint, use, says(CALL))
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call", "get_weather", {"city": "Zürich"},
    )  # fmt: skip
    assert "It is hot." in prompt_of(requests[1])
    assert requests[1].prompt_token_ids == requests[2].prompt_token_ids


def test_streamed_calls_are_items_with_their_arguments_in_pieces(tool_checkpoint):
    async def use(client, sdk, engine):
        stream = await sdk.responses.create(**BODY, tools=TOOLS, stream=True)
        return [event async for event in stream]

    events = serve(tool_checkpoint, use, says(f"I look.<|python_tag|>{CALL}"))
    added = [event.item.type for event in events if event.type == "response.output_item.added"]
    assert added == ["message", "function_call"]
    pieces = [
        event.delta for event in events if event.type == "response.function_call_arguments.delta"
    ]
    assert "".join(pieces) == ARGUMENTS
    [done] = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert done.arguments == ARGUMENTS
    assert [item.status for item in events[-1].response.output] == ["completed"] * 2


def test_an_answer_that_is_cut_is_incomplete(checkpoint):
    async def use(client, sdk, engine):
        whole = await sdk.responses.create(**BODY, max_output_tokens=2)
        stream = await sdk.responses.create(**BODY, max_output_tokens=2, stream=True)
        return whole, [event async for event in stream][-1]

    whole, last = serve(checkpoint, use, says("What is", "length"))
    assert whole.status == last.response.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert last.type == "response.incomplete"


def test_a_stream_that_fails_ends_with_a_failed_response(checkpoint):
    def script(request):
        return [*tokens_one_by_one(TOKENIZER, "What", None), EngineDeadError("gone")]

    async def use(client, sdk, engine):
        stream = await sdk.responses.create(**BODY, stream=True)
        events = [event async for event in stream]
        kept = await client.get(f"{PATH}/{events[0].response.id}")
        return events[-1], kept.status_code

    last, kept = serve(checkpoint, use, script)
    assert last.type == "response.failed"
    assert last.response.error.message
    assert kept == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"role": "system", "content": [PICTURE]}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0]"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
    ],
)
def test_what_is_not_served_is_a_400_that_names_the_field(checkpoint, fields, param):
    error = error_of(post(checkpoint, BODY | fields), 400)
    assert (error["param"] or "").startswith(param), error


def test_cancelling_a_response_that_is_not_in_the_background_is_a_400(checkpoint):
    async def use(client, sdk, engine):
        made = (await client.post(PATH, json=BODY)).json()
        return [await client.post(f"{PATH}/{one}/cancel") for one in (made["id"], "resp_none")]

    made, unknown = serve(checkpoint, use)
    assert "background" in error_of(made, 400)["message"]
    error_of(unknown, 404)
