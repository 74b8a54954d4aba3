"""The supervisor's settings: child processes, restarts and timeouts, with their options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from ...models.batch import NonNegative, Positive
from ...models.settings.option import Option
from ..images.settings import HTTP

FAULTS = "Faults and restarts"
ENGINE_COMMAND = ("-m", "vlmserve.router.engine.process")
# After the engine is ready: most first requests are answered by then.
STANDBY_DELAY_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineTimeouts:
    """When an engine counts as hung, in seconds.

    heartbeat_s: without a heartbeat once the engine is ready; loading_s: before that, because
    loading may block the process. step_s: a step that starts no layer; first_step_s: the same for
    the first step of a kind, which may compile kernels.
    """

    heartbeat_s: float = 10.0
    loading_s: float = 300.0
    step_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0.1)],
        Option(
            "Restart the engine if a step makes no progress (starts no layer) for this many "
            "seconds. The first step of a kind has 600, because it may compile kernels.",
            FAULTS,
            name="max-step-stall",
        ),
    ] = 10.0
    first_step_s: float = 600.0


@dataclass(frozen=True, slots=True)
class WorkerTimeouts:
    """When a worker counts as hung, in seconds without a beat of its event loop.

    starting_s: before the first beat, because the imports block the event loop.
    """

    stall_s: Annotated[
        Annotated[float, msgspec.Meta(ge=1.0)],
        Option(
            "Restart an HTTP worker if its event loop is blocked for this many seconds.",
            FAULTS,
            name="max-worker-stall",
        ),
    ] = 10.0
    starting_s: float = 300.0


@dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """How the supervisor runs its children.

    restart_window_s: the period in which max_restarts counts. standby_delay_s: how long after the
    first engine is ready the standby engine starts, so that it takes no core from the first
    requests.
    """

    num_workers: Annotated[
        Positive, Option("Number of HTTP worker processes on the port.", HTTP, name="workers")
    ] = 1
    drain_time_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0)],
        Option("Seconds that open requests have to finish after SIGTERM; then they fail.", FAULTS),
    ] = 20.0
    max_restarts: Annotated[
        NonNegative,
        Option(
            "Maximum restarts of one process in five minutes. Above it, the server exits with "
            "code 1; with several engines, only if all are paused.",
            FAULTS,
        ),
    ] = 5
    restart_window_s: float = 300.0
    engine_timeouts: EngineTimeouts = field(default_factory=EngineTimeouts)
    worker_timeouts: WorkerTimeouts = field(default_factory=WorkerTimeouts)
    has_standby: Annotated[
        bool,
        Option(
            "Keep a standby engine process (about 300 MB) with all imports done, so that a restart "
            "only loads the model.",
            FAULTS,
            name="spare-engine",
        ),
    ] = True
    standby_delay_s: float = STANDBY_DELAY_S
    engine_command: Sequence[str] = ENGINE_COMMAND
