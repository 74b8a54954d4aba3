"""Constraints between the fields of a body, for the API's document.

A field's type constrains one field; the code checks these as well. A struct lists those that JSON
Schema can express in `schema_rules`, and all others, as sentences, in `prose_rules`.
"""

from __future__ import annotations

from typing import Any


def having(field: str, value: dict[str, Any]) -> dict[str, Any]:
    """The field is present, with a value of this schema."""
    return {"required": [field], "properties": {field: value}}


def given(field: str) -> dict[str, Any]:
    """The field is present and not null."""
    return having(field, {"not": {"type": "null"}})


def absent(*fields: str) -> dict[str, Any]:
    """Each of the fields is null or absent."""
    return {"properties": {field: {"type": "null"} for field in fields}}


def one_given(*fields: str) -> dict[str, Any]:
    """At least one of the fields is present."""
    return any_of(*(given(field) for field in fields))


def only_one_given(*fields: str) -> dict[str, Any]:
    """Exactly one of the fields is present."""
    return {"oneOf": [given(field) for field in fields]}


def needs(field: str, value: dict[str, Any], other: str, need: dict[str, Any]) -> dict[str, Any]:
    """If field has such a value, other must be present with the needed value."""
    return {"if": having(field, value), "then": having(other, need)}


def all_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """All rules apply."""
    return {"allOf": list(rules)}


def any_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """At least one of the rules applies."""
    return {"anyOf": list(rules)}


# Constraints that JSON Schema cannot express. The code that checks one raises its error.
NO_NUL = "Texts do not contain U+0000."
RESULTS = "The id of a tool message is the id of a call in an earlier assistant message."
PICTURES = (
    "An image is a data URL with a base64 image file, or an http or https URL of a public"
    " host, within the server's limits."
)
CONTEXT = "The prompt and the answer fit into the model's context."
ONE_MAXIMUM = "max_tokens and max_completion_tokens are equal if both are set."
MINIMUM = "min_tokens is at most the number of tokens that may be generated."
ONE_FORM = (
    "At most one field sets the form of the answer: response_format or a guided_* field, and a"
    " guided_* field does not go with a tool_choice that requires calls."
)
COMPILED = "JSON schemas, patterns, choices and grammars compile, and no schema is false."
TOOL_NAMES = "Tool names are unique, and none is auto, none or required."
PARAMETERS = "A tool's parameters are a schema of type object: at most 64 KiB and 64 levels."
NAMED_TOOL = "A tool_choice names one of the tools; required needs at least one tool."
ARGUMENTS = "The arguments of an earlier call have at most 64 levels."
VOCABULARY = "Token ids are in the model's vocabulary."
NUM_ANSWERS = "A request has at most --max-answers-per-request answers, and at most 128."
PROMPT_ENTRIES = "prompt_logprobs times the prompt's tokens are within the server's limit."
ONE_MODEL = "model and model_id are equal if both are set."
ONE_SETTING = "A setting in tool_config and the same one beside it are equal."
USERS_PICTURES = "Only user messages have images."

STORED = (
    "A previous_response_id is the id of a response that the server still stores for the same key;"
    " store is true only if the server stores responses."
)
ITEMS = (
    "A message has role and content. A function_call has call_id, name and arguments, which are a"
    " JSON object. A function_call_output has the call_id of an earlier call. Only user messages"
    " have images. No item is an item_reference. At least one item is a message or a call, unless"
    " instructions are set."
)
CUT = "truncate_prompt_tokens leaves all images in the prompt."
TOKENS = "Each prompt has one token at least."
BEST_OF = "best_of is 1 or n if it is set."

TEMPLATE = "The server's chat template accepts the conversation and its arguments."
CONTINUED = (
    "With continue_final_message the last message is an assistant's, without tool_calls, and"
    " add_generation_prompt is not true."
)
VARIABLES = "chat_template_kwargs nests 16 levels at most."
GUARD = "The server's model is a guard."
OF_TEMPLATES = (CONTINUED, VARIABLES)

OF_CONVERSATIONS = (NO_NUL, TEMPLATE, RESULTS, ARGUMENTS, TOOL_NAMES, PARAMETERS)
OF_GENERATIONS = (NO_NUL, CONTEXT, ONE_FORM, COMPILED)
OF_CHATS = (
    *OF_GENERATIONS,
    *(TEMPLATE, PICTURES, ARGUMENTS, TOOL_NAMES, PARAMETERS, NAMED_TOOL),
)
OF_SAMPLING = (MINIMUM, VOCABULARY, NUM_ANSWERS, PROMPT_ENTRIES, CUT)
