"""Quantizes a checkpoint with llm-compressor, in its own environment.

    python llm_compressor_forms.py SOURCE FORM CODED DEQUANTIZED

GPTQ (Frantar et al., 2022) is calibrated with random tokens. compressed-tensors unpacks what the
package saved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from saving import save
from transformers import MllamaForConditionalGeneration

# as RedHatAI/Llama-3.2-11B-Vision-Instruct-FP8-dynamic names them
IGNORED = ["re:.*lm_head", "re:.*multi_modal_projector.*", "re:.*vision_model.*"]
GROUP, NUM_ROWS, ROW_LEN, VOCAB_SIZE = 32, 8, 48, 700


def calibrated() -> Any:
    """GPTQ in 4 bits, columns in the order of their activations."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    weights |= {"symmetric": True, "actorder": "weight"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return GPTQModifier(config_groups=groups, ignore=IGNORED)


def main(source: Path, form: str, coded: Path, dequantized: Path) -> None:
    """Write both checkpoints."""
    model = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    if form == "gptq":
        rows = torch.randint(0, VOCAB_SIZE, (NUM_ROWS, ROW_LEN), generator=torch.manual_seed(0))
        data = Dataset.from_dict({"input_ids": rows.tolist()})
        oneshot(model=model, recipe=calibrated(), dataset=data, pipeline="basic")
    else:
        modifier = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=IGNORED)
        oneshot(model=model, recipe=modifier)
    save(model, source, coded, save_compressed=True)
    from compressed_tensors.compressors import ModelCompressor

    ModelCompressor.from_pretrained_model(model).decompress_model(model)
    plain = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    names = set(plain.state_dict())
    plain.load_state_dict({name: one for name, one in model.state_dict().items() if name in names})
    save(plain, source, dequantized)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
