"""The real supervisor and HTTP workers over the engine of `faulty_engine.py`, for tests.

    python tests/support/faulty_server.py '{"port": 8000, "model": ..., ...}'

Arguments are one JSON object: `port`, and fields of SupervisorSettings, ServerSettings and
EngineConfig under `supervision`, `server` and `engine`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.router.config import EngineConfig
from vlmserve.server.cli.listener import listen
from vlmserve.server.settings import ServerSettings
from vlmserve.server.supervisor.settings import (
    EngineTimeouts,
    SupervisorSettings,
    WorkerTimeouts,
)
from vlmserve.server.supervisor.supervisor import Supervisor

ENGINE = str(Path(__file__).parent / "faulty_engine.py")


def main(options: dict[str, Any]) -> int:
    engine = EngineConfig(
        model="fake", socket_path="", parent_pid=os.getpid(), **options.get("engine", {})
    )
    server = ServerSettings(
        model=str(CHECKPOINT),
        engine_socket="",
        served_model_names=["vlmserve-tiny-vision"],
        **options.get("server", {}),
    )
    supervision = {"drain_time_s": 2.0} | options.get("supervision", {})
    # Its start takes a core from what is tested.
    supervision.setdefault("has_standby", "standby_delay_s" in supervision)
    limits = EngineTimeouts(**supervision.pop("engine_timeouts", {}))
    worker_timeouts = WorkerTimeouts(**supervision.pop("worker_timeouts", {}))
    port = options.get("metrics_port")
    probes = None if port is None else listen("127.0.0.1", port)
    with listen("127.0.0.1", options["port"]) as listener:
        supervisor = Supervisor(
            engine,
            server,
            listener,
            lambda infos: print("vlmserve is ready", file=sys.stderr),
            SupervisorSettings(
                engine_command=(ENGINE,),
                engine_timeouts=limits,
                worker_timeouts=worker_timeouts,
                **supervision,
            ),
            probes,
        )
        return asyncio.run(supervisor.run())


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1])))
