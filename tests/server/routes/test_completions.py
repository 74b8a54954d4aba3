"""POST /v1/completions against a running server with a scripted engine."""

import asyncio
import json

import openai
import pytest
from support.http_side import (
    CLIENT_DEADLINE_S,
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    frames_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)
from support.polling import until

from vlmserve.models.batch import PromptLogprobs, TokenLogprobs
from vlmserve.router.errors import EngineDeadError, QueueFullError
from vlmserve.server.schemas.decoding import decode_body
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest, chat_generation
from vlmserve.server.schemas.openai.completions import CompletionRequest, completion_generation

TOKENIZER = meta_like_tokenizer()
PATH = "/v1/completions"
BOS, END, IMAGE = 128000, 128009, 128256
WHAT, IS = 3923, 374
BODY = {"model": MODEL, "prompt": "What is"}
ANSWER = " in this image?"
EMOJI = "🐻"


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def says(text, finish_reason="stop"):
    """Each answer to each prompt is this text."""
    return lambda request: [
        output_of(one, number)
        for number in range(len(request.answer_ids))
        for one in tokens_one_by_one(TOKENIZER, text, finish_reason)
    ]


def output_of(output, number):
    output.request_id = str(number)
    return output


def tells(text, finish_reason="length"):
    """The same with log-probabilities: -1 for what stands there, -2 for the word `is`."""

    def script(request):
        outputs = []
        for number in range(len(request.answer_ids)):
            for place, one in enumerate(tokens_one_by_one(TOKENIZER, text, finish_reason)):
                one.request_id = str(number)
                top = [one.token_ids[0], IS][: request.sampling.num_logprobs]
                one.logprobs = [TokenLogprobs(-1.0, top, [-1.0, -2.0][: len(top)])]
                if place == number == 0 and request.num_prompt_logprobs is not None:
                    one.prompt_logprobs = [None, *map(told, request.prompt_token_ids[1:])]
                outputs.append(one)
        return outputs

    return script


def told(token_id):
    """The token itself is the third likeliest, behind `?` and `is`."""
    return PromptLogprobs(token_id, -3.0, 3, [30, IS, token_id], [-1.0, -2.0, -3.0])


def serve(checkpoint, use, script=None, **settings):
    """Run `use(client, engine)` against a server and give what it gives."""

    async def run():
        context = settings.pop("context", 131072)
        engine = ScriptedEngine(script or says(ANSWER), max_model_len=context)
        async with client_of(checkpoint, engine, **settings) as client:
            return await use(client, engine)

    return asyncio.run(run())


def post(checkpoint, body, script=None, **settings):
    """One POST: the answer, and the engine."""

    async def use(client, engine):
        return await client.post(PATH, json=BODY | body), engine

    return serve(checkpoint, use, script, **settings)


def texts_of(response):
    return [choice["text"] for choice in response.json()["choices"]]


def chunks_of(response):
    *chunks, done = frames_of(response)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_the_answer_has_the_shape_of_openais(checkpoint):
    response, engine = post(checkpoint, {})
    answer = response.json()
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage"]
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert list(answer["choices"][0].items()) == [
        ("index", 0),
        ("text", ANSWER),
        ("logprobs", None),
        ("finish_reason", "stop"),
        ("stop_reason", None),
        ("prompt_logprobs", None),
    ]
    count = len(ids_of(ANSWER)) + 1
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "total_tokens": 3 + count,
        "completion_tokens": count,
    }
    (request,) = engine.requests
    assert request.prompt_token_ids == [BOS, WHAT, IS]
    assert (request.max_tokens, request.eos_token_ids) == (16, [128001, 128008, 128009])


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("What is", [[BOS, WHAT, IS]]),
        (["What is", "What"], [[BOS, WHAT, IS], [BOS, WHAT]]),
        ([WHAT, IS], [[WHAT, IS]]),
        ([[WHAT], [BOS, IS]], [[WHAT], [BOS, IS]]),
        (None, [[BOS]]),
        ("", [[BOS]]),
    ],
)
def test_a_prompt_may_be_written_in_every_way(checkpoint, prompt, prompts):
    response, engine = post(checkpoint, {"prompt": prompt})
    assert [request.prompt_token_ids for request in engine.requests] == prompts
    assert texts_of(response) == [ANSWER] * len(prompts)
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == sum(map(len, prompts))
    assert usage["completion_tokens"] == len(prompts) * (len(ids_of(ANSWER)) + 1)


def test_a_text_without_special_tokens_has_no_beginning_of_text(checkpoint):
    _, engine = post(checkpoint, {"add_special_tokens": False})
    assert engine.requests[0].prompt_token_ids == [WHAT, IS]


@pytest.mark.parametrize("text", ["<|image|>", "<|eot_id|>", "<|begin_of_text|>"])
def test_text_that_spells_special_tokens_is_text(checkpoint, text):
    _, engine = post(checkpoint, {"prompt": text})
    first, *rest = engine.requests[0].prompt_token_ids
    assert first == BOS
    assert rest
    assert max(rest) < BOS


def test_choices_are_counted_prompt_by_prompt(checkpoint):
    def script(request):
        name = " is" if len(request.prompt_token_ids) == 3 else " in"
        return [
            output_of(one, number)
            for number in (1, 0)
            for one in tokens_one_by_one(TOKENIZER, name + "?" * number, "stop")
        ]

    async def use(client, engine):
        body = BODY | {"prompt": ["What is", "What"], "n": 2}
        plain = (await client.post(PATH, json=body)).json()
        streamed = await client.post(PATH, json=body | {"stream": True})
        return plain, chunks_of(streamed)

    plain, chunks = serve(checkpoint, use, script)
    expected = [" is", " is?", " in", " in?"]
    assert [choice["index"] for choice in plain["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in plain["choices"]] == expected
    joined = dict.fromkeys(range(4), "")
    for chunk in chunks:
        joined[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(joined.values()) == expected
    assert plain["usage"]["prompt_tokens"] == 3 + 2


def test_without_a_seed_each_prompt_draws_its_own_and_with_one_all_have_it(checkpoint):
    _, engine = post(checkpoint, {"prompt": ["What"] * 3})
    assert len({request.sampling.seed for request in engine.requests}) == 3
    _, engine = post(checkpoint, {"prompt": ["What"] * 3, "seed": 7})
    assert {request.sampling.seed for request in engine.requests} == {7}


def test_streamed_pieces_joined_are_the_plain_answer(checkpoint):
    body = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = chunks_of(post(checkpoint, body)[0])
    assert list(chunks[0]) == ["id", "object", "created", "model", "choices", "usage"]
    assert list(chunks[0]["choices"][0]) == [
        "index", "text", "logprobs", "finish_reason", "stop_reason",
    ]  # fmt: skip
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["prompt_tokens"]) == ([], 3)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_chunks_are_obfuscated_where_asked(checkpoint):
    body = {"stream": True, "stream_options": {"include_obfuscation": True}}
    chunks = chunks_of(post(checkpoint, body)[0])
    sizes = {
        (len(chunk["choices"][0]["text"].encode()) + len(chunk["obfuscation"])) % 32
        for chunk in chunks
    }
    assert sizes == {0}
    assert "obfuscation" not in chunks_of(post(checkpoint, {"stream": True})[0])[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["What is", [BOS, WHAT, IS]])
def test_echo_puts_the_prompt_in_front(checkpoint, stream, prompt):
    body = {"echo": True, "prompt": [prompt, "?"] if isinstance(prompt, str) else prompt, "n": 2}
    response, _ = post(checkpoint, body | {"stream": stream})
    if not stream:
        texts = texts_of(response)
    else:
        texts = [""] * (4 if isinstance(prompt, str) else 2)
        for chunk in chunks_of(response):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    others = ["?" + ANSWER] * 2 if isinstance(prompt, str) else []
    assert texts == ["What is" + ANSWER] * 2 + others


def test_logprobs_have_the_four_lists(checkpoint):
    response, engine = post(checkpoint, {"logprobs": 2}, tells(" in this", "stop"))
    assert response.json()["choices"][0]["logprobs"] == {
        "tokens": [" in", " this", "<|eot_id|>"],
        "token_logprobs": [-1.0, -1.0, -1.0],
        "top_logprobs": [
            {" in": -1.0, " is": -2.0},
            {" this": -1.0, " is": -2.0},
            {"<|eot_id|>": -1.0, " is": -2.0},
        ],
        "text_offset": [0, 3, 8],
    }
    assert engine.requests[0].num_prompt_logprobs is None


def test_logprobs_zero_tells_of_the_tokens_alone(checkpoint):
    response, engine = post(checkpoint, {"logprobs": 0}, tells(" in"))
    assert response.json()["choices"][0]["logprobs"]["top_logprobs"] == [{" in": -1.0}]
    assert engine.requests[0].sampling.num_logprobs == 0


@pytest.mark.parametrize("stream", [False, True])
def test_echo_tells_of_the_prompts_tokens_too(checkpoint, stream):
    body = {"echo": True, "logprobs": 1, "n": 2, "stream": stream}
    response, _ = post(checkpoint, body, tells(" in"))
    expected = {
        "tokens": ["<|begin_of_text|>", "What", " is", " in"],
        "token_logprobs": [None, -3.0, -3.0, -1.0],
        "top_logprobs": [None, {"What": -3.0, "?": -1.0}, {" is": -3.0, "?": -1.0}, {" in": -1.0}],
        "text_offset": [0, 0, 4, 7],
    }
    if not stream:
        for choice in response.json()["choices"]:
            assert (choice["text"], choice["logprobs"]) == ("What is in", expected)
            assert choice["prompt_logprobs"] is None
        return
    for index in range(2):
        lists = {name: [] for name in expected}
        for chunk in chunks_of(response):
            (choice,) = chunk["choices"]
            if choice["index"] == index and choice["logprobs"]:
                for name, values in choice["logprobs"].items():
                    lists[name] += values
        assert lists == expected


def test_offsets_count_characters_of_the_text_though_tokens_split_them(checkpoint):
    text = f"a{EMOJI}b"
    response, _ = post(checkpoint, {"logprobs": 0}, tells(text))
    lists = response.json()["choices"][0]["logprobs"]
    assert len(lists["tokens"]) == 6
    assert lists["text_offset"] == [0, 1, 1, 1, 1, 2]
    assert response.json()["choices"][0]["text"] == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_echo_of_no_new_token_scores_the_prompt(checkpoint, stream, logprobs):
    body = {"echo": True, "max_tokens": 0, "logprobs": logprobs, "stream": stream}
    response, engine = post(checkpoint, body | {"prompt": ["What is", "?"]}, tells(" in"))
    assert {request.max_tokens for request in engine.requests} == {1}
    if stream:
        chunks = chunks_of(response)
        told = [chunk["choices"][0] for chunk in chunks]
        assert [one["text"] for one in told if one["text"]] == ["What is", "?"]
        assert [one["index"] for one in told if one["finish_reason"] == "length"] == [0, 1]
        tokens = sum(len(one["logprobs"]["tokens"]) for one in told if one["logprobs"])
        assert tokens == (0 if logprobs is None else 5)
        return
    first, second = response.json()["choices"]
    assert (first["text"], second["text"]) == ("What is", "?")
    assert first["finish_reason"] == second["finish_reason"] == "length"
    if logprobs is not None:
        assert first["logprobs"]["tokens"] == ["<|begin_of_text|>", "What", " is"]
        assert second["logprobs"]["token_logprobs"] == [None, -3.0]
    assert response.json()["usage"] == {
        "prompt_tokens": 5,
        "total_tokens": 5,
        "completion_tokens": 0,
    }


def test_prompt_logprobs_come_with_each_prompts_choices(checkpoint):
    body = {"prompt": ["What is", "?"], "prompt_logprobs": 3, "echo": True, "logprobs": 1}
    response, engine = post(checkpoint, body, tells(" in"))
    first, second = response.json()["choices"]
    assert {request.num_prompt_logprobs for request in engine.requests} == {3}
    assert [entry and list(entry) for entry in first["prompt_logprobs"]] == [
        None, ["3923", "30", "374"], ["374", "30"],
    ]  # fmt: skip
    assert len(second["prompt_logprobs"]) == 2
    assert first["logprobs"]["top_logprobs"][1] == {"What": -3.0, "?": -1.0}


def test_sampling_forms_and_extras_reach_the_engine(checkpoint):
    fields = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "seed": 5,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5,
        "logit_bias": {"7": 2}, "min_tokens": 2, "max_tokens": 9, "stop_token_ids": [30],
        "priority": -3, "ignore_eos": True, "n": 2, "best_of": 2, "cache_salt": "s",
        "user": "u", "timeout_s": 5,
    }  # fmt: skip
    response, engine = post(checkpoint, fields)
    assert response.status_code == 200
    (request,) = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 3)
    assert (sampling.min_p, sampling.seed, sampling.min_tokens) == (0.125, 5, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, ((7, 2.0),))
    assert (request.max_tokens, request.stop_token_ids, request.priority) == (9, [30], -3)
    assert len(request.answer_ids) == 2
    assert request.tenant


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"guided_choice": ["a", "b"]}, "guided_choice"),
        ({"nvext": {"guided_regex": "a+"}}, "nvext.guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_an_answer_may_be_held_to_a_form_as_in_a_chat(fields, field):
    raw = json.dumps(BODY | fields).encode()
    generation = completion_generation(decode_body(raw, CompletionRequest))
    chat = BODY | fields | {"messages": [{"role": "user", "content": "a"}]}
    del chat["prompt"]
    other = chat_generation(decode_body(json.dumps(chat).encode(), ChatCompletionRequest))
    assert generation.grammar_field == other.grammar_field == field
    assert generation.grammar == other.grammar is not None


@pytest.mark.parametrize("context", [20, 8])
def test_the_default_of_sixteen_tokens_shrinks_with_the_context(checkpoint, context):
    _, engine = post(checkpoint, {}, context=context)
    assert engine.requests[0].max_tokens == min(16, context - 3)


def test_a_stop_string_ends_one_answer_and_not_the_others(checkpoint):
    body = {"prompt": ["What", "What is"], "stop": [" image"], "stream": True}
    response, engine = post(checkpoint, body)
    texts = ["", ""]
    for chunk in chunks_of(response):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [" in this"] * 2
    assert engine.aborted == [request.request_id for request in engine.requests]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, [1]]}, "prompt[1]"),
        ({"prompt": ["a", "b\0"]}, "prompt[1]"),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
        ({"prompt": [[1], [128264]]}, "prompt[1]"),
        ({"prompt": [IMAGE]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 30}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 131072}, "max_tokens"),
        ({"max_tokens": 131070}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 65}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "a " * 4000, "echo": True, "logprobs": 20}, "logprobs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"logit_bias": {"128264": 1}}, "logit_bias"),
        ({"max_token": 9}, "max_token"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_400_that_names_the_field(checkpoint, body, param):
    response, engine = post(checkpoint, body)
    assert error_of(response, 400)["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize("body", [{"suffix": ""}, {"best_of": 1, "n": 2}, {"best_of": 1}])
def test_neutral_values_are_taken(checkpoint, body):
    assert post(checkpoint, body)[0].status_code == 200


def test_a_prompt_over_the_context_is_named(checkpoint):
    response, engine = post(checkpoint, {"prompt": ["a", "What is " * 100]}, context=128)
    error = error_of(response, 400)
    assert error["param"] == "prompt[1]"
    assert "max_model_len is 128" in error["message"]
    assert engine.requests == []


def test_many_long_prompts_are_refused_together(checkpoint):
    """Each fits; all would keep a thread busy for long, and the queue full."""
    response, engine = post(checkpoint, {"prompt": ["What is " * 40_000] * 8})
    assert "524,288" in error_of(response, 400)["message"]
    assert engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_admitted_together_or_not_at_all(checkpoint, stream):
    def script(request):
        if len(request.prompt_token_ids) == 2:
            return [QueueFullError("the queue is full", 3.0)]
        return [0.01, *says(ANSWER)(request)]

    response, engine = post(
        checkpoint, {"prompt": ["?", "What is", "What is"], "stream": stream}, script
    )
    error_of(response, 429)
    assert response.headers["retry-after"] == "3"
    assert engine.aborted == [request.request_id for request in engine.requests[1:]]


def test_an_error_in_the_middle_of_a_stream_ends_all_prompts(checkpoint):
    def script(request):
        if len(request.prompt_token_ids) == 2:
            return [EngineDeadError("gone")]
        return says(ANSWER, None)(request)

    response, engine = post(checkpoint, {"prompt": ["What is", "?"], "stream": True}, script)
    *_, error, done = frames_of(response)
    assert json.loads(error)["error"]["object"] == "error"
    assert json.loads(error)["error"]["type"] == "service_unavailable_error"
    assert done == "[DONE]"
    assert engine.aborted == [engine.requests[0].request_id]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_all_its_prompts(checkpoint, stream):
    def script(request):
        return [*says("What", None)(request), CLIENT_DEADLINE_S * 2]

    async def use(client, engine):
        body = BODY | {"prompt": ["a", "b", "c"], "n": 2, "stream": stream}
        call = asyncio.create_task(client.post(PATH, json=body))
        await until(lambda: engine.requests)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await until(lambda: len(engine.aborted) == 6)
        return engine

    engine = serve(checkpoint, use, script)
    ids = [one for request in engine.requests for one in request.answer_ids]
    assert sorted(engine.aborted) == sorted(ids)


def test_an_unknown_model_is_a_404_and_no_engine_a_503(checkpoint):
    assert error_of(post(checkpoint, {"model": "gpt"})[0], 404)["param"] == "model"

    async def use(client, engine):
        engine.is_ready, engine.info = False, None
        return await client.post(PATH, json=BODY)

    assert serve(checkpoint, use).headers["retry-after"] == "1"


def test_the_sdk_reads_plain_and_streamed_answers(checkpoint):
    async def use(client, engine):
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        async with sdk:
            call = {"model": MODEL, "prompt": ["What", "is"], "echo": True, "logprobs": 1}
            plain = await sdk.completions.create(**call)
            texts = ["", ""]
            async for chunk in await sdk.completions.create(**call, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].text
            with pytest.raises(openai.BadRequestError) as bad:
                await sdk.completions.create(**call, suffix="x")
        return plain, texts, bad.value

    plain, texts, bad = serve(checkpoint, use, tells(ANSWER))
    assert [choice.text for choice in plain.choices] == texts == ["What" + ANSWER, "is" + ANSWER]
    assert plain.choices[0].logprobs.tokens[:2] == ["<|begin_of_text|>", "What"]
    assert bad.param == "suffix"
