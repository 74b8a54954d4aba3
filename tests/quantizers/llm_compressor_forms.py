"""Quantizes a checkpoint with llm-compressor, in its own environment.

    python llm_compressor_forms.py SOURCE FORM CODED DEQUANTIZED

GPTQ (Frantar et al., 2022) is calibrated with random tokens and pictures: without a picture the
cross-attention layers are skipped, and their scales stay uninitialized. compressed-tensors unpacks
what the package saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from saving import run, save
from torch.utils.data import DataLoader
from transformers import MllamaForConditionalGeneration

# as RedHatAI/Llama-3.2-11B-Vision-Instruct-FP8-dynamic names them
IGNORED = ["re:.*lm_head", "re:.*multi_modal_projector.*", "re:.*vision_model.*"]
GROUP, NUM_ROWS, ROW_LEN, VOCAB_SIZE = 32, 16, 64, 700


def calibrated() -> Any:
    """GPTQ in 4 bits, columns in the order of their activations."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    weights |= {"symmetric": True, "actorder": "weight"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return GPTQModifier(config_groups=groups, ignore=IGNORED)


def calibration_rows(config: Any) -> list[dict[str, torch.Tensor]]:
    """Random tokens that see a random picture of one tile."""
    generator, side = torch.manual_seed(0), config.vision_config.image_size
    tiles = config.vision_config.max_num_tiles
    rows = []
    for _ in range(NUM_ROWS):
        token_ids = torch.randint(0, VOCAB_SIZE, (1, ROW_LEN), generator=generator)
        token_ids[0, 0] = config.image_token_index
        pixels = torch.zeros(1, 1, tiles, 3, side, side)
        pixels[:, :, 0] = torch.randn(3, side, side, generator=generator)
        mask = torch.zeros(1, 1, tiles, dtype=torch.int64)
        mask[..., 0] = 1
        rows.append(
            {
                "input_ids": token_ids,
                "attention_mask": torch.ones_like(token_ids),
                "pixel_values": pixels,
                "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
                "aspect_ratio_mask": mask,
                "cross_attention_mask": mask[:, None].expand(1, ROW_LEN, 1, tiles),
            }
        )
    return rows


def main(source: Path, form: str, coded: Path, dequantized: Path | None) -> None:
    """Write both checkpoints, or the quantized one alone."""
    model = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    if form == "gptq":
        rows = DataLoader(calibration_rows(model.config), batch_size=None)
        oneshot(model=model, recipe=calibrated(), dataset=rows, pipeline="basic")
    else:
        modifier = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=IGNORED)
        oneshot(model=model, recipe=modifier)
    save(model, source, coded, save_compressed=True)
    if dequantized is None:
        return
    from compressed_tensors.compressors import ModelCompressor

    ModelCompressor.from_pretrained_model(model).decompress_model(model)
    plain = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    names = set(plain.state_dict())
    plain.load_state_dict({name: one for name, one in model.state_dict().items() if name in names})
    save(plain, source, dequantized)


if __name__ == "__main__":
    run(main)
