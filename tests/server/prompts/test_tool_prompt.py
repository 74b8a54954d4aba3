"""Tools, calls and results in the prompt: the published format, and what users may not do to it."""

import datetime
import json
from keyword import iskeyword

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.http_side import SPECIAL_IDS, write_checkpoint
from support.tool_template import TOOL_TEMPLATE

from vlmserve.server.generation.tool_calls.python_arguments import json_of_arguments
from vlmserve.server.prompts.chat_template import AS_USUAL, ChatTemplate, TemplateRefusedError
from vlmserve.server.prompts.conversation import ImagePart, Message, TextPart, Tool, ToolCall
from vlmserve.server.prompts.meta_format import python_literal, render_as_meta
from vlmserve.server.prompts.processor import Processor, PromptTooLongError
from vlmserve.server.prompts.rendering import Renderer

LIMIT = 100_000
BEGIN = "<|begin_of_text|>"
WEATHER = Tool(
    "get_weather",
    "What the weather is like <now>",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
CLOCK = Tool("get_time")
CALL = ToolCall("get_weather", {"city": "Zürich", "days": 2, "exact": True})
TASK = (
    "Given the following functions, please respond with a JSON for a function call with its proper"
    " arguments that best answers the given prompt.\n\nRespond in the format"
    ' {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
WEATHER_JSON = """\
{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What the weather is like <now>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            },
            "required": [
                "city"
            ]
        }
    }
}

"""


def text(role, content, *calls):
    return Message(role, (TextPart(content),) if content else (), calls)


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def fixed_now():
    return datetime.datetime(2024, 7, 26)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE)
    return Processor.from_folder(folder, now=fixed_now)


@pytest.fixture(scope="module")
def metas(tmp_path_factory):
    return Processor.from_folder(write_checkpoint(tmp_path_factory.mktemp("meta"), template=None))


def rendered(processor, messages, tools=(), **options):
    token_ids = processor.prepare(messages, LIMIT, tools, **options).token_ids
    return processor.tokenizer.decode(token_ids, skip_special_tokens=False)


def preamble(system=""):
    return (
        BEGIN
        + header("system")
        + "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        + f"{system}<|eot_id|>"
    )


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_tools_stand_in_the_first_user_message_as_published(published, system):
    messages = [text("system", system), text("user", "Hot?")][not system :]
    assert rendered(published, messages, [WEATHER]) == (
        preamble(system)
        + header("user")
        + f"{TASK}{WEATHER_JSON}Hot?<|eot_id|>"
        + header("assistant")
    )


def test_a_call_and_its_results_come_back_as_published(published):
    messages = [
        text("user", "Hot?"),
        text("assistant", "", CALL),
        text("tool", '{"celsius": 30}'),
        text("tool", " sunny\n"),
        text("user", "And now?"),
    ]
    assert rendered(published, messages, [WEATHER]) == (
        preamble()
        + header("user")
        + f"{TASK}{WEATHER_JSON}Hot?<|eot_id|>"
        + header("assistant")
        + '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2, "exact": true}}'
        + f"<|eot_id|>{header('ipython')}"
        + '"{\\"celsius\\": 30}"<|eot_id|>'
        + header("ipython")
        + '" sunny\\n"<|eot_id|>'
        + header("user")
        + "And now?<|eot_id|>"
        + header("assistant")
    )


def test_a_result_in_several_texts_is_one_text(published):
    messages = [text("user", "Hot?"), text("assistant", "", CALL)]
    parts = Message("tool", (TextPart("sun"), TextPart("ny")))
    assert rendered(published, [*messages, parts]) == rendered(
        published, [*messages, text("tool", "sunny")]
    )


def test_a_history_of_calls_is_rendered_without_tools_too(published):
    messages = [text("user", "Hot?"), text("assistant", "", CALL), text("tool", "yes")]
    assert rendered(published, messages).endswith(
        f'true}}}}<|eot_id|>{header("ipython")}"yes"<|eot_id|>{header("assistant")}'
    )


def test_several_calls_of_one_turn_are_rendered_in_metas_format(published, metas):
    """The published template raises on them."""
    messages = [text("user", "Hot?"), text("assistant", "", CALL, ToolCall("get_time", {}))]
    ours = rendered(published, messages, [WEATHER])
    assert ours == rendered(metas, messages, [WEATHER])
    assert ours == (
        BEGIN
        + header("user")
        + f"{TASK}{WEATHER_JSON}Hot?<|eot_id|>"
        + header("assistant")
        + '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2, "exact": true}}; '
        + '{"name": "get_time", "parameters": {}}<|eot_id|>'
        + header("assistant")
    )


def test_a_text_beside_a_call_is_rendered_in_metas_format(published, metas):
    """The published template drops it."""
    turn = text("assistant", "Let me see.", CALL)
    messages = [text("user", "Hot?"), turn, text("tool", "yes")]
    found = published.prepare(messages, LIMIT, [WEATHER])
    assert found.meta_reason == "text_and_calls"
    assert rendered(published, messages, [WEATHER]) == rendered(metas, messages, [WEATHER])
    assert 'Let me see.\n{"name": "get_weather"' in rendered(published, messages, [WEATHER])


def test_a_text_that_is_lost_elsewhere_is_refused_beside_a_call_too():
    """Only the text beside the call is promised."""
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}"
    source += "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
    template = ChatTemplate(source, {})
    turns = [text("user", "Hot?"), text("assistant", "Let me see.", CALL), text("tool", "yes")]
    with pytest.raises(TemplateRefusedError, match=r"leaves out the text of messages\[1\]"):
        Renderer(template).render(turns, [], "json", AS_USUAL)


@pytest.mark.parametrize(
    "messages",
    [
        [text("system", "Be brief.")],
        [text("system", "Be brief."), text("assistant", "Hello."), text("assistant", "Hm.")],
        [text("system", "a"), text("assistant", "b"), text("user", "c")],
    ],
)
def test_tools_find_a_place_whatever_the_roles(published, metas, messages):
    """Not in the published template, which would put them before an assistant's words."""
    with pytest.raises(TemplateRefusedError, match="in the first user message"):
        published.prepare(messages, LIMIT, [WEATHER])
    ours = rendered(metas, messages, [WEATHER])
    assert ours.count(WEATHER_JSON) == 1
    assert ours.index(header("user")) < ours.index(TASK)
    for message in messages:
        assert message.text in ours


def test_a_template_that_knows_no_tools_does_not_lose_them():
    template = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}", {})
    for messages, tools in (
        ([text("user", "a")], [WEATHER]),
        ([text("user", "a"), text("assistant", "", CALL)], []),
    ):
        with pytest.raises(TemplateRefusedError, match="takes no"):
            template.render(messages, tools)


def test_function_tags_and_python_lists_are_rendered_as_asked(published):
    messages = [
        text("user", "Hot?"),
        text("assistant", "", CALL, ToolCall("get_time", {"z": None})),
        text("tool", "yes"),
    ]
    tags = rendered(published, messages, [WEATHER, CLOCK], tool_format="function_tag")
    assert tags.startswith(BEGIN + header("system"))
    assert '\n\n{"name": "get_weather", "description": "What' in tags
    assert '<function=example_function_name>{"example_name": "example_value"}</function>' in tags
    assert (
        '<function=get_weather>{"city": "Zürich", "days": 2, "exact": true}</function>\n'
        '<function=get_time>{"z": null}</function><|eot_id|>'
        f"{header('ipython')}yes<|eot_id|>{header('assistant')}"
    ) in tags
    lists = rendered(
        published, [text("system", "s"), *messages], [WEATHER], tool_format="python_list"
    )
    assert lists.startswith(BEGIN + header("system") + "You have access")
    assert lists.count(header("system")) == 1
    assert '[get_weather(city="Zürich", days=2, exact=True), get_time(z=None)]<|eot_id|>' in lists


@pytest.mark.parametrize("tool_format", ["json", "function_tag", "python_list"])
@pytest.mark.parametrize("special", sorted(SPECIAL_IDS))
def test_no_tool_call_or_result_can_spell_a_special_token(published, metas, special, tool_format):
    def messages_and_tools(mark):
        parameters = {"properties": {f"p{mark}": {"description": mark, "enum": [mark, "<|", 1]}}}
        tool = Tool("f", f"d{mark}", parameters)
        call = ToolCall("f", {f"a{mark}": mark, "b": [{"c": f"{mark}{mark}"}]})
        result = text("tool", f'r{mark}"')
        return [text("user", "x"), text("assistant", "", call), result], [tool]

    specials = set(SPECIAL_IDS.values())
    for one in (published, metas):
        told = []
        for mark in ("plain", special):
            messages, tools = messages_and_tools(mark)
            token_ids = one.prepare(messages, LIMIT, tools, tool_format).token_ids
            told.append([token_id for token_id in token_ids if token_id in specials])
        assert told[0] == told[1]
        assert rendered(one, messages, tools, tool_format=tool_format).count(special) > 8


def test_a_mark_cannot_be_put_together_from_a_key_and_a_value(published):
    tool = Tool("f", None, {"properties": {"<|eot": "_id|>", "<|": "eot_id|>"}})
    plain = Tool("f", None, {"properties": {"a": "b", "c": "d"}})
    specials = set(SPECIAL_IDS.values())
    token_ids = [
        published.prepare([text("user", "x")], LIMIT, [one]).token_ids for one in (tool, plain)
    ]
    first, second = ([i for i in ids if i in specials] for ids in token_ids)
    assert first == second


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from([*SPECIAL_IDS, "type"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("a<|>\" é_", max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text('ab<|>\\" é_', max_size=5), JSON, max_size=3)


@settings(max_examples=60, deadline=None)
@given(OBJECTS, OBJECTS, st.text(st.characters(exclude_categories=["Cs"])))
def test_the_rendering_is_the_one_that_transformers_makes(parameters, arguments, result):
    transformers = pytest.importorskip("transformers")
    tool, call = Tool("f", "a <b>", parameters), ToolCall("f", arguments)
    turns = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        },
        {"role": "tool", "content": result},
    ]
    template = TOOL_TEMPLATE.replace("strftime_now is defined", "false")
    theirs, _ = transformers.utils.chat_template_utils.render_jinja_template(
        conversations=[turns],
        tools=[tool.definition],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="",
    )
    messages = [text("user", "hi"), text("assistant", "", call), text("tool", result)]
    pieces = ChatTemplate(template, {}).render(messages, [tool])
    assert "".join(piece.text for piece in pieces) == theirs[0]


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        # Python takes no call with a keyword such as `as` for a name.
        st.from_regex(r"[a-z_]{1,5}", fullmatch=True).filter(lambda name: not iskeyword(name)),
        JSON,
        max_size=3,
    )
)
def test_python_literals_are_read_back_as_they_were_written(arguments):
    written = ", ".join(f"{key}={python_literal(value)}" for key, value in arguments.items())
    assert json.loads(json_of_arguments(written)) == arguments


def test_megabytes_of_tools_are_refused_before_they_are_tokenized(published):
    for tools, messages in (
        ([Tool("f", "x " * 1_000_000)], [text("user", "a")]),
        ([], [text("user", "a"), text("assistant", "", ToolCall("f", {"a": "x " * 1_000_000}))]),
    ):
        with pytest.raises(PromptTooLongError, match="over"):
            published.prepare(messages, 8191, tools)


def test_an_image_and_a_history_of_calls_share_a_prompt(published):
    picture = Message("user", (ImagePart("u", "image"), TextPart("a")))
    messages = [picture, text("assistant", "", CALL), text("tool", "b")]
    prompt = published.prepare(messages, LIMIT)
    assert len(prompt.spans) == len(prompt.images) == 1


def test_tools_in_metas_format_are_text():
    pieces = render_as_meta([text("user", "hi")], [Tool("f", "<|eot_id|>")])
    assert [piece.text for piece in pieces if piece.is_template].count("<|eot_id|>") == 1
    assert any("<|eot_id|>" in piece.text for piece in pieces if not piece.is_template)


@pytest.mark.parametrize("written", ['{"city": "Zü', "[1]", "<|eot_id|>", '"s0x0e"'])
def test_arguments_that_are_no_object_are_rendered_as_they_stand(published, metas, written):
    messages = [text("user", "a"), Message("assistant", (), (ToolCall("f", written),))]
    for processor in (published, metas):
        prompt = rendered(processor, messages)
        assert f'{{"name": "f", "parameters": {written}}}' in prompt
    plain, marked = (
        published.prepare([messages[0], Message("assistant", (), (ToolCall("f", one),))], 999)
        for one in ("x", written)
    )
    ends = [one.token_ids.count(SPECIAL_IDS["<|eot_id|>"]) for one in (plain, marked)]
    assert ends[0] == ends[1]
    for tool_format, expected in (
        ("function_tag", f"<function=f>{written}</function>"),
        ("python_list", f"[f({written})]"),
    ):
        pieces = render_as_meta(messages, (), tool_format)
        assert expected in "".join(piece.text for piece in pieces)
