"""The fields that set the form of the answer.

Owns OpenAI's response_format, the guided_* fields, their twins under nvext, and Llama Stack's
response_format. Knows nothing of how a grammar is written (`grammar_text.py`) or obeyed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec

from ..errors import BadRequestError
from ..prompts.conversation import Tool, ToolFormat
from ..structured_output.grammar_text import (
    choice_grammar,
    ebnf_grammar,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
)
from ..structured_output.plain_schema import plain_schema
from ..structured_output.tool_call_grammar import call_or_answer_grammar, calls_grammar

_OF_TEXT = ("response_format", "text.format", "output_config", "output_format")
ONE_TEXT = msgspec.Meta(extra_json_schema={"minProperties": 1, "maxProperties": 1})
Choices = Annotated[
    list[Annotated[str, msgspec.Meta(extra_json_schema={"minLength": 1})]],
    msgspec.Meta(max_length=1024, extra_json_schema={"minItems": 1}),
]


class SchemaOfFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The schema is obeyed whether `strict` or not; name and description have no effect."""

    schema: dict[str, Any] | bool = True
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    pass


class JsonObjectFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_object"):
    pass


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_schema"):
    json_schema: SchemaOfFormat


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StackSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_schema"):
    json_schema: dict[str, Any]


class StackGrammarFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="grammar"):
    """bnf: the grammar's text, or an object with the text as its only value."""

    bnf: str | Annotated[dict[str, str], ONE_TEXT]


StackFormat = StackSchemaFormat | StackGrammarFormat


class Guided(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of nvext, each also taken at the body's top."""

    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """vLLM's present names for the guided fields. json_object: any JSON object."""

    foreign: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_any_whitespace": (False, True),
        "disable_additional_properties": (False,),
        "disable_fallback": (False, True),
    }

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Form(msgspec.Struct, frozen=True):
    """A grammar, not compiled yet, and its field.

    parts: schemas within it, each as a grammar with its field. ignored: paths of keywords that
    have no effect.
    """

    grammar: str
    field: str
    parts: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


def response_form(response_format: ResponseFormat | None) -> list[Form]:
    """The form that OpenAI's field requests, if any."""
    if isinstance(response_format, JsonObjectFormat):
        return [Form(json_object_grammar(), "response_format")]
    if isinstance(response_format, JsonSchemaFormat):
        field = "response_format.json_schema.schema"
        return [schema_form(response_format.json_schema.schema, field)]
    return []


def guided_forms(guided: Guided, prefix: str = "") -> list[Form]:
    """The forms that the guided fields request: one for each field that is set."""
    return renamed_forms(guided, {name: prefix + name for name in Guided.__struct_fields__})


def renamed_forms(guided: Guided, names: Mapping[str, str]) -> list[Form]:
    """The same where the fields have other names. names: those, by the names here."""
    makers: dict[str, Callable[[Any, str], str]] = {
        "guided_regex": regex_grammar,
        "guided_choice": choice_grammar,
        "guided_grammar": ebnf_grammar,
    }
    forms = []
    if guided.guided_json is not None:
        forms.append(_guided_json(guided.guided_json, names["guided_json"]))
    for name, make in makers.items():
        value = getattr(guided, name)
        if value is not None:
            forms.append(Form(make(value, names[name]), names[name]))
    return forms


def structured_forms(wanted: StructuredOutputs) -> list[Form]:
    """The forms that vLLM's field requests: one for each of its fields that is set."""
    guided = Guided(
        guided_json=wanted.json,
        guided_regex=wanted.regex,
        guided_choice=wanted.choice,
        guided_grammar=wanted.grammar,
    )
    names = {
        name: "structured_outputs." + name[len("guided_") :] for name in Guided.__struct_fields__
    }
    forms = renamed_forms(guided, names)
    if wanted.json_object:
        forms.append(Form(json_object_grammar(), "structured_outputs.json_object"))
    return forms


def stack_form(response_format: StackFormat | None) -> list[Form]:
    """The form that Llama Stack's field requests, if any."""
    if isinstance(response_format, StackSchemaFormat):
        field = "response_format.json_schema"
        return [schema_form(response_format.json_schema, field)]
    if isinstance(response_format, StackGrammarFormat):
        field, bnf = "response_format.bnf", response_format.bnf
        texts = [bnf] if isinstance(bnf, str) else list(bnf.values())
        if len(texts) != 1:
            raise BadRequestError(f"{field} has {len(texts)} texts: send one", param=field)
        return [Form(ebnf_grammar(texts[0], field), field)]
    return []


def call_form(
    tools: Sequence[Tool],
    choice: str | None,
    max_calls: int | None = None,
    tool_format: ToolFormat = "json",
    schema_field: str = "tools[{}].function.parameters",
) -> list[Form]:
    """The form of calls if tool_choice requires them: of any tool, or of the named one.

    schema_field: the field of each tool's schema, as a format of its number.
    """
    if choice in (None, "auto", "none"):
        return []
    named = [(i, tool) for i, tool in enumerate(tools) if choice in ("required", tool.name)]
    grammar = calls_grammar([tool for _, tool in named], max_calls, tool_format)
    parts = [schema_form(tool.schema, schema_field.format(i)) for i, tool in named]
    return [
        Form(
            grammar,
            "tool_choice",
            tuple((part.grammar, part.field) for part in parts),
            tuple(path for part in parts for path in part.ignored),
        )
    ]


def answer_form(
    forms: list[Form],
    tools: Sequence[Tool],
    choice: str | None,
    max_calls: int | None = None,
    tool_format: ToolFormat = "json",
    schema_field: str = "tools[{}].function.parameters",
) -> Form | None:
    """The form of the whole answer: of its text, or of calls, or of either.

    forms: what the request asks for beside tool_choice. Calls that must come leave no text, so a
    form of the text has no effect. A model that may call still may. Both are as with OpenAI.
    Raises BadRequestError that names two forms.
    """
    calls = call_form(tools, choice, max_calls, tool_format, schema_field)
    texts = [form for form in forms if form.field.startswith(_OF_TEXT)]
    if calls:
        return only_form([form for form in forms if form not in texts] + calls)
    form = only_form(forms)
    if form is None or not tools or form not in texts:
        return form
    schema = _schema_of(form)
    if schema is None:
        return form
    grammar = call_or_answer_grammar(tools, schema, form.field)
    return msgspec.structs.replace(form, grammar=grammar, parts=((form.grammar, form.field),))


def _schema_of(form: Form) -> dict[str, Any] | None:
    """The schema of a form of JSON, as its grammar has it."""
    grammars = msgspec.json.decode(form.grammar).get("grammars", [{}])
    schema: dict[str, Any] | None = grammars[0].get("json_schema")
    return {key: schema[key] for key in schema if key != "x-guidance"} if schema else None


def only_form(forms: list[Form]) -> Form | None:
    """The requested form. Raises BadRequestError if there are two."""
    if len(forms) > 1:
        raise BadRequestError(
            f"{forms[0].field} and {forms[1].field} both set the form of the answer: send one",
            param=forms[1].field,
        )
    return forms[0] if forms else None


def _guided_json(value: str | dict[str, Any], field: str) -> Form:
    if isinstance(value, dict):
        return schema_form(value, field)
    try:
        return schema_form(msgspec.json.decode(value, type=dict[str, Any] | bool), field)
    except (msgspec.MsgspecError, RecursionError):
        raise BadRequestError(
            f"{field} is not a JSON schema: send an object", param=field
        ) from None


def schema_form(schema: dict[str, Any] | bool, field: str) -> Form:
    """The form of the JSON texts that a schema describes. Raises BadRequestError."""
    if schema is False:
        raise BadRequestError(f"{field} is false, which no answer can satisfy", param=field)
    whole = {} if schema is True else schema
    grammar = json_schema_grammar(whole, field)
    _, ignored = plain_schema(whole, field)
    return Form(grammar, field, ignored=tuple(ignored))
