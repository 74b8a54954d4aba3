"""Who imports whom, read from the source: files, modules, and the rooms that hold them.

A room is a folder of a floor, or a module that lies at the floor's root. The fence
(`tests/test_floors.py`) and the picture of the architecture are made from this.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {"models": 0, "router": 1, "server": 2}


def sources(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def all_sources() -> list[Path]:
    return [path for floor in FLOORS for path in sources(floor)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("vlmserve", *(part for part in parts if part != "__init__")))


@functools.cache
def imported_modules(path: Path) -> frozenset[str]:
    """Absolute names of everything a file imports, lazily or not."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found.add(prefix)
            found.update(f"{prefix}.{alias.name}" for alias in node.names)
    return frozenset(found)


@functools.cache
def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(module: str) -> str | None:
    """The folder that holds a module; the module itself where it lies at a floor's root.

    None for a name that is no module of a floor, and for the floors themselves.
    """
    path = ROOT.joinpath(*module.split(".")[1:])
    if not module.startswith("vlmserve.") or not is_module(module) or path.parent == ROOT:
        return None
    if path.is_dir() or path.parent.parent == ROOT:
        return path.relative_to(ROOT).as_posix()
    return path.parent.relative_to(ROOT).as_posix()


def rooms_imported(path: Path) -> set[str]:
    rooms = {room_of(name) for name in imported_modules(path)}
    return {room for room in rooms if room is not None}


def arrows(floor: str) -> dict[str, dict[str, str]]:
    """Each room of a floor -> every room that it imports, on any floor -> a file that does so."""
    found: dict[str, dict[str, str]] = {}
    for path in sources(floor):
        own = room_of(module_name(path))
        if own is not None:
            reached = rooms_imported(path) - {own}
            found.setdefault(own, {}).update(dict.fromkeys(reached, path.name))
    return found


def within(floor: str) -> dict[str, dict[str, str]]:
    """The arrows of a floor that stay on it."""
    return {
        room: {below: file for below, file in reached.items() if below.startswith(f"{floor}/")}
        for room, reached in arrows(floor).items()
    }
