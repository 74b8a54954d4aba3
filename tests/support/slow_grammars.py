"""Grammars that take seconds to compile, for tests of limits on that time."""

from __future__ import annotations

from typing import Any

# Each pattern doubles the work: sixteen of them take seconds.
_PATTERNS = [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrst"]


def slow_schema(number: int = 0) -> dict[str, Any]:
    """A JSON schema of another text for each number, all slow to compile."""
    return {"type": "array", "minItems": number, "items": {"allOf": _PATTERNS}}
