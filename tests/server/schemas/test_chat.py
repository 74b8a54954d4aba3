"""What the two APIs take, refuse and make of a body, without a server."""

import functools
import json
from pathlib import Path

import msgspec
import pytest

from vlmserve.models.batch import SamplingParams
from vlmserve.server.errors import BadRequestError
from vlmserve.server.prompts.conversation import ImagePart, TextPart, with_images_in_front
from vlmserve.server.schemas.decoding import MAX_NAMED_FIELDS, decode_body, decode_leniently
from vlmserve.server.schemas.lenient import lenient
from vlmserve.server.schemas.llama_stack.requests import (
    StackChatRequest,
    stack_generation,
    stack_model,
)
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest, chat_generation
from vlmserve.server.schemas.openai.completions import CompletionRequest

DATA = Path(__file__).resolve().parents[2] / "data"
ANSWER = {"role": "assistant", "content": "It is"}
DEEP = functools.reduce(lambda inner, _: {"a": inner}, range(20), {})
TURN = {"role": "user", "content": "hi"}


def dumps(body) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def parse(body, **options):
    return decode_body(dumps(body), ChatCompletionRequest, **options)


def generation(**fields):
    return chat_generation(parse({"model": "m", "messages": [TURN]} | fields))


def messages_of(*turns):
    return generation(messages=list(turns)).messages


def stack(**fields):
    body = {"model_id": "m", "messages": [TURN]} | fields
    return stack_generation(decode_body(json.dumps(body).encode(), StackChatRequest))


def refused(call, *args, **kwargs):
    with pytest.raises(BadRequestError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_both_documented_curls_ask_for_the_same():
    chat = chat_generation(parse((DATA / "chat.request.json").read_bytes()))
    body = decode_body((DATA / "llama_stack.request.json").read_bytes(), StackChatRequest)
    other = stack_generation(body)
    (one,), (two,) = chat.messages, other.messages
    strip = lambda message: [  # noqa: E731
        part.url if isinstance(part, ImagePart) else part.text for part in message.parts
    ]
    assert one.role == two.role == "user"
    assert strip(with_images_in_front(one)) == strip(two)
    assert (chat.max_tokens, other.max_tokens) == (256, None)
    assert stack_model(body) == "meta/llama-3.2-11b-vision-instruct"


def test_defaults_are_the_documented_ones():
    request = generation()
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, -1)
    assert (request.max_tokens, request.stop, request.ignore_eos) == (None, (), False)


def test_nulls_are_as_good_as_absent_fields():
    fields = [f for f in ChatCompletionRequest.__struct_fields__ if f not in ("model", "messages")]
    request = generation(**dict.fromkeys(fields))
    assert request.sampling.temperature == 1.0


def test_two_requests_without_a_seed_draw_different_ones():
    assert generation().sampling.seed != generation().sampling.seed


def test_sampling_fields_arrive():
    request = generation(
        temperature=0, top_p=0.5, top_k=3, seed=7, stop="x", stop_token_ids=[5], ignore_eos=True
    )
    assert request.sampling == SamplingParams(temperature=0.0, top_p=0.5, top_k=3, seed=7)
    assert (request.stop, request.stop_token_ids, request.ignore_eos) == (("x",), (5,), True)


def test_a_negative_seed_is_a_seed():
    assert 0 <= generation(seed=-1).sampling.seed < 2**63


def test_max_completion_tokens_is_the_newer_name_of_max_tokens():
    assert generation(max_completion_tokens=3).max_tokens == 3
    assert generation(max_completion_tokens=3, max_tokens=3).max_tokens == 3
    error = refused(generation, max_completion_tokens=3, max_tokens=4)
    assert error.param == "max_completion_tokens"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"min_p": -0.01}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 2**31}, "min_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": "a\0b"}, "stop"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"frequency_penalty": 2.01}, "frequency_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 2.01}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias[...]"),
        ({"logit_bias": {"5": None}}, "logit_bias[...]"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"foo": 1}}, "stream_options.foo"),
        ({"foo": 1}, "foo"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"a": ["b\0"]}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {str(i): 0 for i in range(65)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": DEEP}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {
                "continue_final_message": True,
                "messages": [TURN, ANSWER],
                "add_generation_prompt": True,
            },
            "continue_final_message",
        ),
        ({"messages": []}, "messages"),
        ({"messages": [TURN] * 2049}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, "messages[0].content"),
        ({"messages": [TURN, {"role": "user", "content": "", "x": 1}]}, "messages[1].x"),
        ({"model": None}, "model"),
    ],
)
def test_a_bad_field_is_named(fields, param):
    error = refused(generation, **fields)
    assert error.param == param
    assert param.split("[")[0].split(".")[0] in error.message


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "text", "text": 1}, ".text"),
        ({"type": "text", "text": "\0"}, ".text"),
        ({"type": "text", "text": "a", "b": 1}, ".b"),
        ({"type": "image_url"}, ".image_url"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": 1}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "u", "detail": "x"}}, ".image_url.detail"),
        ({"type": "input_audio", "input_audio": {}}, ".type"),
        ({"text": "a"}, ".type"),
    ],
)
def test_a_bad_part_is_named_by_its_path(part, param):
    turn = {"role": "user", "content": [{"type": "text", "text": "a"}, part]}
    assert refused(generation, messages=[turn]).param == f"messages[0].content[1]{param}"


def test_only_a_users_message_may_hold_an_image():
    part = {"type": "image_url", "image_url": "u"}
    for role in ("system", "developer", "assistant"):
        error = refused(generation, messages=[{"role": role, "content": [part]}])
        assert error.param == "messages[0].content[0].type"


def test_sampling_fields_at_null_or_neutral_change_nothing():
    plain = generation(seed=1).sampling
    neutral = {
        "min_p": 0,
        "min_tokens": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1,
        "logit_bias": {},
        "logprobs": False,
        "top_logprobs": 0,
    }
    assert generation(seed=1, **neutral).sampling == plain
    assert generation(seed=1, **dict.fromkeys(neutral)).sampling == plain
    assert plain == SamplingParams(seed=1)


def test_every_sampling_field_reaches_the_engine():
    assert generation(
        seed=1,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        min_tokens=3,
        presence_penalty=-1.5,
        frequency_penalty=0.25,
        repetition_penalty=1.3,
        logit_bias={"5": -100, "0": 2.5},
        logprobs=True,
        top_logprobs=4,
    ).sampling == SamplingParams(
        seed=1,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        min_tokens=3,
        presence_penalty=-1.5,
        frequency_penalty=0.25,
        repetition_penalty=1.3,
        logit_bias=((5, -100.0), (0, 2.5)),
        num_logprobs=4,
    )


def test_logprobs_alone_ask_for_the_chosen_token_only():
    assert generation(logprobs=True).sampling.num_logprobs == 0


def test_llama_stack_asks_for_logprobs_and_a_repetition_penalty():
    asked = stack(logprobs={"top_k": 3}, sampling_params={"repetition_penalty": 1.5}).sampling
    assert (asked.num_logprobs, asked.repetition_penalty) == (3, 1.5)
    for off in (None, {}, {"top_k": 0}, {"top_k": None}):
        unset = stack(logprobs=off, sampling_params={"repetition_penalty": 0}).sampling
        assert (unset.num_logprobs, unset.repetition_penalty) == (None, 1.0)


def test_the_documented_list_is_taken_without_effect():
    generation(
        user="u",
        metadata={"a": "b"},
        safety_identifier="s",
        prompt_cache_key="k",
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_a_byte_order_mark_is_skipped(encoding):
    body = json.dumps({"model": "m", "messages": [TURN]}).encode(encoding)
    assert parse(body).messages[0].content == "hi"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(encoding):
    body = json.dumps({"model": "m", "messages": [TURN]}).encode(encoding)
    assert "send it in UTF-8" in refused(parse, body).message


def test_unknown_fields_are_dropped_when_asked():
    turn = {"role": "user", "content": [{"type": "text", "text": "a", "b": 1}], "c": 2}
    body = {"model": "m", "messages": [TURN, turn], "d": 3}
    assert parse(body, unknown="ignore").messages[1].content[0].text == "a"
    assert refused(parse, body | {"n": 0}, unknown="ignore").param == "n"


def test_an_unknown_field_within_a_mapping_is_dropped_too():
    """It used to be an error of the server's: of a mapping no key is told."""
    parameters = {"a": {"param_type": "str"}, "b": {"param_type": "int", "units": "m", "x": 1}}
    tools = [{"tool_name": "f", "parameters": parameters}]
    body = {"model": "m", "messages": [TURN], "tools": tools}
    assert refused(decode_body, dumps(body), StackChatRequest).message.startswith("tools[0]")
    decoded = decode_body(dumps(body), StackChatRequest, unknown="ignore")
    assert decoded.tools[0].parameters["b"].param_type == "int"


@pytest.mark.parametrize(
    "place",
    ["y", "messages", "messages[0]", "messages[7]", "messages[...]", f"a[{'9' * 5000}]", ""],
)
def test_a_name_that_reads_like_a_path_is_an_unknown_field_like_any_other(place):
    """The server used to answer 500 or 400 where it had to ignore such a field of the body."""
    body = {"model": "m", "messages": [TURN], f"x` - at `$.{place}": 1}
    assert "not a field" in refused(parse, body).message
    assert parse(body, unknown="ignore").messages[0].content == TURN["content"]
    body = {"model": "m", "messages": [TURN | {f"x` - at `$.{place}": 1}]}
    error = refused(decode_body, dumps(body), ChatCompletionRequest)
    assert error.param.startswith("messages[0].x` - at")
    assert parse(body, unknown="ignore").messages[0].content == TURN["content"]


def test_any_number_of_unknown_fields_is_dropped_in_one_pass():
    """The server used to reject the 65th field: it read the body again for each."""
    body = {"model": "m", "messages": [TURN]} | {f"x{i}": 1 for i in range(10_000)}
    decoded = decode_leniently(dumps(body), ChatCompletionRequest)
    assert decoded.unknown_fields == [f"x{i}" for i in range(MAX_NAMED_FIELDS)]
    assert decoded.value.messages[0].content == TURN["content"]
    assert "x0, x1" in refused(parse, body).message


def test_unknown_fields_are_named_at_any_depth_in_their_order():
    turn = {"role": "user", "content": [{"type": "text", "text": "a", "b": 1}], "c": 2}
    schema = {"type": "object", "properties": {"not": {"a": {"field": 1}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "e": 1}}
    body = {"z": 3, "model": "m", "messages": [TURN, turn], "tools": [tool], "metadata": {"f": 1}}
    decoded = decode_leniently(dumps(body), ChatCompletionRequest)
    expected = ["z", "messages[1].content[0].b", "messages[1].c", "tools[0].function.e"]
    assert decoded.unknown_fields == expected
    error = refused(parse, body)
    assert error.message.startswith(", ".join(expected) + " are not fields of this API")
    assert error.param == "z"


@pytest.mark.parametrize("schema", [ChatCompletionRequest, CompletionRequest, StackChatRequest])
def test_a_lenient_twin_has_every_field_of_its_schema(schema):
    fields = {field.name: field for field in msgspec.structs.fields(schema)}
    twins = {field.name: field for field in msgspec.structs.fields(lenient(schema))}
    assert issubclass(lenient(schema), schema)
    assert fields.keys() == twins.keys()
    for name, field in fields.items():
        assert (field.encode_name, field.default) == (twins[name].encode_name, twins[name].default)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{}x",
        b'{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":NaN}',
        b'{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":Infinity}',
        b'{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":1e999}',
        b'{"model":"m","messages":[{"role":"user","content":"a"}],"max_tokens":1e999}',
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"a"}],"metadata":' + b"[" * 100_000,
        b'{"model":"m","messages":[{"role":"user","content":"a"}],"tools":' + b"[" * 100_000,
        '{"model":"m"}'.encode("utf-16"),
    ],
)
@pytest.mark.parametrize("ignore_unknown", [False, True])
@pytest.mark.parametrize("schema", [ChatCompletionRequest, StackChatRequest])
def test_what_is_not_json_or_not_an_object_is_refused(body, ignore_unknown, schema):
    refused(decode_body, body, schema, unknown="ignore" if ignore_unknown else "refuse")


def test_image_urls_come_as_an_object_or_bare():
    turn = {
        "role": "user",
        "content": [
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": "u1", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "u2", "detail": "high"}},
            {"type": "image_url", "image_url": "u3"},
        ],
    }
    assert messages_of(turn)[0].parts == (
        TextPart("a"),
        ImagePart("u1", "messages[0].content[1].image_url.url", 1),
        ImagePart("u2", "messages[0].content[2].image_url.url"),
        ImagePart("u3", "messages[0].content[3].image_url"),
    )


def test_an_img_tag_with_a_data_url_in_a_string_content_is_an_image():
    content = "a <img src=\"data:image/png;base64,QQ==\"/> b<img src='data:image/gif;base64,Qg' >"
    assert messages_of({"role": "user", "content": content})[0].parts == (
        TextPart("a "),
        ImagePart("data:image/png;base64,QQ==", "messages[0].content"),
        TextPart(" b"),
        ImagePart("data:image/gif;base64,Qg", "messages[0].content"),
    )


def test_pictures_in_texts_are_bounded_in_a_text_and_in_all():
    tag = '<img src="data:image/png;base64,AAAA"/>'
    few = [{"role": "user", "content": tag * 1_000}] * 2
    assert sum(len(one.images) for one in messages_of(*few)) == 2_000
    assert refused(messages_of, *few, few[0]).param == "messages"
    many = {"role": "user", "content": tag * 2_049}
    assert refused(messages_of, many).param == "messages[0].content"
    assert refused(stack, messages=[*few, few[0]]).param == "messages"


def test_a_link_in_a_text_and_an_img_tag_in_a_text_part_stay_text():
    link = '<img src="http://host/a.png"/>'
    tag = '<img src="data:image/png;base64,QQ=="/>'
    turns = [
        {"role": "user", "content": link},
        {"role": "user", "content": [{"type": "text", "text": tag}]},
        {"role": "assistant", "content": tag},
        {"role": "system", "content": tag},
    ]
    assert not any(message.images for message in messages_of(*turns))


def test_developer_is_system_and_an_echoed_answer_is_taken():
    echoed = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    messages = messages_of({"role": "developer", "content": "d"}, TURN, echoed, TURN)
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]


# Llama Stack


@pytest.mark.parametrize(
    ("item", "url", "place"),
    [
        ({"image": {"uri": "u"}}, "u", ".image.uri"),
        ({"image": "u"}, "u", ".image"),
        ({"type": "image", "image": "u"}, "u", ".image"),
        ({"type": "image", "url": {"uri": "u"}}, "u", ".url.uri"),
        ({"type": "image", "url": {"uri": "u"}, "data": None}, "u", ".url.uri"),
        ({"type": "image", "data": "QQ=="}, "data:image/png;base64,QQ==", ".data"),
        ({"type": "image", "image": {"url": {"uri": "u"}}}, "u", ".image.url.uri"),
        ({"type": "image", "image": {"data": "QQ=="}}, "data:image/png;base64,QQ==", ".image.data"),
    ],
)
def test_llama_stack_takes_an_image_in_every_spelling(item, url, place):
    for content, where in (
        (item, "messages[0].content"),
        (["a", item], "messages[0].content[1]"),
        ([{"type": "text", "text": "a"}, item], "messages[0].content[1]"),
    ):
        request = stack(messages=[{"role": "user", "content": content}])
        (image,) = request.messages[0].images
        assert (image.url, image.field) == (url, where + place)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, (0.0, 1.0, -1)),
        ({}, (0.0, 1.0, -1)),
        ({"strategy": None}, (0.0, 1.0, -1)),
        ({"strategy": "greedy", "temperature": 0.7, "top_p": 0.9, "top_k": 0}, (0.0, 1.0, -1)),
        ({"strategy": "top_p", "temperature": 0.7, "top_p": 0.9, "top_k": 0}, (0.7, 0.9, -1)),
        ({"strategy": "top_p", "temperature": 0.7, "top_p": 0}, (0.7, 1.0, -1)),
        ({"strategy": "top_k", "temperature": 0.7, "top_k": 4}, (0.7, 1.0, 4)),
        ({"strategy": "top_k", "temperature": 0.7, "top_k": 0}, (0.7, 1.0, -1)),
        ({"strategy": {"type": "greedy"}}, (0.0, 1.0, -1)),
        ({"strategy": {"type": "top_p", "temperature": 0.7, "top_p": 0.9}}, (0.7, 0.9, -1)),
        ({"strategy": {"type": "top_k", "top_k": 4}}, (1.0, 1.0, 4)),
    ],
)
def test_llama_stack_takes_strategies_of_every_line(params, expected):
    sampling = stack(sampling_params=params).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == expected


def test_llama_stack_defaults_and_nulls_are_unset():
    request = stack(
        sampling_params={"max_tokens": 0, "repetition_penalty": 1.0, "stop": None},
        tools=[],
        tool_choice="auto",
        tool_prompt_format="json",
        logprobs=None,
        response_format=None,
        tool_config=None,
    )
    assert (request.max_tokens, request.stop) == (None, ())
    assert stack(sampling_params={"max_tokens": 5, "stop": ["x"]}).max_tokens == 5


def test_llama_stack_puts_a_context_behind_the_content_as_meta_does():
    item = {"type": "image", "data": "QQ=="}
    for context in ("b", {"type": "text", "text": "b"}, ["b"], [item, "b"]):
        (message,) = stack(messages=[TURN | {"context": context}]).messages
        texts = [part.text for part in message.parts if isinstance(part, TextPart)]
        assert "".join(texts) == "hi\n\nb"
        assert len(message.images) == (item in context if isinstance(context, list) else 0)


def test_llama_stack_takes_an_answer_back():
    turn = {"role": "assistant", "content": "a", "stop_reason": "end_of_turn", "tool_calls": []}
    messages = stack(messages=[TURN, turn, TURN]).messages
    assert [message.role for message in messages] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model_id": None}, "model_id"),
        ({"foo": 1}, "foo"),
        ({"tools": [{"tool_name": "f f"}]}, "tools[0].tool_name"),
        ({"logprobs": {"top_k": 21}}, "logprobs.top_k"),
        ({"logprobs": {"top_p": 1}}, "logprobs.top_p"),
        ({"response_format": {"type": "grammar", "bnf": {}}}, "response_format.bnf"),
        ({"sampling_params": {"repetition_penalty": 2.5}}, "sampling_params.repetition_penalty"),
        ({"sampling_params": {"strategy": {"type": "x"}}}, "sampling_params.strategy.type"),
        ({"sampling_params": {"temperature": 3}}, "sampling_params.temperature"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "a\0"}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": "a", "context": "b"}]}, "messages[0].context"),
        (
            {"messages": [{"role": "user", "content": "a", "context": ["b", {}]}]},
            "messages[0].context[1]",
        ),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": {"type": "image"}}]},
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "system", "content": {"image": {"uri": "u"}}}]},
            "messages[0].content",
        ),
    ],
)
def test_llama_stack_names_a_bad_field(fields, param):
    def build():
        body = {"model_id": "m", "messages": [TURN]} | fields
        request = decode_body(json.dumps(body).encode(), StackChatRequest)
        stack_model(request)
        stack_generation(request)

    assert refused(build).param == param


@pytest.mark.parametrize(
    "item",
    [
        {"type": "text", "text": "hi", "image": {"uri": "data:,"}},
        {"text": "hi", "url": {"uri": "data:,"}},
        {"type": "image", "url": {"uri": "data:,"}, "data": "AAAA"},
        {"type": "image", "image": {"url": {"uri": "data:,"}, "data": "AAAA"}},
        {"image": {"uri": "data:,", "data": "AAAA"}},
    ],
)
def test_an_item_that_says_two_things_is_refused(item):
    """Regression: one of the two was dropped without a word."""
    error = refused(stack, messages=[{"role": "user", "content": [item]}])
    assert error.param.startswith("messages[0].content[0]")
    assert "send one" in str(error)


def test_two_model_keys_that_differ_are_refused():
    """Regression: model won and model_id was ignored."""
    body = {"model": "a", "model_id": "b", "messages": [TURN]}
    request = decode_body(json.dumps(body).encode(), StackChatRequest)
    assert refused(stack_model, request).param == "model_id"
