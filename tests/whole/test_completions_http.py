"""/v1/completions and /tokenize with the real server and the bundled model."""

import json
import math
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx2

MODEL = "vlmserve-tiny-vision"
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12}


def post(server, path, body):
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def test_the_tokens_of_messages_complete_to_what_the_chat_answers(server, sdk):
    messages = [{"role": "user", "content": "Hello!"}]
    tokens = post(server, "/tokenize", {"messages": messages})["tokens"]
    completed = sdk.completions.create(**GREEDY, prompt=tokens).choices[0]
    chat = sdk.chat.completions.create(**GREEDY, messages=messages).choices[0]
    assert completed.text == chat.message.content
    assert completed.finish_reason == chat.finish_reason
    whole = post(server, "/detokenize", {"tokens": tokens})["prompt"]
    assert "Hello!<|eot_id|>" in whole


def test_each_of_several_prompts_gets_the_answer_that_it_gets_alone(sdk):
    prompts = ["The circle is", "Hello!", "What is", "A red"]
    alone = [sdk.completions.create(**GREEDY, prompt=one).choices[0].text for one in prompts]
    together = sdk.completions.create(**GREEDY, prompt=prompts)
    assert [choice.text for choice in together.choices] == alone
    streamed = [""] * len(prompts)
    for chunk in sdk.completions.create(**GREEDY, prompt=prompts, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_an_echo_scores_a_text_as_it_was_scored_when_it_was_written(sdk):
    """The sum of a continuation's log-probabilities, as evaluations ask for it."""
    written = sdk.completions.create(**GREEDY, prompt="The circle is", logprobs=1).choices[0]
    text = "The circle is" + written.text
    call = GREEDY | {"max_tokens": 0}
    echoed = sdk.completions.create(**call, prompt=text, echo=True, logprobs=1)
    (choice,) = echoed.choices
    lists = choice.logprobs
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert echoed.usage.completion_tokens == 0
    assert lists.token_logprobs[0] is None
    names = lists.tokens[1:]
    for name, offset in zip(names, lists.text_offset[1:], strict=True):
        assert text[offset : offset + len(name)] == name
    # The end of the turn was scored too, but is no text to echo.
    count = sum(token != "<|eot_id|>" for token in written.logprobs.tokens)
    assert names[-count:] == written.logprobs.tokens[:count]
    for one, other in zip(
        lists.token_logprobs[-count:], written.logprobs.token_logprobs[:count], strict=True
    ):
        assert math.isclose(one, other, abs_tol=1e-3)


def test_a_client_that_leaves_frees_all_prompts(server, sdk, wait_for):
    body = GREEDY | {
        "prompt": ["The circle is", "Hello!", "A red"], "n": 2, "max_tokens": 8000,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    with (
        httpx2.Client(timeout=60) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        chunks = response.iter_bytes()  # kept: the connection ends with it
        next(chunks)
        assert wait_for(lambda: server.metric("num_requests_running") > 0)
    busy = ("num_requests_running", "num_requests_waiting", "vlmserve_text_blocks_used")
    assert wait_for(lambda: not any(map(server.metric, busy)))
    assert sdk.completions.create(**GREEDY, prompt="Hello!").choices[0].text


def test_a_form_holds_for_every_prompt(sdk):
    answers = sdk.completions.create(
        **GREEDY, prompt=["The circle is", "Hello!"], extra_body={"guided_choice": ["yes", "no"]}
    )
    assert {choice.text for choice in answers.choices} <= {"yes", "no"}


def test_seeded_prompts_repeat_and_unseeded_ones_differ(sdk):
    call = GREEDY | {"temperature": 2.0, "prompt": ["Hello!"] * 4, "max_tokens": 16}
    seeded = sdk.completions.create(**call, seed=5)
    assert len({choice.text for choice in seeded.choices}) == 1
    assert len({choice.text for choice in sdk.completions.create(**call).choices}) > 1


def test_many_requests_of_many_prompts_each_get_their_own(sdk):
    prompts = ["The circle is", "Hello!", "What is"]
    expected = [c.text for c in sdk.completions.create(**GREEDY, prompt=prompts).choices]
    orders = [prompts[turn:] + prompts[:turn] for turn in range(3)] * 2
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda one: sdk.completions.create(**GREEDY, prompt=one), orders))
    by_prompt = dict(zip(prompts, expected, strict=True))
    for order, answer in zip(orders, answers, strict=True):
        assert [choice.text for choice in answer.choices] == [by_prompt[one] for one in order]
