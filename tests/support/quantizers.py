"""Runs the tools that quantize checkpoints, each in an environment of its own.

Owns which forms each tool writes. What a tool is asked to do is in tests/quantizers/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.client_environments import ROOT, quantizer_python

TIMEOUT_S = 600
# a tool's forms, with the bits of a weight
FORMS: dict[str, dict[str, int]] = {
    "compressed-tensors": {
        "fp8-dynamic": 8,
        "fp8-static": 8,
        "w8a8": 8,
        "w8a16-groups": 8,
        "w4a16-groups": 4,
        "w4a16-zeros": 4,
        "w4a16-channel": 4,
    },
    "bitsandbytes": {"nf4": 4, "fp4": 4, "int8": 8},
    "llm-compressor": {"fp8": 8, "gptq": 4},
    "auto-round": {
        "auto-round": 4,
        "auto-round-zeros": 4,
        "auto-round-zeros-v2": 4,
        "gptq-zeros": 4,
        "gptq-8": 8,
        "awq": 4,
    },
}


def run_tool(tool: str, source: Path, forms: str, coded: Path, dequantized: Path | None) -> None:
    """Write what the tool makes of a checkpoint, and the plain weights that it stands for.

    Without dequantized, forms are several with commas between, and coded gets a folder of each.
    """
    script = ROOT / "tests" / "quantizers" / f"{tool.replace('-', '_')}_forms"
    command = [
        sys.executable if tool == "bitsandbytes" else quantizer_python(tool),
        *(script.with_suffix(".py"), source, forms, coded),
        *([] if dequantized is None else [dequantized]),
    ]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=kept,
        cwd=coded.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
