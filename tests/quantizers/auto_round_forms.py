"""Quantizes a checkpoint with auto-round, in its own environment.

    python auto_round_forms.py SOURCE FORM CODED DEQUANTIZED

Without calibration (iters=0), which needs no data. The package packs; its own layers say which
weights they stand for.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from saving import save
from transformers import AutoTokenizer, MllamaForConditionalGeneration

GROUP = 32
# packing, bits, symmetric
FORMS: dict[str, tuple[str, int, bool]] = {
    "auto-round": ("auto_round", 4, True),
    "auto-round-zeros": ("auto_round", 4, False),
    "gptq-zeros": ("auto_gptq", 4, False),
    "gptq-8": ("auto_gptq", 8, True),
    "awq": ("auto_awq", 4, False),
}


def main(source: Path, form: str, coded: Path, dequantized: Path) -> None:
    """Write both checkpoints."""
    packing, bits, symmetric = FORMS[form]
    model = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    rounds = AutoRound(
        model,
        AutoTokenizer.from_pretrained(source),
        bits=bits,
        group_size=GROUP,
        sym=symmetric,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
    )
    packed, _ = rounds.quantize_and_save(str(coded / "saved"), format=packing)
    # into a folder of the scheme's name
    for file in next(coded.rglob("config.json")).parent.iterdir():
        shutil.move(file, coded)
    plain = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    count = 0
    for name, module in packed.named_modules():
        if hasattr(module, "qweight"):
            target = plain.get_submodule(name)
            target.weight.data = decoded(module, target.in_features)
            count += 1
    assert count, "nothing is quantized"
    save(plain, source, dequantized)


@torch.no_grad()
def decoded(layer: Any, num_in: int) -> torch.Tensor:
    """The layer's weight, from its products with the units, [out, in]."""
    return layer(torch.eye(num_in)).float().T.contiguous()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
