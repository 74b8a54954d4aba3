"""The chunked transfer coding, read as strictly as the head before it (RFC 9112, section 7).

Owns the framing of chunks and the trailer after them. Knows nothing of sockets or of what the
bytes mean.
"""

from __future__ import annotations

import re

from ..errors import BadRequestError
from .head import HeadLimits, HeadTooLargeError, has_lone_line_end, read_fields

# A size of up to 64 GiB. Extensions are ignored; real clients send none.
SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,9})(;[\t -~]*)?")
MAX_SIZE_LINE = 256
# A body may come in small chunks, as long as framing does not outweigh data beyond this.
FREE_FRAMING_BYTES = 1024 * 1024


class ChunkReader:
    """Decodes one body, piece by piece.

    num_bytes: bytes of data so far. declared_bytes: the same, plus the rest of the current
    chunk, so that a body can be rejected before it arrives. is_complete: the last chunk and
    the trailer were read; what follows in the buffer belongs to the next request.
    """

    def __init__(self, limits: HeadLimits) -> None:
        self._limits = limits
        self._left = 0
        self._needs_line_end = False
        self._is_in_trailer = False
        self._framing_bytes = 0
        self.num_bytes = 0
        self.declared_bytes = 0
        self.is_complete = False

    def take(self, received: bytearray, max_bytes: int) -> bytes:
        """Remove what can be decoded from `received` and return its data; empty if none yet.

        Stops once the declared size is over max_bytes. Raises BadRequestError for framing that
        another reader could read differently.
        """
        pieces: list[bytes] = []
        position = 0
        while not self.is_complete and self.declared_bytes <= max_bytes:
            before = position
            if self._left:
                piece = bytes(received[position : position + self._left])
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                self.num_bytes += len(piece)
                self._needs_line_end = True
            elif self._is_in_trailer:
                position = self._end_of_trailer(received, position)
            else:
                position = self._end_of_size(received, position)
            if position == before:
                break
        del received[:position]
        return b"".join(pieces)

    def _end_of_size(self, received: bytearray, position: int) -> int:
        """Where the chunk's data starts; `position` itself while its size is incomplete."""
        start = position
        if self._needs_line_end:
            line_end = bytes(received[position : position + 2])
            if not b"\r\n".startswith(line_end):
                raise _bad_chunk()
            if len(line_end) < 2:
                return position
            start += 2
        end = received.find(b"\r\n", start, start + MAX_SIZE_LINE)
        if end < 0:
            line = bytes(received[start : start + MAX_SIZE_LINE])
            if len(line) == MAX_SIZE_LINE or has_lone_line_end(line):
                raise _bad_chunk()
            return position
        match = SIZE_LINE.fullmatch(received, start, end)
        if match is None:
            raise _bad_chunk()
        self._start_chunk(int(match[1], 16), end + 2 - position)
        return end + 2

    def _start_chunk(self, size: int, framing_bytes: int) -> None:
        self._framing_bytes += framing_bytes
        if self._framing_bytes > FREE_FRAMING_BYTES + self.num_bytes:
            raise BadRequestError("the body's chunks are too small: send it in larger pieces")
        self._left = size
        self.declared_bytes += size
        self._needs_line_end = False
        self._is_in_trailer = size == 0

    def _end_of_trailer(self, received: bytearray, position: int) -> int:
        """Where the trailer ends. Its fields are checked and ignored."""
        rest = bytes(received[position : position + self._limits.max_bytes])
        end = 0 if rest.startswith(b"\r\n") else rest.find(b"\r\n\r\n")
        if end < 0:
            if len(rest) == self._limits.max_bytes:
                raise HeadTooLargeError("the trailer after the body is too large")
            if has_lone_line_end(rest):
                raise _bad_chunk()
            return position
        if end:
            read_fields(rest[:end].split(b"\r\n"), self._limits)
            end += 2
        self.is_complete = True
        return position + end + 2


def _bad_chunk() -> BadRequestError:
    return BadRequestError("the body's chunked transfer coding is invalid")
