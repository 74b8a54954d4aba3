"""A chat template that treats tools as the published one of Llama 3.2 does.

Written from what is documented of it: tools as indented JSON in the first user
message behind a fixed task, one call a turn, results as JSON in an ipython turn.
"""

from .http_side import LLAMA_TEMPLATE

_DATE = '    {{- "Cutting Knowledge Date: December 2023\\n" }}\n'
_TURNS = "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role']"
_TURN_END = "    {{- '<|eot_id|>' }}\n{%- endfor %}\n"

_ENVIRONMENT = """\
    {%- if tools is defined and tools %}
        {{- "Environment: ipython\\n" }}
    {%- endif %}
"""
_TOOLS = """\
{%- if tools is defined and tools %}
    {%- if not messages %}
        {{- raise_exception("no user message to put the tools into") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- "Given the following functions, please respond with a JSON for a function call with its " }}
    {{- "proper arguments that best answers the given prompt.\\n\\nRespond in the format " }}
    {{- '{"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\\n\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + "\\n\\n" }}
    {%- endfor %}
    {{- messages[0]['content'] | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
"""
_CALLS = """\
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name }}
        {{- '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
        {%- continue %}
    {%- elif message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {{- message.content | tojson + '<|eot_id|>' }}
        {%- continue %}
    {%- endif %}
"""

TOOL_TEMPLATE = (
    LLAMA_TEMPLATE.replace(_DATE, _ENVIRONMENT + _DATE)
    .replace(_TURNS, _TOOLS + _TURNS)
    .replace(_TURNS, _CALLS + _TURNS.split("\n", 1)[1])
)
