"""How a setting declares its command-line option, or its line in the documentation.

A setting is declared once: a field with its type, default and bounds, annotated with `Option`:

    max_num_seqs: Annotated[Positive, Option("Requests that run at once.", "Engine")] = 64

`option_parser.py` builds the command line from these declarations, and passes the values on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    """Makes a field an option of the command line.

    group: the heading in --help and docs/settings.md. name: without dashes; the default is the
    field's name without a last `_s`. metavar: the form of the value, for values that need a parser.
    has_negation: whether a switch also gets `--no-NAME`. is_argument: a positional argument.
    """

    help: str
    group: str
    name: str | None = None
    metavar: str | None = None
    has_negation: bool = True
    is_argument: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """Documents a setting that no option sets; only Python code can change it."""

    help: str
