"""How deeply JSON lies nested."""

from __future__ import annotations

from typing import Any

# One tuple: building a union for each of a million items takes as long as the check itself.
_CONTAINERS = (dict, list)


def nests_deeper_than(depth: int, value: Any) -> bool:
    """True if lists and objects nest more than `depth` levels deep.

    A loop, because recursion has a limit too.
    """
    level = [value]
    for _ in range(depth):
        level = [child for item in level for child in _children(item)]
    return bool(level)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return []
    return [child for child in value if isinstance(child, _CONTAINERS)]
