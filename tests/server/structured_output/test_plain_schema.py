"""Schemas as pydantic and zod write them: what changes nothing, and what is dropped."""

import asyncio

import pytest

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.grammar import Grammars
from vlmserve.server.errors import BadRequestError
from vlmserve.server.prompts.conversation import Tool
from vlmserve.server.schemas.structured import call_form, schema_form
from vlmserve.server.schemas.tools import check_schema
from vlmserve.server.structured_output.compile_checks import GrammarChecks
from vlmserve.server.structured_output.compile_child import judge
from vlmserve.server.structured_output.plain_schema import FORMATS, plain_schema

STRING = {"type": "string"}
OBJECT = {"type": "object", "properties": {"a": STRING}}
# The formats that pydantic, zod and OpenAPI write.
ANNOTATIONS = [
    "password", "binary", "byte", "path", "file-path", "directory-path", "int32", "int64",
    "float", "double", "decimal", "uri-reference", "iri", "json-pointer", "regex", "idn-email",
    "uri-template", "phone", "color", "base64url", "cuid", "cuid2", "ulid", "nanoid", "emoji",
    "jwt", "cidrv4",
]  # fmt: skip


@pytest.fixture(scope="module")
def grammars():
    return Grammars(CHECKPOINT, vocab_size=0)


def compiled(grammars, schema):
    verdict = judge(schema_form(schema, "schema").grammar, grammars)
    assert verdict.grammar is not None, verdict.error
    return verdict.grammar


@pytest.mark.parametrize("name", [*ANNOTATIONS, *sorted(FORMATS)])
def test_every_format_is_obeyed_or_an_annotation(grammars, name):
    """24 of 28 formats used to be a 400."""
    compiled(grammars, {"type": "object", "properties": {"a": {"type": "string", "format": name}}})
    plain, dropped = plain_schema(STRING | {"format": name})
    assert dropped == []
    assert ("format" in plain) is (name in FORMATS)


@pytest.mark.parametrize(
    "neutral",
    [
        {"uniqueItems": False},
        {"dependentRequired": {}},
        {"dependencies": {}},
        {"dependentSchemas": {}},
        {"required": None},
        {"enum": None, "additionalProperties": None},
        {"minProperties": 0},
        {"propertyNames": {"type": "string"}},
        {"unevaluatedProperties": True},
        {"if": {}},
        {"then": {}, "else": {}},
        {"contains": {}, "minContains": 0},
        {"minContains": 0},
        {"description": None, "default": None},
    ],
)
def test_a_neutral_keyword_changes_nothing(grammars, neutral):
    compiled(grammars, OBJECT | neutral)
    compiled(grammars, {"type": "array", "items": OBJECT | neutral})
    plain, dropped = plain_schema(OBJECT | neutral)
    assert plain == OBJECT | {key: None for key in neutral if key == "default"}
    assert dropped == []


def test_unique_items_are_dropped_and_named_wherever_they_stand(grammars):
    """Every set of pydantic's used to be a 400."""
    several = {"type": "array", "items": STRING, "uniqueItems": True}
    schema = {
        "type": "object",
        "properties": {"uniqueItems": {"anyOf": [several, {"type": "null"}]}, "b": several},
        "$defs": {"T": {"prefixItems": [several]}},
    }
    form = schema_form(schema, "f")
    assert form.ignored == (
        "f.properties.uniqueItems.anyOf[0].uniqueItems",
        "f.properties.b.uniqueItems",
        "f.$defs.T.prefixItems[0].uniqueItems",
    )
    compiled(grammars, schema)


def test_values_are_no_keywords():
    schema = {"const": None, "enum": [None, {"uniqueItems": True}], "default": {"format": "x"}}
    assert plain_schema(schema) == (schema, [])


def test_parameters_of_an_object_or_null_are_an_objects():
    parameters = OBJECT | {"type": ["object", "null"]}
    check_schema(parameters, "f")
    check_schema(OBJECT | {"type": None}, "f")
    assert Tool("t", None, parameters).schema["type"] == "object"
    with pytest.raises(BadRequestError):
        check_schema({"type": ["string", "null"]}, "f")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"oneOf": [STRING, STRING | {"maxLength": 3}]}, "use anyOf"),
        ({"not": STRING}, 'the keywords "not" are not supported'),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "no JSON fulfils it"),
        ({"$ref": "#/$defs/x"}, "points to nothing"),
        (STRING | {"pattern": "^(?=a)b"}, "look-around"),
    ],
)
def test_an_error_about_a_schema_names_no_option_of_the_library(grammars, schema, words):
    error = judge(schema_form(schema, "schema").grammar, grammars).error
    assert error is not None
    assert words in error
    assert "option" not in error


async def errors_of(form):
    """What is wrong with the form's grammar, then with each of its parts."""
    checks = GrammarChecks(CHECKPOINT, timeout_s=30)
    errors = []
    try:
        for grammar, field in ((form.grammar, form.field), *form.parts):
            try:
                await checks.check(grammar, field, "", "")
            except BadRequestError as error:
                errors.append(error.param)
    finally:
        await checks.close()
    return errors


def test_a_tools_schema_is_a_part_of_the_form_that_an_error_can_name():
    tools = [Tool("a", None, OBJECT), Tool("b", None, OBJECT | {"not": STRING})]
    (form,) = call_form(tools, "required")
    assert asyncio.run(errors_of(form)) == ["tool_choice", "tools[1].function.parameters"]
