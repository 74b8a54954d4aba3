"""Patterns without look-around, compared with the originals in another engine."""

import itertools
import re
import time

import pytest

from vlmserve.server.structured_output.look_around import without_look_around

DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
# As zod 4 writes them.
HOSTNAME = (
    r"^(?=.{1,9}\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\.?$"
)
DURATION = r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(T(?=\d)(\d+H)?)?)$"
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9]+\.)+[A-Za-z]{2,}$"
# Milliseconds, where a look at each character from each other one would take minutes.
LINEAR_S = 5.0
TEXTS = [
    *("".join(text) for n in range(6) for text in itertools.product("a0.-+", repeat=n)),
    *("P1W", "P1Y", "P", "PT1H", "PT", "P1YT1H", "P1YW", "a@b.cc", ".a@b.cc", "a..b@b.cc"),
    *("aA1", "aaaA1aaa", "(?=a)b", "b", "[(?=a)]", "abc", "acb"),
]


def matches(found, text):
    return all(re.search(pattern, text) for pattern in (found.pattern, *found.others))


@pytest.mark.parametrize(
    "pattern",
    [
        DECIMAL,
        HOSTNAME,
        r"^(?=.*[A-Z])(?=.*\d).{3,6}$",
        r"^(?=a)(?=.*b)abc",
        r"^\(\?=a\)b$",
        r"^[(?=a)]+$",
        r"^a[^\](?!]$",
        r"^[a-z]+$",
        "",
    ],
)
def test_these_match_the_same_texts_without_look_around(pattern):
    found = without_look_around(pattern)
    assert not found.is_weaker
    for one in (found.pattern, *found.others):
        assert without_look_around(one).pattern == one
    for text in TEXTS:
        assert matches(found, text) == bool(re.search(pattern, text)), text


@pytest.mark.parametrize(
    "pattern",
    [
        EMAIL,
        DURATION,
        r"^(?!a)..$",
        r"(?<=a)0",
        r"a(?=0)|-",
        r"^(?=a)[ab]|-$",
        r"^(?=(?!aa)a)a",
        r"(?<!0)a(?![(0])-?",
    ],
)
def test_these_match_no_text_less(pattern):
    found = without_look_around(pattern)
    assert found.is_weaker
    accepted = [text for text in TEXTS if re.search(pattern, text)]
    assert accepted
    assert all(matches(found, text) for text in accepted)
    assert any(matches(found, text) and not re.search(pattern, text) for text in TEXTS)


@pytest.mark.parametrize(
    "pattern",
    [
        "[(?=" * 50_000,
        "[" * 100_000 + "\\",
        "(?=" * 50_000,
        "^" + "(?=a)" * 50_000,
        "^" + "(?=(?!b)a)" * 20_000,
        "(?<!" * 50_000 + ")" * 50_000,
        "\\" * 100_001,
        "[^]" * 50_000,
    ],
)
def test_a_long_pattern_is_looked_through_once(pattern):
    """A class without its end was looked for from each bracket: minutes for 48 KB."""
    start = time.process_time()
    without_look_around(pattern)
    assert time.process_time() - start < LINEAR_S


@pytest.mark.parametrize("pattern", ["(?=", "(?!a", "^(?=a", "a(?<=", "[(?=", "(?=a)*b"])
def test_a_broken_pattern_is_no_error_here(pattern):
    without_look_around(pattern)
