"""POST /tokenize and /detokenize: what clients count and read tokens with."""

import asyncio

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

TOKENIZER = meta_like_tokenizer()
CHAT = "/v1/chat/completions"
BOS, IMAGE, END_OF_TURN = 128000, 128256, 128009
WORDS = [3923, 374, 304, 420, 2217, 30]
QUESTION = [{"role": "user", "content": "What is in this image?"}]
IMAGE_PART = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
LOOK = [{"role": "user", "content": [{"type": "text", "text": "What is?"}, IMAGE_PART]}]


def serve(checkpoint, use, **settings):
    """Run `use(client, engine)` against a server and give what it gives."""

    async def run():
        engine = ScriptedEngine(lambda request: tokens_one_by_one(TOKENIZER, "What?"))
        async with client_of(checkpoint, engine, **settings) as client:
            return await use(client, engine)

    return asyncio.run(run())


def post(checkpoint, path, body, **settings):
    return serve(checkpoint, lambda client, engine: client.post(path, json=body), **settings)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_a_prompt_has_the_shape_that_clients_know(checkpoint, path):
    body = {"model": MODEL, "prompt": "What is in this image?"}
    assert list(post(checkpoint, path, body).json().items()) == [
        ("count", 7),
        ("max_model_len", 131072),
        ("tokens", [BOS, *WORDS]),
        ("token_strs", None),
    ]


def test_special_tokens_are_left_out_and_names_told_where_asked(checkpoint):
    body = {"prompt": "What is", "add_special_tokens": False, "return_token_strs": True}
    answer = post(checkpoint, "/tokenize", body).json()
    assert (answer["tokens"], answer["token_strs"]) == ([3923, 374], ["What", "Ġis"])


@pytest.mark.parametrize("text", ["<|image|>", "<|eot_id|>", "a<|begin_of_text|>"])
def test_a_prompt_that_spells_special_tokens_is_text(checkpoint, text):
    answer = post(checkpoint, "/tokenize", {"prompt": text}).json()
    assert answer["tokens"][0] == BOS
    assert max(answer["tokens"][1:]) < BOS
    back = post(checkpoint, "/detokenize", {"tokens": answer["tokens"][1:]}).json()
    assert back == {"prompt": text}


@pytest.mark.parametrize("messages", [QUESTION, LOOK])
def test_messages_are_counted_as_the_chat_route_runs_them(checkpoint, messages):
    async def use(client, engine):
        body = {"model": MODEL, "messages": messages}
        counted = (await client.post("/tokenize", json=body)).json()
        usage = (await client.post(CHAT, json=body)).json()["usage"]
        return counted, usage, engine.requests[0].prompt_token_ids

    counted, usage, run = serve(checkpoint, use)
    assert counted["tokens"] == run
    assert counted["count"] == len(run) == usage["prompt_tokens"]


def test_an_image_is_one_token_and_is_not_fetched(checkpoint):
    images = OneTileImages()
    answer = post(checkpoint, "/tokenize", {"messages": LOOK}, images=images).json()
    assert answer["tokens"].count(IMAGE) == 1
    assert images.requests == []


@pytest.mark.parametrize("template", [True, False])
def test_without_a_generation_prompt_the_last_turn_ends_the_tokens(tmp_path, template):
    options = {} if template else {"template": None}
    checkpoint = write_checkpoint(tmp_path, **options)
    body = {"messages": QUESTION, "add_generation_prompt": False}
    answer = post(checkpoint, "/tokenize", body).json()
    whole = post(checkpoint, "/tokenize", {"messages": QUESTION}).json()
    assert answer["tokens"][-1] == END_OF_TURN
    assert whole["tokens"] == [*answer["tokens"], 128006, 78191, 128007, 271]


def test_tools_are_counted_with_messages(checkpoint):
    tools = [{"type": "function", "function": {"name": "look"}}]
    counts = [
        post(checkpoint, "/tokenize", {"messages": QUESTION, **extra}).json()["count"]
        for extra in ({}, {"tools": tools})
    ]
    assert counts[0] < counts[1]


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_token_ids_become_the_text_that_they_were(checkpoint, path):
    body = {"model": MODEL, "tokens": [BOS, *WORDS, END_OF_TURN]}
    text = "<|begin_of_text|>What is in this image?<|eot_id|>"
    assert post(checkpoint, path, body).json() == {"prompt": text}
    assert post(checkpoint, path, {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": QUESTION}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [{"type": "function", "function": {"name": "b"}}]},
         "tools"),
        ("/tokenize", {"prompt": "a\0"}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [128257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_400_that_names_the_field(checkpoint, path, body, param):
    assert error_of(post(checkpoint, path, body), 400)["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"])
def test_an_unknown_model_is_a_404(checkpoint, path):
    body = {"model": "other"} | ({"tokens": []} if "detok" in path else {"prompt": ""})
    assert error_of(post(checkpoint, path, body), 404)["code"] == "model_not_found"


def test_they_answer_while_the_engine_is_loading(checkpoint):
    async def use(client, engine):
        engine.is_ready, engine.info = False, None
        told = await client.post("/tokenize", json={"prompt": "What"})
        return told, await client.post("/detokenize", json={"tokens": [3923]})

    told, text = serve(checkpoint, use)
    assert (told.json()["tokens"], text.json()) == ([BOS, 3923], {"prompt": "What"})


def test_a_text_longer_than_the_context_is_counted(checkpoint):
    """Whether a text fits is what clients ask."""

    async def use(client, engine):
        body = {"prompt": "What is " * 100_000, "add_special_tokens": False}
        return await client.post("/tokenize", json=body)

    answer = serve(checkpoint, use).json()
    assert answer["count"] > answer["max_model_len"] == 131072


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "What is " * 1_250_000},
        {"messages": [{"role": "user", "content": "What is " * 1_250_000}]},
    ],
)
def test_ten_megabytes_are_refused(checkpoint, body):
    error = error_of(post(checkpoint, "/tokenize", body), 400)
    assert "at most 524,288" in error["message"]
    assert error["param"] in body
