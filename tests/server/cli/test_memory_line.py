"""The start line says what each process takes at most."""

from __future__ import annotations

import msgspec
from support.http_side import ScriptedEngine

from vlmserve.server.cli.build_settings import LEAST_WORKER_BYTES, default_worker_memory
from vlmserve.server.cli.main import memory_line
from vlmserve.server.settings import ServerSettings

SETTINGS = ServerSettings(model="m", engine_socket="", served_model_names=["m"])
READY = ScriptedEngine(lambda request: []).info


def test_the_line_names_each_process_with_its_limit():
    assert READY is not None
    settings = msgspec.structs.replace(SETTINGS, max_memory_bytes=2 << 30)
    engine = msgspec.structs.replace(READY, max_memory_bytes=3 << 29)
    assert memory_line(settings, [engine, engine]) == (
        "memory at most: each engine 1.5 GiB and 1.5 GiB, full queue included; an HTTP worker "
        "2.0 GiB; each of its 2 image decoders 768.0 MiB beyond its start"
    )


def test_what_is_not_known_is_left_out():
    assert READY is not None
    assert memory_line(SETTINGS, [READY]) == (
        "memory at most: each of its 2 image decoders 768.0 MiB beyond its start"
    )


def test_workers_share_what_the_machine_leaves_them():
    assert default_worker_memory(1) >= default_worker_memory(8) >= LEAST_WORKER_BYTES
    assert default_worker_memory(100_000) == LEAST_WORKER_BYTES
