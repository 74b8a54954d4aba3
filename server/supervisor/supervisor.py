"""Owns the listening socket and every child process; never imports torch.

    supervisor
      engine x R       python -m vlmserve.router.engine.process
      HTTP worker x N  python -m vlmserve.server.worker, the socket inherited

Each reads its settings on stdin. Starts them, says when the server is ready, and starts
again what dies or hangs: engines by their heartbeats, workers by their pulse. Ends them all on
SIGINT or SIGTERM, when a child cannot start, and when one dies too often; of several engines one
that dies too often rests, and only when all do that is the end. Knows nothing of requests.
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
from ...router.logs import say
from ...router.messages import EngineReady
from ..settings import ServerSettings
from .child import Child
from .engine_watchdog import EngineWatchdog
from .restart_budget import RestartBudget
from .restart_counter import RestartCounter, RestartReason
from .settings import SupervisorSettings
from .standby_engine import EngineStarter
from .worker_liveness import LivenessPipe

WORKER_COMMAND = ("-m", "vlmserve.server.worker")
EXIT_OK = 0
EXIT_FAILED = 1
# A child that ends with 2 or 3 has said why in one line.
EXIT_CODES_OF_CHILDREN_THAT_SAID_WHY = (2, 3)
# What a worker has beyond its drain to close, and an engine to say goodbye.
CLOSING_TIME_S = 5.0
READY_POLL_S = 0.1
# The kernel holds what an engine said when it died, and then the end of the connection.
LAST_WORDS_S = 1.0
# Where the workers keep their figures, which outlive them; see metrics.py.
FIGURES_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# A worker that lived longer had served.
WORKER_START_S = 3.0


class ChildFailedError(Exception):
    """A child cannot be had; the message is for the operator, None where it has been said."""


@dataclass(slots=True)
class EngineSlot:
    """The place of one engine: where it listens, who runs there now, and how often it died."""

    config: EngineConfig
    restarts: RestartBudget
    child: Child | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    info: EngineReady | None = None
    is_resting: bool = False

    @property
    def name(self) -> str:
        """For the operator."""
        config = self.config
        return f"engine of replica {config.replica}" if config.num_replicas > 1 else "engine"

    @property
    def was_ready(self) -> bool:
        return self.info is not None


@dataclass(slots=True)
class WorkerSlot:
    """The place of one HTTP worker."""

    restarts: RestartBudget
    child: Child | None = None


class Supervisor:
    """Keeps engines and HTTP workers running until told to stop.

    `on_ready` is called once with every engine's EngineReady when all have loaded and
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
        self._figures = Path()
        self._restarts = RestartCounter(Path())
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._engines = [
            EngineSlot(
                msgspec.structs.replace(engine, replica=number),
                self._new_budget(),
            )
            for number in range(engine.num_replicas)
        ]
        self._workers = [WorkerSlot(self._new_budget()) for _ in range(self._settings.num_workers)]
        self._starter = EngineStarter(
            self._settings.engine_command,
            self._settings.standby_delay_s if self._settings.has_standby else None,
        )

    async def run(self) -> int:
        """Serve until the end; returns the process's exit code."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal)
        server = self._server_settings
        # Else a terminal that closes ends the server, as it does any other program.
        if server.api_key_file is not None or server.tls_certfile is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload)
        with tempfile.TemporaryDirectory(prefix="vlmserve-") as folder:
            try:
                return await self._supervise(Path(folder))
            finally:
                await self._kill_all()

    def _new_budget(self) -> RestartBudget:
        return RestartBudget(self._settings.max_restarts, self._settings.restart_window_s)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    def _reload(self) -> None:
        """Have every worker read its keys and certificate again."""
        _say("workers read their keys and certificate again")
        for slot in self._workers:
            if slot.child is not None:
                slot.child.hang_up()

    async def _supervise(self, folder: Path) -> int:
        self._figures = folder / "figures"
        self._figures.mkdir()
        self._restarts = RestartCounter(self._figures)
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
        # Else the kernel takes connections that nobody answers once the workers have ended.
        self._listener.close()
        failures = [end for end in ends if isinstance(end, Exception)]
        for failure in failures:
            if not isinstance(failure, ChildFailedError):
                raise failure
            if failure.args[0] is not None:
                _say(failure.args[0])
        if failures:
            await self._end_children(0.0)
            return EXIT_FAILED
        drain_time_s = self._settings.drain_time_s
        _say(f"stopping; open requests have {drain_time_s:g} s, a second signal ends them now")
        await self._end_children(drain_time_s)
        return EXIT_FAILED if self._stop_now.is_set() else EXIT_OK

    # Keeping children

    async def _keep_engine(self, slot: EngineSlot) -> None:
        """Run an engine, and another when it ends. Raises ChildFailedError to give up."""
        while True:
            child = slot.child = await self._starter.start(slot.config)
            reason = await self._watch_engine(slot, child)
            has_served = slot.ready.is_set()
            slot.ready.clear()
            if not slot.was_ready:
                raise ChildFailedError(_why_not_started(slot.name, child))
            await self._pause_engine(slot, child, has_served)
            self._restarts.count("engine", reason)

    async def _pause_engine(self, slot: EngineSlot, child: Child, has_served: bool) -> None:
        """Wait until an engine is to be started again; long where it died too often.

        Raises ChildFailedError where all the others did so too, or there are none.
        """
        try:
            await self._pause_before_restart(f"the {slot.name}", child, slot.restarts, has_served)
        except ChildFailedError as failure:
            slot.is_resting = True
            if all(one.is_resting for one in self._engines):
                raise
            window_s = self._settings.restart_window_s
            _say(f"{failure} for {window_s:g} s; the other replicas go on")
            await asyncio.sleep(window_s)
            slot.is_resting = False

    async def _watch_engine(self, slot: EngineSlot, child: Child) -> RestartReason:
        """Return when the engine has ended, or has been ended because it hung."""

        def on_ready(info: EngineReady) -> None:
            slot.info = info
            slot.ready.set()
            self._starter.prepare()

        client = EngineClient(slot.config.socket_path, on_ready=on_ready)
        watch = EngineWatchdog(client, self._settings.engine_timeouts)
        try:
            reason = await _ended(child, f"the {slot.name}", watch.until_it_hangs())
            # Its last words may say that it had been ready.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await client.read_to_end()
            return reason
        finally:
            await client.close()

    async def _keep_worker(self, slot: WorkerSlot) -> None:
        """Run an HTTP worker, and another when it ends. Raises ChildFailedError to give up."""
        while True:
            with LivenessPipe(self._settings.worker_timeouts) as pulse:
                child = slot.child = await self._start_worker(pulse)
                began = asyncio.get_running_loop().time()
                reason = await _ended(child, "an HTTP worker", pulse.until_it_stops())
            if child.exit_code in EXIT_CODES_OF_CHILDREN_THAT_SAID_WHY:
                raise ChildFailedError(None)
            has_served = asyncio.get_running_loop().time() - began > WORKER_START_S
            await self._pause_before_restart("an HTTP worker", child, slot.restarts, has_served)
            self._restarts.count("worker", reason)

    async def _start_worker(self, pulse: LivenessPipe) -> Child:
        child = await Child.start(
            WORKER_COMMAND,
            pass_fds=[self._listener.fileno(), pulse.worker_fd],
            environment={FIGURES_VARIABLE: str(self._figures)},
        )
        settings = msgspec.structs.replace(self._settings_of_workers(), liveness_fd=pulse.worker_fd)
        pulse.hand_over()
        await child.configure(settings)
        return child

    def _settings_of_workers(self) -> ServerSettings:
        return msgspec.structs.replace(
            self._server_settings,
            engine_socket=self._engines[0].config.socket_path,
            replica_sockets=[one.config.socket_path for one in self._engines[1:]],
            listen_fd=self._listener.fileno(),
            drain_time_s=self._settings.drain_time_s,
        )

    async def _pause_before_restart(
        self, name: str, child: Child, restarts: RestartBudget, has_served: bool
    ) -> None:
        pause_s = restarts.pause_s(has_served=has_served)
        if pause_s is None:
            raise ChildFailedError(
                f"{name} ended {restarts.max_restarts + 1} times in {restarts.window_s:g} s, last "
                f"by {child.how_it_ended}: giving up"
            )
        when = f"in {pause_s:g} s" if pause_s else "now"
        _say(f"{name} ended ({child.how_it_ended}); starting another {when}")
        await asyncio.sleep(pause_s)

    async def _announce(self) -> None:
        """Wait until the engines have loaded and a worker answers; then say so once."""
        for engine in self._engines:
            await engine.ready.wait()
        is_tls = self._server_settings.tls_certfile is not None
        while not await _is_ready(self._listener, is_tls):  # noqa: ASYNC110 - polls a socket
            await asyncio.sleep(READY_POLL_S)
        self._on_ready([one.info for one in self._engines if one.info is not None])

    # Ending children

    async def _end_children(self, drain_time_s: float) -> None:
        """SIGTERM to the workers, whose requests need the engines, then to the engines."""
        await self._end([slot.child for slot in self._workers], drain_time_s)
        await self._end([slot.child for slot in self._engines], 0.0)

    async def _end(self, children: Sequence[Child | None], time_s: float) -> None:
        """SIGTERM to all at once; what is left at the deadline or a second signal is killed."""
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
        children = [slot.child for slot in self._workers]
        children += [slot.child for slot in self._engines]
        for child in children:
            if child is not None and not child.has_ended:
                child.kill()
                await child.wait()


def _why_not_started(name: str, child: Child) -> str | None:
    if child.exit_code in EXIT_CODES_OF_CHILDREN_THAT_SAID_WHY:
        return None
    return f"the {name} ended ({child.how_it_ended}) before it was ready: giving up"


async def _ended(child: Child, name: str, hanging: Coroutine[Any, Any, str]) -> RestartReason:
    """Return when the child has ended, or has been ended because `hanging` said why it hangs."""
    reason = await child.wait_or_hang(hanging)
    if reason is None:
        return "ended"
    _say(f"{name} {reason}; ending it")
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
        # Of itself: any certificate will do.
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
