"""Cancelling asyncio tasks, and raising the failures of tasks. Knows nothing of what they do.

A kept exception refers to the frames that it passed, and a frame that keeps the exception refers
back: a cycle. Until a full garbage collection it keeps everything in these frames alive, such as
the bodies of a request. So an exception that was stored, by a task or a variable, is raised by
`raise_stored` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, NoReturn, TypeVar

Result = TypeVar("Result")
_finishing: set[asyncio.Future[Any]] = set()


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait until each has ended, whatever its result."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def finish(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Await a coroutine that runs to its end though the caller may be cancelled meanwhile."""
    task = asyncio.ensure_future(coroutine)
    # The event loop keeps only a weak reference.
    _finishing.add(task)
    task.add_done_callback(_finishing.discard)
    return await asyncio.shield(task)


async def run_together(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all at once; their results in order.

    The first failure cancels the others and is raised by itself, not in a group. Nothing is left
    running, also if the caller is cancelled. The frames of a failure keep no reference to it.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((task for task in tasks if _failed(task)), None)
        if failed is None:
            return [task.result() for task in tasks]
        failure = failed.exception()
    finally:
        await end_tasks(*tasks)  # those that have ended too: all their failures are retrieved
        # Both refer to the failure, whose frames include this one.
        tasks.clear()
        failed = None
    try:
        assert failure is not None, "a failed task has an exception"
        raise_stored(failure)
    finally:
        del failure


def raise_stored(error: BaseException) -> NoReturn:
    """Raise an exception that a task or a variable has kept, without a cycle of references.

    The caller must drop its own reference, by `del` in a `finally` around this call.
    """
    try:
        raise error
    finally:
        del error


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None
