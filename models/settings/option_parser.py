"""Builds a command line from the settings that declare its options, and settings from its values.

Reads the fields annotated with the Option of `models/settings/option.py`: `command_of` makes a
command of them, `settings_from` fills the same classes with the parsed values. A new option needs
only its field.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec
import typer
from typer.core import TyperCommand

from .option import Option

PREFIX = "VLMSERVE_"
Parsers = Mapping[str, Callable[[str], Any]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Declaration:
    """One option as its field declares it. value_type: without annotations. bounds: min and max."""

    parameter: str
    option: Option
    value_type: Any
    bounds: dict[str, float]
    default: Any


def variable_of(parameter: str) -> str:
    """The environment variable of an option."""
    return f"{PREFIX}{parameter.upper()}"


def declarations(kind: type) -> Iterator[Declaration]:
    """The options that a settings class declares, including those of nested settings."""
    bare, defaults = get_type_hints(kind), defaults_of(kind)
    for field, hint in get_type_hints(kind, include_extras=True).items():
        if _is_settings(hint):
            yield from declarations(hint)
        elif (option := _option_of(hint)) is not None:
            default, parameter = defaults.get(field), _parameter_name(field, option)
            yield Declaration(parameter, option, bare[field], _bounds(hint), default)


def settings_from(kind: type[T], values: Mapping[str, Any], **given: Any) -> T:
    """The settings with the values of a command line; None keeps a field's default.

    given: fields that no option sets. A field without an option is also set if an option of
    another class has its name.
    """
    for field, hint in get_type_hints(kind, include_extras=True).items():
        if field in given:
            continue
        if _is_settings(hint):
            given[field] = settings_from(hint, values)
        elif (value := values.get(_parameter_name(field, _option_of(hint)))) is not None:
            given[field] = value
    return kind(**given)


def command_of(
    *kinds: type, groups: Sequence[str], parsers: Parsers, has_variables: bool = True
) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """Turns a function of all values into a command with the options of `kinds`.

    groups: the order of the headings. parsers: by metavar, what reads a value; raises ValueError.
    has_variables: each option can be set by its environment variable.
    """
    found = [declaration for kind in kinds for declaration in declarations(kind)]
    found.sort(key=lambda one: groups.index(one.option.group))
    parameters = [_parameter(one, parsers, has_variables) for one in found]

    def decorate(run: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            run(values)

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


class GroupedHelp(TyperCommand):
    """Lists the options under the headings of their groups, with whole names at any width."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group's options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                group = getattr(parameter, "rich_help_panel", None) or "Other"
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def _parameter(declared: Declaration, parsers: Parsers, has_variables: bool) -> inspect.Parameter:
    option, parameter = declared.option, declared.parameter
    shared: dict[str, Any] = {
        "help": option.help,
        "rich_help_panel": option.group,
        "metavar": option.metavar,
        "envvar": variable_of(parameter) if has_variables else None,
        "show_envvar": False,  # all variables follow one rule
    }
    if option.metavar is not None and option.metavar in parsers:
        shared["parser"] = _reporting(parsers[option.metavar])
    else:
        shared |= declared.bounds
    if option.is_argument:
        info: Any = typer.Argument(**shared)
    else:
        name = parameter.replace("_", "-")
        is_switch = bool in (declared.value_type, *get_args(declared.value_type))
        has_negation = is_switch and option.has_negation
        info = typer.Option(f"--{name}/--no-{name}" if has_negation else f"--{name}", **shared)
    return inspect.Parameter(
        parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=declared.default,
        annotation=Annotated[declared.value_type, info],
    )


def _reporting(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The parser with the command line's own error."""

    def parse_value(text: str) -> Any:
        try:
            return parse(str(text))  # a default may be a number
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse_value


def _is_settings(hint: Any) -> bool:
    return isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, msgspec.Struct))


def _option_of(hint: Any) -> Option | None:
    notes = getattr(hint, "__metadata__", ())
    return next((note for note in notes if isinstance(note, Option)), None)


def _parameter_name(field: str, option: Option | None) -> str:
    if option is None:
        return field
    return (option.name or field.removesuffix("_s")).replace("-", "_")


def _bounds(hint: Any) -> dict[str, float]:
    """The inclusive bounds in the annotations of a type, wherever they stand in it."""
    found: dict[str, float] = {}
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, msgspec.Meta):
            found |= {} if note.ge is None else {"min": note.ge}
            found |= {} if note.le is None else {"max": note.le}
    for inner in get_args(hint):
        if not isinstance(inner, (Option, msgspec.Meta)):
            found |= _bounds(inner)
    return found


def defaults_of(kind: Any) -> dict[str, Any]:
    """The default of each field that has an immutable one."""
    if is_dataclass(kind):
        return {
            one.name: one.default for one in dataclass_fields(kind) if one.default is not MISSING
        }
    found = msgspec.structs.fields(kind)
    return {one.name: one.default for one in found if one.default is not msgspec.NODEFAULT}
