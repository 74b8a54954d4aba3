"""Quantizes a checkpoint with bitsandbytes, through transformers, in the tests' own environment.

    python bitsandbytes_forms.py SOURCE FORM CODED DEQUANTIZED

The vision encoder is in fewer bits too, as Unsloth's forms have it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from saving import run, save
from transformers import BitsAndBytesConfig, MllamaForConditionalGeneration

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


@torch.no_grad()
def main(source: Path, form: str, coded: Path, dequantized: Path | None) -> None:
    """Write both checkpoints, or the quantized one alone."""
    config = BitsAndBytesConfig(**FORMS[form], llm_int8_skip_modules=["lm_head"])
    model = MllamaForConditionalGeneration.from_pretrained(
        source, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    save(model, source, coded)
    if dequantized is None:
        return
    plain = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    count = 0
    for name, parameter in model.named_parameters():
        target = plain.get_parameter(name).data
        if (state := getattr(parameter, "quant_state", None)) is not None:
            target.copy_(dequantize_4bit(parameter.data, state).view(target.shape))
        elif (scale := getattr(parameter, "SCB", None)) is not None:
            target.copy_(parameter.data.float() * scale[:, None] / 127)
        else:
            continue
        count += 1
    assert count, "nothing is quantized"
    save(plain, source, dequantized)


if __name__ == "__main__":
    run(main)
