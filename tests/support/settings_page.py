"""The tables of docs/settings.md, made from the settings' declarations.

Run as a script it writes them into the page again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer

from vlmserve.models.settings.option import Limit
from vlmserve.models.settings.option_parser import defaults_of
from vlmserve.router.config import EngineConfig
from vlmserve.server.cli.environment import ADOPTED, IGNORED
from vlmserve.server.cli.main import app
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "settings.md"
LIMITS = "Limits without an option"


def parameters() -> list[Any]:
    """Every parameter of `vlmserve serve`."""
    command: Any = typer.main.get_command(app)
    return [one for one in command.commands["serve"].params if one.name != "help"]


def option_rows() -> dict[str, str]:
    """Each option's row of a table, by its parameter's name."""
    return {one.name: _row(one) for one in parameters()}


def panels() -> dict[str, list[str]]:
    """The rows of each panel of the help."""
    rows = option_rows()
    found: dict[str, list[str]] = {}
    for one in parameters():
        panel = getattr(one, "rich_help_panel", None) or "Model"
        found.setdefault(panel, []).append(rows[one.name])
    return found


def limit_rows() -> Iterator[str]:
    """The row of each documented setting that no option sets."""
    for kind in (ServerSettings, ImageSettings, EngineConfig):
        defaults = defaults_of(kind)
        for name, hint in get_type_hints(kind, include_extras=True).items():
            for note in getattr(hint, "__metadata__", ()):
                if isinstance(note, Limit):
                    yield f"| `{kind.__name__}.{name}` | {_shown(defaults[name])} | {note.help} |"


def variables() -> set[str]:
    """Every name of the documented service that is known."""
    return {*ADOPTED, *IGNORED}


def _row(parameter: Any) -> str:
    is_option = parameter.opts[0].startswith("-")
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else ["MODEL"]
    shown_names = ", ".join(f"`{name}`" for name in names)
    own = parameter.envvar
    others = [name for name, one in ADOPTED.items() if one.option == parameter.name]
    shown_variables = ", ".join(f"`{name}`" for name in (own, *others))
    meaning = " ".join((parameter.help or "").split()).replace("|", "\\|")
    return f"| {shown_names} | {shown_variables} | {_shown(parameter.default)} | {meaning} |"


def _shown(default: Any) -> str:
    if default is None or default == []:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:,}" if isinstance(default, int) else str(default)


def with_tables(page: str) -> str:
    """The page with the tables as they are now; all else stays."""
    parts = page.split("\n## ")
    head = "| option | variables | default | meaning |\n|---|---|---|---|\n"
    tables = {heading: head + "\n".join(rows) for heading, rows in panels().items()}
    kept = [part for part in parts[1:] if part.split("\n")[0] not in {*tables, LIMITS}]
    (limits,) = (part for part in parts if part.startswith(LIMITS))
    limits = limits[: limits.index("| setting |")]
    limits += "| setting | default | meaning |\n|---|---|---|\n" + "\n".join(limit_rows()) + "\n"
    options = [f"{heading}\n\n{table}\n" for heading, table in tables.items()]
    return "\n## ".join([parts[0], *options, *kept, limits])


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
