"""Every kind of template with every kind of conversation: transformers' tokens, or an error."""

import json

import pytest
from support.http_side import write_checkpoint
from support.template_corpus import CONVERSATIONS, PLAIN, TEMPLATES

from vlmserve.server.prompts.chat_template import TemplateOptions, TemplateRefusedError
from vlmserve.server.prompts.conversation import ImagePart, Message, TextPart, Tool, ToolCall
from vlmserve.server.prompts.processor import Processor

LIMIT = 100_000
# In which form each template reads contents; what is in neither it takes in both.
CALLS = {
    title for title, talk in CONVERSATIONS.items() if any(m["calls"] for m in talk["messages"])
}
NO_TOOLS, NO_CALLS = "it takes no tools", "it takes no calls of tools"
LISTS = {"guard, vision", "lists only"}
STRINGS = {"tools", "guard, text", "strings only", "raises"}


def messages_of(talk):
    """The conversation as a request becomes it."""
    return [
        Message(
            one["role"],
            tuple(
                ImagePart(f"u{part}", "f") if isinstance(part, int) else TextPart(part)
                for part in one["parts"]
            ),
            tuple(ToolCall(call["name"], call["arguments"]) for call in one["calls"]),
        )
        for one in talk["messages"]
    ]


def tools_of(talk):
    functions = [tool["function"] for tool in talk["tools"]]
    return [Tool(one["name"], one.get("description"), one.get("parameters")) for one in functions]


def options_of(talk):
    options = dict(talk["options"])
    is_continued = options.get("continue_final_message", False)
    return TemplateOptions(
        options.get("add_generation_prompt", not is_continued),
        is_continued,
        options.get("chat_template_kwargs", {}),
    )


def turns_of(talk, name):
    """The conversation as a user of transformers would write it for this template."""
    return [_turn(one, name, bool(talk["tools"])) for one in talk["messages"]]


def _turn(one, name, has_tools):
    parts = one["parts"]
    has_images = any(isinstance(part, int) for part in parts)
    is_talk = one["role"] in ("user", "assistant")
    in_parts = has_images or (len(parts) > 1 and is_talk and not has_tools)
    if name in LISTS or (name not in STRINGS and in_parts):
        content = [
            {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}
            for part in parts
        ]
    else:
        content = "".join("<|image|>" if isinstance(part, int) else part for part in parts)
    turn = {"role": one["role"], "content": content}
    if one["calls"]:
        calls = [{"type": "function", "function": call} for call in one["calls"]]
        turn["tool_calls"] = calls
    return turn


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path_factory.mktemp("theirs"), None)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return {
        name: Processor.from_folder(write_checkpoint(folder / str(i), dated(template)), "as-sent")
        for i, (name, template) in enumerate(TEMPLATES.items())
    }


def dated(template):
    """The template without a clock."""
    return template.replace("strftime_now is defined", "false")


def theirs_of(tokenizer, name, talk):
    """What transformers makes of it: token ids, or the exception."""
    options = dict(talk["options"])
    variables = options.pop("chat_template_kwargs", {})
    if not options.get("continue_final_message"):
        options.setdefault("add_generation_prompt", True)
    try:
        text = tokenizer.apply_chat_template(
            turns_of(talk, name),
            tools=talk["tools"] or None,
            chat_template=dated(TEMPLATES[name]),
            tokenize=False,
            **options,
            **variables,
        )
    except Exception as error:
        return error
    return text


def is_whole(text, talk):
    """Whether no text, image or tool is missing from a rendering."""
    texts = [part for one in talk["messages"] for part in one["parts"] if isinstance(part, str)]
    images = [part for one in talk["messages"] for part in one["parts"] if isinstance(part, int)]
    names = [tool["function"]["name"] for tool in talk["tools"]]
    names += [call["name"] for one in talk["messages"] for call in one["calls"]]
    shown = [one.strip() for one in texts] + names
    escaped = json.dumps(text, ensure_ascii=False)
    is_shown = all(one in text or json.dumps(one)[1:-1] in text or one in escaped for one in shown)
    return is_shown and text.count("<|image|>") == len(images) and "'type': 'text'" not in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_transformers_or_the_error_says_why(tokenizer, processors, name):
    outcomes = {"equal": 0, "refused": 0, "meta": 0}
    for title, talk in CONVERSATIONS.items():
        theirs = theirs_of(tokenizer, name, talk)
        try:
            ours = processors[name].prepare(
                messages_of(talk), LIMIT, tools_of(talk), options=options_of(talk)
            )
        except TemplateRefusedError as error:
            outcomes["refused"] += 1
            check_refusal(title, talk, theirs, str(error))
            continue
        if ours.meta_reason is not None:
            outcomes["meta"] += 1
            check_meta(title, talk, theirs, ours.meta_reason)
            continue
        outcomes["equal"] += 1
        assert isinstance(theirs, str), (title, theirs)
        expected = tokenizer(theirs, add_special_tokens=False)["input_ids"]
        assert ours.token_ids == expected, (title, theirs)
    assert outcomes["equal"] >= 20, outcomes
    assert processors[name].renderer.is_quick == (name in PLAIN)


def check_refusal(title, talk, theirs, reason):
    """transformers raises the same, or loses something."""
    if isinstance(theirs, Exception):
        is_raised = type(theirs).__name__ == "TemplateError"
        is_ours = reason in (NO_TOOLS, NO_CALLS) and (talk["tools"] or CALLS & {title})
        assert is_ours or not is_raised or reason == str(theirs), (title, theirs, reason)
    elif "first user message" not in reason:
        assert not is_whole(theirs, talk), (title, reason, theirs)


def check_meta(title, talk, theirs, reason):
    """Only for the three things that are promised, and only where the template refuses them."""
    assert isinstance(theirs, Exception) or not is_whole(theirs, talk), title
    has_images = any(isinstance(part, int) for one in talk["messages"] for part in one["parts"])
    has_system = any(one["role"] == "system" for one in talk["messages"]) or talk["tools"]
    if reason == "system_and_images":
        assert has_images, title
        assert has_system, title
    elif reason == "text_and_calls":
        assert any(one["calls"] and any(one["parts"]) for one in talk["messages"]), title
    else:
        assert reason == "several_calls", title
        assert any(len(one["calls"]) > 1 for one in talk["messages"]), title
