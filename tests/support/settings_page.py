"""The rows that docs/settings.md must hold, taken from the command line and the settings' types.

Run as a script it writes the tables of options there anew. Owns the rows' form.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer

from vlmserve.router.config import EngineConfig
from vlmserve.server.cli.environment import ADOPTED, IGNORED
from vlmserve.server.cli.main import app
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "settings.md"
SETTINGS = {"ServerSettings": ServerSettings, "ImageSettings": ImageSettings,
            "EngineConfig": EngineConfig}  # fmt: skip
# Handed over between the processes; the drain's time is an option of the supervisor.
INTERNAL = {"listen_fd", "pulse_fd", "drain_time_s", "replica", "replica_sockets"}


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


def limits() -> Iterator[tuple[str, str]]:
    """Each setting that no option sets, as `Type.name`, with its default."""
    set_by_options = _set_by_the_command_line()
    for kind, settings in SETTINGS.items():
        for name, default in _fields(settings):
            if name not in set_by_options[kind] | INTERNAL:
                yield f"`{kind}.{name}`", _shown(default)


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
    if default is None or default == [] or default is msgspec.NODEFAULT:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    value = getattr(default, "value", default)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _fields(settings: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(settings):
        return [(field.name, field.default) for field in dataclasses.fields(settings)]
    return [(field.name, field.default) for field in msgspec.structs.fields(settings)]


def _set_by_the_command_line() -> dict[str, set[str]]:
    """The fields that server/cli/main.py fills in, by type."""
    found: dict[str, set[str]] = {kind: set() for kind in SETTINGS}
    tree = ast.parse((ROOT / "server" / "cli.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found:
            found[node.func.id] |= {one.arg for one in node.keywords if one.arg}
    return found


def with_options(page: str) -> str:
    """The page with the tables of options as they are now; all else stays."""
    parts = page.split("\n## ")
    tables = {heading: _table(rows) for heading, rows in panels().items()}
    kept = [part for part in parts if part.split("\n")[0] not in tables]
    options = [f"{heading}\n\n{table}\n" for heading, table in tables.items()]
    return "\n## ".join([kept[0], *options, *kept[1:]])


def _table(rows: list[str]) -> str:
    return "\n".join(["| option | variables | default | meaning |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    PAGE.write_text(with_options(PAGE.read_text()))
