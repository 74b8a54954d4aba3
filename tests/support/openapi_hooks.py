"""Hooks of schemathesis, which loads this file as SCHEMATHESIS_HOOKS.

The server may reject schema-valid data only by a rule that the document states in prose:
`ERRORS` has the error of each. Answers have no undocumented key.
"""

from __future__ import annotations

import json
import re

import jsonschema_rs
import schemathesis

VOCAB_SIZE = 768

# A prose rule of the document -> a pattern of its error messages.
ERRORS = {
    "Texts do not contain U+0000.": r"contains the character U\+0000",
    "The id of a tool message is the id of a call in an earlier assistant message.": (
        r"which is the id of no (call in|tool_use block in|earlier function_call)"
    ),
    "An image is a data URL with a base64 image file, or an http or https URL of a public host,"
    " within the server's limits.": r"^(messages|input)\S*: .*(image|data URL|decod)",
    "The prompt and the answer fit into the model's context.": r"max_model_len is",
    "max_tokens and max_completion_tokens are equal if both are set.": (
        r"max_tokens is \d+ and max_completion_tokens is \d+"
    ),
    "min_tokens is at most the number of tokens that may be generated.": (
        r"min_tokens is .* at most"
    ),
    "At most one field sets the form of the answer: response_format or a guided_* field, and a"
    " guided_* field does not go with a tool_choice that requires calls.": (
        r"both set the form of the answer"
    ),
    "JSON schemas, patterns, choices and grammars compile, and no schema is false.": (
        r"cannot be compiled|is false, which no|is not a JSON schema|to compile: simplify"
        r"|guided_choice|guided_grammar|guided_regex|structured_outputs\.|^(regex|ebnf|json_schema)\b"
    ),
    "Tool names are unique, and none is auto, none or required.": (
        r"by which tool_choice means|is a second tool named"
    ),
    "A tool's parameters are a schema of type object: at most 64 KiB and 64 levels.": (
        r'\.type is not "object"|nested more than|bytes; the limit is'
    ),
    "A tool_choice names one of the tools; required needs at least one tool.": (
        r"tool_choice.* none of tools|tool_choice needs tools"
    ),
    "The arguments of an earlier call have at most 64 levels.": r"nested more than",
    "Token ids are in the model's vocabulary.": r"the vocabulary ends at",
    "A request has at most --max-answers-per-request answers, and at most 128.": (
        r"answers at once|a request has at most \d+ answers|a request may ask for \d+"
    ),
    "Each prompt has one token at least.": r"has no tokens",
    "best_of is 1 or n if it is set.": r"best_of is \d+ and n is",
    "model and model_id are equal if both are set.": r"model and model_id differ",
    "A setting in tool_config and the same one beside it are equal.": r"and tool_config\.\w+ is",
    "Only user messages have images.": r"only a user's message may have an image",
    "A previous_response_id is the id of a response that the server still stores for the same key;"
    " store is true only if the server stores responses.": (
        r"is the id of no response|keeps no responses"
    ),
    "A message has role and content. A function_call has call_id, name and arguments, which are a"
    " JSON object. A function_call_output has the call_id of an earlier call. Only user messages"
    " have images. No item is an item_reference. At least one item is a message or a call, unless"
    " instructions are set.": (
        r"is required(:|$)|has no message|is an item_reference|has a picture|is not a JSON object"
        r"|nested more than"
    ),
    "The server's chat template accepts the conversation and its arguments.": (
        r"chat template does not accept this conversation"
    ),
    "With continue_final_message the last message is an assistant's, without tool_calls, and"
    " add_generation_prompt is not true.": (
        r"continue_final_message needs|add_generation_prompt are both true"
    ),
    "chat_template_kwargs nests 16 levels at most.": r"chat_template_kwargs is nested more than",
    "The server's model is a guard.": r"model is no guard",
    "truncate_prompt_tokens leaves all images in the prompt.": r"without all images",
    "prompt_logprobs times the prompt's tokens are within the server's limit.": (
        r"log-probabilities, the limit is"
    ),
}


@schemathesis.hook
def map_body(context, body):
    """Make most requests acceptable: arguments of calls, token ids and times within bounds.

    A 504 is then an error of the server.
    """
    body = _with_arguments(body)
    if isinstance(body, dict) and isinstance(body.get("tokens"), list):
        body = body | {"tokens": [_token(one) for one in body["tokens"]]}
    if isinstance(body, dict) and isinstance(body.get("timeout_s"), int | float):
        return body | {"timeout_s": body["timeout_s"] + 60 if body["timeout_s"] > 0 else -1.0}
    return body


def _token(one):
    is_id = isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31
    return one % VOCAB_SIZE if is_id else one


def _with_arguments(part):
    """Replace arguments by a JSON object: random texts rarely are one."""
    if isinstance(part, dict):
        return {
            key: '{"number": 1}'
            if key == "arguments" and isinstance(value, str)
            else _with_arguments(value)
            for key, value in part.items()
        }
    return [_with_arguments(one) for one in part] if isinstance(part, list) else part


@schemathesis.check
def valid_data_is_accepted(ctx, response, case):
    """400 only for a prose rule that the document has for this body."""
    is_valid = case.meta is not None and case.meta.generation.mode.is_positive
    if not is_valid or response.status_code != 400:
        return
    body = case.operation.definition.raw.get("requestBody", {})
    message = response.json()["message"]
    prose = body.get("description", "")
    rules = [pattern for rule, pattern in ERRORS.items() if rule in prose]
    if not any(re.search(pattern, message) for pattern in rules):
        raise AssertionError(f"schema-valid data was rejected: {message}")


@schemathesis.check
def answers_hold_no_key_that_is_not_documented(ctx, response, case):
    """The document allows further keys in answers; the server sends none yet."""
    kind = (response.headers.get("content-type") or [""])[0].partition(";")[0]
    told = case.operation.definition.raw["responses"].get(str(response.status_code), {})
    if not kind.startswith(JSON_KINDS) or case.method == "HEAD" or not told:
        return
    document = case.operation.schema.raw_schema
    name = told.get("$ref", "").split("/")[-1]
    told = document["components"]["responses"][name] if name else told
    media = told.get("content", {}).get(kind)
    if media is None:
        return
    schema = media["schema"]
    if kind == "text/event-stream":
        schema = schema["properties"]["data"]["anyOf"][0]["contentSchema"]
        lines = [
            line for line in response.content.decode().split("\n") if line.startswith("data: ")
        ]
        said = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
    else:
        said = [response.json()]
    validator = _closed(document, json.dumps(schema))
    for one in said:
        validator.validate(one)


JSON_KINDS = ("application/json", "text/event-stream")
_VALIDATORS: dict[str, jsonschema_rs.Draft202012Validator] = {}


def _closed(document, schema: str) -> jsonschema_rs.Draft202012Validator:
    """A validator of the schema with every object closed that names its keys."""
    if schema not in _VALIDATORS:
        components = _close(document["components"]["schemas"])
        whole = json.loads(schema) | {"components": {"schemas": components}}
        _VALIDATORS[schema] = jsonschema_rs.Draft202012Validator(whole)
    return _VALIDATORS[schema]


def _close(part):
    if isinstance(part, list):
        return [_close(one) for one in part]
    if not isinstance(part, dict):
        return part
    closed = {key: _close(inner) for key, inner in part.items()}
    is_object = part.get("type") == "object" and isinstance(part.get("properties"), dict)
    return closed | ({"additionalProperties": False} if is_object else {})
