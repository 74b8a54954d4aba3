"""An engine process that fails when it is told to, for tests.

    python tests/support/faulty_engine.py [--standby] < config.json

Its runner hashes instead of computing (`FakeRunner`), so that it starts in a fraction of a
second. The file that FAULT_FILE in its environment names says what is to happen in the
next step: `hang` (never ends), `raise`, `exit` (the process ends), `slow N` (each step
takes N seconds), `poison N` (the process ends at a prompt of N tokens or more); a file that
is not there says nothing. No part of the server reads it:
a fault can be had only by starting this script in the place of the engine.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.fake_runner import FakeAdapters, OrdinaryRunner, fake_info

from vlmserve.models.batch import OnLaunch, PoolSizes, StepBatch, StepResult
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.process import main

FAULT_VARIABLE = "FAULT_FILE"


class FaultyRunner(OrdinaryRunner):
    """Computes as its base does, but for what the file says at the beginning of each step."""

    def execute(self, batch: StepBatch, *on_launch: OnLaunch) -> StepResult:
        self._suffer(batch)
        return super().execute(batch, *on_launch)

    def _suffer(self, batch: StepBatch) -> None:
        word, *arguments = fault().split() or [""]
        if word == "hang":
            threading.Event().wait()
        if word == "raise":
            raise RuntimeError("a secret of the step")
        if word == "memory":
            raise MemoryError("CUDA out of memory: tried to allocate a secret number of bytes")
        if word == "exit":
            os._exit(9)
        if word == "poison":
            longest = max(len(one.token_ids) for one in batch.sequences)
            if longest >= int(arguments[0]):
                os._exit(9)
        if word == "slow":
            time.sleep(float(arguments[0]))


def fault() -> str:
    """What is to happen now."""
    try:
        return Path(os.environ[FAULT_VARIABLE]).read_text()
    except (KeyError, FileNotFoundError):
        return ""


def load(config: EngineConfig) -> FaultyRunner:
    word = fault()
    if word == "unloadable":
        raise ValueError("the weights are gone")
    if word == "dies loading":
        os._exit(7)
    pools = PoolSizes(
        num_text_blocks=config.num_text_blocks or 512,
        num_image_blocks=config.num_image_blocks or 32,
        block_size=config.block_size or 16,
    )
    info = fake_info(pools, config.max_model_len or 4096)
    tile_size = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())["size"]["height"]
    adapters = FakeAdapters(config.max_loras) if config.max_loras else None
    return FaultyRunner(replace(info, tile_size=tile_size), adapters)


if __name__ == "__main__":
    main(load, prepare=lambda: None)
