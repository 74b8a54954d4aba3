"""Measures quantized weights: size, speed, error of logits and of the bundled model's answers.

    python bench/quantization.py                 # ten pictures for each number of shapes
    python bench/quantization.py --pictures 20

One self-attention layer of Llama-3.2-11B's shape (hidden 4096, MLP 14336, 32 heads, 8 KV heads)
with random weights, a small head on top of it. Milliseconds are CPU time. The method `int8, rounded
rows` is int8 with inputs that are rounded too, as on a CPU with VNNI: the error alone, on any CPU.
The last line is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import MllamaForConditionalGeneration

from checkpoints import build, layout
from processes import arguments
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.bundled.exam.exam import exam
from vlmserve.models.bundled.exam.grading import Grader
from vlmserve.models.decoder.int8.dynamic import quantize_rows
from vlmserve.models.decoder.int8.linear import Int8Linear
from vlmserve.models.decoder.mllama_fixes import mend
from vlmserve.models.decoder.packed_linear import pack_linears
from vlmserve.models.weights.loader import open_checkpoint
from vlmserve.models.weights.quantization import (
    METHODS,
    OWN_METHODS,
    quantization_config,
    settle,
)
from vlmserve.models.weights.tensor_loader import WHOLE, Recipe, load_tensors, open_tensors

LAYER_11B = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "cross_attention_layers": [],
    "initializer_range": 0.02,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(folder: Path, dtype: torch.dtype, method: str | None) -> MllamaForConditionalGeneration:
    """A folder's model on the CPU with transformers' own attention, mended."""
    if method in OWN_METHODS:
        model = _own(folder, dtype, method)
    else:
        read: Any = MllamaForConditionalGeneration.from_pretrained
        config = quantization_config(method, dtype)
        model = read(folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"})
        settle(model, dtype)
    return mend(model.eval().requires_grad_(False))


def _own(folder: Path, dtype: torch.dtype, method: str | None) -> MllamaForConditionalGeneration:
    checkpoint = open_checkpoint(folder, dtype)
    recipe = Recipe(torch.device("cpu"), dtype, WHOLE, method)
    opened = open_tensors(folder, checkpoint.tensors)
    config = checkpoint.meta_model.config
    return load_tensors(opened, config, recipe, lambda _: None, str(folder))


def layer_bytes(model: MllamaForConditionalGeneration) -> int:
    """Bytes of the decoder's layers, statistics of quantized weights included."""
    return sum(
        parameter.nbytes + sum(t.nbytes for t in _statistics(parameter))
        for parameter in model.model.language_model.layers.parameters()
    ) + sum(buffer.nbytes for buffer in model.model.language_model.layers.buffers())


def _statistics(parameter: Any) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    found = (getattr(parameter, "SCB", None), getattr(state, "absmax", None))
    return [tensor for tensor in found if tensor is not None]


def answers(model: MllamaForConditionalGeneration, pictures: int) -> float:
    """The share of right answers to the bundled model's exam about pictures of 1 to 4 shapes."""
    grader = Grader(model, Grader.load(CHECKPOINT).encoder)
    results = grader.grade(exam(pictures, shapes=(1, 2, 3, 4)))
    return sum(result.is_right for result in results) / len(results)


@torch.inference_mode()
def logits(model: MllamaForConditionalGeneration, num_tokens: int = 64) -> torch.Tensor:
    input_ids = (torch.arange(num_tokens) * 7 % 700)[None]
    return model(input_ids=input_ids, use_cache=False).logits[0].float()


@torch.inference_mode()
def layer_ms(model: MllamaForConditionalGeneration, num_tokens: int, rounds: int = 7) -> float:
    """Median CPU milliseconds of one pass, head included."""
    input_ids = (torch.arange(num_tokens) * 7 % 700)[None]
    seconds = []
    for _ in range(rounds + 2):
        start = time.process_time()
        model(input_ids=input_ids, use_cache=False)
        seconds.append(time.process_time() - start)
    return 1000 * statistics.median(seconds[2:])


def round_rows(model: MllamaForConditionalGeneration) -> None:
    """Round the inputs of int8 layers to int8, as `decoder/int8/dynamic.py` does."""

    def rounded(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        codes, scales = quantize_rows(inputs[0])
        return (codes.mul_(scales).to(inputs[0].dtype),)

    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.register_forward_pre_hook(rounded)


def measure(
    layer: Path, method: str | None, dtype: str, pictures: int, *, rounds_rows: bool = False
) -> dict[str, Any]:
    """A row of the table; `logits` is dropped before it is printed."""
    bundled = load(Path(CHECKPOINT), DTYPES[dtype], method)
    model = load(layer, DTYPES[dtype], method)
    name = f"{method or 'none'}, rounded rows" if rounds_rows else method or "none"
    row: dict[str, Any] = {"method": name, "dtype": dtype, "layer_bytes": layer_bytes(model)}
    if rounds_rows:
        round_rows(bundled)
        round_rows(model)
    else:
        pack_linears(model)  # as the server does; quantized layers are left alone
        row["ms_1_token"], row["ms_16_tokens"] = layer_ms(model, 1), layer_ms(model, 16)
    row["right_answers"] = answers(bundled, pictures) if dtype == "float32" or rounds_rows else None
    row["logits"] = logits(model)
    return row


def main() -> None:
    options = arguments(__doc__, pictures=(10, "for each number of shapes"))
    torch.set_num_threads(1)
    config = layout("tiny")
    text: Any = config.text_config
    for name, value in LAYER_11B.items():
        setattr(text, name, value)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = build(config, Path(folder), with_processor=False)
        for dtype in DTYPES:
            rows += [measure(path, m, dtype, options.pictures) for m in (None, *METHODS)]
            rows.append(measure(path, "int8", dtype, options.pictures, rounds_rows=True))
    exact = rows[0]["logits"]
    for row in rows:
        error = (row.pop("logits") - exact).square().mean().sqrt()
        row["logits_error"] = float(error / exact.square().mean().sqrt())
        print(row, flush=True)
    print(json.dumps({"torch": torch.__version__, "device": "cpu", "rows": rows}))


if __name__ == "__main__":
    main()
