"""Frames of streams, as every client's reader of lines sees them."""

import json

from vlmserve.server.api.sse import frame, named_frame


def test_a_frame_is_one_line_for_clients_that_end_lines_at_any_separator():
    """httpx ends lines at U+0085, U+2028 and U+2029 too: its clients read half a frame."""
    content = {"text": "a\u0085b\u2028c\u2029d é ☃\n\r\x0b\x1c", "type": "x"}
    for make in (frame, named_frame):
        lines = make(content).decode().splitlines()
        (data,) = [line for line in lines if line.startswith("data: ")]
        assert json.loads(data.removeprefix("data: ")) == content
        assert lines[-1] == ""
