"""Jinja's sandbox for chat templates, with the filters and globals that transformers gives them.

Owns the environment and one rendering. Knows nothing of limits, and of placeholders only their
form: `s<nonce><kind><number>e`, where the kind is x for any text, r for a text that `tojson` writes
without quotes, and j for a text of kind x that passed through `tojson`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Clock = Callable[[], datetime.datetime]


class RaisedByTemplateError(TemplateError):
    """The template called raise_exception."""


class ListAsTextError(TemplateError):
    """The template writes a list of parts as Python would show it."""

    def __init__(self) -> None:
        super().__init__("the template writes a content's list of parts as Python code")


class TooMuchTextError(TemplateError):
    """The template writes more text than it may."""

    def __init__(self, max_chars: int) -> None:
        super().__init__(f"the template writes over {max_chars:,} characters")


class _Part(dict[str, Any]):
    """A part of a content. Only a template that expects a string shows a part as Python code."""

    def __repr__(self) -> str:
        raise ListAsTextError

    __str__ = __repr__


class _Generation(Extension):
    """`{% generation %}`: marks what an assistant wrote, for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's content as it stands."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """Rejects attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def make_environment(
    now: Clock = datetime.datetime.now, nonce: str = ""
) -> ImmutableSandboxedEnvironment:
    """The environment in which templates are parsed, compiled and rendered.

    nonce: that of the placeholders; empty if the variables have none.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson_for(nonce) if nonce else _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    environment.globals["namespace"] = _SafeNamespace
    return environment


def render(template: Template, variables: dict[str, Any], max_chars: int) -> str:
    """The text that the template makes of the variables.

    Raises whatever the template raises, and TooMuchTextError above max_chars.
    """
    messages = [_with_parts(message) for message in variables.get("messages", ())]
    chunks: list[str] = []
    num_chars = 0
    for chunk in template.generate(variables | {"messages": messages}):
        num_chars += len(chunk)
        if num_chars > max_chars:
            raise TooMuchTextError(max_chars)
        chunks.append(chunk)
    return "".join(chunks)


def reason_of(error: Exception) -> str:
    """Why a template does not compile or render, in one line: its own words where it has raised."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, RaisedByTemplateError) and text:
        return text
    line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
    name = "" if isinstance(error, TemplateError) and text else f"{type(error).__name__}: "
    return f"{line}{name}{text}"


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return (
        message | {"content": [_Part(part) for part in content]}
        if type(content) is list
        else message
    )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: nothing is escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _tojson_for(nonce: str) -> Callable[..., str]:
    """The filter that marks placeholders, so that their texts are escaped for JSON later."""
    plain, raw = re.compile(f"s{nonce}x([0-9]+)e"), re.compile(f'"(s{nonce}r[0-9]+e)"')

    def tojson(value: Any, *args: Any, **options: Any) -> str:
        text = raw.sub(r"\1", _tojson(value, *args, **options))
        return plain.sub(rf"s{nonce}j\1e", text)

    return tojson


def _raise(message: Any) -> None:
    raise RaisedByTemplateError(str(message))


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot have the attribute {name!r}")
