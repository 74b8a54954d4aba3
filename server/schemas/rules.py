"""What must hold between a body's fields, in JSON schema's words.

A type says what each field may be; these say what the code checks beside it, for the API's
document. A struct names its own as `schema_rules`. Owns the words; knows no field.
"""

from __future__ import annotations

from typing import Any


def having(field: str, value: dict[str, Any]) -> dict[str, Any]:
    """The field is there, with such a value."""
    return {"required": [field], "properties": {field: value}}


def given(field: str) -> dict[str, Any]:
    """The field is there, and not null."""
    return having(field, {"not": {"type": "null"}})


def absent(*fields: str) -> dict[str, Any]:
    """Each of the fields is null or not there."""
    return {"properties": {field: {"type": "null"} for field in fields}}


def one_given(*fields: str) -> dict[str, Any]:
    """At least one of the fields is there."""
    return any_of(*(given(field) for field in fields))


def only_one_given(*fields: str) -> dict[str, Any]:
    """Exactly one of the fields is there."""
    return {"oneOf": [given(field) for field in fields]}


def needs(field: str, value: dict[str, Any], other: str, need: dict[str, Any]) -> dict[str, Any]:
    """Where field is there with such a value, other must be there with what is needed."""
    return {"if": having(field, value), "then": having(other, need)}


def all_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """Every rule holds."""
    return {"allOf": list(rules)}


def any_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """One of the rules holds, or several."""
    return {"anyOf": list(rules)}


# Constraints that JSON schema cannot express; a body lists them in `prose_rules`. The code that
# checks a rule raises its error.
NO_NUL = "Texts hold no U+0000."
RESULTS = "A tool message answers the id of a call in an earlier assistant message."
PICTURES = (
    "A picture is a data URL of a picture file in base64, or an http or https URL of a public"
    " host, within the server's limits."
)
CONTEXT = "The prompt and the answer fit the model's context."
ONE_MAXIMUM = "max_tokens and max_completion_tokens are equal where both are given."
MINIMUM = "min_tokens is not more than the tokens that may be generated."
ONE_FORM = (
    "At most one field says what form the answer must have: response_format, a guided one, or a"
    " tool_choice that asks for calls."
)
COMPILED = "JSON schemas, patterns, choices and grammars can be compiled, and are not false."
TOOL_NAMES = "Tools have different names, none of them auto, none or required."
PARAMETERS = "A tool's parameters are a schema of an object, of 64 KiB and 64 levels at most."
NAMED_TOOL = "A tool_choice names one of the tools, or needs some where it asks for calls."
ARGUMENTS = "The arguments of an earlier call nest 64 levels at most."
VOCABULARY = "Token ids are the model's."
NUM_ANSWERS = "All answers of a request are at most --max-answers-per-request, and 128 at most."
PROMPT_ENTRIES = "prompt_logprobs are not asked for of more than the server's limit of tokens."
ONE_MODEL = "model and model_id are equal where both are given."
ONE_SETTING = "What stands in tool_config and beside it is the same."
USERS_PICTURES = "Only a user's message holds a picture."

STORED = (
    "A previous_response_id is the id of a response that this server still keeps for the same key;"
    " store is true only where the server keeps responses."
)
ITEMS = (
    "An item of the input has what its type needs: a message a role and a content, a function_call"
    " call_id, name and arguments that are a JSON object, a function_call_output the call_id of an"
    " earlier call. Only a user's message has pictures. No item is an item_reference. One item at"
    " least is a message or a call, unless there are instructions."
)
CUT = "truncate_prompt_tokens leaves all images in the prompt."
BEST_OF = "best_of is 1 or n where it is given."

OF_CONVERSATIONS = (NO_NUL, RESULTS, ARGUMENTS, TOOL_NAMES, PARAMETERS)
OF_GENERATIONS = (NO_NUL, CONTEXT, ONE_FORM, COMPILED)
OF_CHATS = (
    *OF_GENERATIONS,
    *(PICTURES, ARGUMENTS, TOOL_NAMES, PARAMETERS, NAMED_TOOL),
)
OF_SAMPLING = (MINIMUM, VOCABULARY, NUM_ANSWERS, PROMPT_ENTRIES, CUT)
