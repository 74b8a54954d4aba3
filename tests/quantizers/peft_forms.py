"""Trains nothing: adds a random LoRA adapter with PEFT, in its own environment.

    python peft_forms.py SOURCE FORM SAVED MERGED

FORM is what is saved: the adapter alone, the model with the adapter in it, or the merged weights
with PEFT's prefix left in their names. MERGED gets the weights that transformers saves after
merge_and_unload.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from saving import save
from transformers import MllamaForConditionalGeneration


def main(source: Path, form: str, saved: Path, merged: Path) -> None:
    """Write both folders."""
    model = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    tuned = get_peft_model(model, settings)
    if form == "adapter":
        tuned.save_pretrained(saved)
    else:
        save(model, source, saved)  # the small files; its weights are replaced below
        if form == "merged":
            tuned.merge_adapter()
        tensors = {name: one.contiguous().clone() for name, one in tuned.state_dict().items()}
        if form == "merged":  # as training loops write it
            kept = {name.replace(".base_layer", ""): one for name, one in tensors.items()}
            tensors = {name: one for name, one in kept.items() if "lora_" not in name}
        for file in saved.glob("*.safetensors"):
            file.unlink()
        save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
        (saved / "adapter_config.json").unlink(missing_ok=True)
    if form == "merged":
        tuned.unmerge_adapter()
    save(tuned.merge_and_unload(), source, merged)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
