"""What server/ uses of the private parts of libraries: a new version may change any of it.

setup.cfg bounds the versions of these libraries. Before you raise a bound, check each name here.
"""

import ast
import configparser
from pathlib import Path

from sanic.http import Http
from sanic.server import HttpProtocol

from vlmserve.server.http import protocol

ROOT = Path(__file__).resolve().parent.parent
# Private attributes that server/ reads and no module of server/, router/ or models/ defines.
PRIVATE_NAMES = {
    "_create_unverified_context": "ssl: health checks of the server's own port",
    "_current": "sanic.Request: the current request of a context; forgotten when it is answered",
    "_initialized": "Pillow: no plugin is loaded beside the allowed ones",
    "_receive_more": "sanic.http.Http: reads the next bytes of a connection",
    "_send": "sanic.http.Http: writes to a connection",
    "_task": "sanic HttpProtocol: the task of a connection, cancelled to evict it",
}
STRUCT_NAMES = {"__struct_config__", "__struct_fields__"}
# Members of Sanic's classes that server/http replaces; none is in Sanic's documented API.
OVERRIDDEN = {
    "AnswerWriter": {"http1_response_header"},
    "StrictHttp": {
        "HEADER_CEILING",
        "HEADER_MAX_SIZE",
        "http1_request_header",
        "http1_response_header",
        "init_for_request",
        "read",
    },
    "StrictProtocol": {
        "HTTP_CLASS",
        "close",
        "connection_lost",
        "connection_made",
        "data_received",
        "pause_writing",
        "resume_writing",
    },
}
BASES = {"AnswerWriter": Http, "StrictHttp": Http, "StrictProtocol": HttpProtocol}


def sources() -> list[Path]:
    return sorted((ROOT / "server").rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_names(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            found.add(node.attr)
    return found


def test_only_the_listed_private_names_of_libraries_are_used():
    used: set[str] = set()
    for path in sources():
        tree = ast.parse(path.read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= set(filter(is_private, names)) - defined_names(tree)
    assert used == PRIVATE_NAMES.keys()


def test_no_private_module_of_a_library_is_imported():
    imported = [
        (path.name, name)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for name in [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        if is_private(name)
    ]
    assert not imported


def test_of_msgspec_structs_only_the_documented_attributes_are_used():
    used = {
        node.attr
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("__struct")
    }
    assert used == STRUCT_NAMES


def test_the_overridden_members_of_sanics_classes_still_exist():
    """Sanic would silently no longer call a method that it renames."""
    overridden = {
        name: {
            member
            for member in vars(getattr(protocol, name))
            if hasattr(base, member) and not member.startswith("__")
        }
        for name, base in BASES.items()
    }
    assert overridden == OVERRIDDEN


def test_the_versions_of_these_libraries_are_bounded():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    for library in ("sanic", "msgspec"):
        (line,) = [one for one in required if one.startswith((f"{library}>", f"{library}="))]
        assert "<" in line, line


def test_sanic_still_has_the_private_names():
    assert hasattr(Http, "_receive_more")
    assert hasattr(Http, "_send")
