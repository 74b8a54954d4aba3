"""Makes random LoRA adapters with PEFT, and the weights that PEFT merges them to.

    python peft_adapters.py SOURCE FOLDER

SOURCE is a checkpoint. FOLDER gets a folder for each form: the adapter as PEFT saves it, and
`merged/` with the weights that transformers saves after merge_and_unload.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from saving import save
from transformers import MllamaForConditionalGeneration

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# as Unsloth writes its targets for vision and language layers
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|fc1|fc2|gate_proj|up_proj|"
    r"down_proj|projector).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
FORMS: dict[str, dict[str, Any]] = {
    "qv-r8": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "seven-r16": {"r": 16, "lora_alpha": 32, "target_modules": ALL},
    "all-linear-r4": {"r": 4, "target_modules": "all-linear"},
    "text-only-r8": {
        "r": 8,
        "target_modules": r"^(?!.*vision_model).*(?:up_proj|down_proj|gate_proj|q_proj|v_proj)",
    },
    "unsloth-r16": {"r": 16, "lora_alpha": 16, "target_modules": UNSLOTH, "use_rslora": True},
    "vision-r4": {"r": 4, "target_modules": ["fc1", "fc2", "multi_modal_projector"]},
    "patterns-r4": {
        "r": 4,
        "target_modules": r".*(cross_attn|mlp)\..*_proj",
        "rank_pattern": {r"layers\.[0-2]\.mlp\.up_proj": 8, "k_proj": 2},
        "alpha_pattern": {"k_proj": 12},
        "use_rslora": True,
    },
}


def main(source: Path, folder: Path) -> None:
    """Write all forms."""
    for number, (name, settings) in enumerate(FORMS.items()):
        model = MllamaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        torch.manual_seed(number)
        tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_" in key:  # PEFT's random matrices would leave noise of the answers
                    parameter *= 0.3
        tuned.save_pretrained(folder / name)
        save(tuned.merge_and_unload(), source, folder / name / "merged")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
