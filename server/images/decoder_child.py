"""The decoder process: reads encoded images from stdin, writes tiles to stdout.

Owns what makes the process safe to kill. It exits with its parent, at the end of its stdin or by
its own alarm; its memory and its time are limited, and it can write no file. Knows nothing of
requests or URLs. Started as `python -m vlmserve.server.images.decoder_child` with a DecoderConfig
as JSON in its only argument.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from ...router.processes.parent_death import (
    ParentGoneError,
    die_with_parent,
    limit_address_space,
)
from .decoder_frames import REQUEST_HEAD, DecoderConfig, DecodeReply, encode_reply
from .decoding import decode, prepare_pillow
from .settings import ImageError

# The parent kills the child first. These limits, of CPU time and of real time, are for a parent
# that cannot.
CPU_FACTOR = 3
ALARM_FACTOR = 8
BROKEN = "image cannot be decoded: the file is damaged, cut off or does not match its header"
TOO_MUCH_MEMORY = "image takes too much memory to decode: scale it down or save it again"


def main() -> None:
    """Serve decode requests until stdin ends."""
    config = msgspec.json.decode(sys.argv[1].encode(), type=DecoderConfig)
    end_only_with(config.parent_pid)
    prepare_pillow(config.settings)
    limit_memory(config.settings.decoder_memory_bytes)
    # Output of a library must not get between the frames.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(config, sys.stdin.buffer, replies)


def serve(config: DecoderConfig, requests: BinaryIO, replies: BinaryIO) -> None:
    """Send an empty reply when ready, then answer each request frame with one reply frame."""
    send(replies, DecodeReply())
    while len(head := requests.read(REQUEST_HEAD.size)) == REQUEST_HEAD.size:
        max_tiles, length = REQUEST_HEAD.unpack(head)
        data = requests.read(length)
        if len(data) < length:
            return
        limit_s = config.settings.decode_timeout_s
        signal.setitimer(signal.ITIMER_REAL, limit_s * ALARM_FACTOR)
        limit_cpu(limit_s * CPU_FACTOR)
        reply = answer(data, config, max_tiles or None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        del data
        send(replies, reply)


def answer(data: bytes, config: DecoderConfig, max_tiles: int | None) -> DecodeReply:
    """Tiles, or an error text for the client. Pillow's own texts may quote the file."""
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
    replies.writelines(encode_reply(reply))
    replies.flush()


def end_only_with(parent_pid: int) -> None:
    """Exit with the parent, or now if it is gone. Only the parent ends this process earlier."""
    try:
        die_with_parent(parent_pid)
    except ParentGoneError:
        sys.exit(0)
    # Both signals may be sent to the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def limit_memory(extra_bytes: int) -> None:
    """Limit the address space to its present size plus extra_bytes; allow no core and no file."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        pages = int(statm.read().split()[0])
    limit_address_space(pages * resource.getpagesize() + extra_bytes)
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
