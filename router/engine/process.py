"""The engine's process: `python -m vlmserve.router.engine.process [--standby] < config.json`.

Owns the process's life: its settings from stdin, its end with its parent, its signals and its exit
code. Knows nothing of scheduling or tensors. A standby process (`--standby`) imports all that an
engine needs while it waits for settings, which may never come. Importing is most of the start time
of a small model.

Exit codes: 0 after SIGTERM, 1 if the engine fails, 2 if the settings or the socket path cannot be
used, 3 if the model cannot be loaded. Before 2 and 3 it writes the reason to stderr in one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import msgspec

from ...models.malloc import use_growing_segments, use_one_heap
from ...models.settings.byte_text import shown_bytes
from ...models.settings.runner_config import RunnerConfig
from ...models.settings.threads import wait_briefly
from ..config import EngineConfig
from ..errors import AdapterUnusableError, EngineDeadError
from ..processes.logs import say, set_up_logging
from ..processes.parent_death import ParentGoneError, die_with_parent, name_process
from .engine import Engine
from .runner_protocol import Runner
from .server import EngineServer, SocketPathError

logger = logging.getLogger("vlmserve.engine")

EXIT_STOPPED = 0
EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2
EXIT_MODEL_ERROR = 3

STANDBY_OPTION = "--standby"
ENGINE_NAME, STANDBY_NAME = "vlmserve-engine", "vlmserve-spare"

LoadRunner = Callable[[EngineConfig], Runner]


def load_model_runner(config: EngineConfig) -> Runner:
    """Load the model that `config` names. Imports torch: call it late, off the loop."""
    with _no_collections():
        from ...models.create_runner import create_runner
        from ...models.distributed.parallel_runner import create_parallel_runner
        from ...models.distributed.replica import Replica

    runner_config: RunnerConfig = config
    if config.num_replicas > 1:
        replica = Replica(config.replica, config.num_replicas, config.tensor_parallel_size)
        runner_config = replica.share_of(config)
    runner: Runner
    if config.tensor_parallel_size > 1:
        runner = create_parallel_runner(config.model, config.tensor_parallel_size, runner_config)
    else:
        runner = create_runner(config.model, runner_config)
    # All of this stays: no collection between steps needs to look at it again.
    gc.collect()
    gc.freeze()
    return runner


def import_model_runner() -> None:
    """Import what `load_model_runner` needs, before the settings are known."""
    with _no_collections():
        from ...models.execution.runner import ModelRunner  # noqa: F401


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Importing creates a million objects, and hardly any garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def serve(config: EngineConfig, load_runner: LoadRunner = load_model_runner) -> int:
    """Listen, load, and compute steps until SIGTERM; returns the exit code."""
    stopping = _stop_on_sigterm()
    server = EngineServer(config)
    try:
        await server.start()
    except SocketPathError as error:
        return _report(str(error), EXIT_BAD_SETTINGS)
    try:
        return await _load_and_run(config, load_runner, server, stopping)
    finally:
        await server.close()


async def _load_and_run(
    config: EngineConfig, load_runner: LoadRunner, server: EngineServer, stopping: asyncio.Event
) -> int:
    # Load in the thread that computes later: some of torch's state belongs to a thread.
    executor = ThreadPoolExecutor(1, thread_name_prefix="model")
    loading = asyncio.get_running_loop().run_in_executor(executor, load_runner, config)
    stop = asyncio.create_task(stopping.wait())
    await _first_of(loading, stop)
    if not loading.done():
        return EXIT_STOPPED
    if (error := loading.exception()) is not None:
        return _report_model_error(config, error)
    engine = Engine(loading.result(), config, server.send, executor)
    reading = asyncio.create_task(_read_adapters(engine, config), name="adapters")
    await _first_of(reading, stop)
    if not reading.done():
        reading.cancel()
        return EXIT_STOPPED
    if (problem := reading.result()) is not None:
        return _report(problem, EXIT_MODEL_ERROR)
    server.attach(engine)
    logger.info("the engine is ready")
    running = asyncio.create_task(engine.run(), name="engine")
    await _first_of(running, stop)
    engine.close(EngineDeadError("the engine is stopping"))
    if running.done():
        logger.error("the engine failed", exc_info=running.exception())
        return EXIT_FAILED
    running.cancel()
    return EXIT_STOPPED


async def _read_adapters(engine: Engine, config: EngineConfig) -> str | None:
    """Read the adapters of the start; returns why the engine cannot start without one."""
    for ref in config.adapters:
        try:
            info = await engine.load_adapter(ref)
        except AdapterUnusableError as error:
            problem = f"cannot use the adapter {ref.name!r}: {error}"
            if config.requires_adapters:
                return problem
            logger.error(problem)
        else:
            base = info.base_model or "an unknown model"
            size = shown_bytes(info.num_bytes)
            logger.info("adapter %s: rank %d, %s, trained on %s", ref.name, info.rank, size, base)
    return None


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def main(
    load_runner: LoadRunner = load_model_runner,
    prepare: Callable[[], None] = import_model_runner,
) -> NoReturn:
    """Run one engine process to its end. Does not return.

    prepare: what a standby process does before it waits for settings.
    """
    use_one_heap()  # before any thread starts; importing torch starts some
    wait_briefly()
    use_growing_segments()
    try:
        if STANDBY_OPTION in sys.argv[1:]:
            die_with_parent()
            name_process(STANDBY_NAME)
            prepare()
        config = read_config()
        set_up_logging(config.log_level, config.log_format, config.process_name)
        die_with_parent(config.parent_pid)
        name_process(ENGINE_NAME)
    except (msgspec.DecodeError, UnicodeDecodeError, ParentGoneError) as error:
        _exit(_report(f"engine settings: {error}", EXIT_BAD_SETTINGS))
    _exit(asyncio.run(serve(config, load_runner)))


def read_config() -> EngineConfig:
    """The settings: one line of JSON on stdin. Raises msgspec.DecodeError."""
    line = sys.stdin.buffer.readline()
    if not line and STANDBY_OPTION in sys.argv[1:]:
        _exit(EXIT_STOPPED)  # the supervisor did not need it
    return msgspec.json.decode(line, type=EngineConfig)


def _stop_on_sigterm() -> asyncio.Event:
    """An event set by SIGTERM. SIGINT is ignored: the parent handles Ctrl-C for the group."""
    stopping = asyncio.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    return stopping


def _report_model_error(config: EngineConfig, error: BaseException) -> int:
    # The message of these is enough. ImportError: no memory for a library.
    if not isinstance(error, (ValueError, OSError, MemoryError, ImportError)):
        logger.error("loading the model failed", exc_info=error)
    first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
    return _report(f"cannot load the model {config.model!r}: {first_line}", EXIT_MODEL_ERROR)


def _report(message: str, exit_code: int) -> int:
    say(f"error: {message}", logging.ERROR)
    return exit_code


def _exit(exit_code: int) -> NoReturn:
    """Exit now: the thread of a step that never ends would otherwise block the exit."""
    with contextlib.suppress(OSError):  # a full disk
        sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
