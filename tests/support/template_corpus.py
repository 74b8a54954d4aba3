"""Chat templates in the forms that checkpoints of this family have, and conversations for them.

The words are this project's own; the forms are those of Llama 3.2 Vision, of Llama 3.1 with tools,
of Llama Guard 3 for text and for images, and of templates that read one form of content only, that
raise, or that use macros and loop controls.
"""

from __future__ import annotations

from .http_side import LLAMA_TEMPLATE
from .tool_template import TOOL_TEMPLATE

_HEADER = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
_ANSWER = (
    "{%- if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

LIST_ONLY = (
    "{{- bos_token }}{%- for message in messages %}{{- "
    + _HEADER
    + """ }}
    {%- for part in message['content'] %}
        {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}"""
    + _ANSWER
)
STRING_ONLY = (
    "{{- bos_token }}{%- for message in messages %}{{- "
    + _HEADER
    + " + message['content'] + '<|eot_id|>' }}{%- endfor %}"
    + _ANSWER
)
RAISING = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('A system message stands first.') }}
    {%- endif %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('The role ' + message['role'] + ' is unknown here.') }}
    {%- endif %}
    {{- '[' + message['role'] + '] ' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant] ' }}{%- endif %}
"""
MACROS = """\
{%- macro shown(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|image|>' -}}
                {%- continue -%}
            {%- endif -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if loop.index0 == 7 -%}{%- break -%}{%- endif -%}
    {%- set text = shown(message.content) -%}
    {%- if message.role == 'assistant' and '</think>' in text -%}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ text ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
WITH_TOOLS = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "These functions can be called:\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Tools need a first message of a user.") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nCall one of these functions:\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call a turn, please.") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_POLICY = """\
{%- if not categories is defined %}
    {%- set categories = {'S1': 'Threats.', 'S2': 'Fraud.', 'S3': 'Private data.'} %}
{%- endif %}
{%- if not excluded_category_keys is defined %}{%- set excluded_category_keys = [] %}{%- endif %}
{{- bos_token }}{{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
{{- "Task: Say whether the last message of '" + role + "' breaks the rules below.\\n\\n" }}
{{- '<BEGIN UNSAFE CONTENT CATEGORIES>' }}
{%- for key in categories.keys() if key not in excluded_category_keys %}
    {{- '\\n' + key + ': ' + categories[key] }}
{%- endfor %}
{{- '\\n<END UNSAFE CONTENT CATEGORIES>\\n\\n<BEGIN CONVERSATION>\\n\\n' }}
"""
_VERDICT = """\
{{- '<END CONVERSATION>\\n\\nAnswer for ' + role + ": 'safe', or 'unsafe' and on the next" }}
{{- ' line the categories.<|eot_id|>' }}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GUARD_TEXT = (
    "{%- set role = 'Agent' if messages | length % 2 == 0 else 'User' %}\n"
    + _POLICY
    + """\
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user, assistant, user, ...') }}
    {%- endif %}
    {{- 'User: ' if message['role'] == 'user' else 'Agent: ' }}
    {{- message['content'] | trim + '\\n\\n' }}
{%- endfor %}
"""
    + _VERDICT
)
GUARD_VISION = (
    "{%- set role = 'Agent' if messages | length % 2 == 0 else 'User' %}\n"
    + _POLICY
    + """\
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user, assistant, user, ...') }}
    {%- endif %}
    {{- 'User: ' if message['role'] == 'user' else 'Agent: ' }}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'image' %}
            {%- if not (loop.first and message['role'] == 'user') %}
                {{- raise_exception('An image stands at the start of a user message.') }}
            {%- endif %}
            {{- '<|image|>' }}
        {%- else %}
            {{- part['text'] | trim }}
        {%- endif %}
    {%- endfor %}
    {{- '\\n\\n' }}
{%- endfor %}
"""
    + _VERDICT
)

TEMPLATES = {
    "vision": LLAMA_TEMPLATE,
    "vision with tools": TOOL_TEMPLATE,
    "tools": WITH_TOOLS,
    "guard, text": GUARD_TEXT,
    "guard, vision": GUARD_VISION,
    "lists only": LIST_ONLY,
    "strings only": STRING_ONLY,
    "raises": RAISING,
    "macros": MACROS,
}
# Those that a worker renders itself.
PLAIN = {name for name in TEMPLATES if name != "macros"}


def _message(role, *parts, calls=()):
    """A client's message: texts, and numbers for images."""
    return {"role": role, "parts": list(parts), "calls": list(calls)}


def _user(*parts):
    return _message("user", *parts)


def _system(*parts):
    return _message("system", *parts)


def _answer(*parts, calls=()):
    return _message("assistant", *parts, calls=calls)


def _result(text):
    return _message("tool", text)


CALL = {"name": "get_weather", "arguments": {"city": "Zürich <1>", "days": 2, "exact": True}}
TIME = {"name": "get_time", "arguments": {}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather & more <now>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}


def _talk(*messages, tools=(), **options):
    return {"messages": list(messages), "tools": list(tools), "options": options}


_CHAT = (_user("Hello."), _answer("Hi! "), _user(" And you?\n"))
CONVERSATIONS = {
    "a question": _talk(_user("What is it?")),
    "blanks around a text": _talk(_user(" What is it? ")),
    "a tag": _talk(_user("Look: <image>")),
    "lines": _talk(_user("\n\nWhat\n\tis it?\n")),
    "an image and blanks": _talk(_user(1, " What is it? ")),
    "an image": _talk(_user(1, "What is it?")),
    "an image alone": _talk(_user(1)),
    "two images": _talk(_user(1, 2, "Which one?")),
    "captions": _talk(_user("first: ", 1, " second: ", 2)),
    "an image last": _talk(_user("Look: ", 1)),
    "two texts": _talk(_user("a ", " b")),
    "several turns": _talk(*_CHAT),
    "an image in the second turn": _talk(_user("Hello."), _answer("Hi."), _user(1, "What is it?")),
    "an image in each turn": _talk(_user(1, "And?"), _answer("Red."), _user(2, "And now?")),
    "a system message": _talk(_system(" Be brief. \n"), *_CHAT),
    "a system message in parts": _talk(_system("Be ", "brief."), _user("Hello.")),
    "a system message and an image": _talk(_system("Be brief."), _user(1, "What is it?")),
    "a late system message": _talk(_user("Hello."), _system("Be brief."), _user("Well?")),
    "an assistant first": _talk(_answer("Hello."), _user("Who are you?")),
    "two users": _talk(_user("Hello."), _user("Hello?")),
    "an answer last": _talk(_user("Hello."), _answer("Hi.")),
    "an empty answer": _talk(_user("Hello."), _answer(""), _user("Hello?")),
    "an empty text": _talk(_user("")),
    "blanks alone": _talk(_user("  ")),
    "code of a template": _talk(_user("{{ 7 * 7 }}{% raw %} {# x #}")),
    "markup": _talk(_user("<b>&amp;\"'</b> 🐻 東京")),
    "a thought": _talk(_user("1+1?"), _answer("<think>\nhm\n</think>\n\n2"), _user("Sure?")),
    "many turns": _talk(*(_user(f"{i}?") if i % 2 == 0 else _answer(f"{i}.") for i in range(9))),
    "tools": _talk(_user(" Hot? "), tools=[WEATHER, CLOCK]),
    "tools and a system message": _talk(_system("Be brief."), _user("Hot?"), tools=[WEATHER]),
    "tools and an assistant first": _talk(_answer("Hm."), _user("Hot?"), tools=[WEATHER]),
    "a call": _talk(_user("Hot?"), _answer(calls=[CALL]), _result('{"c": "30"} '), tools=[WEATHER]),
    "a call without tools": _talk(_user("Hot?"), _answer(calls=[CALL]), _result("yes")),
    "a text beside a call": _talk(_user("Hot?"), _answer("Hm.", calls=[CALL]), tools=[WEATHER]),
    "several calls": _talk(_user("Hot?"), _answer(calls=[CALL, TIME]), tools=[WEATHER, CLOCK]),
    "tools and an image": _talk(_user(1, "Hot there?"), tools=[WEATHER]),
    "no header": _talk(*_CHAT, add_generation_prompt=False),
    "an answer to continue": _talk(
        _user(1, "What is it?"), _answer("It is"), continue_final_message=True
    ),
    "blanks to continue": _talk(_user("JSON?"), _answer(' {"a": '), continue_final_message=True),
    "variables": _talk(
        _user("How?"),
        chat_template_kwargs={
            "categories": {"S1": "Long words.", "X 9": "Short <words>."},
            "excluded_category_keys": ["X 9"],
            "date_string": "1 Jan 2030",
        },
    ),
    "an excluded category": _talk(
        _user("How?"), chat_template_kwargs={"excluded_category_keys": ["S2", "S3"]}
    ),
    "tools in the system message": _talk(
        _user("Hot?"), tools=[WEATHER], chat_template_kwargs={"tools_in_user_message": False}
    ),
}
