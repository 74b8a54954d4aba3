"""What grammars of clients' may say, and how long it takes to see that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from asyncio.subprocess import PIPE, Process
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.grammar import Grammars
from vlmserve.server.children.processes import ChildStartError
from vlmserve.server.errors import BadRequestError, NotReadyError
from vlmserve.server.structured_output import compile_checks
from vlmserve.server.structured_output.compile_checks import NUM_CHILDREN, GrammarChecks
from vlmserve.server.structured_output.compile_child import Verdict, judge
from vlmserve.server.structured_output.grammar_text import (
    MAX_GRAMMAR_BYTES,
    choice_grammar,
    ebnf_grammar,
    lark_grammar,
    regex_grammar,
)

# Milliseconds, where a look at each character from each other one would take minutes.
LINEAR_S = 5.0


TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
SPECIAL_IDS = {id for id, one in TOKENIZER.get_added_tokens_decoder().items() if one.special}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(CHECKPOINT, vocab_size=TOKENIZER.get_vocab_size())


@pytest.mark.parametrize("text", ["<|eot_id|>", "a<|python_tag|>b", "<|image|>"])
def test_what_spells_a_special_token_is_answered_letter_by_letter(
    text: str, grammars: Grammars
) -> None:
    """It used to be answered by the token itself, which is no text, and may fit no grammar."""
    verdict = judge(choice_grammar([text]), grammars)
    assert verdict.grammar is not None
    matcher = grammars.compile(verdict.grammar)
    token_ids: list[int] = []
    while TOKENIZER.decode(token_ids) != text:
        allowed = np.unpackbits(grammars.fill([matcher])[0], bitorder="little")
        token_ids.append(int(np.flatnonzero(allowed)[0]))
        assert token_ids[-1] not in SPECIAL_IDS
        matcher.accept(token_ids[-1])
        assert not matcher.has_failed


def test_special_tokens_may_also_stand_in_the_model_s_own_vocabulary(tmp_path) -> None:
    """They got new ids behind the last one then: no grammar could be used with the checkpoint."""
    content = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {one["content"]: one["id"] for one in content["added_tokens"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((CHECKPOINT / name).read_text())
    grammars = Grammars(tmp_path, vocab_size=TOKENIZER.get_vocab_size())
    verdict = judge(choice_grammar(["<|eot_id|>", "a"]), grammars)
    assert verdict.grammar is not None
    matcher = grammars.compile(verdict.grammar)
    allowed = np.unpackbits(grammars.fill([matcher])[0], bitorder="little")
    first = set(np.flatnonzero(allowed).tolist())
    assert TOKENIZER.token_to_id("a") in first
    assert not first & SPECIAL_IDS


@pytest.mark.parametrize(
    "text",
    [
        'start: "a" <|eot_id|>',
        'start: "a" <[1]>',
        # It used to pass: a regex was taken to end with its line.
        "start: /a\n b/ <|eot_id|> /c/",
        "start: /a\n\\/ b/ <|eot_id|> /c/",
        'start: /"/ <|eot_id|> /"/',
        "start: /#/ <|eot_id|>",
        'start: "//" <|eot_id|>',
        'start: "\\"" <|eot_id|> "\\""',
    ],
)
def test_a_special_token_is_found_wherever_it_is_one(text: str) -> None:
    with pytest.raises(BadRequestError, match="special token"):
        ebnf_grammar(text)


@pytest.mark.parametrize(
    "text",
    [
        'start: "<|eot_id|>"',
        "start: /<b>\n<i>/",
        'start: "a" // <|eot_id|>\n# <b>',
        'start: /a/i "b"i',
        "start: /\\/</",
        'start: %json {"const": "</b>"}',
    ],
)
def test_text_that_looks_like_a_special_token_is_text(text: str, grammars: Grammars) -> None:
    assert judge(ebnf_grammar(text), grammars).error is None


@pytest.mark.parametrize("text", ['start: "a', "start: /a", 'start: "a\nb"', "start: /a\\\n/"])
def test_a_string_or_regex_without_its_end_is_refused(text: str) -> None:
    with pytest.raises(BadRequestError, match="without its end"):
        lark_grammar(text)


@pytest.mark.parametrize(
    "text",
    [
        "\n" * MAX_GRAMMAR_BYTES,
        "\n" * 10_000_000,
        " \t" * (MAX_GRAMMAR_BYTES // 2),
        "start" + " \n" * 30_000,
        'start: "' + '\\"' * 32_000,
        "start: /" + "\\/" * 32_000,
        "start: " + "[" * 60_000,
        "start: " + '"' * 60_000,
    ],
    ids=lambda text: f"{text[:9]!r}-{len(text)}",
)
def test_row_08_a_grammar_is_looked_through_once(text: str) -> None:
    """Blank lines and open strings used to be looked at again from each of their characters."""
    began = time.process_time()
    with contextlib.suppress(BadRequestError):
        ebnf_grammar(text)
    assert time.process_time() - began < LINEAR_S


def test_row_60_a_grammar_waits_for_the_child_that_replaces_a_dead_one(monkeypatch) -> None:
    """It started a child of its own beside that, so three ran where two are promised."""
    children: list[int] = []
    counts: list[int] = []

    async def start(checks: GrammarChecks) -> SimpleNamespace:
        child = SimpleNamespace(returncode=None, stdin=None)
        child.kill = lambda: None
        child.wait = lambda: asyncio.sleep(0)
        children.append(child)
        counts.append(sum(one.returncode is None for one in children))
        await asyncio.sleep(0.01)
        return child

    async def ask(process: SimpleNamespace, question: bytes, timeout_s: float) -> Verdict:
        await asyncio.sleep(0)
        if b"die" in question:
            process.returncode = -signal.SIGPROF
            raise ConnectionError
        return Verdict(grammar=question.decode())

    monkeypatch.setattr(GrammarChecks, "_start", start)
    monkeypatch.setattr(compile_checks, "_ask", ask)

    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT)
        asked = [f"{kind} {number}" for number in range(20) for kind in ("die", "die", "live")]
        calls = [checks.check(text, "f", "t", owner=text) for text in asked]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(one, BadRequestError) for one in results) == 40
        assert sum(isinstance(one, str) for one in results) == 20
        await checks.close()

    asyncio.run(scenario())
    assert max(counts) == NUM_CHILDREN


@pytest.mark.parametrize("problem", [ChildStartError("no process is left"), None])
def test_row_60_a_grammar_whose_process_cannot_start_is_a_503(monkeypatch, problem) -> None:
    """It was a 500, and another was never tried."""

    async def start_python(*arguments: object, **options: object) -> Process:
        if problem is not None:
            raise problem
        return await asyncio.create_subprocess_exec("true", stdin=PIPE, stdout=PIPE)

    monkeypatch.setattr(compile_checks, "start_python", start_python)

    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT)
        for _ in range(2):
            with pytest.raises(NotReadyError, match="short of processor time or memory"):
                await checks.check("{}", "f", "t")
        monkeypatch.undo()
        try:
            assert await checks.check(choice_grammar(["a"]), "f", "t")
        finally:
            await checks.close()

    asyncio.run(scenario())


def takes(grammar: str, text: str, grammars: Grammars) -> bool:
    """Whether the text is a whole one of the grammar."""
    matcher = grammars.compile(grammar)
    for token_id in TOKENIZER.encode(text, add_special_tokens=False).ids:
        matcher.accept(token_id)
    return not matcher.has_failed and bool(matcher.inner.is_accepting())


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (r'"\u00e9\U0001F600"', "\u00e9\U0001f600"),
        (r"[\u00e9-\u00ff]", "\u00f0"),
        (r"[^\x00-\u00ff]", "\u0100"),
        (r'"\u005c\u0022"', '\\"'),
        (r"[\u005d\x5e]", "]"),
        (r'"\\u00e9"', "\\u00e9"),
    ],
)
def test_gbnf_may_escape_every_character(rule: str, text: str, grammars: Grammars) -> None:
    """The translation of `\\u00e9` dropped its zeros, and the grammar was a 400."""
    verdict = judge(ebnf_grammar(f"root ::= {rule}"), grammars)
    assert verdict.grammar is not None, verdict.error
    assert takes(verdict.grammar, text, grammars)
    assert not takes(verdict.grammar, text + "a", grammars)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (regex_grammar("("), "a regular expression is invalid: unclosed group"),
        (regex_grammar("(?=a)b"), "look-around"),
        (regex_grammar("[(?" * 10_000), "a regular expression is invalid"),
        (ebnf_grammar("root ::= [^\\]"), ""),
        (ebnf_grammar("start: foo"), 'unknown name: "foo"'),
    ],
)
def test_a_reason_shows_no_lines_of_the_library(grammar, words, grammars: Grammars) -> None:
    error = judge(grammar, grammars).error
    assert error is not None
    assert words in error
    assert "|" not in error
    assert "llguidance" not in error


@pytest.mark.parametrize(
    ("names", "reason"),
    [(["<|eot_id|>"], "the tokenizer does not support grammars"), ([], "names no end token")],
)
def test_a_tokenizer_that_supports_no_grammars_is_a_400_that_says_so(
    tmp_path, names: list[str], reason: str
) -> None:
    """It used to be a 503 about processor time, and a start of a process for each request."""
    tokenizer = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = f"response_format cannot be used with this model: .*{reason}"

    async def scenario() -> None:
        checks = GrammarChecks(tmp_path)
        try:
            with pytest.raises(BadRequestError, match=words) as refused:
                await checks.check(choice_grammar(["a"]), "response_format", "")
            assert refused.value.param == "response_format"
            checks._start = None  # type: ignore[assignment,method-assign]
            with pytest.raises(BadRequestError, match=words):
                await checks.check(choice_grammar(["b"]), "response_format", "")
        finally:
            await checks.close()

    asyncio.run(scenario())
