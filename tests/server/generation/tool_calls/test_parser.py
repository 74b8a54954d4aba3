"""Tool calls found in answers: every form, whatever the pieces; anything else stays text."""

import itertools
import json
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tool_call_answers import TAG, hostile, in_pieces, joined, parsed

from vlmserve.server.generation.tool_calls.parser import ToolCallParser
from vlmserve.server.generation.tool_calls.pieces import CallPiece, TextPiece
from vlmserve.server.generation.tool_calls.python_arguments import (
    MAX_CHARS,
    NotLiteralError,
    json_of_arguments,
)

CALLS = [
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (' \n{"name":"f","parameters":{ "a" : "}" }}\n', "", [("f", '{ "a" : "}" }')]),
    ('{"name": "f", "arguments": {}}', "", [("f", "{}")]),
    ('{"parameters": {"a": "\\"}"}, "name": "f"}', "", [("f", '{"a": "\\"}"}')]),
    ('{"type": "function", "id": "1", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    ('{"name": "f", "parameters": {}, "type": "function"}', "", [("f", "{}")]),
    (
        '{"name": "f", "parameters": {}}; {"name": "get_weather", "parameters": {"b": []}}',
        "",
        [("f", "{}"), ("get_weather", '{"b": []}')],
    ),
    ('{"name":"f","parameters":{}}\n{"name":"f","parameters":{}}', "", [("f", "{}")] * 2),
    ('[{"name":"f","parameters":{}}, {"name":"f","arguments":{}}]', "", [("f", "{}")] * 2),
    ('<function=f>{"a": "<"}</function>', "", [("f", '{"a": "<"}')]),
    ('I see: <function=f> {"a": 1} </function>!', "I see: !", [("f", '{"a": 1}')]),
    ("<function=f>{}<function=ENDED>{}", "", [("f", "{}"), ("ENDED", "{}")]),
    ("<<function=f>{}</function>", "<", [("f", "{}")]),
    (f'{TAG}f.call(query="a b")', "", [("f", '{"query": "a b"}')]),
    (f"{TAG}f(a=1, b=-2.5e3, c=[None, True, (1,)], d={{'x': 'y'}})", "", [
        ("f", '{"a": 1, "b": -2500.0, "c": [null, true, [1]], "d": {"x": "y"}}'),
    ]),
    (f"Wait.{TAG}f(); f.call()", "Wait.", [("f", "{}")] * 2),
    (TAG + '{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    ('[f(a="\\"]\'"), get_weather()]', "", [("f", '{"a": "\\"]\'"}'), ("get_weather", "{}")]),
    ('[get_weather(from="A", in=1)]', "", [("get_weather", '{"from": "A", "in": 1}')]),
    ('{"name": "f", "parameters": {}} done', " done", [("f", "{}")]),
    ('{"name": "f", "parameters": {}, "x": 1}', ', "x": 1}', [("f", "{}")]),
]  # fmt: skip
TEXTS = [
    "Hello, world. 1 < 2 {x} [y]",
    "",
    "  {",
    '{"name": "g", "parameters": {}}',
    '{"name": "f"}',
    '{"name": "f", "parameters": "x"}',
    '{"name": "f", "parameters": null}',
    '{"name": "f", "name": "f", "parameters": {}}',
    '{"answer": 42, "name": "f", "parameters": {}}',
    '{"name": "ff", "parameters": {}}',
    '{"name": "\\u0066", "parameters": {}}',
    '{"parameters": {}, "parameters": {}, "name": "f"}',
    'So: {"name": "f", "parameters": {}}',
    "<function=g>{}</function>",
    "<function=f>[]</function>",
    "<function=f",
    "</function>",
    TAG + "print('hello')",
    TAG + "f('positional')",
    TAG + "f(a=g())",
    TAG + "f(a=1+1)",
    TAG + "f(a=__import__('os').system('true'))",
    TAG + "f(a='\\ud800')",
    TAG + "f(a=1, a=2)",
    TAG + 'f(a="',
    "f(a=1)",
    "[f(a=1",
    "[1, 2, 3]",
    '{"name": "f", \'parameters\': {}}',
    '{"type": "' + "x" * 1000 + '", "name": "f", "parameters": {}}',
]


@pytest.mark.parametrize(("answer", "text", "calls"), CALLS)
def test_calls_are_found_in_every_form(answer, text, calls):
    assert joined(parsed(in_pieces(answer))) == (
        text,
        [(name, arguments, True) for name, arguments in calls],
    )
    for _, arguments in calls:
        json.loads(arguments)


@pytest.mark.parametrize("answer", TEXTS)
def test_what_is_no_call_is_text_to_the_last_byte(answer):
    assert joined(parsed(in_pieces(answer))) == (answer.replace(TAG, ""), [])


def chunked(answer, cuts):
    """The answer cut at these places, the special token kept whole."""
    pieces = []
    for piece in in_pieces(answer):
        places = sorted({cut % (len(piece) + 1) for cut in cuts})
        borders = [0, *places, len(piece)]
        whole = [piece[a:b] for a, b in itertools.pairwise(borders)]
        pieces += [piece] if piece == TAG else whole
    return pieces


ANSWERS = st.sampled_from([answer for answer, _, _ in CALLS] + TEXTS)
FRAGMENTS = st.sampled_from(
    ['{"name": "f", ', '"parameters": {', "}", "}}", "; ", "<function=f>", "</function>", TAG,
     "f(", "a=1", ")", "[", "]", "x", " ", '"', "\\", "{}", "f.call(", "\n", "END", "PYTHON_TAG"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(ANSWERS, st.lists(ANSWERS, max_size=3).map("".join),
              st.lists(FRAGMENTS, max_size=20).map("".join)),
    st.lists(st.integers(0, 200), max_size=20),
)  # fmt: skip
def test_any_pieces_of_an_answer_give_the_same_calls_and_text(answer, cuts):
    whole = joined(parsed(in_pieces(answer)))
    assert joined(parsed(chunked(answer, cuts))) == whole
    one_by_one = [
        symbol for piece in in_pieces(answer) for symbol in ([piece] if piece == TAG else piece)
    ]
    assert joined(parsed(one_by_one)) == whole


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=20).map("".join))
@example("<function=f>{}<function=f>")  # the beginning of a second call was dropped
def test_no_character_is_lost_but_between_calls_and_behind_them(answer):
    found = parsed(in_pieces(answer))
    kept = "".join(piece.text if isinstance(piece, TextPiece) else piece.raw for piece in found)
    plain = answer.replace(TAG, "")
    assert plain.startswith(kept)
    assert set(plain[len(kept) :]) <= set(" \n\t\r;,[]")
    assert kept == plain or isinstance(found[-1], CallPiece)


def test_only_what_may_still_become_a_call_is_held_back():
    parser = ToolCallParser(["f"])
    assert parser.push('{"na') == []
    assert parser.push("tion") == [TextPiece('{"nation')]
    assert parser.push(" <") == [TextPiece(" ")]
    assert parser.push("b") == [TextPiece("<b")]


def test_arguments_come_as_they_are_written():
    parser = ToolCallParser(["f"])
    assert parser.push('{"name": "f", "parameters": ') == []
    assert parser.push('{"ci') == [
        CallPiece(0, "f", '{"ci', '{"name": "f", "parameters": {"ci'),
    ]
    assert parser.push('ty": 1') == [CallPiece(0, None, 'ty": 1', 'ty": 1')]
    assert parser.push("}") == [CallPiece(0, None, "}", "}")]
    assert parser.push("}") == [CallPiece(0, None, "", "}", is_end=True)]
    assert parser.flush() == []


def test_a_call_that_was_cut_is_no_complete_call():
    cut = ['{"name": "f", "parameters": {"a": "x']
    assert joined(parsed(cut)) == ("", [("f", '{"a": "x', False)])
    assert joined(parsed(['{"name": "f", "parameters": {}'])) == ("", [("f", "{}", True)])


def test_a_special_token_inside_a_call_ends_it():
    pieces = ['{"name": "f", "parameters": {"a": ', TAG, '{"name": "f", "parameters": {}}']
    assert joined(parsed(pieces)) == ("", [("f", '{"a": ', False), ("f", "{}", True)])


def test_after_the_last_allowed_call_nothing_is_read():
    answer = ['<function=f>{}</function>{"name": "f", "parameters": {}} and more']
    assert joined(parsed(answer, max_calls=1)) == ("", [("f", "{}", True)])


def steps_of(work):
    """How many lines of our own code run: the same on every machine."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if "/server/generation/tool_calls/" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_row_25_tool_parsing_of_hostile_output_is_linear_and_evaluates_nothing():
    """Twice the text takes twice the steps; a quadratic parser would take four times."""
    for (part, short), (_, long) in zip(hostile(5_000), hostile(10_000), strict=True):
        few = steps_of(lambda text=short: parsed(in_pieces(text)))
        many = steps_of(lambda text=long: parsed(in_pieces(text)))
        assert few >= 4_000, part
        assert many <= 2.2 * few, part


def test_row_25_a_megabyte_of_hostile_output_stays_text_or_calls():
    megabyte = [text for part, text in hostile(1_000_000) if part in ("<function=", "strings")]
    for text in [*megabyte, *(text for _, text in hostile(50_000))]:
        found = parsed(in_pieces(text))
        kept = "".join(piece.text if isinstance(piece, TextPiece) else piece.raw for piece in found)
        assert text.replace(TAG, "").startswith(kept)


@pytest.mark.parametrize(
    "text",
    ["a", "a=", "a=b", "=1", "a=1 b=2", "a=1,,", "a='", 'a="\n\\', "a=[", "a=[1", "a={1: 2}",
     "a={'x'}", "a=01", "a=1e999", "a=1j", "a=f'x'", "a=b'x'", "a=(1", "a=[)", "a=*b",
     "a=1if 1 else 2", "a='\\ud800'", "a=" + "[" * 40 + "]" * 40, "a=lambda: 1", "a='\\Uffffffff'",
     "a=...", "a=-'x'", "a=-True", "a=1, a=2", "**{}", "a=1) + g(b=2", "a=1)(b=2", "a=1).g(b=2",
     "a=" + "-" * 9_000 + "1", "a=" + "not " * 9_000 + "1", "a=" + "lambda:" * 9_000 + "1",
     "a=" + "1+" * 9_000 + "1", "a=" + "b." * 9_000 + "c", "a=" + "9" * 9_000,
     "a=[" + "1," * MAX_CHARS + "]", "a=from", "a.from=1", "from=1, from=2", "from==1",
     "a=b=1", "a" * MAX_CHARS, "a " * (MAX_CHARS // 2)],
)  # fmt: skip
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(NotLiteralError):
        json_of_arguments(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (" a = 1 , ", {"a": 1}),
        ("a='x' \"y\"", {"a": "xy"}),
        (r"a='\x41\u00e9\U0001F43B\n\q'", {"a": "Aé🐻\n\\q"}),
        (r"a='\ud83d\udc3b'", {"a": "🐻"}),
        ("a=true, b=False, c=null", {"a": True, "b": False, "c": None}),
        ("a={'b': [], 'c': (), 'd': {}}", {"a": {"b": [], "c": [], "d": {}}}),
        ("a=" + "9" * 30, {"a": int("9" * 30)}),
        ("a=" + "9" * 400, {"a": int("9" * 400)}),
        ("a=1_000, b=0x1, c=1., d=-2.5", {"a": 1000, "b": 1, "c": 1.0, "d": -2.5}),
        ("a='x\ny',\nb=\"c\\\\\n\"", {"a": "x\ny", "b": "c\\\n"}),
        ("größe=1", {"größe": 1}),
        (
            "from=\"A\", in = 1, class='from=2', None=True, k_a=3, lambda=null",
            {"from": "A", "in": 1, "class": "from=2", "None": True, "k_a": 3, "lambda": None},
        ),
    ],
)
def test_literals_become_json(text, expected):
    assert json.loads(json_of_arguments(text)) == expected
