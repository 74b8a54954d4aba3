"""Unknown fields of a request: dropped, and named in a header, in the log and in a metric."""

import asyncio
import logging

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)

from vlmserve.server.api import ignored_fields
from vlmserve.server.schemas.decoding import MAX_NAMED_FIELDS
from vlmserve.server.schemas.lenient import is_within

TOKENIZER = meta_like_tokenizer()
TURN = {"role": "user", "content": "What"}
CHAT = "/v1/chat/completions"
BODIES = {
    CHAT: {"model": MODEL, "messages": [TURN]},
    "/v1/completions": {"model": MODEL, "prompt": "What"},
    "/v1/messages": {"model": MODEL, "max_tokens": 8, "messages": [TURN]},
    "/inference/chat_completion": {"model": MODEL, "messages": [TURN]},
    "/tokenize": {"prompt": "What"},
}


@pytest.fixture(autouse=True)
def nothing_logged_before(monkeypatch):
    monkeypatch.setattr(ignored_fields, "_logged", set())


def answers(checkpoint, *bodies, path=CHAT, **settings):
    """The answers to the bodies, then the metrics page."""

    async def run():
        engine = ScriptedEngine(lambda request: tokens_one_by_one(TOKENIZER, "What?"))
        async with client_of(checkpoint, engine, **settings) as client:
            sent = [await client.post(path, json=BODIES[path] | body) for body in bodies]
            return [*sent, (await client.get("/metrics")).text]

    return asyncio.run(run())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("settings", [{}, {"unknown_fields": "report"}])
def test_an_unknown_field_is_dropped_and_named_on_every_route(checkpoint, path, settings):
    """It used to be a 400, which stopped every client behind a router that adds fields."""
    answer, _ = answers(checkpoint, {"some_field": True, "zzz": {"a": 1}}, path=path, **settings)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-fields"] == "some_field, zzz"


def test_a_stream_names_the_fields_too(checkpoint):
    answer, _ = answers(checkpoint, {"stream": True, "zzz": 1})
    assert answer.headers["x-ignored-fields"] == "zzz"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_request_of_known_fields_has_no_such_header(checkpoint):
    answer, _ = answers(checkpoint, {"temperature": 0.5})
    assert "x-ignored-fields" not in answer.headers


def test_the_header_names_twenty_fields_of_any_characters(checkpoint):
    body = {"ä,\r\nSet-Cookie: a": 1} | {f"zzz{number}": 1 for number in range(5_000)}
    answer, _ = answers(checkpoint, body)
    names = answer.headers["x-ignored-fields"].split(", ")
    assert len(names) == MAX_NAMED_FIELDS
    assert names[:2] == ["%C3%A4%2C%0D%0ASet-Cookie: a", "zzz0"]
    assert "set-cookie" not in answer.headers


def test_a_name_is_logged_once_and_counted_each_time(checkpoint, caplog):
    turns = [TURN | {"zzz": 1}, {"role": "assistant", "content": "a"}, TURN | {"zzz": 1}]
    with caplog.at_level(logging.WARNING):
        *_, page = answers(
            checkpoint, {"messages": turns}, {"lora_path": "a", "messages": [TURN | {"zzz": 2}]}
        )
    told = [one.getMessage() for one in caplog.records if "unknown field" in one.getMessage()]
    assert [one.split("'")[1] for one in told] == ["messages[].zzz", "lora_path"]
    assert 'vlmserve_ignored_fields_total{field="other"} 3.0' in page
    assert 'vlmserve_ignored_fields_total{field="lora_path"} 1.0' in page


def test_the_log_remembers_a_bounded_number_of_names(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(ignored_fields, "MAX_LOGGED_NAMES", 2)
    with caplog.at_level(logging.WARNING):
        answers(checkpoint, {f"zzz{number}": 1 for number in range(9)})
    assert len([one for one in caplog.records if "unknown field" in one.getMessage()]) == 2


TOOL = {"type": "function", "funtion": {"name": "f"}}
SOURCE = {"type": "base64", "media_typ": "image/png", "data": ""}
PICTURE = [{"role": "user", "content": [{"type": "image", "source": SOURCE}]}]


@pytest.mark.parametrize(
    ("path", "body", "param", "meant"),
    [
        (CHAT, {"messages": [{"role": "user", "contnet": "a"}]}, "messages[0].contnet", "content"),
        (CHAT, {"tools": [TOOL]}, "tools[0].funtion", "function"),
        ("/v1/messages", {"messages": PICTURE}, "content[0].source.media_typ", "media_type"),
        ("/tokenize", {"promt": "a", "messages": None}, "promt", "prompt"),
    ],
)
def test_a_misspelt_required_field_is_named_too(checkpoint, path, body, param, meant):
    """The error used to say only that the field is required."""
    answer, _ = answers(checkpoint, body, path=path)
    assert answer.status_code == 400
    assert param in answer.json()["error"]["param"]
    assert f"{param} is not a field of this API: did you mean" in answer.json()["message"]
    assert meant in answer.json()["message"]


def test_a_required_field_that_nothing_resembles_is_required(checkpoint):
    body = {"messages": [{"role": "user", "Zcontent_of_it": "a"}, {"rol": "user"}]}
    assert "messages[0].content is required" in answers(checkpoint, body)[0].json()["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "meant"),
    [
        (CHAT, {"max_token": 1}, "max_token", "max_tokens"),
        (CHAT, {"temprature": 1}, "temprature", "temperature"),
        (CHAT, {"Temperature": 1}, "Temperature", "temperature"),
        (CHAT, {"presence_penality": 1}, "presence_penality", "presence_penalty"),
        (CHAT, {"messages": [TURN | {"nmae": "a"}]}, "messages[0].nmae", "messages[0].name"),
        ("/v1/completions", {"max_tokesn": 1}, "max_tokesn", "max_tokens"),
        ("/v1/messages", {"stop_sequence": ["a"]}, "stop_sequence", "stop_sequences"),
        (
            "/inference/chat_completion",
            {"sampling_params": {"stratgy": "greedy"}},
            "sampling_params.stratgy",
            "sampling_params.strategy",
        ),
    ],
)
def test_a_misspelt_known_field_is_a_400_that_names_it(checkpoint, path, body, param, meant):
    answer, _ = answers(checkpoint, {"zzz": 1} | body, path=path)
    if path == "/v1/messages":
        assert answer.status_code == 400
        assert f"did you mean {meant}?" in answer.json()["error"]["message"]
        return
    error = error_of(answer, 400)
    assert error["param"] == param
    assert f"did you mean {meant}?" in error["message"]


def test_a_misspelt_name_is_found_behind_many_unknown_ones(checkpoint):
    body = {f"zzz{number}": 1 for number in range(150)} | {"max_token": 1}
    assert error_of(answers(checkpoint, body)[0], 400)["param"] == "max_token"


@pytest.mark.parametrize("name", ["models", "top_a", "min_k", "x", "typical_p", "documents"])
def test_a_name_that_means_something_else_is_no_misspelling(checkpoint, name):
    assert answers(checkpoint, {name: 1})[0].status_code == 200


@pytest.mark.parametrize("mode", ["report", "refuse", "error", "ignore"])
def test_null_equals_absence_for_unknown_names_at_every_depth(checkpoint, mode):
    tool = {"type": "function", "function": {"name": "f", "zzz": None}, "zzz": None}
    body = {"messages": [TURN | {"max_token": None}], "tools": [tool], "max_token": None}
    answer, _ = answers(checkpoint, body, unknown_fields=mode)
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers


@pytest.mark.parametrize("mode", ["refuse", "error"])
def test_refusing_names_the_fields_and_what_was_meant(checkpoint, mode):
    error = error_of(answers(checkpoint, {"zzz": 1, "max_token": 1}, unknown_fields=mode)[0], 400)
    assert error["message"].startswith("zzz, max_token are not fields of this API")
    assert "did you mean max_tokens?" in error["message"]


@pytest.mark.parametrize(
    ("one", "other", "num_edits"),
    [
        ("abc", "abc", 0),
        ("abc", "abcd", 1),
        ("abcd", "abc", 1),
        ("abc", "axc", 1),
        ("abcd", "acbd", 1),
        ("abcdef", "bcdefg", 2),
        ("", "ab", 2),
        ("abcdef", "ghcdef", 2),
        ("abcdef", "ghidef", 3),
    ],
)
def test_edits_between_two_names_are_counted(one, other, num_edits):
    assert is_within(one, other, num_edits)
    assert is_within(other, one, num_edits)
    assert num_edits == 0 or not is_within(one, other, num_edits - 1)
