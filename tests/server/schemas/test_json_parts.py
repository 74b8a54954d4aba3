"""Log-probabilities of whole answers: JSON text from the start, in every API's form."""

from __future__ import annotations

import gc
import json
import math
import sys
import tracemalloc

import msgspec
import pytest

from vlmserve.server.generation.completion import Answer, Completion
from vlmserve.server.generation.events import Finish, PromptLogprobs, TextDelta, Usage
from vlmserve.server.generation.token_text import (
    PromptCandidate,
    TokenEntry,
    TokenLogprob,
    TokenText,
)
from vlmserve.server.schemas.json_parts import PART_BYTES, JsonList, json_parts
from vlmserve.server.schemas.llama_stack.answers import StackAnswers
from vlmserve.server.schemas.openai.chat_answers import ChatAnswers
from vlmserve.server.schemas.openai.completion_answers import CompletionAnswers
from vlmserve.server.schemas.openai.response_answers import ResponseAnswers
from vlmserve.server.schemas.openai.responses import ResponsesRequest

NUM_TOP = 20
FINISH = Finish("stop", None, Usage(1, 1))
BODY = msgspec.convert({"model": "m", "input": "a", "top_logprobs": NUM_TOP}, ResponsesRequest)
APIS = {
    "chat": lambda: ChatAnswers(model="m"),
    "completions": lambda: CompletionAnswers(model="m", num_top=NUM_TOP),
    "llama-stack": lambda: StackAnswers(is_new=True),
    "responses": lambda: ResponseAnswers(BODY),
}


def entry(number: int) -> TokenEntry:
    """A token with its own objects, as each step brings them."""

    def token(rank: int) -> TokenLogprob:
        text = f" wörd{(number + rank) % 100}"
        return TokenLogprob(TokenText(text, text.encode()), -math.pi * rank - number / 1000)

    return TokenEntry(token(1), tuple(token(rank) for rank in range(1, NUM_TOP + 1)))


def _finish(entries):
    return Finish("stop", None, Usage(1, len(entries)), logprobs=tuple(entries))


def document(answers, log):
    answer = Answer("text", FINISH, log)
    return b"".join(json_parts(answers.plain(Completion((answer,), Usage(1, 1)))))


def found_in(api, content):
    """The entries in a whole answer or in a stream's frame."""
    if api == "chat":
        return content["choices"][0]["logprobs"]["content"]
    if api == "completions":
        return content["choices"][0]["logprobs"]
    if api == "responses":
        return content["output"][0]["content"][0]["logprobs"]
    return content.get("event", content)["logprobs"]


@pytest.mark.parametrize("api", APIS)
def test_a_whole_answer_has_the_entries_that_its_stream_has(api):
    entries = [entry(number) for number in range(300)]
    log = APIS[api]().new_log()
    for begin in range(0, 300, 7):
        log.add(entries[begin : begin + 7])
    whole = found_in(api, json.loads(document(APIS[api](), log)))
    stream = APIS[api]()
    if api == "responses":
        stream.chunks(TextDelta("text", tuple(entries)))
        *_, frame = stream.chunks(_finish(()))
        expected = frame["item"]["content"][0]["logprobs"]
    else:
        (frame,) = stream.chunks(_finish(entries))
        expected = found_in(api, frame)
    assert whole == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    "api", [pytest.param(api, marks=() if api == "chat" else pytest.mark.slow) for api in APIS]
)
def test_row_57_a_whole_answer_keeps_no_object_of_a_token(api):
    """Each token with 20 candidates was kept as 2 KB of objects, then as 6 KB of dicts."""
    count = 1_000
    gc.collect()
    tracemalloc.start()
    try:
        before, blocks = tracemalloc.get_traced_memory()[0], sys.getallocatedblocks()
        log = APIS[api]().new_log()
        for number in range(count):
            log.add((entry(number),))
        gc.collect()  # empties the interpreter's own stores of tuples
        grown = tracemalloc.get_traced_memory()[0] - before
        objects = sys.getallocatedblocks() - blocks
        tracemalloc.reset_peak()
        parts = json_parts(APIS[api]().plain(Completion((Answer("", FINISH, log),), Usage(1, 1))))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    num_bytes = sum(map(len, parts))
    assert num_bytes > 300 * count
    assert grown < 1.15 * num_bytes + 2 * PART_BYTES
    assert objects < count / 4
    # Numbers of the offsets alone are made at the end.
    assert peak < 1.15 * num_bytes + 3 * PART_BYTES + 100 * count
    assert max(map(len, parts)) < 2 * PART_BYTES


@pytest.mark.parametrize("api", APIS)
def test_an_answer_without_entries_has_none(api):
    assert json.loads(document(APIS[api](), APIS[api]().new_log()))
    if api in ("chat", "llama-stack"):
        assert b'"logprobs":null' in document(APIS[api](), APIS[api]().new_log())


def test_an_echoed_prompt_comes_before_the_answer_and_moves_its_offsets():
    """A prompt that ends inside a character counts one for it: the answer's text starts anew."""
    tokens = (TokenText("Gr", b"Gr"), TokenText("bytes:\\xc3", b"\xc3"))
    prompt = PromptLogprobs(0, tokens, (None, (PromptCandidate(7, "bytes:\\xc3", -1.0, 1),)))
    answers = CompletionAnswers(model="m", num_top=1, echoes=["Gr\ufffd"])
    log = answers.new_log()
    for text in ("ö", "b"):
        chosen = TokenLogprob(TokenText(text, text.encode()), -2.0)
        log.add([TokenEntry(chosen, (chosen,))])
    answer = Answer("öb", FINISH, log)
    content = answers.plain(Completion((answer,), Usage(2, 2), (prompt,)))
    (choice,) = json.loads(b"".join(json_parts(content)))["choices"]
    assert choice["text"] == "Gr\ufffdöb"
    assert choice["logprobs"] == {
        "tokens": ["Gr", "bytes:\\xc3", "ö", "b"],
        "token_logprobs": [None, -1.0, -2.0, -2.0],
        "top_logprobs": [None, {"bytes:\\xc3": -1.0}, {"ö": -2.0}, {"b": -2.0}],
        "text_offset": [0, 2, 3, 4],
    }


def test_lists_may_be_empty_joined_and_anywhere_in_a_document():
    empty, first, second = JsonList(), JsonList(), JsonList()
    first.extend([1, {"a": [2]}])
    first.extend([])
    second.extend(["x"])
    second.append(empty)
    second.append(first)
    empty.append(JsonList())
    content = {"b": [first, {"c": empty}], "d": second, "e": 1}
    assert json.loads(b"".join(json_parts(content))) == {
        "b": [[1, {"a": [2]}], {"c": []}],
        "d": ["x", 1, {"a": [2]}],
        "e": 1,
    }
    with pytest.raises(TypeError, match="not JSON serializable: object"):
        json_parts({"a": object()})
