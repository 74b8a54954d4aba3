"""Owns the listening socket and every child process; never imports torch.

    supervisor
      engine x R       python -m vlmserve.router.engine.process
      HTTP worker x N  python -m vlmserve.server.worker.process, which inherits the socket

Children read their settings on stdin. The supervisor starts them, logs when the server is ready,
and restarts a child that ends or hangs, by the states in `child_states.py`. It stops all children
on SIGINT or SIGTERM, when a child cannot start, and when a child ends too often. With several
engines, an engine that keeps ending is suspended; the server exits only when all are.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...router.client.engine_client import EngineClient
from ...router.config import EngineConfig
from ...router.messages import EngineReady
from ...router.processes.logs import say
from ...router.processes.memory_folder import memory_folder
from ..children.processes import ChildStartError
from ..settings import ServerSettings
from .child import Child
from .child_slot import (
    EXIT_CODES_WITH_REASON_LOGGED,
    ChildEnd,
    ChildFailedError,
    ChildSlot,
    EngineSlot,
    too_many_ends,
    why_not_ready,
)
from .child_states import ChildEvent, ChildState
from .ended_metrics import merge_ended
from .engine_watchdog import EngineWatchdog
from .readiness_probe import is_ready
from .restart_budget import RestartBudget
from .restart_counter import RestartCounter, RestartReason
from .settings import SupervisorSettings
from .standby_engine import EngineStarter
from .worker_liveness import LivenessPipe

WORKER_COMMAND = ("-m", "vlmserve.server.worker.process")
EXIT_OK = 0
EXIT_FAILED = 1
# Time to exit after the drain.
CLOSING_TIME_S = 5.0
READY_POLL_S = 0.1
# Time to read the last messages of an engine that died; the kernel buffers them.
LAST_MESSAGES_S = 1.0
# The folder of the workers' metrics, which outlive a worker; see telemetry/metrics.py.
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# A worker that runs this long counts as serving.
WORKER_START_S = 3.0


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
        probes: socket.socket | None = None,
    ) -> None:
        """probes: the listening socket of --metrics-port."""
        self._settings = settings or SupervisorSettings()
        self._server_settings = server
        self._listener = listener
        self._probes = probes
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
        try:
            temporary = tempfile.TemporaryDirectory(prefix="vlmserve-", ignore_cleanup_errors=True)
        except OSError as error:
            _say(
                f"cannot create a temporary folder: {error.strerror}; set TMPDIR to a writable one"
            )
            return EXIT_FAILED
        wants_images = self._engines[0].config.image_cache_host_bytes is not None
        with temporary as folder, memory_folder(wants_images) as images:
            try:
                return await self._supervise(Path(folder), images)
            finally:
                await self._kill_all()

    @property
    def _sockets(self) -> list[socket.socket]:
        return [self._listener] if self._probes is None else [self._listener, self._probes]

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

    async def _supervise(self, folder: Path, images: str) -> int:
        self._metrics_folder = folder / "metrics"
        self._metrics_folder.mkdir()
        self._restarts = RestartCounter(self._metrics_folder)
        for number, engine in enumerate(self._engines):
            path = str(folder / f"engine{number}.sock")
            engine.config = msgspec.structs.replace(
                engine.config, socket_path=path, image_folder=images
            )
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
        for one in self._sockets:
            one.close()
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
            # Requests that another engine or worker still answers may end first.
            has_served = any(engine.info is not None for engine in self._engines)
            await self._stop_children(self._settings.drain_time_s if has_served else 0.0)
            return EXIT_FAILED
        drain_time_s = self._settings.drain_time_s
        _say(f"stopping; open requests have {drain_time_s:g} s, a second signal stops them now")
        await self._stop_children(drain_time_s)
        return EXIT_FAILED if self._stop_now.is_set() else EXIT_OK

    # Running children

    async def _keep_engine(self, slot: EngineSlot) -> None:
        """Run an engine and restart it when it ends. Raises ChildFailedError to give up."""
        while True:
            end = await self._run_engine(slot)
            slot.ready.clear()
            if slot.info is None and end.has_started:
                slot.move(ChildEvent.END)
                slot.move(ChildEvent.GIVE_UP)
                raise ChildFailedError(why_not_ready(slot.name, end))
            if not await self._pause_before_restart(slot, end):
                await self._suspend(slot, end)
            slot.move(ChildEvent.RESTART)
            self._restarts.count_engine(end.reason, slot.config.replica)

    async def _run_engine(self, slot: EngineSlot) -> ChildEnd:
        """Start an engine and return when it has ended."""
        try:
            child = slot.child = await self._starter.start(slot.config)
        except ChildStartError as error:
            return ChildEnd.not_started(error)
        return ChildEnd.of(child, await self._watch_engine(slot, child))

    async def _suspend(self, slot: EngineSlot, end: ChildEnd) -> None:
        """Wait until the restarts no longer count. Raises ChildFailedError for the last engine."""
        message = too_many_ends(slot, end)
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
            # Another start must not fail because the files of an adapter are gone by then.
            slot.config = msgspec.structs.replace(slot.config, requires_adapters=False)
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
            try:
                end = await self._run_worker(slot)
            except ChildStartError as error:
                end = ChildEnd.not_started(error)
            merge_ended(self._metrics_folder, self._worker_pids())
            if end.exit_code in EXIT_CODES_WITH_REASON_LOGGED:
                slot.move(ChildEvent.END)
                slot.move(ChildEvent.GIVE_UP)
                raise ChildFailedError(None)
            if not await self._pause_before_restart(slot, end):
                slot.move(ChildEvent.GIVE_UP)
                raise ChildFailedError(f"{too_many_ends(slot, end)}: giving up")
            slot.move(ChildEvent.RESTART)
            self._restarts.count_worker(end.reason)

    async def _run_worker(self, slot: ChildSlot) -> ChildEnd:
        """Start a worker and return when it has ended. Raises ChildStartError."""
        try:
            pipe = LivenessPipe(self._settings.worker_timeouts)
        except OSError as error:
            raise ChildStartError(error.strerror) from error
        with pipe as liveness:
            child = slot.child = await self._start_worker(liveness)
            loop = asyncio.get_running_loop()
            serving = loop.call_later(WORKER_START_S, slot.move, ChildEvent.READY)
            try:
                reason = await _ended(child, slot.name, liveness.until_it_stops())
            finally:
                serving.cancel()
        return ChildEnd.of(child, reason)

    def _worker_pids(self) -> list[int]:
        """The workers that run now."""
        children = [slot.child for slot in self._workers]
        return [child.pid for child in children if child is not None and not child.has_ended]

    async def _start_worker(self, liveness: LivenessPipe) -> Child:
        child = await Child.start(
            WORKER_COMMAND,
            pass_fds=[*(one.fileno() for one in self._sockets), liveness.worker_fd],
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
            probe_fd=None if self._probes is None else self._probes.fileno(),
            liveness_fd=liveness_fd,
            drain_time_s=self._settings.drain_time_s,
        )

    async def _pause_before_restart(self, slot: ChildSlot, end: ChildEnd) -> bool:
        """Wait until a child that ended may restart; False at once if no restart is left."""
        has_served = slot.state is ChildState.SERVING
        slot.move(ChildEvent.END)
        pause_s = slot.restarts.pause_s(has_served=has_served)
        if pause_s is None:
            return False
        when = f"in {pause_s:g} s" if pause_s else "now"
        _say(f"{slot.name} ended ({end.cause}); starting another {when}")
        await asyncio.sleep(pause_s)
        return True

    async def _announce(self) -> None:
        """Wait until the engines have loaded and a worker answers; then call `on_ready`."""
        for engine in self._engines:
            await engine.ready.wait()
        is_tls = self._server_settings.tls_certfile is not None
        while not await is_ready(self._listener, is_tls):  # noqa: ASYNC110 - polls a socket
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
        children = [slot.child for slot in self._slots]
        running = [child for child in children if child is not None and not child.has_ended]
        for child in running:
            child.kill()
        await _all_ended(running)
        await self._starter.close()


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


def _say(line: str) -> None:
    say(f"vlmserve: {line}")
