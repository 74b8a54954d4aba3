"""The standby engine: what it costs when the system cannot start it."""

from __future__ import annotations

import asyncio

import pytest
from support.polling import until

from vlmserve.server.children.processes import ChildStartError
from vlmserve.server.supervisor import standby_engine
from vlmserve.server.supervisor.child import Child
from vlmserve.server.supervisor.standby_engine import EngineStarter

WAITS = ("-c", "import sys; sys.stdin.read()")


def refuse(*arguments: object, **options: object) -> None:
    raise OSError(11, "Resource temporarily unavailable")


@pytest.mark.parametrize("error", [OSError(11, "no process left"), RuntimeError("no thread left")])
def test_a_fork_that_fails_is_an_error_of_its_own(monkeypatch, error):
    """RuntimeError: Python 3.11 waits for each child in a thread."""

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(asyncio.BaseEventLoop, "subprocess_exec", fail)
    with pytest.raises(ChildStartError, match=r"no (process|thread) left"):
        asyncio.run(Child.start(WAITS))


def test_a_standby_that_cannot_start_is_tried_again_and_the_starter_still_closes(
    monkeypatch, caplog
):
    """Before: the error was raised at the server's end, and other processes were left running."""
    monkeypatch.setattr(standby_engine, "RETRY_S", 0.01)
    real = asyncio.BaseEventLoop.subprocess_exec

    async def main() -> None:
        starter = EngineStarter(WAITS, delay_s=0.0)
        monkeypatch.setattr(asyncio.BaseEventLoop, "subprocess_exec", refuse)
        starter.prepare()
        await until(lambda: caplog.text.count("no standby engine: Resource") > 1)
        monkeypatch.setattr(asyncio.BaseEventLoop, "subprocess_exec", real)
        await until(lambda: starter.has_standby)
        await starter.close()
        assert not starter.has_standby
        starter = EngineStarter(WAITS, delay_s=0.0)
        monkeypatch.setattr(asyncio.BaseEventLoop, "subprocess_exec", refuse)
        starter.prepare()
        await asyncio.sleep(0)
        await starter.close()

    asyncio.run(main())
