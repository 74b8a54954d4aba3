"""Regular expressions have ASCII classes in every field, as two other engines read them."""

import functools
import json
import re

import numpy as np
import pytest
import regex as other_engine

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.grammar import Grammars
from vlmserve.server.structured_output.compile_child import judge
from vlmserve.server.structured_output.grammar_text import (
    ebnf_grammar,
    json_schema_grammar,
    regex_grammar,
)
from vlmserve.server.structured_output.regex_dialect import (
    lark_with_ascii_classes,
    with_ascii_classes,
)

PATTERNS = (
    r"\d{3}-\d{4}",
    r"(?:\d{1,3}\.){3}\d{1,3}",
    r"\w{1,6}",
    r"\w{1,3}@\w{1,3}\.(?:com|org)",
    r"a\sb",
    r"\S{2,5}",
    r"\D\d\D",
    r"\W\w\W",
    r"[\d,]{1,8}",
    r"[^\d]{1,4}",
    r"[\w.-]{2,9}",
    r"[^\w]{1,3}",
    r"[\s\d]{1,4}",
    r"[^\s]{1,4}",
    r"[\D]{1,3}",
    r"[\W_]{1,3}",
    r"[^\W\d]{1,5}",
    r"[\S]{1,4}",
    r"x[\Sy]z?",
    r"\\d",
    r"\\\d",
    r"[\\d]",
    r"[\]\d]{1,3}",
    r"\[\d\]",
    r"^\d+$",
    r"\d{4}-(?:0[1-9]|1[0-2])-\d\d",
    r"(?:yes|no)\s?\d?",
    r"\$\d+(?:\.\d\d)?",
    r"[A-Z]\w{0,3}/\d",
    r"\d|\w\w|\s",
)
NUM_SAMPLES = 1_000
MAX_TOKENS = 40
ENGINES = {
    "re": functools.partial(re.fullmatch, flags=re.ASCII),
    "regex": functools.partial(other_engine.fullmatch, flags=other_engine.ASCII),
}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(CHECKPOINT, vocab_size=2_000)


def sampled(grammars, grammar, rng, num_samples):
    """Whole answers that a model which finds all allowed tokens equally likely would give."""
    tokenizer = grammars_tokenizer()
    verdict = judge(grammar, grammars)
    assert verdict.grammar is not None, verdict.error
    texts = []
    for _ in range(num_samples):
        matcher, ids = grammars.compile(verdict.grammar), []
        for _ in range(MAX_TOKENS):
            allowed = np.flatnonzero(np.unpackbits(grammars.fill([matcher])[0], bitorder="little"))
            token_id = int(rng.choice(allowed))
            matcher.accept(token_id)
            assert not matcher.has_failed
            if matcher.inner.is_stopped() and not tokenizer.decode([token_id]):
                break
            ids.append(token_id)
            if matcher.inner.is_stopped():
                break
        if matcher.inner.is_accepting():
            texts.append(tokenizer.decode(ids))
    return texts


@functools.cache
def grammars_tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sampled_answers_match_in_two_other_engines(grammars, pattern):
    r"""`\d{3}-\d{4}` used to give other digits than ASCII's in 20 of 20 answers."""
    rng = np.random.default_rng(7)
    texts = sampled(grammars, regex_grammar(pattern), rng, NUM_SAMPLES // len(PATTERNS) + 1)
    assert texts
    for name, fullmatch in ENGINES.items():
        assert all(fullmatch(pattern, text) for text in texts), (name, texts)


@pytest.mark.parametrize("pattern", [one for one in PATTERNS if one != r"^\d+$"])
def test_a_schemas_pattern_and_a_grammar_speak_the_same_dialect(grammars, pattern):
    rng = np.random.default_rng(8)
    schema = json_schema_grammar({"type": "string", "pattern": f"^(?:{pattern})$"})
    in_slashes = pattern.replace("/", r"\/")
    lark = ebnf_grammar(f"start: /{in_slashes}/ // a \\d comment")
    texts = [json.loads(text) for text in sampled(grammars, schema, rng, 6)]
    texts += sampled(grammars, lark, rng, 6)
    assert texts
    for fullmatch in ENGINES.values():
        assert all(fullmatch(pattern, text) for text in texts), texts


def test_strings_and_comments_of_a_grammar_keep_their_backslashes():
    text = 'start: "\\\\d" A // /\\d/\nA: /\\d\\//i\n# \\w'
    assert lark_with_ascii_classes(text) == 'start: "\\\\d" A // /\\d/\nA: /[0-9]\\//i\n# \\w'


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", "a"),
        (r"\\d", r"\\d"),
        (r"\\\d", r"\\[0-9]"),
        (r"[\d\]\D]", r"[[0-9]\][^0-9]]"),
        (r"\p{Nd}\x41", r"\p{Nd}\x41"),
        ("\\", "\\"),
        ("\\\n", "\\\n"),
    ],
)
def test_only_the_classes_are_translated(pattern, expected):
    assert with_ascii_classes(pattern) == expected


@pytest.mark.parametrize("field", ["regex", "schema", "lark"])
@pytest.mark.parametrize(("pattern", "text"), [(r"\d", "٣"), (r"\w", "ä"), (r"\s", "\u00a0")])
def test_no_other_script_passes_for_ascii(grammars, field, pattern, text):
    grammar = {
        "regex": lambda: regex_grammar(pattern),
        "schema": lambda: json_schema_grammar({"type": "string", "pattern": f"^{pattern}$"}),
        "lark": lambda: ebnf_grammar(f"start: /{pattern}/"),
    }[field]()
    matcher = grammars.compile(grammar)
    written = json.dumps(text, ensure_ascii=False) if field == "schema" else text
    ids = grammars_tokenizer().encode(written, add_special_tokens=False).ids
    assert matcher.inner.validate_tokens(ids) < len(ids)
