"""What a checkpoint takes in memory and on which GPUs it fits, by arithmetic, as JSON.

Run as `python -m vlmserve.models.memory.fit_report FOLDER`: `vlmserve check` runs it in a child,
because the server imports no torch. Reads headers only. Prints one JSON object, or one line on
stderr and exit code 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint import read_json
from ..errors import ModelError
from ..kv_cache.pool_sizes import plan_pools
from ..settings.runner_config import RunnerConfig
from ..weights.formats.coded_tensor import CodedTensor
from ..weights.formats.recognition import method_of, quantization_of
from ..weights.loader import Checkpoint, open_checkpoint
from ..weights.quantization import INT4, METHODS
from ..weights.tensor_loader import WHOLE
from .estimate import by_kind
from .fit import LEAST_TEXT_TOKENS, Plan, needs_of, peak_of, plan_of

# of common GPUs, in GB of 10 ** 9 bytes: no GPU of that name has less
GPU_GB = (24, 40, 48, 80, 141)
SHARE = 0.9
# each --quantize, and a checkpoint that is in 4 bits already
FORMS = (None, *METHODS, INT4)
CacheDtype = Literal["auto", "int8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = ("auto", "int8")


def report(folder: Path) -> dict[str, Any]:
    """The checkpoint's form, and a row for each way to quantize it. Raises ModelError."""
    checkpoint = open_checkpoint(folder, torch.bfloat16)
    methods = (None,) if checkpoint.is_coded else FORMS
    config: Any = checkpoint.meta_model.config
    return {
        "model": str(folder),
        "parameters": sum(one.numel() for one in checkpoint.meta_model.parameters()),
        "layers": config.text_config.num_hidden_layers,
        "context": config.text_config.max_position_embeddings,
        "stored": stored_form(checkpoint),
        "image_bytes": {name: image_bytes(checkpoint, name) for name in CACHE_DTYPES},
        "rows": [row(checkpoint, method) for method in methods],
    }


def image_bytes(checkpoint: Checkpoint, cache_dtype: CacheDtype) -> int:
    """Bytes of an image of the most tiles in the image cache, in bfloat16 or in int8."""
    pools = plan_of(checkpoint, RunnerConfig(image_cache_dtype=cache_dtype), WHOLE).pools
    return pools.max_num_tiles * pools.tile_bytes


def stored_form(checkpoint: Checkpoint) -> str:
    """How the files store the weights, in words."""
    coded = [one for one in checkpoint.tensors.values() if isinstance(one, CodedTensor)]
    settings = quantization_of(read_json(checkpoint.folder / "config.json"))
    if not coded:
        types = ", ".join(sorted({one.dtype for one in checkpoint.tensors.values()}))
        stale = f"; quantization_config ({method_of(settings)}) is ignored" if settings else ""
        return f"plain weights ({types}){stale}"
    codings = ", ".join(sorted({str(one.layout.coding) for one in coded}))
    method = method_of(settings) if settings else "quantized"
    return f"{method} ({len(coded)} layers in {codings})"


def row(checkpoint: Checkpoint, method: str | None) -> dict[str, Any]:
    """Bytes of the weights, and the room that each GPU leaves."""
    plan = replace(plan_of(checkpoint, RunnerConfig(), WHOLE), quantize=method)
    weights = needs_of(plan).weights
    return {
        "quantize": method,
        "weights": sum(weights.values()),
        "parts": by_kind(weights),
        "gpus": [{"gb": gb, **fit(plan, int(SHARE * gb * 10**9))} for gb in GPU_GB],
    }


def fit(plan: Plan, num_bytes: int) -> dict[str, int] | dict[str, None]:
    """The longest context and the images of the most tiles that fit both pools; None: no room.

    The context is halved as at a start, not below 2,048 tokens.
    """
    weights = sum(needs_of(plan).weights.values())
    length = plan.limits.max_model_len
    shortest = min(length, LEAST_TEXT_TOKENS)
    while True:
        limits = replace(plan.limits, max_model_len=length)
        left = num_bytes - weights - peak_of(plan, limits).most
        try:
            sized = plan_pools(replace(plan.pools, context_len=length), max(0, left))
        except ModelError:
            if length <= shortest:
                return {"context": None, "images": None}
        else:
            if sized.max_model_len >= shortest or length <= shortest:
                images = sized.sizes.num_image_blocks // plan.pools.max_num_tiles
                return {"context": sized.max_model_len, "images": images}
        length = max(shortest, length // 2)


def main() -> None:
    """Print the report of the folder that the command line names."""
    try:
        sys.stdout.write(json.dumps(report(Path(sys.argv[1]))) + "\n")
    except ModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
