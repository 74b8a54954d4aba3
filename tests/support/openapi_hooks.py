"""What schemathesis is told beside the document: loaded by it as SCHEMATHESIS_HOOKS.

Valid data may be refused only for what the document says in words, as JSON schema has
none for it: `TOLD` has the refusal of each. Answers hold no key that is not documented.
"""

from __future__ import annotations

import json
import re

import jsonschema_rs
import schemathesis

VOCAB_SIZE = 768

# A rule of the document -> the messages that it stands for.
TOLD = {
    "Texts hold no U+0000.": r"(holds|contains) the character U\+0000",
    "A tool message answers the id of a call in an earlier assistant message.": (
        r"which is the id of no (call in|tool_use block in|earlier function_call)"
    ),
    "A picture is a data URL of a picture file in base64, or an http or https URL of a public host,"
    " within the server's limits.": r"^(messages|input)\S*: .*(image|data URL|decod)",
    "The prompt and the answer fit the model's context.": r"max_model_len is",
    "max_tokens and max_completion_tokens are equal where both are given.": (
        r"max_tokens is \d+ and max_completion_tokens is \d+"
    ),
    "min_tokens is not more than the tokens that may be generated.": r"min_tokens is .* at most",
    "At most one field says what form the answer must have: response_format, a guided one, or a"
    " tool_choice that asks for calls.": r"both say what form the answer must have",
    "JSON schemas, patterns, choices and grammars can be compiled, and are not false.": (
        r"cannot be compiled|is false, which no|is not a JSON schema|to compile: simplify"
        r"|guided_choice|guided_grammar|guided_regex|structured_outputs\.|^(regex|ebnf|json_schema)\b"
    ),
    "Tools have different names, none of them auto, none or required.": (
        r"by which tool_choice means|is a second tool named"
    ),
    "A tool's parameters are a schema of an object, of 64 KiB and 64 levels at most.": (
        r'\.type is not "object"|nested more than|bytes; the limit is'
    ),
    "A tool_choice names one of the tools, or needs some where it asks for calls.": (
        r"tool_choice.* none of tools|tool_choice needs tools"
    ),
    "The arguments of an earlier call nest 64 levels at most.": r"nested more than",
    "Token ids are the model's.": r"the vocabulary ends at",
    "All answers of a request are at most --max-answers-per-request, and 128 at most.": (
        r"answers at once|a request has at most \d+ answers|a request may ask for \d+"
    ),
    "best_of is 1 or n where it is given.": r"best_of is \d+ and n is",
    "model and model_id are equal where both are given.": r"model and model_id differ",
    "What stands in tool_config and beside it is the same.": r"and tool_config\.\w+ is",
    "Only a user's message holds a picture.": r"only a user's message may hold an image",
    "A previous_response_id is the id of a response that this server still keeps for the same key;"
    " store is true only where the server keeps responses.": (
        r"is the id of no response|keeps no responses"
    ),
    "An item of the input has what its type needs: a message a role and a content, a function_call"
    " call_id, name and arguments that are a JSON object, a function_call_output the call_id of an"
    " earlier call. Only a user's message has pictures. No item is an item_reference. One item at"
    " least is a message or a call, unless there are instructions.": (
        r"is required(:|$)|has no message|is an item_reference|has a picture|is not a JSON object"
        r"|nested more than"
    ),
    "truncate_prompt_tokens leaves all images in the prompt.": r"without all images",
    "prompt_logprobs are not asked for of more than the server's limit of tokens.": (
        r"log-probabilities, the limit is"
    ),
}


@schemathesis.hook
def map_body(context, body):
    """Spare most requests the refusals that say least: of calls' texts, of tokens, of time.

    504 is an error of the server's then.
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
    """Most texts are no JSON object: few requests with calls would be answered."""
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
    """400 only for a rule that the document tells for this body."""
    is_valid = case.meta is not None and case.meta.generation.mode.is_positive
    if not is_valid or response.status_code != 400:
        return
    body = case.operation.definition.raw.get("requestBody", {})
    message = response.json()["message"]
    told = body.get("description", "")
    rules = [pattern for rule, pattern in TOLD.items() if rule in told]
    if not any(re.search(pattern, message) for pattern in rules):
        raise AssertionError(f"schema-valid data was refused: {message}")


@schemathesis.check
def answers_hold_no_key_that_is_not_documented(ctx, response, case):
    """The document leaves answers open for what may come; the server says nothing beside it yet."""
    kind = (response.headers.get("content-type") or [""])[0]
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
        lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
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
