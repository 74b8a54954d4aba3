"""Makes the tests' many servers start quickly: the same routes are parsed and compiled once.

A run starts some two thousand servers of a hundred routes each in its processes. sanic-routing
parses each path four times, and writes, parses, prints and compiles a function for each router: two
thirds of a server's start. The function is the same for the same source.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from sanic_routing import route, router, utils


def share_compiled_routes() -> None:
    """Keep what sanic-routing makes of a path, and of a source, for the next server."""
    path_to_parts = functools.cache(utils.path_to_parts)
    names: Any = router
    names.path_to_parts = path_to_parts
    route.path_to_parts = path_to_parts
    # The source is compiled as it is, instead of its syntax tree.
    names.ast = SimpleNamespace(parse=str, unparse=str, fix_missing_locations=str)
    names.compile = functools.cache(compile)
