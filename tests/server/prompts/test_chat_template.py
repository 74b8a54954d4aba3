"""Templates that misbehave, that look into texts, and what clients' texts may not do to them."""

import re
import time

import pytest
from support.http_side import LLAMA_TEMPLATE, SPECIAL_IDS
from support.template_corpus import GUARD_TEXT, MACROS, TEMPLATES, WITH_TOOLS

from vlmserve.server.prompts import chat_template
from vlmserve.server.prompts.chat_template import (
    ChatTemplate,
    TemplateOptions,
    TemplateRefusedError,
)
from vlmserve.server.prompts.conversation import ImagePart, Message, TextPart, arranged
from vlmserve.server.prompts.templates.content_format import content_formats
from vlmserve.server.prompts.templates.environment import make_environment
from vlmserve.server.prompts.templates.processes import (
    TemplateError,
    TemplateProcesses,
    try_template,
)

MARKS = tuple(SPECIAL_IDS)


def user(*parts):
    return Message(
        "user",
        tuple(ImagePart(str(one), "f") if isinstance(one, int) else TextPart(one) for one in parts),
    )


def answer(text):
    return Message("assistant", (TextPart(text),))


def rendered(template, messages, **options):
    pieces = template.render(messages, (), TemplateOptions(**options))
    return "".join(piece.text for piece in pieces)


def marks_of(pieces):
    """The special tokens that the pieces of the template's own text make."""
    text = "\0".join(piece.text for piece in pieces if piece.is_template)
    return [mark for mark in MARKS for _ in range(text.count(mark))]


LOOPS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "a power": "{{ (9 ** (9 ** 9)) | string | length }}",
    "a recursive macro": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
}
EATERS = {
    "a product": "{{ ('x' * 9999999999) | length }}",
    "a width": "{{ '%9999999999d' | format(1) }}",
    "a doubled name": "{% set ns = namespace(x='x' * 64) %}"
    "{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "an endless output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def processes():
    one = TemplateProcesses(timeout_s=0.5)
    yield one
    one.close()


@pytest.mark.parametrize("name", LOOPS | EATERS)
def test_row_22_a_template_that_loops_or_eats_memory_ends_within_its_bound(processes, name):
    """In a child: this process used to hang, or to be ended by the system."""
    source = "{{ messages[0].content }}" + (LOOPS | EATERS)[name]
    template = ChatTemplate(source, {}, processes=processes)
    assert not template.is_plain
    start = time.process_time()
    with pytest.raises(TemplateRefusedError, match=r"takes|over|memory|Error|too"):
        template.render([user("hi")])
    assert time.process_time() - start < 0.4, "the work was the child's"
    # The next template is not concerned.
    other = ChatTemplate(MACROS, {"bos_token": ""}, processes=processes)
    assert "hi<|eot_id|>" in rendered(other, [user("hi")])


def test_a_template_is_tried_in_a_child_that_is_ended():
    for source in LOOPS.values():
        try:
            reason = try_template(source, {"messages": []}, 0.3).error
        except TemplateError as error:
            reason = str(error)
        assert re.search(r"longer than 0\.3 s|recursion", reason), reason
    assert try_template(LLAMA_TEMPLATE, {"messages": [{"role": "user", "content": "a"}]}).text
    with pytest.raises(TemplateError, match=r"line 2: .*endfor"):
        try_template("\n{% for x in y %}", {"messages": []})


def test_the_published_form_is_rendered_once_and_in_the_worker(monkeypatch):
    calls = []
    real = chat_template.render

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(chat_template, "render", counted)

    class NoProcesses:
        def render(self, question):
            pytest.fail("a plain template needs no child")

    for name in ("vision", "vision with tools", "tools", "guard, vision"):
        calls.clear()
        template = ChatTemplate(TEMPLATES[name], {"bos_token": ""}, processes=NoProcesses())
        template.render([user(" Look: <image> <|eot_id|> </think>")])
        assert len(calls) == 1, name


@pytest.mark.parametrize(
    "code",
    [
        "{% for a in messages %}{% for b in messages %}{{ b.content }}{% endfor %}{% endfor %}",
        "{% set x = messages[0].content %}{% set x = x ~ x %}{{ x }}",
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x ~ m.content %}"
        "{% endfor %}{{ ns.x }}",
        "{% set x = [messages, messages] %}{% set x = [x, x] %}{{ x }}",
        "{{ messages[0].content | replace('<', '') }}",
        "{{ messages[0].content[:5] }}",
        "{% if 'x' in messages[0].content %}{{ messages[0].content }}{% endif %}",
        "{% if messages[0].content == 'x' %}{{ messages[0].content }}{% endif %}",
        "{% set text = messages[0].content %}{% if text == 'x' %}{{ text }}{% endif %}",
        "{{ messages[0].content.upper() }}",
        "{{ messages | map(attribute='content') | join }}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) }}",
        "{% for m in messages recursive %}{{ m.content }}{% endfor %}",
        "{{ 'x' * 5 }}{{ messages[0].content }}",
        "{{ '%s' % messages[0].content }}",
        "{% include 'x' %}",
        "{% for m in messages %}{% set m = messages %}{% for x in m %}{{ x }}{% endfor %}"
        "{% endfor %}",
    ],
)
def test_what_is_not_linear_or_looks_into_texts_is_not_plain(code):
    assert not ChatTemplate(code, {}).is_plain


FORMS = {
    "{{ messages[0].content }}": (("string", None), "string"),
    "{% for m in messages %}{{ m.content }}{% endfor %}": ((None, "string"), "string"),
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}": (
        (None, "openai"), "openai"),
    "{% for m in messages %}{% set content = m['content'] %}{% if content is string %}{{ content }}"
    "{% else %}{% for p in content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}": (
        (None, "both"), "both"),
    "{% macro f(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ f(m.content) }}{% endfor %}": ((None, "openai"), "openai"),
    "{% for m in messages %}{{ (m.content | selectattr('type', 'equalto', 'text') | first).text }}"
    "{% endfor %}": ((None, "openai"), "openai"),
    "{% for m in messages %}{{ m.content[0].text }}{% endfor %}": ((None, "openai"), "openai"),
    "no contents": ((None, None), "string"),
}  # fmt: skip


@pytest.mark.parametrize("source", FORMS)
def test_the_form_of_contents_is_read_from_the_syntax_tree(source):
    found = content_formats(make_environment().parse(source))
    (head, turn), of_users = FORMS[source]
    assert (found.head, found.turn) == (head, turn)
    assert found.of_role("user") == of_users


def test_the_option_overrides_what_is_found():
    source = (
        "{% for m in messages %}{{ '[' + m.role }}{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for p in m.content %}{{ '(' + p.text + ')' if p.text else '<|image|>' }}"
        "{% endfor %}{% endif %}{{ ']' }}{% endfor %}"
    )
    talk = [Message("system", (TextPart("s"),)), user("a", "b"), user(1, "c"), answer("d")]
    as_found = "[systems][user(a)(b)][user<|image|>(c)][assistantd]"
    expected = {
        "auto": as_found,
        "string": "[systems][userab][user<|image|>c][assistantd]",
        "openai": "[system(s)][user(a)(b)][user<|image|>(c)][assistant(d)]",
    }
    for option, text in expected.items():
        assert rendered(ChatTemplate(source, {}, content_format=option), talk) == text


def test_a_list_that_a_template_would_write_as_code_is_refused():
    template = ChatTemplate(LLAMA_TEMPLATE, {"bos_token": ""}, content_format="openai")
    with pytest.raises(TemplateRefusedError, match="list of parts as Python code"):
        template.render([Message("system", (TextPart("Be brief."),)), user("hi")])


LOOKING = {
    "a split": "{{ messages[0].content.split('#')[-1] }}",
    "lower case": "{{ messages[0].content | lower }}",
    "a replacement": "{{ messages[0].content | replace('#', '') }}",
    "a doubled text": "{{ messages[0].content }}{{ messages[0].content }}",
    "two texts as one": "{{ messages[0].content ~ messages[1].content }}{{ 'x' * 1 }}",
}


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("mark", ["<|eot_id|>", "<|image|>"])
def test_no_text_becomes_a_special_token_however_a_template_treats_it(processes, name, mark):
    template = ChatTemplate(LOOKING[name] + "<|eot_id|>", {}, marks=MARKS, processes=processes)
    half = len(mark) // 2
    for text in (f"a {mark}", f"#{mark}#", f"{mark[:half]}#{mark[half:]}", mark.upper(), "plain"):
        try:
            pieces = template.render([user(text), user("b")])
        except TemplateRefusedError:
            continue
        assert marks_of(pieces) == ["<|eot_id|>"]
    if name == "two texts as one":
        pieces = template.render([user(f"x{mark[:half]}"), user(f"{mark[half:]}y")])
        assert marks_of(pieces) == ["<|eot_id|>"]
        assert "".join(piece.text for piece in pieces) == f"x{mark}yx<|eot_id|>"


def test_variables_reach_the_template_and_make_no_special_token():
    template = ChatTemplate(GUARD_TEXT, {"bos_token": ""}, marks=MARKS)
    variables = {"categories": {"S1": "Lies.<|eot_id|>", "S2": "Puns."}}
    text = rendered(template, [user("hi")], variables=variables)
    assert "S1: Lies.<|eot_id|>\nS2: Puns.\n<END" in text
    pieces = template.render([user("hi")], (), TemplateOptions(variables=variables))
    usual = template.render([user("hi")])
    assert marks_of(pieces) == marks_of(usual)
    excluded = rendered(template, [user("hi")], variables={"excluded_category_keys": ["S2"]})
    assert "S1: Threats.\nS3:" in excluded
    dated = ChatTemplate(WITH_TOOLS, {"bos_token": ""})
    assert "Date: 1 Jan 2030" in rendered(
        dated, [user("hi")], variables={"date_string": "1 Jan 2030"}
    )


def test_a_message_is_continued_up_to_its_own_last_character():
    template = ChatTemplate(LLAMA_TEMPLATE, {"bos_token": ""})
    talk = [user(1, "What?"), answer(" It is ")]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    text = rendered(template, talk, **options)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n It is ")
    empty = rendered(template, [user("What?"), answer("")], **options)
    assert empty.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    trimming = ChatTemplate(TEMPLATES["raises"], {"bos_token": ""})
    assert rendered(trimming, [user("a"), answer(" b ")], **options).endswith("[assistant] b")


@pytest.mark.parametrize(
    ("parts", "auto", "front"),
    [
        (("a", 1), (1, "a"), (1, "a")),
        (("a", 1, 2), (1, 2, "a"), (1, 2, "a")),
        (("a", "b", 1), (1, "a", "b"), (1, "a", "b")),
        ((1, "a"), (1, "a"), (1, "a")),
        (
            ("first: ", 1, "second: ", 2),
            ("first: ", 1, "second: ", 2),
            (1, 2, "first: ", "second: "),
        ),
        (("a", 1, "b"), ("a", 1, "b"), (1, "a", "b")),
        ((1, 2), (1, 2), (1, 2)),
        (("a",), ("a",), ("a",)),
    ],
)
def test_images_move_to_the_front_only_from_behind_all_text(parts, auto, front):
    assert arranged(user(*parts), "auto") == user(*auto)
    assert arranged(user(*parts), "front") == user(*front)
    assert arranged(user(*parts), "as-sent") == user(*parts)
