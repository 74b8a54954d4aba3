"""Answers that hold tool calls, or only look like it, and what the parser makes of them."""

from __future__ import annotations

from vlmserve.server.generation.tool_calls.parser import ToolCallParser
from vlmserve.server.generation.tool_calls.pieces import TextPiece

TAG = "<|python_tag|>"
NAMES = ("f", "get_weather", "ENDED")


def parsed(pieces, names=NAMES, **options):
    """All that a parser gives for an answer in pieces; a piece TAG is the special token."""
    parser = ToolCallParser(names, **options)
    found = []
    for piece in pieces:
        found += parser.push_python_tag() if piece == TAG else parser.push(piece)
    return found + parser.flush()


def joined(found):
    """The text, and (name, arguments, is_end) of each call, from pieces in order."""
    text, calls = "", []
    for piece in found:
        if isinstance(piece, TextPiece):
            assert piece.text
            text += piece.text
        elif piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.name, piece.arguments, piece.is_end))
        else:
            name, arguments, is_end = calls[-1]
            assert piece.index == len(calls) - 1
            assert not is_end
            calls[-1] = (name, arguments + piece.arguments, piece.is_end)
    return text, calls


def in_pieces(answer):
    """An answer as one text each side of the special token."""
    parts = answer.split(TAG)
    return [parts[0], *(piece for part in parts[1:] for piece in (TAG, part))]


def hostile(length):
    """Texts that make careless parsers slow: each is a beginning again and again."""
    for part in (
        "<", "<function=", "<function=f>{}", "{", "[", "[{", '{"name": "f", "parameters": {"a":"',
        '{"parameters":{"a":', f"{TAG}f(a=", f"{TAG}f(a='\\", "[f(a=[", "f(a=1);", '"\\', " ", ";",
    ):  # fmt: skip
        yield part, (part * (length // len(part) + 1))[:length]
    yield "strings", TAG + "f(a=" + "'x'" * (length // 3) + ")"
    yield "digits", TAG + "f(a=" + "1" * length + ")"
    yield "brackets", TAG + "f(a=" + "[" * (length // 2) + "]" * (length // 2) + ")"
