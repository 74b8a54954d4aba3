"""The engine's process: what a standby process has imported, and the adapters of the start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest
from support.fake_runner import FakeAdapters, FakeRunner, fake_adapter
from support.polling import FAR_S

from vlmserve.router.client.engine_client import EngineClient
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.process import EXIT_MODEL_ERROR, EXIT_STOPPED, serve

CODE = """
import sys
from vlmserve.router.engine.process import import_model_runner
assert "torch" not in sys.modules
import_model_runner()
assert "torch" in sys.modules and "transformers" in sys.modules
"""


@pytest.mark.slow
def test_a_standby_process_imports_the_model_s_libraries_before_its_settings_arrive():
    """Regression: a move lost the import, so a standby engine saved no time."""
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=300)


def config_at(tmp_path, *names: str, **fields) -> EngineConfig:
    adapters = tuple(map(fake_adapter, names))
    path = str(tmp_path / "engine.sock")
    return EngineConfig(model="m", socket_path=path, adapters=adapters, max_loras=2, **fields)


def test_an_engine_does_not_start_with_an_adapter_that_it_cannot_use(tmp_path, capfd):
    runner = FakeRunner(adapters=FakeAdapters())
    config = config_at(tmp_path, "text", "broken")
    assert asyncio.run(serve(config, lambda config: runner)) == EXIT_MODEL_ERROR
    lines = capfd.readouterr().err.strip().splitlines()
    problem = "cannot use the adapter 'broken': adapter_model.safetensors: it is broken"
    assert [one for one in lines if "error" in one] == [f"error: {problem}"]


def test_a_restarted_engine_serves_without_an_adapter_whose_files_are_gone(tmp_path):
    adapters = FakeAdapters()
    config = config_at(tmp_path, "broken", "text", requires_adapters=False)

    async def scenario() -> int:
        serving = asyncio.create_task(serve(config, lambda config: FakeRunner(adapters=adapters)))
        client = EngineClient(config.socket_path)
        try:
            await client.connect(FAR_S)
            await client.wait_ready(FAR_S)
        finally:
            await client.close()
        assert adapters.read_names == ["broken", "text"]
        os.kill(os.getpid(), signal.SIGTERM)
        return await serving

    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert asyncio.run(scenario()) == EXIT_STOPPED
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(one, handler)
