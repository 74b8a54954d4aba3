"""POST /v1/chat/completions against a running server with a scripted engine."""

import asyncio
import json
from pathlib import Path

import httpx2
import numpy
import openai
import pytest
from PIL import Image
from support.http_side import (
    CLIENT_DEADLINE_S,
    MODEL,
    OneTileImages,
    ScriptedEngine,
    client_of,
    error_of,
    frames_of,
    meta_like_tokenizer,
    running_server,
    tokens_one_by_one,
)
from support.polling import until
from support.shapes import shape_of

from vlmserve.models.bundled.pictures import data_url
from vlmserve.router.errors import (
    EngineDeadError,
    EngineInternalError,
    InvalidRequestError,
    QueueFullError,
)
from vlmserve.router.messages import SequenceOutput
from vlmserve.server.images.settings import ImageError, PoolClosed
from vlmserve.server.settings import ServerSettings

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENIZER = meta_like_tokenizer()
CHAT = "/v1/chat/completions"
STACK = "/inference/chat_completion"
ANSWER = "This image shows a böardwalk 🐻 in a field."
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What is in this image?"}]}


def says(text, finish_reason="stop", before=()):
    return lambda request: [*before, *tokens_one_by_one(TOKENIZER, text, finish_reason)]


def fails(*script):
    return lambda request: script


def with_image(url="https://host/a.png"):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]
    return BODY | {"messages": [{"role": "user", "content": parts}]}


def serve(checkpoint, use, script=None, *, images=None, engine=None, **settings):
    """Run `use(client, engine)` against a server and give what it gives."""

    async def run():
        nonlocal engine
        engine = engine or ScriptedEngine(script or says(ANSWER))
        async with client_of(checkpoint, engine, images=images, **settings) as client:
            return await use(client, engine)

    return asyncio.run(run())


def post(checkpoint, body, script=None, *, path=CHAT, headers=None, **options):
    """One POST; bytes go out as they are."""

    async def use(client, engine):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post(path, content=content, headers=headers)

    return serve(checkpoint, use, script, **options)


def test_the_documented_request_gets_the_documented_answer(checkpoint):
    images = OneTileImages()
    response = post(checkpoint, (DATA / "chat.request.json").read_bytes(), images=images)
    sample = json.loads((DATA / "chat.response.json").read_text())
    answer = response.json()
    assert response.status_code == 200
    assert shape_of(answer) == shape_of(sample)
    assert answer["id"].startswith("chat-")
    assert len(answer["id"]) == len(sample["id"])
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["usage"]["prompt_tokens"] == 17
    usage = answer["usage"]
    assert usage["total_tokens"] == 17 + usage["completion_tokens"]
    assert [image.url[:28] for image in images.requests] == ["https://upload.wikimedia.org"]


def test_the_engine_is_given_the_prompt_and_our_own_id(checkpoint):
    async def use(client, engine):
        headers = {"X-Request-Id": "mine"}
        response = await client.post(CHAT, json=with_image() | {"seed": 3}, headers=headers)
        assert response.headers["x-request-id"] == "mine"
        return engine.requests[0]

    request = serve(checkpoint, use)
    assert len(request.images) == len(request.spans) == 1
    assert request.prompt_token_ids[request.spans[0].start] == 128256
    assert request.max_tokens == 131072 - len(request.prompt_token_ids)
    assert request.eos_token_ids == [128001, 128008, 128009]
    assert request.sampling.seed == 3
    assert request.request_id != "mine"
    assert len(request.request_id) == 32


def test_ignore_eos_and_stop_token_ids_reach_the_engine(checkpoint):
    async def use(client, engine):
        await client.post(CHAT, json=BODY | {"ignore_eos": True, "stop_token_ids": [5]})
        return engine.requests[0]

    request = serve(checkpoint, use)
    assert (request.eos_token_ids, request.stop_token_ids) == ([], [5])


def test_streamed_pieces_joined_are_the_plain_answer(checkpoint):
    async def use(client, engine):
        plain = await client.post(CHAT, json=BODY)
        streamed = await client.post(CHAT, json=BODY | {"stream": True})
        return plain.json(), streamed

    plain, streamed = serve(checkpoint, use)
    *chunks, done = frames_of(streamed)
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert plain["choices"][0]["message"]["content"] == ANSWER
    assert streamed.headers["cache-control"] == "no-cache"
    assert streamed.headers["x-accel-buffering"] == "no"


def test_chunks_have_the_documented_shape(checkpoint):
    response = post(checkpoint, BODY | {"stream": True}, says("What is"))
    first, *middle, last, done = frames_of(response)
    first, last = json.loads(first), json.loads(last)
    assert list(first) == ["id", "object", "created", "model", "choices"]
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
    ]
    assert [json.loads(chunk)["choices"][0]["delta"] for chunk in middle] == [
        {"content": "What"},
        {"content": " is"},
    ]
    assert last["choices"][0] | {"delta": {}} == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    ids = {json.loads(chunk)["id"] for chunk in frames_of(response)[:-1]}
    assert len(ids) == 1
    assert done == "[DONE]"


def test_include_usage_adds_one_last_chunk(checkpoint):
    body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = frames_of(post(checkpoint, body, says("What is")))
    *others, last = map(json.loads, chunks)
    assert last["choices"] == []
    assert list(last["usage"]) == ["prompt_tokens", "total_tokens", "completion_tokens"]
    assert last["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in others)
    assert done == "[DONE]"


def test_the_openai_sdk_reads_plain_and_streamed_answers_and_errors(checkpoint):
    async def use(client, engine):
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        async with sdk:
            plain = await sdk.chat.completions.create(**BODY)
            text = ""
            stream = await sdk.chat.completions.create(
                **BODY, stream=True, stream_options={"include_usage": True}
            )
            async for chunk in stream:
                if chunk.choices:
                    text += chunk.choices[0].delta.content or ""
            with pytest.raises(openai.BadRequestError) as bad:
                await sdk.chat.completions.create(**BODY, temperature=3)
            with pytest.raises(openai.NotFoundError) as unknown:
                await sdk.chat.completions.create(**(BODY | {"model": "x"}))
        return plain, text, chunk.usage, bad.value, unknown.value

    plain, text, usage, bad, unknown = serve(checkpoint, use)
    assert plain.choices[0].message.content == text == ANSWER
    assert usage == plain.usage
    assert (bad.param, unknown.code) == ("temperature", "model_not_found")


def test_a_stop_string_ends_the_answer_and_aborts_the_request(checkpoint):
    async def use(client, engine):
        body = BODY | {"stop": ["shows a"]}
        plain = (await client.post(CHAT, json=body)).json()
        streamed = frames_of(await client.post(CHAT, json=body | {"stream": True}))
        return plain, streamed, engine

    plain, streamed, engine = serve(checkpoint, use)
    choice = plain["choices"][0]
    assert choice["message"]["content"] == "This image "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "shows a")
    chunks = [json.loads(chunk)["choices"][0] for chunk in streamed[:-1]]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "This image "
    assert chunks[-1]["stop_reason"] == "shows a"
    assert engine.aborted == [request.request_id for request in engine.requests]


def test_a_stop_token_is_reported(checkpoint):
    (token_id,) = TOKENIZER.encode("?", add_special_tokens=False).ids
    last = SequenceOutput(
        request_id="r", token_ids=[token_id], finish_reason="stop", stop_token_id=token_id
    )
    response = post(checkpoint, BODY | {"stop_token_ids": [token_id]}, fails(last))
    assert response.json()["choices"][0]["stop_reason"] == token_id


def test_an_answer_cut_by_max_tokens_says_length(checkpoint):
    choice = post(checkpoint, BODY, says("What is", "length")).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFullError("the queue is full", 2.4), 429, "rate_limit_error"),
        (InvalidRequestError("too many tiles"), 400, "invalid_request_error"),
        (EngineInternalError("secret"), 500, "server_error"),
        (EngineDeadError("the engine process ended"), 503, "service_unavailable_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, STACK])
def test_a_refusal_of_the_engine_has_a_status_even_for_a_stream(
    checkpoint, error, status, kind, stream, path
):
    response = post(checkpoint, BODY | {"stream": stream}, fails(error), path=path)
    assert error_of(response, status)["type"] == kind
    assert "secret" not in response.text
    if status == 429:
        assert response.headers["retry-after"] == "3"


def test_where_the_engine_is_known_to_be_full_no_picture_is_loaded(checkpoint):
    images, engine = OneTileImages(), ScriptedEngine(says("What is"))
    engine.refused = QueueFullError("the queue is full", 2.4)

    async def use(client, engine):
        answer = await client.post(CHAT, json=with_image())
        return answer, (await client.get("/metrics")).text

    answer, figures = serve(checkpoint, use, images=images, engine=engine)
    assert error_of(answer, 429)["type"] == "rate_limit_error"
    assert answer.headers["retry-after"] == "3"
    assert images.requests == engine.requests == []
    assert "request_failure_total 1.0" in figures


def test_an_error_in_the_middle_of_a_stream_is_a_frame_before_done(checkpoint):
    script = fails(*says("What is", None)(None), EngineDeadError("gone"))
    *chunks, error, done = frames_of(post(checkpoint, BODY | {"stream": True}, script))
    assert done == "[DONE]"
    error = json.loads(error)
    assert list(error) == ["error"]
    # NIM's clients know an error by its object.
    assert error["error"]["object"] == "error"
    assert error["error"]["type"] == "service_unavailable_error"
    assert not any("error" in json.loads(chunk) for chunk in chunks)


def test_a_bug_in_the_middle_of_a_stream_is_an_error_frame_without_details(checkpoint):
    def script(request):
        yield from says("What", None)(request)
        raise RuntimeError("secret")

    *_, error, done = frames_of(post(checkpoint, BODY | {"stream": True}, script))
    assert json.loads(error)["error"]["type"] == "server_error"
    assert "secret" not in error
    assert done == "[DONE]"


def test_an_engine_that_ends_without_an_answer_is_an_error(checkpoint):
    error_of(post(checkpoint, BODY, fails()), 500)


def test_silence_is_filled_with_comments(checkpoint):
    script = says("What", before=[0.3])
    response = post(
        checkpoint,
        BODY | {"stream": True},
        script,
        stream_ping_interval_s=0.05,
        first_output_wait_s=0.05,
    )
    assert ": ping\n\n" in response.text
    assert frames_of(response)[-1] == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(checkpoint, stream):
    async def use(client, engine):
        call = asyncio.create_task(client.post(CHAT, json=BODY | {"stream": stream}))
        await until(lambda: engine.open)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await until(lambda: engine.aborted)
        return engine

    script = fails(*says("What", None)(None), CLIENT_DEADLINE_S * 2)
    engine = serve(checkpoint, use, script)
    assert engine.aborted == [engine.requests[0].request_id]


def test_an_unknown_model_is_a_404(checkpoint):
    for path in (CHAT, STACK):
        error = error_of(post(checkpoint, BODY | {"model": "gpt"}, path=path), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_every_served_name_is_taken_and_echoed(checkpoint):
    async def use(client, engine):
        return (await client.post(CHAT, json=BODY | {"model": "b"})).json()["model"]

    async def run():
        options = ServerSettings(
            model=str(checkpoint), engine_socket="", served_model_names=["a", "b"]
        )
        engine = ScriptedEngine(says("What"))
        parts = {"engine_client": engine, "images": OneTileImages()}
        async with (
            running_server(options, **parts) as url,
            httpx2.AsyncClient(base_url=url) as client,
        ):
            return await use(client, engine)

    assert asyncio.run(run()) == "b"


def test_bad_input_is_a_400_that_names_the_field(checkpoint):
    for path, field in ((CHAT, "temperature"), (STACK, "sampling_params.temperature")):
        value = {"temperature": 9}
        body = BODY | (value if path == CHAT else {"sampling_params": value})
        assert error_of(post(checkpoint, body, path=path), 400)["param"] == field
    answer = post(checkpoint, BODY | {"foo": 1}, unknown_fields="refuse")
    assert error_of(answer, 400)["param"] == "foo"
    assert error_of(post(checkpoint, b"{"), 400)["param"] is None
    assert error_of(post(checkpoint, b""), 400)["param"] is None
    error = error_of(post(checkpoint, BODY | {"stream_options": {"include_usage": True}}), 400)
    assert error["param"] == "stream_options"


def test_unknown_fields_can_be_ignored(checkpoint):
    for body in (BODY | {"foo": 1}, BODY | {"max_token": 1}):
        response = post(checkpoint, body, unknown_fields="ignore")
        assert response.status_code == 200


def test_a_bad_image_is_a_400_that_names_its_part(checkpoint):
    class Bad:
        async def load(self, images, deadline=None):
            raise ImageError("not an image", 0)

    error = error_of(post(checkpoint, with_image(), images=Bad()), 400)
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert "not an image" in error["message"]


def test_images_that_wait_too_long_for_this_server_are_a_504(checkpoint):
    """It was a 400 that asked for fewer or smaller images."""

    class Slow:
        async def load(self, images, deadline=None):
            async with asyncio.timeout_at(deadline):
                await asyncio.Event().wait()

    response = post(checkpoint, with_image(), images=Slow(), image_deadline_s=0.05)
    assert "0.05 s" in error_of(response, 504)["message"]
    assert response.headers["retry-after"] == "5"


def test_images_that_wait_while_the_server_stops_are_a_503(checkpoint):
    """It was a 500, as for a bug, with a traceback in the log."""

    class ClosedImages:
        async def load(self, images, deadline=None):
            raise PoolClosed

    response = post(checkpoint, with_image(), images=ClosedImages())
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


def test_a_prompt_that_is_too_long_is_refused_before_its_images_are_loaded(checkpoint):
    images = OneTileImages()
    engine = ScriptedEngine(says(ANSWER), max_model_len=8)
    response = post(checkpoint, with_image(), images=images, engine=engine)
    error = error_of(response, 400)
    assert "max_model_len is 8" in error["message"]
    assert error["param"] == "messages"
    assert images.requests == []
    assert engine.requests == []


def test_a_long_text_is_refused_with_its_size(checkpoint):
    engine = ScriptedEngine(says(ANSWER), max_model_len=8192)
    body = BODY | {"messages": [{"role": "user", "content": "word " * 30_000}]}
    error = error_of(post(checkpoint, body, engine=engine), 400)
    assert "max_model_len is 8,192" in error["message"]


@pytest.mark.parametrize("max_tokens", [512, 511, 500])
def test_max_tokens_beyond_the_context_is_a_400(checkpoint, max_tokens):
    engine = ScriptedEngine(says(ANSWER), max_model_len=512)
    for field in ("max_tokens", "max_completion_tokens"):
        response = post(checkpoint, BODY | {field: max_tokens}, engine=engine)
        assert error_of(response, 400)["param"] == field
    assert engine.requests == []


def test_a_stop_token_out_of_the_vocabulary_is_a_400(checkpoint):
    error = error_of(post(checkpoint, BODY | {"stop_token_ids": [128264]}), 400)
    assert error["param"] == "stop_token_ids"


def test_requests_are_503_while_the_engine_is_not_ready(checkpoint):
    engine = ScriptedEngine(says(ANSWER))
    engine.is_ready, engine.info = False, None
    for path in (CHAT, STACK):
        response = post(checkpoint, BODY, engine=engine, path=path)
        assert error_of(response, 503)["type"] == "service_unavailable_error"
        assert response.headers["retry-after"] == "1"


def test_the_same_scripted_answer_comes_for_many_at_once(checkpoint):
    async def use(client, engine):
        calls = [
            client.post(CHAT, json=BODY | {"stream": bool(number % 2)}) for number in range(32)
        ]
        return await asyncio.gather(*calls)

    responses = serve(checkpoint, use)
    assert all(response.status_code == 200 for response in responses)
    assert len({response.headers["x-request-id"] for response in responses}) == 32


def test_detail_low_is_one_tile_of_the_same_picture_under_a_key_of_its_own(checkpoint):
    """Usage counts one token in any case; what the model sees has one tile's aspect ratio."""
    url = data_url(Image.fromarray(numpy.arange(56 * 112 * 3, dtype="uint8").reshape(56, 112, 3)))

    async def run():
        options = ServerSettings(
            model=str(checkpoint), engine_socket="", served_model_names=[MODEL]
        )
        engine = ScriptedEngine(says(ANSWER))
        async with (
            asyncio.timeout(CLIENT_DEADLINE_S),
            running_server(options, engine_client=engine) as base_url,
            httpx2.AsyncClient(base_url=base_url, timeout=CLIENT_DEADLINE_S) as client,
        ):
            usages = []
            for detail in ("low", "high", "auto", None, "low"):
                image = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
                body = BODY | {"messages": [{"role": "user", "content": [image]}]}
                usages.append((await client.post(CHAT, json=body)).json()["usage"])
        return usages, [request.images[0] for request in engine.requests]

    usages, (low, high, auto, unset, again) = asyncio.run(run())
    assert {usage["prompt_tokens"] for usage in usages} == {usages[0]["prompt_tokens"]}
    assert (low.num_tiles, low.aspect_ratio_id) == (1, 1)
    assert (high.num_tiles, high.aspect_ratio_id) == (2, 2)
    assert high == auto == unset
    assert low == again
    assert low.content_hash != high.content_hash
