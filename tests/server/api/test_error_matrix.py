"""Every field of every POST route: missing, null, of a wrong type, out of range, unknown beside it.

The cases come from the types that read the bodies, so a new field or route is in it by itself.
"""

import asyncio
import copy
import functools
import random
import re
from dataclasses import dataclass, replace

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    meta_like_tokenizer,
    tokens_one_by_one,
    write_checkpoint,
)
from support.invariants import POSTED_HANDLERS, POSTED_ROUTES
from support.quick_posts import quick_posts
from support.schema_cases import cases_of

from vlmserve.models.lora.files import CONFIG, WEIGHTS
from vlmserve.server.adapters.settings import AdapterSettings
from vlmserve.server.routes import adapters
from vlmserve.server.structured_output.compile_checks import GrammarChecks
from vlmserve.server.worker.app import ROUTES

TOKENIZER = meta_like_tokenizer()
TURN = {"role": "user", "content": "What"}
BASES = {
    "ChatCompletionRequest": {"model": MODEL, "messages": [TURN]},
    "CompletionRequest": {"model": MODEL, "prompt": "What"},
    "TokenizeRequest": {"prompt": "What"},
    "ModerationRequest": {"input": "What"},
    "DetokenizeRequest": {"tokens": [3923]},
    "StackChatRequest": {"model_id": MODEL, "messages": [TURN]},
    "MessagesRequest": {"model": MODEL, "max_tokens": 8, "messages": [TURN]},
    "CountTokensRequest": {"model": MODEL, "messages": [TURN]},
    "ResponsesRequest": {"model": MODEL, "input": "What"},
    "LoadAdapterRequest": {"lora_name": "new", "lora_path": "good", "load_inplace": True},
    "UnloadAdapterRequest": {"lora_name": "new"},
}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
URL = "https://host/a.png"
# Structs whose rules between fields ask for more than their required ones.
SAMPLES = {
    "AssistantMessage": {"role": "assistant", "content": "a"},
    "CalledFunction": {"name": "a", "arguments": "{}"},
    "ContentItem": {"text": "a"},
    "ImageSource": {"uri": URL},
    "InputItem": {"role": "user", "content": "a"},
    "StackMessage": {"role": "user", "content": "a"},
}
TOOL = {"type": "function", "function": {"name": "a"}}
CALL = {"id": "a", "type": "function", "function": {"name": "a", "arguments": "{}"}}
# What the type takes at null, and a rule between fields does not: something must be there.
REFUSED_NULLS = {
    "ChatCompletionRequest": r"(?!)",
    "CompletionRequest": r"(?!)",
    "TokenizeRequest": r"prompt",
    "ModerationRequest": r"(?!)",
    "DetokenizeRequest": r"(?!)",
    "MessagesRequest": r"(?!)",
    "CountTokensRequest": r"(?!)",
    "ResponsesRequest": r"input\[0\]\.(role|content)",
    "LoadAdapterRequest": r"(?!)",
    "UnloadAdapterRequest": r"(?!)",
    "StackChatRequest": r"model_id|messages\[0\]\.(content|context)(\[0\])?\.(text|image\.uri)",
}
ANTHROPIC = ("MessagesRequest", "CountTokensRequest")
KINDS = ("missing", "null", "type", "range", "choice", "unknown")
# The adapters' routes are served with --allow-lora-updates only.
SERVED = [*ROUTES, adapters.ROUTES]
ADAPTERS = ("LoadAdapterRequest", "UnloadAdapterRequest")
WITHOUT_CHOICES = ("CompletionRequest", "DetokenizeRequest", *ADAPTERS)
POSTS = [one for group in SERVED for one in group.endpoints if one.body is not None]
# The first path of each body takes every case, each further handler a sample of them.
FIRST = {one.body: one.path for one in reversed(POSTS)}
HANDLERS = {one.handler: one.path for one in reversed(POSTS)}
SIBLINGS = [path for path in HANDLERS.values() if path not in FIRST.values()]


@dataclass(frozen=True)
class Folders:
    """What a server is started with. root: the folder of adapters."""

    checkpoint: str
    root: str


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Without a template: Meta's format takes every conversation that the schemas take."""
    root = tmp_path_factory.mktemp("adapters")
    (root / "good").mkdir()
    (root / "good" / CONFIG).write_text("{}")
    (root / "good" / WEIGHTS).write_text("good")
    return Folders(write_checkpoint(tmp_path_factory.mktemp("matrix"), None), str(root))


@pytest.fixture(autouse=True)
def no_grammar_is_compiled(monkeypatch):
    """The small tokenizer takes none; what grammars may be is tested with them."""

    async def check(self, grammar, *_):
        return grammar

    monkeypatch.setattr(GrammarChecks, "check", check)


def test_every_post_route_is_in_the_matrix():
    assert {one.body.__name__ for one in POSTS} == set(BASES)
    for body in FIRST:
        cases = all_cases(body)
        assert {case.kind for case in cases} >= {"null", "type", "unknown"}
        assert {case.field for case in cases} >= set(body.__struct_fields__)
        has_choices = body.__name__ not in WITHOUT_CHOICES
        assert not has_choices or len([case for case in cases if case.kind == "choice"]) > 2


def test_rows_on_every_route_are_run_through_every_handler():
    """A path more of a handler is read by the same code."""
    handlers = {one.path: one.handler for one in POSTS}
    of_all = {handlers[path] for path in POSTED_ROUTES}
    assert {handlers[path] for path in POSTED_HANDLERS} == of_all


@functools.cache
def all_cases(body):
    return list(cases_of(body, BASES[body.__name__], SAMPLES))


def completed(schema, case):
    """The body, with what its null needs beside it to be taken."""
    body = copy.deepcopy(case.body)
    if schema == "TokenizeRequest" and (body.get("messages") or body.get("tools")):
        body = {"messages": [TURN]} | body
        del body["prompt"]
    if not case.is_neutral:
        return body
    if "stream_options" in body:
        body["stream"] = True
    if schema == "ChatCompletionRequest" and "tool_choice" in body:
        body["tools"] = [TOOL]
    if schema == "ResponsesRequest" and body.get("tool_choice"):
        body["tools"] = [{"type": "function", "name": "a"}]
    if schema in ANTHROPIC and body.get("tool_choice"):
        body["tools"] = [{"name": "a", "input_schema": {}}]
    return with_turns_that_fit(schema, body)


def with_turns_that_fit(schema, body):
    """A result behind its call; of Llama Stack's, calls in an answer, and an image without text."""
    turn = (body.get("messages") or [{}])[0] or {}
    if schema in ANTHROPIC:
        block = turn["content"][0] if isinstance(turn.get("content"), list) else {}
        if block.get("type") == "tool_result":
            call = {"type": "tool_use", "id": "a", "name": "a", "input": {}}
            body["messages"].insert(0, {"role": "assistant", "content": [call]})
        return body
    if schema != "StackChatRequest":
        if turn.get("role") == "tool":
            body["messages"].insert(0, {"role": "assistant", "tool_calls": [CALL]})
        return body
    if turn.get("tool_calls"):
        turn["role"] = "assistant"
    for content in (turn.get("content"), turn.get("context")):
        item = content[0] if isinstance(content, list) and content else content
        if isinstance(item, dict) and item.get("image"):
            item.pop("text", None)
    return body


async def make_ready(posts, schema):
    """Serve the adapter new before it is unloaded, and not before it is loaded."""
    if schema == "LoadAdapterRequest":
        await posts.post(UNLOAD, BASES["UnloadAdapterRequest"])
    elif schema == "UnloadAdapterRequest":
        await posts.post(LOAD, BASES["LoadAdapterRequest"])


def send(server, path, body, cases, unknown_fields="refuse"):
    """The answers to all cases, from one server, which then still answers a good body."""

    schema = body.__name__

    async def run():
        is_guard = schema == "ModerationRequest"
        text = "safe" if is_guard else "What?"
        engine = ScriptedEngine(lambda request: tokens_one_by_one(TOKENIZER, text))
        options = {"unknown_fields": unknown_fields, "task": "moderation" if is_guard else "auto"}
        if schema in ADAPTERS:
            options["adapters"] = AdapterSettings(allow_lora_updates=True, lora_root=server.root)
        answers = []
        async with (
            client_of(server.checkpoint, engine, **options) as client,
            quick_posts(client) as posts,
        ):
            for case in cases:
                await make_ready(posts, schema)
                answers.append(await posts.post(path, completed(schema, case)))
            await make_ready(posts, schema)
            assert (await posts.post(path, BASES[schema])).status_code == 200
            assert engine.open == set()
            return answers

    return asyncio.run(run())


def problem_of(schema, case, answer):
    """What is wrong with the answer to a case; None if nothing."""
    is_missed = case.is_neutral and re.fullmatch(REFUSED_NULLS[schema], case.field)
    if case.is_neutral and not is_missed:
        return None if answer.status_code == 200 else answer.text[:200]
    if answer.status_code != 400:
        return f"status {answer.status_code}"
    error = error_of(answer, 400)
    param, message = error["param"], error["message"][:120]
    if error["type"] != "invalid_request_error" or param is None:
        return f"not a named field: {message}"
    if is_missed:
        # The whole that lacks something, or the field.
        return None if (case.field + ".").startswith(f"{param}.") else f"param {param}: {message}"
    # Of a list it may be an item.
    if param != case.field and not param.startswith((f"{case.field}.", f"{case.field}[")):
        return f"param {param}: {message}"
    name = case.field.rpartition(".")[2].partition("[")[0]
    if name not in message:
        return f"not named: {message}"
    # Of an enum, and of parts by their type, the error lists what is taken.
    missed = [value for value in case.choices if f'"{value}"' not in error["message"]]
    return f"not listed: {missed}" if missed else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", list(FIRST), ids=lambda body: body.__name__)
def test_every_field_is_judged_and_named(server, body, kind):
    cases = [case for case in all_cases(body) if case.kind == kind]
    answers = send(server, FIRST[body], body, cases)
    problems = {
        (case.field, str(case.body)[:150]): problem
        for case, answer in zip(cases, answers, strict=True)
        if (problem := problem_of(body.__name__, case, answer))
    }
    assert not problems, "\n".join(map(repr, problems.items()))


@pytest.mark.parametrize("body", list(FIRST), ids=lambda body: body.__name__)
def test_by_default_unknown_fields_are_reported_and_the_others_judged_alike(server, body):
    schema = body.__name__
    cases = all_cases(body)
    unknown = [replace(case, is_neutral=True) for case in cases if case.kind == "unknown"]
    others = [case for case in cases if case.kind != "unknown"]
    others = random.Random(schema).sample(others, min(40, len(others)))
    answers = send(server, FIRST[body], body, [*unknown, *others], "report")
    problems = {}
    for case, answer in zip(unknown, answers, strict=False):
        # A result stands behind the turn that `completed` puts before it.
        named = answer.headers.get("x-ignored-fields", "").replace("messages[1]", "messages[0]")
        # Llama Stack's samples have two spellings of an image at once, which is another mistake.
        is_other = schema == "StackChatRequest" and "send one" in answer.text
        if named != case.field or not (answer.status_code == 200 or is_other):
            problems[case.field] = (answer.status_code, named, answer.text[:200])
    for case, answer in zip(others, answers[len(unknown) :], strict=True):
        if problem := problem_of(schema, case, answer):
            problems[case.field] = problem
    assert not problems, "\n".join(map(repr, problems.items()))


@pytest.mark.parametrize("path", SIBLINGS)
def test_sibling_paths_judge_alike(server, path):
    (body,) = [one.body for one in POSTS if one.path == path]
    cases = random.Random(path).sample(all_cases(body), 12)
    answers = send(server, path, body, cases)
    first = send(server, FIRST[body], body, cases)
    for case, answer, other in zip(cases, answers, first, strict=True):
        assert answer.status_code == other.status_code, case
        if answer.status_code == 400:
            assert error_of(answer, 400) == error_of(other, 400)
