"""Owns the listening socket and every child process; never imports torch.

    supervisor
      engine x R       python -m vlmserve.router.engine.process
      HTTP worker x N  python -m vlmserve.server.worker, which inherits the socket

Children read their settings on stdin. The supervisor starts them, logs when the server is ready,
and restarts a child that ends or hangs, by the states in `child_states.py`. It stops all children
on SIGINT or SIGTERM, when a child cannot start, and when a child ends too often. With several
engines, one that keeps ending is suspended; the server exits only when all are.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ...router.client.engine_client import EngineClient
from ...router.config import EngineConfig
from ...router.messages import EngineReady
from ...router.processes.logs import say
from ...router.state_table import next_state
from ..settings import ServerSettings
from .child import Child
from .child_states import TRANSITIONS, ChildEvent, ChildState
from .engine_watchdog import EngineWatchdog
from .restart_budget import RestartBudget
from .restart_counter import RestartCounter, RestartReason
from .settings import SupervisorSettings
from .standby_engine import EngineStarter
from .worker_liveness import LivenessPipe

WORKER_COMMAND = ("-m", "vlmserve.server.worker")
EXIT_OK = 0
EXIT_FAILED = 1
# A child that exits with 2 or 3 has logged the reason.
EXIT_CODES_WITH_REASON_LOGGED = (2, 3)
# Time to exit after the drain.
CLOSING_TIME_S = 5.0
READY_POLL_S = 0.1
# Time to read the last messages of an engine that died; the kernel buffers them.
LAST_MESSAGES_S = 1.0
# The folder of the workers' metrics, which outlive a worker; see telemetry/metrics.py.
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# A worker that runs this long counts as serving.
WORKER_START_S = 3.0


class ChildFailedError(Exception):
    """The supervisor gave up on a child. message: for the operator; None if already logged."""


@dataclass(slots=True, kw_only=True)
class ChildSlot:
    """One place for a child: its state, its current process and its restarts."""

    name: str
    restarts: RestartBudget
    child: Child | None = None
    state: ChildState = ChildState.STARTING

    def move(self, event: ChildEvent) -> None:
        """Change the state by the table in `child_states.py`."""
        self.state = next_state(TRANSITIONS, self.state, event)


@dataclass(slots=True, kw_only=True)
class EngineSlot(ChildSlot):
    """The place of one engine. info: set once the engine has been ready for the first time."""

    config: EngineConfig
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    info: EngineReady | None = None


class Supervisor:
    """Runs engines and HTTP workers until SIGINT or SIGTERM.

    Calls `on_ready` once, with every engine's EngineReady, when all engines have loaded and
    /v1/health/ready answers 200.
    """

    def __init__(
        self,
        engine: EngineConfig,
        server: ServerSettings,
        listener: socket.socket,
        on_ready: Callable[[Sequence[EngineReady]], None],
        settings: SupervisorSettings | None = None,
    ) -> None:
        self._settings = settings or SupervisorSettings()
        self._server_settings = server
        self._listener = listener
        self._on_ready = on_ready
        self._metrics_folder = Path()
        self._restarts = RestartCounter(Path())
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._engines = [
            EngineSlot(
                name=f"the engine of replica {number}" if engine.num_replicas > 1 else "the engine",
                restarts=self._new_budget(),
                config=msgspec.structs.replace(engine, replica=number),
            )
            for number in range(engine.num_replicas)
        ]
        self._workers = [
            ChildSlot(name="an HTTP worker", restarts=self._new_budget())
            for _ in range(self._settings.num_workers)
        ]
        self._starter = EngineStarter(
            self._settings.engine_command,
            self._settings.standby_delay_s if self._settings.has_standby else None,
        )

    async def run(self) -> int:
        """Run until the server stops; returns the process's exit code."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal)
        server = self._server_settings
        # Without these files SIGHUP keeps its default: closing the terminal stops the server.
        if server.api_key_file is not None or server.tls_certfile is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload)
        with tempfile.TemporaryDirectory(prefix="vlmserve-") as folder:
            try:
                return await self._supervise(Path(folder))
            finally:
                await self._kill_all()

    @property
    def _slots(self) -> list[ChildSlot]:
        return [*self._workers, *self._engines]

    def _new_budget(self) -> RestartBudget:
        return RestartBudget(self._settings.max_restarts, self._settings.restart_window_s)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    def _reload(self) -> None:
        """Make every worker reread its keys and certificate."""
        _say("workers reread their keys and certificate")
        for slot in self._workers:
            if slot.child is not None:
                slot.child.send_hangup()

    async def _supervise(self, folder: Path) -> int:
        self._metrics_folder = folder / "metrics"
        self._metrics_folder.mkdir()
        self._restarts = RestartCounter(self._metrics_folder)
        for number, engine in enumerate(self._engines):
            path = str(folder / f"engine{number}.sock")
            engine.config = msgspec.structs.replace(engine.config, socket_path=path)
        keepers = [
            *(asyncio.create_task(self._keep_engine(engine)) for engine in self._engines),
            *(asyncio.create_task(self._keep_worker(worker)) for worker in self._workers),
        ]
        announcing = asyncio.create_task(self._announce())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([stopping, *keepers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopping, announcing, *keepers):
                task.cancel()
            ends = await asyncio.gather(*keepers, return_exceptions=True)
        # Otherwise the kernel accepts connections that no worker will answer.
        self._listener.close()
        for slot in self._slots:
            if slot.state is not ChildState.FAILED:
                slot.move(ChildEvent.STOP)
        failures = [end for end in ends if isinstance(end, Exception)]
        for failure in failures:
            if not isinstance(failure, ChildFailedError):
                raise failure
            if failure.args[0] is not None:
                _say(failure.args[0])
        if failures:
            await self._stop_children(0.0)
            return EXIT_FAILED
        drain_time_s = self._settings.drain_time_s
        _say(f"stopping; open requests have {drain_time_s:g} s, a second signal stops them now")
        await self._stop_children(drain_time_s)
        return EXIT_FAILED if self._stop_now.is_set() else EXIT_OK

    # Running children

    async def _keep_engine(self, slot: EngineSlot) -> None:
        """Run an engine and restart it when it ends. Raises ChildFailedError to give up."""
        while True:
            child = slot.child = await self._starter.start(slot.config)
            reason = await self._watch_engine(slot, child)
            slot.ready.clear()
            if slot.info is None:
                slot.move(ChildEvent.END)
                slot.move(ChildEvent.GIVE_UP)
                raise ChildFailedError(_why_not_started(slot.name, child))
            if not await self._pause_before_restart(slot, child):
                await self._suspend(slot, child)
            slot.move(ChildEvent.RESTART)
            self._restarts.count("engine", reason)

    async def _suspend(self, slot: EngineSlot, child: Child) -> None:
        """Wait until the restarts no longer count. Raises ChildFailedError for the last engine."""
        message = _too_many_ends(slot, child)
        others = [engine for engine in self._engines if engine is not slot]
        if all(engine.state is ChildState.SUSPENDED for engine in others):
            slot.move(ChildEvent.GIVE_UP)
            raise ChildFailedError(f"{message}: giving up")
        slot.move(ChildEvent.SUSPEND)
        window_s = self._settings.restart_window_s
        _say(f"{message}: suspended for {window_s:g} s; the other replicas keep serving")
        await asyncio.sleep(window_s)

    async def _watch_engine(self, slot: EngineSlot, child: Child) -> RestartReason:
        """Return when the engine has exited, or was killed because it hung."""

        def on_ready(info: EngineReady) -> None:
            slot.info = info
            slot.move(ChildEvent.READY)
            slot.ready.set()
            self._starter.prepare()

        client = EngineClient(slot.config.socket_path, on_ready=on_ready)
        watchdog = EngineWatchdog(client, self._settings.engine_timeouts)
        try:
            reason = await _ended(child, slot.name, watchdog.until_it_hangs())
            # The last messages may report that it was ready.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_MESSAGES_S):
                    await client.read_to_end()
            return reason
        finally:
            await client.close()

    async def _keep_worker(self, slot: ChildSlot) -> None:
        """Run an HTTP worker and restart it when it ends. Raises ChildFailedError to give up."""
        while True:
            with LivenessPipe(self._settings.worker_timeouts) as liveness:
                child = slot.child = await self._start_worker(liveness)
                loop = asyncio.get_running_loop()
                serving = loop.call_later(WORKER_START_S, slot.move, ChildEvent.READY)
                try:
                    reason = await _ended(child, slot.name, liveness.until_it_stops())
                finally:
                    serving.cancel()
            if child.exit_code in EXIT_CODES_WITH_REASON_LOGGED:
                slot.move(ChildEvent.END)
                slot.move(ChildEvent.GIVE_UP)
                raise ChildFailedError(None)
            if not await self._pause_before_restart(slot, child):
                slot.move(ChildEvent.GIVE_UP)
                raise ChildFailedError(f"{_too_many_ends(slot, child)}: giving up")
            slot.move(ChildEvent.RESTART)
            self._restarts.count("worker", reason)

    async def _start_worker(self, liveness: LivenessPipe) -> Child:
        child = await Child.start(
            WORKER_COMMAND,
            pass_fds=[self._listener.fileno(), liveness.worker_fd],
            environment={METRICS_VARIABLE: str(self._metrics_folder)},
        )
        settings = self._worker_settings(liveness.worker_fd)
        liveness.hand_over()
        await child.configure(settings)
        return child

    def _worker_settings(self, liveness_fd: int) -> ServerSettings:
        return msgspec.structs.replace(
            self._server_settings,
            engine_socket=self._engines[0].config.socket_path,
            replica_sockets=[one.config.socket_path for one in self._engines[1:]],
            listen_fd=self._listener.fileno(),
            liveness_fd=liveness_fd,
            drain_time_s=self._settings.drain_time_s,
        )

    async def _pause_before_restart(self, slot: ChildSlot, child: Child) -> bool:
        """Wait until a child that ended may restart; False at once if no restart is left."""
        has_served = slot.state is ChildState.SERVING
        slot.move(ChildEvent.END)
        pause_s = slot.restarts.pause_s(has_served=has_served)
        if pause_s is None:
            return False
        when = f"in {pause_s:g} s" if pause_s else "now"
        _say(f"{slot.name} ended ({child.how_it_ended}); starting another {when}")
        await asyncio.sleep(pause_s)
        return True

    async def _announce(self) -> None:
        """Wait until the engines have loaded and a worker answers; then call `on_ready`."""
        for engine in self._engines:
            await engine.ready.wait()
        is_tls = self._server_settings.tls_certfile is not None
        while not await _is_ready(self._listener, is_tls):  # noqa: ASYNC110 - polls a socket
            await asyncio.sleep(READY_POLL_S)
        self._on_ready([one.info for one in self._engines if one.info is not None])

    # Stopping children

    async def _stop_children(self, drain_time_s: float) -> None:
        """SIGTERM to the workers, whose requests need the engines; then to the engines."""
        await self._terminate([slot.child for slot in self._workers], drain_time_s)
        await self._terminate([slot.child for slot in self._engines], 0.0)

    async def _terminate(self, children: Sequence[Child | None], time_s: float) -> None:
        """SIGTERM to all at once; SIGKILL at the deadline or at a second signal."""
        running = [child for child in children if child is not None and not child.has_ended]
        for child in running:
            child.terminate()
        ended = asyncio.create_task(_all_ended(running))
        at_once = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait(
            [ended, at_once], timeout=time_s + CLOSING_TIME_S, return_when=asyncio.FIRST_COMPLETED
        )
        at_once.cancel()
        for child in running:
            child.kill()
        await ended

    async def _kill_all(self) -> None:
        await self._starter.close()
        for child in [slot.child for slot in self._slots]:
            if child is not None and not child.has_ended:
                child.kill()
                await child.wait()


def _why_not_started(name: str, child: Child) -> str | None:
    if child.exit_code in EXIT_CODES_WITH_REASON_LOGGED:
        return None
    return f"{name} ended ({child.how_it_ended}) before it was ready: giving up"


def _too_many_ends(slot: ChildSlot, child: Child) -> str:
    budget = slot.restarts
    return (
        f"{slot.name} ended {budget.max_restarts + 1} times in {budget.window_s:g} s, last by "
        f"{child.how_it_ended}"
    )


async def _ended(child: Child, name: str, hanging: Coroutine[Any, Any, str]) -> RestartReason:
    """Return when the child has exited, or was killed because `hanging` reported that it hangs."""
    reason = await child.wait_or_hang(hanging)
    if reason is None:
        return "ended"
    _say(f"{name} {reason}; killing it")
    child.kill()
    await child.wait()
    return "hung"


async def _all_ended(children: Sequence[Child]) -> None:
    for child in children:
        await child.wait()


async def _is_ready(listener: socket.socket, is_tls: bool) -> bool:
    """Whether GET /v1/health/ready on this socket's address answers 200."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    request = b"GET /v1/health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try:
        # Our own server: any certificate is fine.
        tls = ssl._create_unverified_context() if is_tls else None
        reader, writer = await asyncio.open_connection(host, port, ssl=tls)
        writer.write(request)
        status_line = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.startswith(b"HTTP/1.1 200")


def _say(line: str) -> None:
    say(f"vlmserve: {line}")
