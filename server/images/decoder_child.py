"""The decoder's own process: reads encoded images from stdin, writes tiles to stdout.

Owns what a process must do to be safe to kill: it dies with its parent, at the end
of its stdin, or by its own alarm; it caps its memory and its time and can write no file.
Knows nothing of requests or URLs. Started as `python -m vlmserve.server.images.decoder_child`
with a DecoderConfig as JSON in its only argument.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
from dataclasses import dataclass
from typing import BinaryIO

import msgspec

from ...router.parent_death import ParentGoneError, die_with_parent
from .decoder_frames import REQUEST_HEAD, DecodeReply, encode_reply
from .decoding import decode, prepare_pillow
from .settings import ImageError, ImageSettings
from .tiling import TilingConfig

# The parent kills at decode_timeout_s; this is for a parent that no longer can.
ALARM_FACTOR = 3
BROKEN = "image cannot be decoded: the file is broken, cut off or not what its header says"
TOO_MUCH_MEMORY = "image takes too much memory to decode: scale it down or save it anew"


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What a child is told when it starts. parent_pid: whose death ends it."""

    settings: ImageSettings
    tiling: TilingConfig
    parent_pid: int


def main() -> None:
    """Serve decode requests until stdin ends."""
    config = msgspec.json.decode(sys.argv[1].encode(), type=DecoderConfig)
    end_only_with(config.parent_pid)
    prepare_pillow(config.settings)
    limit_memory(config.settings.decoder_memory_bytes)
    # Whatever a library prints must not land among the frames.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(config, sys.stdin.buffer, replies)


def serve(config: DecoderConfig, requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer each request frame with one reply frame, after one that says 'ready'."""
    send(replies, DecodeReply())
    while len(head := requests.read(REQUEST_HEAD.size)) == REQUEST_HEAD.size:
        max_tiles, length = REQUEST_HEAD.unpack(head)
        data = requests.read(length)
        if len(data) < length:
            return
        limit_s = config.settings.decode_timeout_s * ALARM_FACTOR
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        limit_cpu(limit_s)
        reply = answer(data, config, max_tiles or None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        del data
        send(replies, reply)


def answer(data: bytes, config: DecoderConfig, max_tiles: int | None) -> DecodeReply:
    """Tiles, or a reason fit for the client: Pillow's own words may quote the file."""
    try:
        return DecodeReply(tiles=decode(data, config.settings, config.tiling, max_tiles))
    except ImageError as error:
        return DecodeReply(error=error.message)
    except MemoryError:
        return DecodeReply(error=TOO_MUCH_MEMORY)
    except Exception:
        return DecodeReply(error=BROKEN)


def send(replies: BinaryIO, reply: DecodeReply) -> None:
    """Write one reply frame at once."""
    replies.write(encode_reply(reply))
    replies.flush()


def end_only_with(parent_pid: int) -> None:
    """Die with the parent, exit if it is gone, and leave it to the parent to end this before."""
    try:
        die_with_parent(parent_pid)
    except ParentGoneError:
        sys.exit(0)
    # Both may reach a whole group of processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def limit_memory(extra_bytes: int) -> None:
    """Cap the address space at what is taken now plus extra_bytes; no core, no file written."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def limit_cpu(seconds: float) -> None:
    """End this process when it has computed for so long from now on, whatever it does then.

    Threads of a library count too, and no handler that one sets undoes it, as of an alarm.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


if __name__ == "__main__":
    main()
