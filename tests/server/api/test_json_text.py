"""Row 6: what JSON may say here, on every route with a body; and the walk over its text alone."""

import contextlib
import json
import string

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.invariants import BODY_HANDLERS, TEXT_ROUTES, assert_error, body_for

from vlmserve.server.errors import BadRequestError
from vlmserve.server.schemas import json_text
from vlmserve.server.schemas.json_text import MAX_COMMAS, MAX_MARKS, check_now

NUMBER = 7_654_321
TEXT = "Here-is-the-text"
# In the place of a number of tokens.
NO_NUMBERS = [
    "NaN", "Infinity", "-Infinity", "nan", "1e999", "-1e999", "1" + "0" * 25, "9" * 5_000, "-1",
    "true", "false", '"2"', "2.5", "1e-2", "0x10", "01", "+1", "1_0", ".5", "1.", "[2]", "{}", "2n",
]  # fmt: skip
# In the place of a text between its quotes.
NO_TEXTS = [
    rb"\ud800", rb"\udc00\ud800", rb"\ud83d\u0041", b"\xed\xa0\x80", b"\xff", b"\xc0\xaf", b"\x00",
    rb"\u0000", rb"a\\\u0000", b"\x1f", b"\n", rb"\x41", rb"\u00g0", b"\xf4\x90\x80\x80",
]  # fmt: skip


def with_number(route: str, number: str) -> bytes:
    return json.dumps(body_for(route, max_tokens=NUMBER)).replace(str(NUMBER), number).encode()


def with_text(route: str, text: bytes) -> bytes:
    """A body whose text is `text` as it stands; a route without texts has a model's name."""
    has_text = not route.endswith("/detokenize")
    body = body_for(route, TEXT) if has_text else body_for(route, model=TEXT)
    return json.dumps(body).encode().replace(TEXT.encode(), text)


def malformed(route: str) -> list[bytes]:
    """Bodies that are not one JSON object, or one that says something twice."""
    whole = json.dumps(body_for(route)).encode()
    first = next(iter(body_for(route)))
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in first)
    return [
        b"", b" ", b"null", b"[]", b'"a"', b"7", b"{", whole[:-1], whole + b"}", whole + whole,
        whole.decode().encode("utf-16"), whole[:-1] + b",}",
        b"/* a */" + whole, whole.replace(b'"', b"'"), b"[" * 100_000, b'{"a":' * 100_000,
        whole[:-1] + b',"%b":null}' % first.encode(), whole[:-1] + b',"%b" :1}' % escaped.encode(),
        whole[:-1] + b',"unknown_field":{"a":1,"b":{},"\\u0061":2}}',
    ]  # fmt: skip


def test_row_06_what_is_no_plain_json_is_a_400_on_every_route(standing):
    for route in BODY_HANDLERS:
        for body in malformed(route):
            assert_error(standing.post(route, body), 400)
        for text in NO_TEXTS:
            assert_error(standing.post(route, with_text(route, text)), 400)


@pytest.mark.parametrize("route", BODY_HANDLERS[::4])
def test_row_06_a_body_of_a_million_values_is_refused_before_it_is_decoded(standing, route):
    """60 MB of empty objects held up everything for seven seconds."""
    whole = json.dumps(body_for(route)).encode()
    for values in (b"{}," * MAX_MARKS, b"0," * (MAX_COMMAS + 1)):
        body = whole[:-1] + b',"unknown_field":[' + values + b"0]}"
        assert "send less" in assert_error(standing.post(route, body), 400)["message"]


def test_row_06_what_is_no_number_of_tokens_is_a_400_on_every_route(standing):
    for route in TEXT_ROUTES:
        assert standing.post(route, with_number(route, "2")).status == 200
        for number in NO_NUMBERS:
            assert_error(standing.post(route, with_number(route, number)), 400)


def test_row_06_a_text_may_speak_of_escapes_and_of_numbers_that_are_none(standing):
    for route in TEXT_ROUTES:
        body = body_for(route, 'NaN \\u0000 \\ud800 "a": 1, "a": 2 \U0001f600')
        assert standing.post(route, body).status == 200


def test_a_name_that_stands_twice_is_named():
    with pytest.raises(BadRequestError, match="'b' occurs twice"):
        check_now(b'{"a": {"b": 1, "c": {"b": 2}, "b": 3}}')
    check_now(b'[{"a":1},{"a":1}]')
    check_now(b'{"a":"b","b":"a","c":["a","a"]}')
    check_now(b'{"a":{"a":{"a":1}}}')


@pytest.mark.parametrize(
    ("limit", "most"), [("MAX_COMMAS", b'["a,a",0,0,0]'), ("MAX_MARKS", b'{"a":"\\"b"}')]
)
def test_the_most_that_may_be_there_is_allowed(monkeypatch, limit, most):
    monkeypatch.setattr(json_text, limit, 4)
    check_now(most)
    with pytest.raises(BadRequestError, match="send less"):
        check_now(most + b',""')


def members(text: bytes):
    """The members of every object, as Python's own reader finds them: the oracle."""
    found: list[list[tuple[str, object]]] = []

    def keep(pairs):
        found.append(pairs)
        return dict(pairs)

    json.loads(text, object_pairs_hook=keep)
    return found


NAMES = st.text(st.sampled_from('ab"\\,:{}[] \u00e9\U0001f600'), max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(NAMES, inner), max_size=3),
    max_leaves=12,
)


def written(value, style) -> str:
    """JSON of a value, its lists of pairs as objects: a name may stand twice, in two spellings."""
    is_object = isinstance(value, list) and value and all(isinstance(one, tuple) for one in value)
    blank = style.draw(st.sampled_from(["", " ", "\n\t"]))
    if is_object:
        pairs = [
            f"{blank}{spelled(name, style)}{blank}:{written(inner, style)}" for name, inner in value
        ]
        return "{" + ",".join(pairs) + blank + "}"
    if isinstance(value, list):
        return "[" + f"{blank},".join(written(inner, style) for inner in value) + "]"
    return spelled(value, style) if isinstance(value, str) else json.dumps(value)


def spelled(text: str, style) -> str:
    return json.dumps(text, ensure_ascii=style.draw(st.booleans()))


@given(VALUES, st.data())
def test_names_that_stand_twice_are_found_as_pythons_reader_finds_them(value, data):
    text = written(value, data).encode()
    is_double = any(len(dict(pairs)) < len(pairs) for pairs in members(text))
    if is_double:
        with pytest.raises(BadRequestError, match="twice"):
            check_now(text)
    else:
        check_now(text)


@given(st.text(st.sampled_from('\\u0n"' + string.ascii_letters[:2]), max_size=40))
@example("\\" * 60_000)
@example("\\" * 60_001)
@example("\\\\" * 25_000 + "\\u0000")
def test_a_nul_is_found_where_it_is_one_and_only_there(inside):
    text = b'["' + inside.encode() + b'"]'
    try:
        has_nul = any("\0" in one for one in msgspec.json.decode(text, type=list[str]))
    except msgspec.DecodeError:
        has_nul = None
    try:
        check_now(text)
    except BadRequestError:
        assert has_nul is not False
    else:
        assert has_nul is not True


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (rb'{"a":[1,{"b":"\u0000"}]}', "a[1].b"),
        (rb'{"a":{"\u0000":1},"b":"\u0000"}', "a"),
        (rb'["\u0000"]', "[0]"),
        (rb'{"a":"\u0000"', None),
        (rb'"\u0000"', None),
    ],
)
def test_the_field_that_holds_a_nul_is_named(text, field):
    with pytest.raises(BadRequestError, match="the character U") as refusal:
        check_now(text)
    assert refusal.value.param == field


@given(st.binary(max_size=60))
def test_any_bytes_are_walked_over_to_their_end(text):
    with contextlib.suppress(BadRequestError):
        check_now(text)
