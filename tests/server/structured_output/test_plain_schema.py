"""Schemas as pydantic and zod write them: what changes nothing, and what is dropped."""

import asyncio

import pytest

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.grammar import Grammars
from vlmserve.server.errors import BadRequestError
from vlmserve.server.prompts.conversation import Tool
from vlmserve.server.schemas.structured import call_form, schema_form
from vlmserve.server.schemas.tools import check_schema
from vlmserve.server.structured_output import grammar_text
from vlmserve.server.structured_output.compile_checks import GrammarChecks
from vlmserve.server.structured_output.compile_child import judge
from vlmserve.server.structured_output.plain_schema import FORMATS, plain_schema

STRING = {"type": "string"}
OBJECT = {"type": "object", "properties": {"a": STRING}}
NUMBER = {"type": "number"}
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


def test_what_no_grammar_can_enforce_is_dropped_and_named(grammars):
    """Pydantic and zod write all of them; each used to be a 400."""
    schema = {
        "type": "object",
        "properties": {
            "host": STRING | {"pattern": "^(?=.{1,5}$)a+$"},
            "duration": STRING | {"format": "duration", "pattern": "^P(?!.*W)"},
            "int64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
            "double": {"type": "number", "maximum": 1.7976931348623157e308},
            "low": {"type": "number", "minimum": 1e17},
            "never": {"not": {}},
            "uuids": {"type": "object", "propertyNames": {"format": "uuid"}},
        },
    }
    plain, dropped = plain_schema(schema)
    assert dropped == [
        "schema.properties.duration.pattern",
        "schema.properties.int64.minimum",
        "schema.properties.int64.maximum",
        "schema.properties.uuids.propertyNames",
    ]
    properties = plain["properties"]
    assert properties["host"] == STRING | {
        "pattern": "^a+$",
        "allOf": [{"pattern": "^(?:.{1,5}$)"}],
    }
    assert properties["duration"]["pattern"] == "^P"
    assert properties["double"] == {"type": "number"}
    assert properties["low"]["minimum"] == 1e17
    assert properties["never"] is False
    compiled(grammars, schema)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"enum": ["x", "y"]}, {"properties": {"x": NUMBER, "y": NUMBER}}),
        ({"const": "x", "type": "string"}, {"properties": {"x": NUMBER}}),
        ({"$ref": "#/$defs/Colour"}, {"properties": {"red": NUMBER, "blue": NUMBER}}),
        ({"pattern": r"^\d$"}, {"patternProperties": {"^[0-9]$": NUMBER}}),
    ],
)
def test_a_dictionary_has_the_names_that_its_keys_may_be(grammars, names, expected):
    schema = {
        "type": "object",
        "propertyNames": names,
        "additionalProperties": NUMBER,
        "$defs": {"Colour": {"enum": ["red", "blue"], "title": "Colour", "type": "string"}},
    }
    plain, dropped = plain_schema(schema)
    assert dropped == []
    kept = {"type": "object", "additionalProperties": False, "$defs": schema["$defs"]}
    assert plain == kept | expected
    compiled(grammars, schema)


def test_names_of_a_dictionary_do_not_multiply_a_schema():
    """A kilobyte could become gigabytes: each name has a copy of the values' schema."""
    names = {"enum": [f"k{number}" for number in range(2_000)]}
    value = {"type": "object", "properties": {f"v{number}": STRING for number in range(500)}}
    one = {"type": "object", "propertyNames": names, "additionalProperties": value}
    plain, dropped = plain_schema({"properties": {"a": one, "b": one}})
    assert dropped == ["schema.properties.a.propertyNames", "schema.properties.b.propertyNames"]
    assert plain["properties"]["a"] == {"type": "object", "additionalProperties": value}


def test_a_schema_is_measured_before_it_is_gone_through(monkeypatch):
    monkeypatch.setattr(grammar_text, "plain_schema", None)
    with pytest.raises(BadRequestError, match="the limit is 65,536"):
        schema_form(STRING | {"pattern": "a" * 300_000}, "schema")


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
        (STRING | {"pattern": "("}, "a regular expression is invalid: unclosed group"),
        (STRING | {"pattern": r"(a)\1"}, "back-references"),
        (STRING | {"pattern": "^a$", "minLength": 5}, "exclude each other"),
        ({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 3}, "no multiple of 7"),
        ({"enum": []}, "no possible value"),
        ({"type": "strin"}, "strin is not a type"),
        (STRING | {"minLength": -1}, "'minLength' must be an integer from 0, not -1"),
        ({"type": "number", "minimum": "a"}, "'minimum' must be a number"),
        (STRING | {"pattern": 3}, "'pattern' must be of the type string, not 3"),
        ({"$ref": "http://x/y"}, "must start with #/"),
        (OBJECT | {"required": ["z"], "additionalProperties": False}, "property 'z' has no"),
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
